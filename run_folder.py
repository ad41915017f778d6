"""A run's folder, written so that a kill or a full disk loses nothing, and read so that no file can run code.

    config.json       every option, and what the numbers were made with
    log.jsonl         an object per logged step and per epoch
    ckpt.pt           the newest checkpoint; ckpt-previous.pt is the one before it, ckpt-damaged.pt one that could not be read
    lock              held, while it runs, by the process that writes here
"""

import contextlib
import errno
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
import torchvision

from images import Refused

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

FORMAT = "supcon-pretrain-1"
ENTRIES = {"config": dict, "step": int, "seconds": float, "encoder": dict, "optimizer": dict, "mean": torch.Tensor, "std": torch.Tensor, "classes": list}


def load_checkpoint(path):
    """The contents of a checkpoint of pretrain.py: plain tensors and types. Raises Refused for anything else."""
    return load_plain(path, "checkpoint", "pretrain.py", FORMAT, ENTRIES, "name the ckpt.pt of a run folder")


def load_plain(path, kind, script, form, entries, remedy):
    """The contents of a file of this project, read without running code: a dict that says its format and holds these entries."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise Refused(f"there is no {kind} {path}: {remedy}") from e
    except Exception as e:  # of a zip archive, of pickle, of the file system
        raise Refused(f"{path} cannot be read as a {kind} of {script} ({type(e).__name__}): {remedy}") from e
    if not isinstance(contents, dict) or contents.get("format") != form:
        raise Refused(f"{path} is not a {kind} of {script}: {remedy}")
    wrong = [name for name, type_ in entries.items() if not isinstance(contents.get(name), type_)]
    if wrong:
        raise Refused(f"{path} is not a {kind} of {script}, it lacks {', '.join(wrong)}: {remedy}")
    return contents


def newest_checkpoint(run):
    """(contents, warning or None) of the newest readable checkpoint in the folder `run`."""
    newest, previous = run / "ckpt.pt", run / "ckpt-previous.pt"
    if not (is_there(newest) or is_there(previous)):
        raise Refused(f"--resume {run} has no checkpoint: name the folder of a run")
    try:
        return load_checkpoint(newest), None
    except Refused:
        if not previous.exists():
            raise
    contents = load_checkpoint(previous)
    return contents, f"{newest} cannot be read: going on from {previous}, step {contents['step']}" if newest.exists() else None


def load_state(module, state, path):
    """Loads the state of a module or optimizer from the checkpoint at `path`; every entry must be there, and no other."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise Refused(f"{path} does not hold the weights that its own options name: it is damaged or changed by hand, name another") from e


def is_there(path):
    try:
        return path.exists()
    except OSError as e:  # a name too long, a folder that may not be read
        raise Refused(f"{str(path)[:80]} cannot be looked for ({e.strerror}): name another") from e


def refuse_unusable(run, resuming):
    """Refuses, before any long work and without a trace, a folder that RunFolder would refuse after it."""
    if not resuming and (is_there(run / "log.jsonl") or holds_steps(run)):
        raise Refused(f"--run-dir {run} already holds a run: go on with --resume {run}, or name another --run-dir")
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise Refused(f"--run-dir {run} cannot be written: name another --run-dir")


def holds_steps(run):
    """Whether there is a checkpoint that a new run would lose: any but that of a run that was killed before its first step."""
    try:
        return any(load_checkpoint(path)["step"] > 0 for path in (run / "ckpt.pt", run / "ckpt-previous.pt") if path.exists())
    except Refused:
        return True


