"""A run that is killed, stopped, short of disk or of numbers loses nothing but the steps since its last checkpoint."""
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import images
import linear_probe
import pretrain
import run_folder
from kill_and_resume import WAYS, kill_and_resume
from runs import FOLDER, SMALL, TORCHRUN, files_in, folder_of, log_of, python, refusal, same_bits, start, state_of

LONG = [*SMALL, "--epochs", "30"]  # 120 steps, some seconds


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    run = tmp_path_factory.mktemp("long") / "whole"
    assert python("pretrain.py", *LONG, "--run-dir", run).returncode == 0
    return run


def wait_for_step(run, step, process):
    """Until the log shows `step`."""
    log = run / "log.jsonl"
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert process.poll() is None and not time.sleep(0.005)


@pytest.mark.parametrize("way", WAYS)
def test_runs_killed_at_random_moments_end_with_the_bits_of_an_unbroken_one(way, tmp_path):
    kill_and_resume(way, tmp_path, kills=1 if "two ranks" in way else 2, seed=list(WAYS).index(way))


def test_the_log_is_cut_back_to_the_checkpoint_in_place(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n{"step": 3}\n{"st')
    before = log.stat().st_ino
    run_folder.cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n' and log.stat().st_ino == before
    run_folder.cut_log(log, 9)
    assert log.read_text().count("\n") == 3


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_the_command_that_goes_on(word, long, tmp_path):
    run = tmp_path / "a folder"
    process = start("pretrain.py", *LONG, "--run-dir", run, output=subprocess.PIPE)
    wait_for_step(run, 9, process)
    process.send_signal(word)
    out, err = process.communicate(timeout=10)
    step = run_folder.load_checkpoint(run / "ckpt.pt")["step"]
    assert process.returncode == 0 and "Traceback" not in err and 9 <= step < 120 and f"stopped after step {step} of 120" in out
    command = shlex.split(out.splitlines()[-1])
    assert command == ["python", "pretrain.py", "--resume", str(run)]
    assert python(*command[1:]).returncode == 0
    assert log_of(run) == log_of(long) and same_bits(state_of(run), state_of(long))


def test_output_that_nobody_reads_any_more_ends_no_run(long, tmp_path):
    run = tmp_path / "run"
    process = start("pretrain.py", *LONG, "--run-dir", run, output=subprocess.PIPE)
    wait_for_step(run, 9, process)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=100) == 0
    assert log_of(run) == log_of(long) and same_bits(state_of(run), state_of(long))


def test_a_reader_that_is_killed_ends_the_run_at_its_last_step(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b"], count=1000)  # an epoch of 500 steps, for readers begin anew in every epoch
    run = tmp_path / "run"
    process = start("pretrain.py", *FOLDER, "--stream", "--log-every", "1", "--data", tmp_path, "--run-dir", run, output=subprocess.PIPE)
    wait_for_step(run, 9, process)
    readers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(readers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.count("\n") == 1 and "lower --workers" in err
    assert run_folder.load_checkpoint(run / "ckpt.pt")["step"] == log_of(run)[-1]["step"]


def test_a_signal_in_the_middle_of_an_epoch_ends_every_rank(tmp_path):
    options = [*SMALL, "--epochs", "2", "--limit", "1000", "--batch", "20"]  # 50 steps an epoch
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(*TORCHRUN, "pretrain.py", *options, "--run-dir", whole).wait() == 0
    process = start(*TORCHRUN, "pretrain.py", *options, "--run-dir", run, output=subprocess.PIPE)
    wait_for_step(run, 60, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)  # torchrun ends after its ranks have
    step = run_folder.load_checkpoint(run / "ckpt.pt")["step"]
    assert 60 <= step < 100 and step % 50 and out.splitlines()[-1] == f"torchrun --nproc_per_node=2 pretrain.py --resume {run}"
    assert start(*TORCHRUN, "pretrain.py", "--resume", run).wait() == 0
    assert log_of(run) == log_of(whole) and same_bits(state_of(run), state_of(whole))


def test_a_run_goes_on_with_other_ranks_and_parts_of_the_same_batch(tmp_path):
    run = tmp_path / "run"
    assert start(*TORCHRUN, "pretrain.py", *SMALL, "--epochs", "1", "--run-dir", run).wait() == 0
    assert python("pretrain.py", "--resume", run, "--epochs", "2", "--micro-batch", "25").returncode == 0
    assert start(*TORCHRUN, "pretrain.py", "--resume", run, "--epochs", "3", "--micro-batch", "5").wait() == 0
    assert [line["epoch"] for line in log_of(run) if "mean_loss" in line] == [1, 2, 3]
    refused = python("pretrain.py", "--resume", run, "--batch", "20")
    assert refused.returncode == 2 and "leave out --batch" in refused.stderr


def test_checkpoints_are_saved_every_few_minutes_too(tmp_path):
    run = tmp_path / "run"
    pretrain.main([*SMALL, "--epochs", "1", "--save-minutes", "0", "--run-dir", str(run)], standalone_mode=False)
    assert run_folder.load_checkpoint(run / "ckpt.pt")["step"] == 4
    previous = run_folder.load_checkpoint(run / "ckpt-previous.pt")
    assert previous["step"] == 3 and previous["losses_of_epoch"] == [line["loss"] for line in log_of(run)[:3]]


@pytest.mark.parametrize("damage", [b"", b"half", None], ids=["empty", "half", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(damage, long, tmp_path, capsys):
    run = tmp_path / "run"
    pretrain.main([*LONG, "--epochs", "2", "--schedule", "constant", "--run-dir", str(run)], standalone_mode=False)
    whole = (state_of(run), log_of(run))
    newest = run / "ckpt.pt"
    if damage is None:
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[: 1000 * len(damage)])
    capsys.readouterr()
    pretrain.main(["--resume", str(run)], standalone_mode=False)
    assert (f"{newest} cannot be read: going on from {run / 'ckpt-previous.pt'}, step 4" in capsys.readouterr().err) == (damage is not None)
    assert same_bits(state_of(run), whole[0]) and log_of(run) == whole[1]
    assert run_folder.load_checkpoint(run / "ckpt-previous.pt")["step"] == 4  # not the damaged one


def test_a_checkpoint_that_another_process_has_left_behind_is_not_gone_back_from(trained):
    files = files_in(trained)
    with pytest.raises(images.Refused, match="has gone on to step 16 meanwhile"):
        run_folder.RunFolder(trained, {}, step=12)
    assert {k: v for k, v in files_in(trained).items() if k.name != "lock"} == {k: v for k, v in files.items() if k.name != "lock"}


def test_what_one_rank_alone_refuses_ends_every_rank(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b"])
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"")
    process = start(*TORCHRUN, "pretrain.py", *FOLDER, "--data", tmp_path, "--run-dir", tmp_path / "run", output=subprocess.PIPE)
    _, err = process.communicate(timeout=100)
    assert process.returncode and err.count("is not a readable image") == 1 and "gloo" not in err


def test_config_keeps_what_the_earlier_parts_of_a_run_ran_on(tmp_path):
    run = tmp_path / "run"
    for more in ([*SMALL, "--epochs", "1", "--run-dir"], ["--epochs", "2", "--resume"], ["--epochs", "3", "--resume"]):
        pretrain.main([*more, str(run)], standalone_mode=False)
    about = json.loads((run / "config.json").read_text())
    assert about["options"]["epochs"] == 3 and len(about["earlier"]) == 2 and about["earlier"][0]["versions"] == about["versions"]


def test_a_folder_in_use_is_refused_to_a_second_process(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    process = start("pretrain.py", *LONG, "--epochs", "300", "--warmup", "0", "--run-dir", run)
    wait_for_step(run, 2, process)
    assert "in use by another process" in refusal(pretrain, ["--resume", run], monkeypatch, capsys)
    process.kill()
    process.wait()
    pretrain.main(["--resume", str(run), "--epochs", str(log_of(run)[-1]["epoch"] + 1)], standalone_mode=False)


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


def test_a_full_disk_loses_nothing(long, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 7):  # two checkpoints of 3 MB, not three
        run = disk / "run"
        full = python("pretrain.py", *LONG, "--run-dir", run)
        assert full.returncode == 2 and len(re.findall("^error: .*$", full.stderr, re.M)) == 1 and "Traceback" not in full.stderr and "the last good one stays: free space" in full.stderr
        assert run_folder.load_checkpoint(run / "ckpt.pt")["step"] == 4 and not (run / "ckpt.tmp").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert python("pretrain.py", "--resume", run).returncode == 0
        assert log_of(run) == log_of(long) and same_bits(state_of(run), state_of(long))


def test_a_full_disk_is_told_before_the_first_step_and_by_a_probe(trained, tmp_path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, 1):
        assert "free space, or name another --run-dir" in refusal(pretrain, [*SMALL, "--run-dir", disk / "run"], monkeypatch, capsys)
    with small_disk(tmp_path / "other", 4):
        (tmp_path / "other" / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
        with contextlib.suppress(OSError), open(tmp_path / "other" / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1000))
        error = refusal(linear_probe, [tmp_path / "other" / "ckpt.pt", "--limit", "100", "--epochs", "1"], monkeypatch, capsys)
        assert "cannot be written" in error and not list((tmp_path / "other").glob("*.tmp"))


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch, capsys):
    class Full:
        fileno = open(tmp_path / "some file", "wb").fileno

        def write(self, line):
            return len(line) // 2

    monkeypatch.setattr(run_folder.RunFolder, "_log", Full(), raising=False)
    monkeypatch.setattr(run_folder.RunFolder, "__setattr__", lambda self, name, value: None if name == "_log" else object.__setattr__(self, name, value))
    assert "log.jsonl cannot be written" in refusal(pretrain, [*SMALL, "--run-dir", tmp_path / "run"], monkeypatch, capsys)


def test_a_loss_that_is_not_finite_names_step_rate_and_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    explosive = ["--loss", "n-pair", "--npair-l2", "0", "--lr", "1e30", "--schedule", "constant", "--warmup", "2.5", "--warmup-from", "0.001", "--log-every", "100"]
    error = refusal(pretrain, [*SMALL, *explosive, "--run-dir", run], monkeypatch, capsys)
    step, saved = (int(n) for n in re.search(r"step (\d+) \(learning rate .*of step (\d+)", error).groups())
    good = run_folder.load_checkpoint(run / "ckpt.pt")
    assert good["step"] == saved < step and "--lr" in error
    assert all(entry.isfinite().all() for entry in good["encoder"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    run, make = tmp_path / "run", pretrain.build_model

    def poisoned(config, autocast):  # the gradient of the second step, not its loss
        model, calls = make(config, autocast), []
        next(model.parameters()).register_hook(lambda g: g * float("nan") if calls.append(0) or len(calls) == 2 else g)
        return model

    monkeypatch.setattr(pretrain, "build_model", poisoned)
    error = refusal(pretrain, [*SMALL, "--save-minutes", "0", "--log-every", "100", "--run-dir", run], monkeypatch, capsys)
    assert "a weight is not finite at step 2" in error and "ckpt.pt of step 1" in error
    assert run_folder.load_checkpoint(run / "ckpt.pt")["step"] == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")])  # fmt: skip
def test_too_little_memory_names_the_options_to_lower(error, tmp_path, monkeypatch, capsys):
    def short(*arguments):
        raise error

    monkeypatch.setattr(pretrain, "total_loss", short)
    line = refusal(pretrain, [*SMALL, "--run-dir", tmp_path / "run"], monkeypatch, capsys)
    assert "not enough memory" in line and "lower --micro-batch" in line


def test_resume_may_extend_a_run_but_not_change_its_recipe(tmp_path):
    run = tmp_path / "extended"
    assert python("pretrain.py", *SMALL, "--epochs", "1", "--schedule", "constant", "--warmup", "0", "--run-dir", run).returncode == 0
    assert python("pretrain.py", "--resume", run, "--epochs", "2").returncode == 0
    assert log_of(run)[-1]["epoch"] == 2
    refused = python("pretrain.py", "--resume", run, "--tau", "0.2", "--batch", "20")
    assert refused.returncode == 2 and "--batch, --tau" in refused.stderr
    assert log_of(run)[-1]["epoch"] == 2


def test_a_folder_killed_before_its_log_began_starts_anew(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("lock", "config.json", "ckpt.tmp"):
        (run / name).write_text("")
    pretrain.main([*SMALL, "--epochs", "1", "--run-dir", str(run)], standalone_mode=False)
    assert log_of(run)[-1]["epoch"] == 1
