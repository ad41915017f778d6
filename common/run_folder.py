"""A run's folder, written so that a kill or a full disk loses nothing, and read so that no file can run code.

    config.json       every option, and what the numbers were made with
    log.jsonl         an object for each logged step and each epoch
    ckpt.pt           the newest checkpoint; ckpt-previous.pt is the one before it,
                      ckpt-damaged.pt one that could not be read
    epoch-0003.pt     weights alone, of an epoch that --keep-every keeps
    lock              held by the process that writes here, while it runs; names its host, number and start
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import platform
import socket
import subprocess
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torchvision

from common.cli import Refused, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


CHECKPOINTS = "ckpt.pt", "ckpt-previous.pt"
WRITTEN = "ckpt", "epoch", "config"  # how the names begin that a run writes aside
FORMAT = "supcon-pretrain-1"
ENTRIES = {"config": dict, "step": int, "seconds": float, "encoder": dict, "optimizer": dict,
           "mean": torch.Tensor, "std": torch.Tensor, "classes": list}
CHECKPOINT = "checkpoint", "pretrain.py", FORMAT, ENTRIES, "name the ckpt.pt of a run folder"  # for load_plain


def load_checkpoint(path):
    """The contents of a checkpoint of pretrain.py: plain tensors and types. Raises Refused for anything else."""
    return load_plain(path, *CHECKPOINT)


def load_plain(path, kind, script, form, entries, remedy):
    """The contents of a file of this project, a dict that names its format and holds these entries. Runs no code."""
    try:
        contents = load_undamaged(path)
    except FileNotFoundError as e:
        raise Refused(f"there is no {kind} {path}: {remedy}") from e
    except Exception as e:  # of a zip archive, of pickle, of the file system
        raise Refused(f"{path} cannot be read as a {kind} of {script} ({type(e).__name__}): {remedy}") from e
    require_entries(contents, path, kind, script, form, entries, remedy)
    return contents


def load_undamaged(path):
    """The contents of a file that torch.save wrote. Raises an error where a checksum in it is wrong."""
    if zipfile.is_zipfile(path):  # as all are but those of very old versions of torch
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look
        if damaged:
            raise zipfile.BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True)


def require_entries(contents, path, kind, script, form, entries, remedy):
    """Raises Refused unless the contents of a file are a dict that names its format and holds these entries."""
    if not isinstance(contents, dict) or contents.get("format") != form:
        raise Refused(f"{path} is not a {kind} of {script}: {remedy}")
    wrong = [name for name, type_ in entries.items() if not isinstance(contents.get(name), type_)]
    if wrong:
        raise Refused(f"{path} is not a {kind} of {script}, it lacks {', '.join(wrong)}: {remedy}")


def checkpoint_of(path):
    """The path of a checkpoint that is named by itself, or by the folder of its run."""
    return Path(path, CHECKPOINTS[0]) if Path(path).is_dir() else Path(path)


def same_place(a, b):
    """Whether two paths, which may be spelled differently, name one place."""
    return Path(a).resolve() == Path(b).resolve()


def newest_checkpoint(run):
    """(contents, warning or None) of the newest readable checkpoint in the folder `run`."""
    newest, previous = (run / name for name in CHECKPOINTS)
    if not (is_there(newest) or is_there(previous)):
        raise Refused(f"--resume {run} has no checkpoint: name the folder of a run")
    try:
        return load_checkpoint(newest), None
    except Refused:
        if not previous.exists():
            raise
    contents = load_checkpoint(previous)
    if not newest.exists():
        return contents, None
    return contents, f"{newest} cannot be read: going on from {previous}, step {contents['step']}"


def is_finished(contents, epochs):
    """Whether the run of a checkpoint has taken all steps of so many epochs."""
    images = contents.get("images")  # up to version 0.3 there is no such entry
    return images is not None and contents["step"] >= epochs * (images // contents["config"]["batch"])


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
    """Whether there is a checkpoint that a new run would lose. One of step 0 is no loss."""
    checkpoints = [run / name for name in CHECKPOINTS if (run / name).exists()]
    try:
        return any(load_checkpoint(path)["step"] > 0 for path in checkpoints)
    except Refused:
        return True


class RunFolder:
    """The folder of a run. This process alone writes to it. Raises Refused where it cannot be written.

    about: what config.json is to hold. A new run saves its first checkpoint, `first`, before its first step, so that it
    can be resumed from then on. A resumed run has no `first`. It puts a damaged newest checkpoint aside and cuts the
    log back to `step`, from which it goes on.

    Later checkpoints are written by a thread, one at a time, while the run goes on. What their writing refuses is
    raised by the next call of wait, save, keep or look_after.
    """

    def __init__(self, path, about, first=None, step=0):
        self.path = path
        self._log = None
        self._lock_by_name = False
        self._writer = ThreadPoolExecutor(1)
        self._written = None  # the Future of the newest checkpoint
        self.seconds_saving = 0.0
        refuse_unusable(path, resuming=first is None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / "lock", "a")
        except OSError as e:
            raise self._unwritable(e) from e
        self._claim()
        try:
            for left in (file for stem in WRITTEN for file in path.glob(f"{stem}*.tmp")):  # by a killed process
                left.unlink(missing_ok=True)
            if first is None:
                self._put_damaged_aside(step)
                cut_log(path / "log.jsonl", step)
                about = about | {"earlier": earlier_parts(path / "config.json")}
            write_aside(path / "config.json", lambda f: f.write(json.dumps(about, indent=1).encode() + b"\n"))
            if first is not None:
                self._write(path / CHECKPOINTS[0], first)
            self._log = open(path / "log.jsonl", "ab", buffering=0)
        except OSError as e:
            raise self._unwritable(e) from e

    def _unwritable(self, e):
        return Refused(f"--run-dir {self.path} cannot be written ({e.strerror}): free space, or name another --run-dir")

    def _claim(self):
        """Keeps other processes out: by a lock, or, where the file system has none, by the name in the lock's file."""
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._lock_by_name = not self._take_lock()
        if self._lock_by_name:
            holder = holder_of(self.path / "lock")
            if holder and holder != me:
                raise self._in_use()
            say(f"warning: the file system of {self.path} has no locks: until the run has ended, start no other there",
                err=True)
        self._name_holder(json.dumps(me) + "\n")
        if self._lock_by_name:
            time.sleep(0.2)  # another process may have written its name at the same moment
            if holder_of(self.path / "lock") != me:
                raise self._in_use()

    def _name_holder(self, words):
        """Writes into the file that is open already: to open it once more and close that would give up the lock."""
        self.lock.truncate(0)
        self.lock.write(words)
        self.lock.flush()

    def _take_lock(self):
        """Returns whether this process got the lock. It goes with the process, however that ends; workers do not
        inherit it."""
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise self._in_use() from e
        except OSError:  # a file system without locks
            return False
        return bool(fcntl)

    def _in_use(self):
        holder = read_holder(self.path / "lock")
        by = "{process} on {host} since {since}".format(**holder) if holder else "of an earlier version"
        until = f", or until {LEASE // 60} minutes after it was killed," if self._lock_by_name else ""
        return Refused(f"--run-dir {self.path} is in use by another process, {by}: "
                       f"wait for its end{until} or name another --run-dir")

    def _put_damaged_aside(self, step):
        newest = self.path / "ckpt.pt"
        try:
            found = load_checkpoint(newest)["step"]
        except Refused:
            if newest.exists():  # else the next save would move it onto the good one
                os.replace(newest, self.path / "ckpt-damaged.pt")
        else:
            if found != step:  # another process saved it after we had read ours, and before we had the lock
                raise Refused(f"--resume {self.path} has gone on to step {found} meanwhile: "
                              "give the same command again")

    def log(self, entry):
        line = json.dumps(entry).encode() + b"\n"
        try:
            if self._lock_by_name:
                os.utime(self.path / "lock")  # the process is alive
            if self._log.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise Refused(f"{self.path}/log.jsonl cannot be written ({e.strerror}): "
                          f"free space, then go on with --resume {self.path}") from e

    def save(self, contents):
        """Copies a checkpoint at once. The thread writes the copy aside, flushes it to the disk and renames it: the
        folder always holds a whole one."""
        newest, previous = (self.path / name for name in CHECKPOINTS)
        self._hand_over(newest, contents, previous)

    def keep(self, name, contents):
        """As save, for a checkpoint that no later one replaces."""
        self._hand_over(self.path / name, contents)

    def _hand_over(self, path, contents, keep_as=None):
        start = time.perf_counter()
        self.wait()
        copied = copy_on_host(contents)
        self.seconds_saving += time.perf_counter() - start
        self._written = self._writer.submit(self._write_in_thread, path, copied, keep_as)

    def _write_in_thread(self, *what):
        start = time.perf_counter()
        self._write(*what)
        self.seconds_saving += time.perf_counter() - start

    def wait(self):
        """Waits until the newest checkpoint is on the disk. Raises what its writing refused."""
        written, self._written = self._written, None
        if written:
            written.result()

    def is_writing(self):
        return self._written is not None and not self._written.done()

    def look_after(self):
        """Raises what the writing of the newest checkpoint refused, if it has ended."""
        if not self.is_writing():
            self.wait()

    def _write(self, path, contents, keep_as=None):
        try:
            if self._log:
                os.fsync(self._log.fileno())  # no checkpoint is newer than its log
            write_aside(path, lambda f: torch.save(contents, f), keep_as=keep_as)
        except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
            reason = getattr(e, "strerror", None) or "is the disk full?"
            remedy = "free space, or name another --run-dir"
            if not self.path.exists():
                remedy = "if the folder was moved, go on with --resume and its new name"
            elif (self.path / CHECKPOINTS[0]).exists():
                remedy = f"the last good one stays: free space, then go on with --resume {self.path}"
            raise Refused(f"{path} could not be written ({reason}); {remedy}") from e

    def close(self):
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._log.close()
            if self._lock_by_name:
                self._name_holder("")
            self.lock.close()


