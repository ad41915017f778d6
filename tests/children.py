"""Processes of the tests' own, started from a forkserver that has torch and the project loaded.

A new Python needs 3 to 4 seconds to import torch and torchvision; a child of the forkserver starts in milliseconds.

    start("pretrain", *arguments)                a script; .pids, .signal(number), .kill(), .wait(), .status, .out, .err
    start("pretrain", *arguments, ranks=2)       on two ranks, as torchrun would start them
    call(function, *arguments, ranks=4)          any importable function, on every rank, to its end
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
import common.cli

PROJECT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds; a rank that waits for another one for ever fails its test, and no more
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["children", "pretrain", "linear_probe", "robustness", "torch.distributed"])


def preload():
    """Starts the forkserver with the project on its path and one thread; the server keeps what it is started with."""
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(str(PROJECT / folder) for folder in (".", "tests", "tests/tools"))
    }
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Launch:
    """The processes of one launch, and what they print."""

    def __init__(self, function, arguments, ranks=None, absent=0):
        """absent: how many of the ranks, the last ones, never start."""
        preload()
        self.folder = tempfile.TemporaryDirectory()
        self.store = store() if ranks else None
        self.processes = []
        for rank in range((ranks or 1) - absent):
            environment = environment_of(rank, ranks, self.store) if ranks else {}
            streams = [os.path.join(self.folder.name, f"{name}{rank}") for name in ("out", "err")]
            self.processes.append(server.Process(target=child, args=(function, arguments, environment, streams)))
        for process in self.processes:
            process.start()

    @property
    def pids(self):
        return [process.pid for process in self.processes]

    def running(self):
        return any(process.is_alive() for process in self.processes)

    def signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def kill(self):
        """SIGKILL to every process of the launch, and to the workers that they started."""
        for pid in [worker for pid in self.pids for worker in workers_of(pid)] + self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended meanwhile
                pass
        self.join(TIMEOUT)

    def join(self, timeout):
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))

    def wait(self, timeout=TIMEOUT):
        """Waits for the end of all processes; after `timeout` seconds kills them and raises TimeoutError."""
        self.join(timeout)
        if self.running():
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.out}\n{self.err}")
        return self

    @property
    def status(self):
        """The exit status, of several processes the largest."""
        return max((process.exitcode for process in self.processes), key=abs)

    @property
    def out(self):
        return self._text("out")

    @property
    def err(self):
        return self._text("err")

    def _text(self, name):
        files = [Path(self.folder.name, f"{name}{rank}") for rank in range(len(self.processes))]
        return "".join(file.read_text() for file in files if file.exists())


def start(script, *arguments, ranks=None):
    """Starts a script of the project with these words on its command line."""
    return Launch(run_script, (script, *map(str, arguments)), ranks)


def call(function, *arguments, ranks=None, timeout=TIMEOUT):
    """Calls the function in every process; fails the test, with what they printed, where one of them fails."""
    launch = Launch(function, arguments, ranks).wait(timeout)
    assert launch.status == 0, launch.err
    return launch


def store():
    """A meeting place for ranks at a free port, as torchrun's agent holds one."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT))


def environment_of(rank, ranks, store):
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def workers_of(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [worker for child in map(int, children) for worker in [*workers_of(child), child]]


# ---------------------------------------------------------------- in the child


def child(function, arguments, environment, streams):
    for number, path in enumerate(streams, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= environment
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test run in the background ignores it, and hands that on
    function(*arguments)


def run_script(script, *arguments):
    """What the last two lines of a script do."""

    sys.argv = [f"{script}.py", *arguments]
    common.cli.run_command(importlib.import_module(script).main)
