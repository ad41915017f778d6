"""How the scripts speak and how they end.

What a user can put right ends in one line and exit status 2. Of several ranks only the first one speaks, and the one
that refuses something.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys

import click
import torch


class Refused(click.ClickException):
    """Something that the user can put right. The message names the option and the remedy."""

    exit_code = 2

    def __init__(self, message):
        if message.startswith("Caught Refused in DataLoader"):  # torch puts the worker's traceback before it
            message = message.rstrip().splitlines()[-1].split("Refused: ", 1)[-1]
        super().__init__(message)


class NotFinite(Refused):
    """A training whose loss or weights are no numbers any more. Its last good checkpoint is kept."""


class Stopped(SystemExit):
    """A run that a signal has ended after it has saved. Its status is the shell's: 143 for SIGTERM, 130 for Ctrl-C."""

    def __init__(self, number):
        super().__init__(128 + number)


class Asked:
    """What signals have asked of a run. end: the number of the first one that ends it, or 0. save: whether to save."""

    def __init__(self):
        self.end, self.save = 0, False

    def note(self, number, frame):
        if signal.Signals(number).name in SAVING:
            self.save = True
        else:
            self.end = self.end or number


ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
SAVING = ("SIGUSR1", "SIGUSR2")  # by which schedulers warn a job that its time is nearly over


@contextlib.contextmanager
def signals_noted(asked, names):
    """Notes the signals of these names in `asked`, an Asked, so that a run ends, or saves, at the end of a step.

    After the first signal that ends the run, others change nothing, not even when the block is left. A signal that is
    ignored already, as under nohup, stays ignored.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, asked.note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked.end else handler)


def is_first():
    """Whether this process is rank 0, or no rank of a torchrun at all."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def say(words, err=False):
    """Prints once, whatever the number of ranks. A pipe that nobody reads any more does not end the run."""
    if is_first():
        clear_line()
        write(words, "\n", err)


standing = ""  # what stands in the terminal's last line until other words take its place


def say_in_place(words):
    """As say. On a terminal the next words take the place of these."""
    global standing
    if not on_terminal():
        say(words)
    elif is_first():
        clear_line()
        standing = words[: shutil.get_terminal_size().columns - 1]
        write(standing, "")


def clear_line():
    global standing
    if standing:
        write("\r" + " " * len(standing) + "\r", "")
        standing = ""


def on_terminal():
    return sys.stdout.isatty()


def write(words, end, err=False):
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(printable(f"{words}{end}", getattr(stream, "encoding", None)), nl=False, err=err)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def printable(words, encoding=None):
    """The words with ? for what the encoding cannot write, such as names of files in another one."""
    encoding = encoding or "utf-8"
    return words.encode(encoding, "replace").decode(encoding)


RENAMED = {  # options of earlier versions, and what took their place
    "--fraction": "--subset",
    "--figure": "python -m common.figures RUN...",
    "--proj-depth": "--projection, for example --projection 2048-128",
    "--proj-hidden": "--projection, for example --projection 2048-128",
    "--proj-dim": "--projection, for example --projection 2048-128",
}


def run_command(command, lower="--micro-batch, --batch, --size or --limit"):
    """Runs a click command. What it refuses ends the process with one line and status 2, an interruption with 130.

    lower: the options that lower the command's need of memory.
    """
    try:
        command(standalone_mode=False)
        return
    except click.NoSuchOption as e:
        new = RENAMED.get(e.option_name, "")
        known = {name for parameter in e.ctx.command.params for name in parameter.opts}
        if new.startswith("python") or new.split(",")[0] in known:
            line = f"{e.option_name} has another name now: {new}"
        else:
            line = e.format_message()
    except click.ClickException as e:
        line = e.format_message()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        line = f"not enough memory ({str(e).splitlines()[0] if str(e) else 'MemoryError'}): lower {lower}"
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise
        line = f"{str(e.filename)[:80]} ... is too long a name: name another"
    except (click.Abort, KeyboardInterrupt):
        clear_line()
        click.echo("interrupted", err=True)
        sys.exit(130)
    clear_line()
    click.echo(f"error: {' '.join(line.split())}", err=True)
    sys.exit(2)


OUT_OF_MEMORY = (  # torch raises a plain RuntimeError on a CPU
    "can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed",
    "invalid for storage size",
)


def is_out_of_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(words in str(e) for words in OUT_OF_MEMORY)