class RunFolder:
    """The folder of a run, which this process alone writes to. Raises Refused where it cannot be written.

    A new run saves its first checkpoint before its first step, so that it can be resumed from then on. A resumed one
    puts a damaged newest checkpoint aside and cuts the log back to `step`, the step that it resumes from.
    """

    def __init__(self, path, about, first=None, step=0):
        self.path, self._log = path, None
        refuse_unusable(path, resuming=first is None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / "lock", "a")
        except OSError as e:
            raise self._unwritable(e) from e
        self._claim()
        try:
            if first is None:
                self._put_damaged_aside(step)
                cut_log(path / "log.jsonl", step)
                about = about | {"earlier": earlier_parts(path / "config.json")}
            write_aside(path / "config.json", lambda f: f.write(json.dumps(about, indent=1).encode() + b"\n"))
            if first is not None:
                self.save(first)
            self._log = open(path / "log.jsonl", "ab", buffering=0)
        except OSError as e:
            raise self._unwritable(e) from e

    def _unwritable(self, e):
        return Refused(f"--run-dir {self.path} cannot be written ({e.strerror}): free space, or name another --run-dir")

    def _claim(self):
        try:
            if fcntl:  # this lock goes with the process, however that ends, and is not inherited by workers
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise Refused(f"--run-dir {self.path} is in use by another process: wait for its end, or name another --run-dir") from e
        except OSError:  # a file system without locks
            pass

    def _put_damaged_aside(self, step):
        newest = self.path / "ckpt.pt"
        try:
            found = load_checkpoint(newest)["step"]
        except Refused:
            if newest.exists():  # else the next save would move it onto the good one
                os.replace(newest, self.path / "ckpt-damaged.pt")
        else:
            if found != step:  # another process saved it after we had read ours, and before we had the lock
                raise Refused(f"--resume {self.path} has gone on to step {found} meanwhile: give the same command again")

    def log(self, entry):
        line = json.dumps(entry).encode() + b"\n"
        try:
            if self._log.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise Refused(f"{self.path}/log.jsonl cannot be written ({e.strerror}): free space, then go on with --resume {self.path}") from e

    def save(self, contents):
        """Written aside, flushed to disk, renamed: at any moment the folder holds a whole checkpoint."""
        newest, previous = self.path / "ckpt.pt", self.path / "ckpt-previous.pt"
        try:
            if self._log:
                os.fsync(self._log.fileno())  # no checkpoint is newer than its log
            write_aside(newest, lambda f: torch.save(contents, f), keep_as=previous)
        except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
            reason = getattr(e, "strerror", None) or "is the disk full?"
            kept = f"the last good one stays: free space, then go on with --resume {self.path}" if newest.exists() else "free space, or name another --run-dir"
            raise Refused(f"{newest} could not be written ({reason}); {kept}") from e

    def close(self):
        self._log.close()
        self.lock.close()


def is_first():
    """Whether this is rank 0, or no rank of a torchrun at all."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def say(words, err=False):
    """Prints once, whatever the number of ranks. A pipe that nobody reads any more ends no run."""
    if not is_first():
        return
    try:
        click.echo(words, err=err)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if err else sys.stdout).fileno())
        os.close(nowhere)


def suffix(*kinds):
    """Of the name of a file that stands beside others of its sort: "-a-b" of those kinds that there are."""
    return "".join(f"-{kind}" for kind in kinds if kind)


def write_aside(path, write, keep_as=None):
    """write(file) into a file beside `path`, which then takes its place, and what stood there that of `keep_as`."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if keep_as and path.exists():
        os.replace(path, keep_as)
    os.replace(aside, path)
    if hasattr(os, "O_DIRECTORY"):  # the new names reach the disk too
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def cut_log(path, step):
    """Drops what a killed run wrote after its last checkpoint, in place: what stays is never written again."""
    if not path.exists():
        return
    with open(path, "r+b") as log:
        kept = 0
        for line in log:
            if step_of(line) > step:
                break
            kept += len(line)
        log.truncate(kept)


