"""A run that is killed, stopped, short of disk or of numbers loses nothing but the steps since its last checkpoint."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch

import common.cli
import common.run_folder
import linear_probe
import pretrain
from children import call, run_script, start, workers_of
from kill_and_resume import WAYS, kill_and_resume
from common.run_folder import newest_checkpoint
from runs import FOLDER, SMALL, files_in, folder_of, log_of, options_of, refusal, same_bits, state_of, torchrun, train

pytestmark = pytest.mark.seeds_torch
LONG = [*SMALL, "--epochs", "16"]  # 64 steps, some seconds


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    whole = tmp_path_factory.mktemp("long") / "whole"
    train(*LONG, "--run-dir", whole)
    return whole


def wait_for_step(folder, step, running):
    """Until the log shows `step`; fails where the run has ended before."""
    log = folder / "log.jsonl"
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert running() and not time.sleep(0.005)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_at_a_random_moment_ends_with_the_bits_of_an_unbroken_one(way, tmp_path):
    kill_and_resume(way, tmp_path, kills=1, seed=list(WAYS).index(way), epochs=4)


@pytest.mark.long
def test_copies_of_a_folder_that_is_being_written_all_resume_to_the_same_bits(long, tmp_path):
    writing = start("pretrain", *LONG, "--save-minutes", "0", "--run-dir", tmp_path / "run")
    copies = [tmp_path / f"copy-{step}" for step in (5, 15, 25, 35)]
    for step, copy in zip((5, 15, 25, 35), copies):
        wait_for_step(tmp_path / "run", step, writing.running)
        subprocess.run(["cp", "-r", tmp_path / "run", copy], stderr=subprocess.DEVNULL)  # a file may go meanwhile
    assert writing.running() and writing.wait().status == 0
    for step, copy in zip((5, 15, 25, 35), copies):
        assert step - 3 < newest_checkpoint(copy)[0]["step"] < 60  # one step later its checkpoint is on the disk
        assert start("pretrain", "--resume", copy).wait().status == 0
        assert same_bits(state_of(copy), state_of(long))
        assert all(entry in log_of(long) for entry in log_of(copy))  # its log may have been copied before the rest


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_runs_killed_again_and_again_end_with_the_bits_of_an_unbroken_one(way, tmp_path):
    kill_and_resume(way, tmp_path, kills=6, seed=100 + list(WAYS).index(way))


def test_the_log_is_cut_back_to_the_checkpoint_in_place(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n{"step": 3}\n{"st')
    before = log.stat().st_ino
    common.run_folder.cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n' and log.stat().st_ino == before
    common.run_folder.cut_log(log, 9)
    assert log.read_text().count("\n") == 3


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_the_command_that_goes_on(word, long, tmp_path):
    folder = tmp_path / "a folder"
    stopped = start("pretrain", *LONG, "--run-dir", folder)
    wait_for_step(folder, 9, stopped.running)
    stopped.signal(word)
    stopped.wait(timeout=10)
    step = common.run_folder.load_checkpoint(folder / "ckpt.pt")["step"]
    assert stopped.status == 128 + word and "Traceback" not in stopped.err and 9 <= step < 64
    assert f"stopped after step {step} of 64" in stopped.out
    command = shlex.split(stopped.out.splitlines()[-1])
    assert command == ["python", "pretrain.py", "--resume", str(folder)]
    train(*command[2:])
    assert log_of(folder) == log_of(long) and same_bits(state_of(folder), state_of(long))


@pytest.mark.parametrize("word", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_signal_saves_and_the_run_goes_on(word, long, tmp_path):
    folder = tmp_path / "run"
    warned = start("pretrain", *LONG, "--run-dir", folder)
    wait_for_step(folder, 9, warned.running)
    warned.signal(word)
    assert warned.wait().status == 0
    step = int(re.search(r"saved step (\d+), as a signal asked; the run goes on", warned.out)[1])
    assert 9 <= step < 64
    assert log_of(folder) == log_of(long) and same_bits(state_of(folder), state_of(long))


def test_a_warning_signal_before_the_first_step_waits_for_it(tmp_path, monkeypatch, capsys):
    load = pretrain.load_on_every_rank
    warned = lambda *args: signal.raise_signal(signal.SIGUSR1) or load(*args)
    monkeypatch.setattr(pretrain, "load_on_every_rank", warned)
    train(*SMALL, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert "saved step 1, as a signal asked; the run goes on" in capsys.readouterr().out


def test_a_warning_signal_to_any_rank_saves(tmp_path):
    folder = tmp_path / "run"
    warned = start("pretrain", *LONG, "--run-dir", folder, ranks=2)
    wait_for_step(folder, 9, warned.running)
    os.kill(warned.pids[1], signal.SIGUSR1)
    assert warned.wait().status == 0 and warned.out.count("as a signal asked") == 1


def run_into_a_closed_pipe(*arguments):
    """pretrain.py, with an output that somebody reads once, after some steps, and then nobody any more."""
    reader, writer = os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    threading.Thread(target=lambda: (os.read(reader, 1), os.close(reader))).start()
    run_script("pretrain", *arguments)


def test_output_that_nobody_reads_any_more_ends_no_run(long, tmp_path):
    folder = tmp_path / "run"
    run_unread = call(run_into_a_closed_pipe, *map(str, [*LONG, "--run-dir", folder]))
    assert run_unread.status == 0
    assert log_of(folder) == log_of(long) and same_bits(state_of(folder), state_of(long))


def test_a_reader_that_is_killed_ends_the_run_at_its_last_step(tmp_path):
    folder_of(
        tmp_path, ["train"], ["a", "b"], count=1000
    )  # an epoch of 500 steps, for readers begin anew in every epoch
    folder = tmp_path / "run"
    bereft = start("pretrain", *FOLDER, "--stream", "--log-every", "1", "--data", tmp_path, "--run-dir", folder)
    wait_for_step(folder, 9, bereft.running)
    os.kill(workers_of(*bereft.pids)[0], signal.SIGKILL)
    bereft.wait()
    assert bereft.status == 2 and bereft.err.count("\n") == 1 and "lower --workers" in bereft.err
    assert common.run_folder.load_checkpoint(folder / "ckpt.pt")["step"] == log_of(folder)[-1]["step"]


def test_a_signal_to_torchrun_in_the_middle_of_an_epoch_ends_every_rank(tmp_path):
    options = [*SMALL, "--epochs", "2", "--limit", "600", "--batch", "20"]  # 30 steps an epoch
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert start("pretrain", *options, "--run-dir", whole, ranks=2).wait().status == 0
    process = torchrun("pretrain.py", *options, "--run-dir", folder)
    wait_for_step(folder, 35, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)  # torchrun ends after its ranks have
    assert process.returncode != 0  # a scheduler must not take the run for a finished one
    step = common.run_folder.load_checkpoint(folder / "ckpt.pt")["step"]
    assert 35 <= step < 60 and step % 30
    assert out.splitlines()[-1] == f"torchrun --nproc_per_node=2 pretrain.py --resume {folder}"
    assert start("pretrain", "--resume", folder, ranks=2).wait().status == 0
    assert log_of(folder) == log_of(whole) and same_bits(state_of(folder), state_of(whole))


def test_a_run_goes_on_with_other_ranks_and_parts_of_the_same_batch(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert start("pretrain", *SMALL, "--epochs", "1", "--run-dir", folder, ranks=2).wait().status == 0
    train("--resume", folder, "--epochs", "2", "--micro-batch", "25")
    assert start("pretrain", "--resume", folder, "--epochs", "3", "--micro-batch", "5", ranks=2).wait().status == 0
    assert [line["epoch"] for line in log_of(folder) if "mean_loss" in line] == [1, 2, 3]
    assert "leave out --batch" in refusal(pretrain, ["--resume", folder, "--batch", "20"], monkeypatch, capsys)


def test_checkpoints_are_saved_every_few_minutes_too(tmp_path):
    run = tmp_path / "run"
    train(*SMALL, "--epochs", "1", "--save-minutes", "0", "--run-dir", run)
    assert common.run_folder.load_checkpoint(run / "ckpt.pt")["step"] == 4
    previous = common.run_folder.load_checkpoint(run / "ckpt-previous.pt")
    assert previous["step"] == 3 and previous["losses_of_epoch"] == [line["loss"] for line in log_of(run)[:3]]


@pytest.mark.parametrize("damage", [b"", b"half", None], ids=["empty", "half", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(damage, long, tmp_path, capsys):
    run = tmp_path / "run"
    train(*LONG, "--epochs", "2", "--schedule", "constant", "--run-dir", run)
    whole = (state_of(run), log_of(run))
    newest = run / "ckpt.pt"
    if damage is None:
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[: 1000 * len(damage)])
    capsys.readouterr()
    train("--resume", run)
    assert (
        f"{newest} cannot be read: going on from {run / 'ckpt-previous.pt'}, step 4" in capsys.readouterr().err
    ) == (damage is not None)
    assert same_bits(state_of(run), whole[0]) and log_of(run) == whole[1]
    assert common.run_folder.load_checkpoint(run / "ckpt-previous.pt")["step"] == 4  # not the damaged one


def test_a_checkpoint_that_another_process_has_left_behind_is_not_gone_back_from(trained):
    files = files_in(trained)
    with pytest.raises(common.cli.Refused, match="has gone on to step 16 meanwhile"):
        common.run_folder.RunFolder(trained, {}, step=12)
    assert {k: v for k, v in files_in(trained).items() if k.name != "lock"} == {
        k: v for k, v in files.items() if k.name != "lock"
    }


def test_what_one_rank_alone_refuses_ends_every_rank(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b"])
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"")
    ended = start("pretrain", *FOLDER, "--data", tmp_path, "--run-dir", tmp_path / "run", ranks=2).wait()
    assert [process.exitcode for process in ended.processes] == [2, 2]
    assert ended.err.count("is not a readable image") == 1 and "gloo" not in ended.err


def test_what_every_rank_refuses_is_said_once(tmp_path):
    ended = start("pretrain", *SMALL, "--batch", "49", "--run-dir", tmp_path / "run", ranks=2).wait()
    assert ended.status == 2 and ended.err.count("\n") == 1 and "not a multiple of the 2 ranks" in ended.err


def test_config_keeps_what_the_earlier_parts_of_a_run_ran_on(tmp_path):
    run = tmp_path / "run"
    for more in ([*SMALL, "--epochs", "1", "--run-dir"], ["--epochs", "2", "--resume"], ["--epochs", "3", "--resume"]):
        train(*more, run)
    about = json.loads((run / "config.json").read_text())
    assert (
        about["options"]["epochs"] == 3
        and len(about["earlier"]) == 2
        and about["earlier"][0]["versions"] == about["versions"]
    )


def test_a_folder_in_use_is_refused_to_a_second_process(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    other = start("pretrain", *LONG, "--epochs", "300", "--warmup", "0", "--run-dir", folder)
    wait_for_step(folder, 2, other.running)
    words = f"in use by another process, {other.pids[0]} on {socket.gethostname()} since"
    assert words in refusal(pretrain, ["--resume", folder], monkeypatch, capsys)
    other.kill()
    train("--resume", folder, "--epochs", log_of(folder)[-1]["epoch"] + 1)


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A file system of that size in memory; the test is skipped where none can be made."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.long
def test_a_full_disk_loses_nothing(long, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 7):  # two checkpoints of 3 MB, not three
        folder = disk / "run"
        full = start("pretrain", *LONG, "--run-dir", folder).wait()
        errors = [line for line in full.err.splitlines() if line.startswith("error: ")]
        assert full.status == 2 and len(errors) == 1 and "Traceback" not in full.err
        assert "the last good one stays: free space" in errors[0]
        assert common.run_folder.load_checkpoint(folder / "ckpt.pt")["step"] == 4 and not any(folder.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        train("--resume", folder)
        assert log_of(folder) == log_of(long) and same_bits(state_of(folder), state_of(long))


@pytest.mark.long
def test_a_full_disk_is_told_before_the_first_step_and_by_a_probe(trained, tmp_path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, 1):
        assert "free space, or name another --run-dir" in refusal(
            pretrain, [*SMALL, "--run-dir", disk / "run"], monkeypatch, capsys
        )
    with small_disk(tmp_path / "other", 4):
        (tmp_path / "other" / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
        with contextlib.suppress(OSError), open(tmp_path / "other" / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1000))
        error = refusal(
            linear_probe, [tmp_path / "other" / "ckpt.pt", "--limit", "100", "--epochs", "1"], monkeypatch, capsys
        )
        assert "cannot be written" in error and not list((tmp_path / "other").glob("*.tmp"))


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch, capsys):
    class Full:
        fileno = open(tmp_path / "some file", "wb").fileno

        def write(self, line):
            return len(line) // 2

        def close(self):
            pass

    monkeypatch.setattr(common.run_folder.RunFolder, "_log", Full(), raising=False)
    monkeypatch.setattr(
        common.run_folder.RunFolder,
        "__setattr__",
        lambda self, name, value: None if name == "_log" else object.__setattr__(self, name, value),
    )
    assert "log.jsonl cannot be written" in refusal(
        pretrain, [*SMALL, "--run-dir", tmp_path / "run"], monkeypatch, capsys
    )


def test_a_loss_that_is_not_finite_names_step_rate_and_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    explosive = [
        "--loss",
        "n-pair",
        "--npair-l2",
        "0",
        "--lr",
        "1e30",
        "--schedule",
        "constant",
        "--warmup",
        "2.5",
        "--warmup-from",
        "0.001",
        "--log-every",
        "100",
    ]
    error = refusal(pretrain, [*SMALL, *explosive, "--run-dir", run], monkeypatch, capsys)
    step, saved = (int(n) for n in re.search(r"step (\d+) \(learning rate .*of step (\d+)", error).groups())
    good = common.run_folder.load_checkpoint(run / "ckpt.pt")
    assert good["step"] == saved < step and "--lr" in error
    assert all(entry.isfinite().all() for entry in good["encoder"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    run, make = tmp_path / "run", pretrain.build_model

    def poisoned(config, autocast):  # the gradient of the second step, not its loss
        model, calls = make(config, autocast), []
        next(model.parameters()).register_hook(lambda g: g * float("nan") if calls.append(0) or len(calls) == 2 else g)
        return model

    monkeypatch.setattr(pretrain, "build_model", poisoned)
    error = refusal(
        pretrain, [*SMALL, "--save-minutes", "0", "--log-every", "100", "--run-dir", run], monkeypatch, capsys
    )
    assert "a weight is not finite at step 2" in error and "ckpt.pt of step 1" in error
    assert common.run_folder.load_checkpoint(run / "ckpt.pt")["step"] == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
)
def test_too_little_memory_names_the_options_to_lower(error, tmp_path, monkeypatch, capsys):
    def short(*arguments):
        raise error

    monkeypatch.setattr(pretrain, "total_loss", short)
    line = refusal(pretrain, [*SMALL, "--run-dir", tmp_path / "run"], monkeypatch, capsys)
    assert "not enough memory" in line and "lower --micro-batch" in line


def test_resume_may_extend_a_run_but_not_change_its_recipe(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "extended"
    train(*SMALL, "--epochs", "1", "--schedule", "constant", "--warmup", "0", "--run-dir", folder)
    train("--resume", folder, "--epochs", "2")
    assert log_of(folder)[-1]["epoch"] == 2
    assert "--batch, --tau" in refusal(
        pretrain, ["--resume", folder, "--tau", "0.2", "--batch", "20"], monkeypatch, capsys
    )
    assert log_of(folder)[-1]["epoch"] == 2


def test_a_folder_killed_before_its_log_began_starts_anew(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("lock", "config.json", "ckpt.tmp", "ckpt-ab12.tmp", "config-ab12.tmp"):
        (run / name).write_text("")
    train(*SMALL, "--epochs", "1", "--run-dir", run)
    assert log_of(run)[-1]["epoch"] == 1 and not any(run.glob("*.tmp"))


def test_a_folder_that_is_moved_while_it_is_written_is_not_taken_for_a_full_disk(tmp_path):
    folder = tmp_path / "run"
    moved = start("pretrain", *LONG, "--save-minutes", "0", "--run-dir", folder)
    wait_for_step(folder, 5, moved.running)
    folder.rename(tmp_path / "elsewhere")
    moved.wait()
    assert moved.status == 2 and moved.err.splitlines()[-1].startswith("error: ") and "Traceback" not in moved.err
    assert "go on with --resume and its new name" in moved.err and "free space" not in moved.err
    train("--resume", tmp_path / "elsewhere", "--epochs", log_of(tmp_path / "elsewhere")[-1]["epoch"] + 1)


def test_a_signal_that_ends_the_compiler_too_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    step, run = pretrain.training_step, tmp_path / "run"

    def told_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a process of the compiler is gone")

    def broken(*arguments):
        raise RuntimeError("a mistake of the compiler")

    words = [*SMALL, "--epochs", "1", "--compile", "--run-dir", run]
    monkeypatch.setattr(pretrain, "training_step", told_to_stop)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with pytest.raises(common.cli.Stopped) as stopped:
        train(*words)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert re.search("stopped while step 1 was compiled; this goes on:\n.* --resume", capsys.readouterr().out)
    for number, handler in handlers.items():  # a run that was told to stop ignores what else comes
        signal.signal(number, handler)
    monkeypatch.setattr(pretrain, "training_step", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        train("--resume", run)
    monkeypatch.setattr(pretrain, "training_step", step)
    train("--resume", run, "--no-compile")
    assert log_of(run)[-1]["epoch"] == 1


def test_what_a_resumed_run_changes_is_in_its_checkpoint_before_the_first_step(tmp_path, monkeypatch):
    """A run that is extended and ends at once is extended all the same, and finds data that have moved."""
    folder_of(tmp_path / "data", ["train", "test"], ["dark", "light"])
    run = tmp_path / "run"
    train(*FOLDER, "--data", tmp_path / "data", "--run-dir", run)
    (tmp_path / "data").rename(tmp_path / "moved")

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(pretrain, "train_steps", lambda *of: None)  # stopped before a step
        train("--resume", run, "--epochs", "3", "--data", tmp_path / "moved")
    assert options_of(run)["epochs"] == 3 and options_of(run)["data"] == str(tmp_path / "moved")
    train("--resume", run)
    assert [entry["epoch"] for entry in log_of(run) if "mean_loss" in entry] == [1, 2, 3]
    (tmp_path / "moved").rename(tmp_path / "again")
    train(*FOLDER, "--epochs", "3", "--data", tmp_path / "again", "--run-dir", run, "--resume", "auto")
    assert options_of(run)["data"] == str(tmp_path / "again")


def test_a_device_that_nobody_named_is_chosen_anew_by_a_resumed_run(tmp_path):
    words = [word for word in SMALL if word not in ("--device", "cpu")]
    train(*words, "--epochs", "1", "--run-dir", tmp_path / "free")
    train(*SMALL, "--epochs", "1", "--run-dir", tmp_path / "named")
    assert options_of(tmp_path / "free")["device"] is None and options_of(tmp_path / "named")["device"] == "cpu"