def copy_on_host(entry):
    """A copy of what a checkpoint holds, with its tensors on the CPU, that later steps leave as it is."""
    if isinstance(entry, torch.Tensor):
        return entry.detach().to("cpu", copy=True)
    if isinstance(entry, dict):
        return {name: copy_on_host(part) for name, part in entry.items()}
    return [copy_on_host(part) for part in entry] if isinstance(entry, list) else entry


LEASE = 900  # seconds without a log entry after which a process that holds a folder by name counts as dead


def read_holder(path):
    """Who wrote the lock's file: a dict of host, process and since; or None."""
    try:
        holder = json.loads(path.read_text())
        return holder if holder.keys() == {"host", "process", "since"} else None
    except (OSError, ValueError, AttributeError):
        return None


def holder_of(path):
    """As read_holder, but None where that process has ended, or, on another host, where it is silent for LEASE."""
    holder = read_holder(path)
    if holder and holder["host"] == socket.gethostname():
        return holder if is_running(holder["process"]) else None
    return holder if holder and time.time() - path.stat().st_mtime < LEASE else None


def is_running(process):
    try:
        os.kill(process, 0)
    except (OSError, OverflowError, TypeError):
        return False
    return True


def suffix(*kinds):
    """The end of a name that tells a file from others of its sort: "-a-b" for the kinds a and b, the empty left out."""
    return "".join(f"-{kind}" for kind in kinds if kind)