def earlier_parts(path):
    """What the parts of a run before this one ran on, from its config.json."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return before.get("earlier", []) + [{k: v for k, v in before.items() if k not in ("options", "earlier")}]


def step_of(line):
    """The step of a log line; of half a line, infinity."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def describe_run(config, world):
    """What config.json holds: every option, and what the numbers were made with."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = None
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return {
        "options": vars(config),
        "device": device,
        "world": world,
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
    }


# ---------------------------------------------------------------- what rank 0 notes of a run


class Journal:
    """Log, progress line, diagnosis after an epoch, checkpoints. Its calls raise Refused where the run must end.

    contents(losses of the epoch so far, seconds of training) gives what a checkpoint holds.
    """

    def __init__(self, config, contents, resume, steps_per_epoch, collapse):
        self.config, self.contents, self.steps_per_epoch, self.collapse = config, contents, steps_per_epoch, collapse
        self.resumed = resume is not None
        self.saved, self.seconds = (resume["step"], resume["seconds"]) if resume else (0, 0.0)
        self.losses = list(resume.get("losses_of_epoch", ())) if resume else []  # of this epoch; numbers where `checked`
        self.lrs, self.checked = [None] * len(self.losses), len(self.losses)
        self.lr, self.entry, self.shown = None, None, 0.0

    def open(self, run, about):
        first = None if self.resumed else self.contents([], 0.0)
        self.folder = RunFolder(run, about, first, self.saved)
        self.saved_at = time.perf_counter()
        self._start_epoch()

    def _start_epoch(self):
        self.began, self.clock, self.begun_with = time.perf_counter(), time.perf_counter(), len(self.losses)

    def note(self, step, loss, lr, diagnosis):
        """After every step; at the end of an epoch diagnosis() is taken."""
        self.losses.append(loss)
        self.lrs.append(lr)
        self.lr = lr
        last = step % self.steps_per_epoch == 0
        if last or step % self.config.log_every == 0:
            self._note_step(step, last)
        if last:
            self._note_epoch(step, diagnosis)
        if last or time.perf_counter() - self.saved_at > 60 * self.config.save_minutes:
            self.save(step)
        if last:
            self._start_epoch()

    def _note_step(self, step, last):
        self._refuse_non_finite(step)
        config, now = self.config, time.perf_counter()
        epoch, rate = -(-step // self.steps_per_epoch), (len(self.losses) - self.begun_with) * config.batch / (now - self.began)
        lr, loss = self.lr, self.losses[-1]
        self.folder.log({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "images_per_s": round(rate, 1)})
        if last or now - self.shown > 10:
            self.shown, total = now, config.epochs * self.steps_per_epoch
            left = (total - step) * config.batch / rate / 60
            say(f"epoch {epoch}/{config.epochs} step {step}/{total}  loss {loss:.4f}  lr {lr:.4g}  {rate:.0f} images/s  {left:.1f} min left")

    def _note_epoch(self, step, diagnosis):
        self._count_seconds()
        mean_loss = math.fsum(self.losses) / len(self.losses)
        self.entry = {"step": step, "epoch": step // self.steps_per_epoch, "mean_loss": mean_loss, "seconds": round(self.seconds, 2)} | diagnosis()
        self.folder.log(self.entry)
        say("  " + "  ".join(f"{k} {v:.4g}" for k, v in self.entry.items() if isinstance(v, float)))
        if self.collapse and abs(mean_loss - self.collapse) < 0.01 * self.collapse:
            say(f"  warning: the loss sits at its collapse value {self.collapse:.4f}: all features are alike. "
                "Lower --lr, lengthen --warmup or raise --tau", err=True)  # fmt: skip
        self.losses, self.lrs, self.checked = [], [], 0

    def save(self, step):
        """Nothing that is not finite is saved, so that the last checkpoint stays good."""
        self._refuse_non_finite(step)
        self._count_seconds()
        contents = self.contents(self.losses, self.seconds)
        if not all(entry.isfinite().all() for part in ("encoder", "projection", "classifier") for entry in contents.get(part, {}).values()):
            raise self._not_finite("a weight is not finite", step, self.lr)
        self.folder.save(contents)
        self.saved, self.saved_at = step, time.perf_counter()
        self.clock = self.saved_at

    def close(self, step):
        if step != self.saved:
            self.save(step)
        self.folder.close()

    def _count_seconds(self):
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _refuse_non_finite(self, step):
        """Reads the losses off their device, once for many steps."""
        fresh = self.losses[self.checked :]
        values = torch.stack(fresh).tolist() if fresh else []
        for k, value in enumerate(values, self.checked):
            if not math.isfinite(value):
                raise self._not_finite(f"the loss is {value}", step - len(self.losses) + 1 + k, self.lrs[k])
        self.losses[self.checked :] = values
        self.checked = len(self.losses)

    def _not_finite(self, what, step, lr):
        return Refused(f"{what} at step {step} (learning rate {lr:.4g}): start again with a lower --lr or a longer --warmup; "
                       f"the last good checkpoint is {self.folder.path}/ckpt.pt of step {self.saved}")  # fmt: skip


def checkpoint_of(config, model, optimizer, queue, step, seconds, losses_of_epoch, mean, std, data):
    return {
        "format": FORMAT,
        "config": vars(config),
        "step": step,
        "seconds": seconds,
        "losses_of_epoch": losses_of_epoch,
        **{name: module.state_dict() for name, module in model.named_children()},  # encoder, projection, classifier
        **({"queue": queue.state_dict()} if queue else {}),
        "optimizer": optimizer.state_dict(),
        "mean": mean.cpu().float(),
        "std": std.cpu().float(),
        "classes": list(data.classes),
        "images": len(data.labels),
    }


@contextlib.contextmanager
def signals_noted():
    """A list that SIGTERM, SIGINT and SIGHUP are added to, so that a run ends at a step's end. A second one changes nothing,
    and one that is ignored already (nohup) stays so."""
    asked, numbers = [], [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, signal.SIG_IGN if asked else handler)


def refusal_of(call, *arguments):
    """What the call refuses, or None: where other ranks wait, an error has to be agreed on."""
    try:
        call(*arguments)
    except Refused as e:
        return e