def kind_of_its_own(kind, path_of, about):
    """The first of kind, kind-2, kind-3, ... whose report path_of(kind) does not exist or is of the same data.

    about: what a report of the same data holds, a dict. Reports of other data that have the same name are kept.
    """
    numbered = (f"{kind}-{k}" for k in itertools.count(2))
    free = next(name for name in itertools.chain([kind], numbered) if is_free(path_of(name), about))
    if free != kind:
        say(f"{path_of(kind)} is of other data of the same name: this report is {path_of(free).name}")
    return free


def is_free(path, about):
    """Whether a report may be written there: nothing stands there, or a report that holds what `about` says."""
    try:
        found = json.loads(path.read_text())
    except OSError:  # what is there and cannot be read cannot be written either, which is refused then
        return True
    except ValueError:
        return False
    return isinstance(found, dict) and found | about == found


def write_aside(path, write, keep_as=None):
    """Calls write(file) on a file beside `path`, which then takes its place. What stood there becomes `keep_as`.

    The file beside it has a name of its own, so that several may write at a time, and the last one counts.
    """
    aside = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
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
    """Drops, in place, what a killed run wrote after its last checkpoint. What stays is not written again."""
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
    """What the earlier parts of a run ran on, from its config.json."""
    try:
        before = json.loads(path.read_text())
        earlier = before.get("earlier", [])
    except (OSError, ValueError, AttributeError):
        return []
    return earlier + [{k: v for k, v in before.items() if k not in ("options", "earlier")}]


def step_of(line):
    """The step of a log line; of half a line, infinity."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def describe_run(config, device, world):
    """What config.json holds: every option, and what the numbers were made with."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "options": dataclasses.asdict(config),
        "device": name,
        "world": world,
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
