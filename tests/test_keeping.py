"""The parts of a run's folder, one by one: what is written there, what is kept, what is read again."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import common.cli
import common.journal
import common.run_folder
from runs import StandIn


def contents(step, **entries):
    return {
        "format": common.run_folder.FORMAT,
        "config": {},
        "step": step,
        "seconds": 0.0,
        "optimizer": {},
        "encoder": {"w": torch.full((2,), float(step))},
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "classes": ["a"],
    } | entries


def steps_in(folder):
    return {path.name: common.run_folder.load_checkpoint(path)["step"] for path in folder.glob("ckpt*.pt")}


def test_the_log_keeps_the_checkpoints_own_step_and_no_half_line(tmp_path):
    log = tmp_path / "log.jsonl"
    for half in ('{"step": 2', '{"step": 2}', '{"st', ""):
        log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n' + half)
        common.run_folder.cut_log(log, 2)
        assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "epoch": 1}\n'
    common.run_folder.cut_log(log, 1)
    assert log.read_text() == '{"step": 1}\n'


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    file = tmp_path / "ckpt.pt"
    common.run_folder.write_aside(file, lambda f: f.write(b"first"))

    def fails(f):
        f.write(b"sec")
        raise OSError

    with pytest.raises(OSError):
        common.run_folder.write_aside(file, fails)
    assert file.read_bytes() == b"first" and list(tmp_path.iterdir()) == [file]
    common.run_folder.write_aside(file, lambda f: f.write(b"second"), keep_as=tmp_path / "previous")
    assert file.read_bytes() == b"second" and (tmp_path / "previous").read_bytes() == b"first"


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    file, sizes = tmp_path / "probe.json", [1000 * n for n in range(1, 41)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda size: common.run_folder.write_aside(file, lambda f: f.write(bytes(size))), sizes))
    assert file.stat().st_size in sizes and list(tmp_path.iterdir()) == [file]


def without_locks(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_there_are_no_locks_the_name_of_the_writer_keeps_a_second_one_out(tmp_path, monkeypatch, capsys):
    run, lock = tmp_path / "run", tmp_path / "run" / "lock"
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    first = common.run_folder.RunFolder(run, {}, contents(0))
    assert capsys.readouterr().err.count("has no locks") == 1
    mine = json.loads(lock.read_text())
    assert mine["host"] == socket.gethostname() and mine["process"] == os.getpid()
    others = {"a live process": mine | {"process": os.getppid()}, "another host": mine | {"host": "elsewhere"}}
    for holder in others.values():
        lock.write_text(json.dumps(holder))
        words = f"{holder['process']} on {holder['host']} since {mine['since']}"
        with pytest.raises(common.cli.Refused, match=f"in use by another process, {words}"):
            common.run_folder.RunFolder(run, {}, step=0)
    os.utime(lock, (0, 0))  # the other host has been silent for long
    common.run_folder.RunFolder(run, {}, step=0).close()
    lock.write_text(json.dumps(mine | {"process": 2**22 + 1}))  # there is no such process
    second = common.run_folder.RunFolder(run, {}, step=0)
    os.utime(lock, (0, 0))
    second.log({"step": 1})
    assert lock.stat().st_mtime > 0  # every entry of the log says that the process is alive
    second.close()
    assert not lock.read_text()
    first.close()


def test_the_newest_checkpoint_and_the_one_before_it_are_kept(tmp_path):
    folder = common.run_folder.RunFolder(tmp_path / "run", {}, contents(0))
    for step in (3, 5):
        folder.save(contents(step))
    folder.close()
    assert steps_in(tmp_path / "run") == {"ckpt.pt": 5, "ckpt-previous.pt": 3}


class Gate:
    """torch.save that waits until it may write."""

    def __init__(self, monkeypatch):
        self.open, save = threading.Event(), torch.save
        monkeypatch.setattr(common.run_folder.torch, "save", lambda *what: self.open.wait(30) and save(*what))


def test_what_later_steps_change_is_not_in_a_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    folder, gate = common.run_folder.RunFolder(tmp_path / "run", {}, contents(0)), Gate(monkeypatch)
    w, losses, momentum = torch.ones(2), [0.5], torch.ones(2)
    optimizer = {"state": {0: {"momentum_buffer": momentum}}, "param_groups": [{"lr": 1.0}]}
    folder.save(contents(3, encoder={"w": w}, losses_of_epoch=losses, optimizer=optimizer))
    assert folder.is_writing()
    w += 1
    momentum += 1
    losses.append(0.7)
    optimizer["param_groups"][0]["lr"] = 2.0
    gate.open.set()
    folder.close()
    saved = common.run_folder.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 3 and saved["losses_of_epoch"] == [0.5] and saved["encoder"]["w"].tolist() == [1, 1]
    assert saved["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1, 1]
    assert saved["optimizer"]["param_groups"] == [{"lr": 1.0}]


def test_a_second_checkpoint_waits_for_the_first(tmp_path, monkeypatch):
    folder, gate = common.run_folder.RunFolder(tmp_path / "run", {}, contents(0)), Gate(monkeypatch)
    folder.save(contents(3))
    second = threading.Thread(target=folder.save, args=(contents(5),))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.open.set()
    second.join()
    folder.close()
    assert steps_in(tmp_path / "run") == {"ckpt.pt": 5, "ckpt-previous.pt": 3}


@pytest.mark.parametrize("call", ["save", "look_after", "wait", "close"])
def test_a_checkpoint_that_the_thread_cannot_write_is_refused_by_the_next_call(call, tmp_path, monkeypatch):
    folder = common.run_folder.RunFolder(tmp_path / "run", {}, contents(0))

    def full(*what):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(common.run_folder.torch, "save", full)
    folder.save(contents(3))
    while folder.is_writing():
        time.sleep(0.001)
    with pytest.raises(common.cli.Refused, match="is the disk full.*the last good one stays: free space"):
        getattr(folder, call)(*[contents(4)] * (call == "save"))
    assert steps_in(tmp_path / "run") == {"ckpt.pt": 0} and not any((tmp_path / "run").glob("*.tmp"))
    if call != "close":
        folder.close()


def test_what_a_signal_asked_for_is_on_the_disk_before_it_is_said(tmp_path, monkeypatch):
    noted, run, note = journal(tmp_path / "run", monkeypatch)
    run.checkpoint = lambda *of: contents(1)
    note(1.0, 0.1)
    found, gate = [], Gate(monkeypatch)
    monkeypatch.setattr(common.journal, "say", lambda words: found.append(steps_in(tmp_path / "run")["ckpt.pt"]))
    threading.Timer(0.1, gate.open.set).start()
    noted.save_now_and_then(run, asked=True)
    assert found == [1]
    noted.close(run)


def test_a_write_that_fails_while_steps_go_on_ends_the_run(tmp_path, monkeypatch):
    noted, run, note = journal(tmp_path / "run", monkeypatch)
    note(1.0, 0.1)
    monkeypatch.setattr(common.run_folder.torch, "save", lambda *what: [][0])
    noted.save(run)
    while noted.folder.is_writing():
        time.sleep(0.001)
    with pytest.raises(IndexError):  # what is no refusal is raised too
        note(1.0, 0.1)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path):
    run = tmp_path / "run"
    folder = common.run_folder.RunFolder(run, {}, contents(0))
    folder.save(contents(3))
    folder.close()
    (run / "ckpt.pt").write_bytes(b"cut short")
    found, warning = common.run_folder.newest_checkpoint(run)
    assert found["step"] == 0 and "cannot be read" in warning
    folder = common.run_folder.RunFolder(run, {}, step=0)
    assert (run / "ckpt-damaged.pt").read_bytes() == b"cut short"
    folder.save(contents(4))
    folder.close()
    (run / "ckpt-damaged.pt").unlink()
    assert steps_in(run) == {"ckpt.pt": 4, "ckpt-previous.pt": 0}


def test_a_checkpoint_runs_no_code_and_lacks_nothing(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    good, path = contents(1), tmp_path / "ckpt.pt"
    mischief, other_kind = {"config": {"x": Mischief()}}, {"format": "supcon-probe-2"}
    for bad in (mischief, other_kind, {"encoder": None}, {"step": "1"}, {"mean": [0.0] * 3}):
        torch.save(good | bad, path)
        with pytest.raises(common.cli.Refused):
            common.run_folder.load_checkpoint(path)
        assert not (tmp_path / "ran").exists()
    torch.save(good, path)
    assert common.run_folder.load_checkpoint(path)["step"] == 1


def test_a_new_run_takes_no_folder_in_which_steps_would_be_lost(tmp_path):
    torch.save(contents(1), tmp_path / "ckpt.pt")
    with pytest.raises(common.cli.Refused, match="already holds a run"):
        common.run_folder.refuse_unusable(tmp_path, resuming=False)
    common.run_folder.refuse_unusable(tmp_path, resuming=True)
    torch.save(contents(0), tmp_path / "ckpt.pt")  # killed before its first step
    common.run_folder.refuse_unusable(tmp_path, resuming=False)


def journal(folder, monkeypatch, weight=0.0):
    """(a Journal, and a function that notes the next step's loss and rate)."""
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    config = SimpleNamespace(batch=5, epochs=9, save_minutes=10, log_every=2, tensorboard=False, run=folder)
    saved = contents(0, encoder={"w": torch.tensor([weight])})
    run = StandIn(config=config, step=0, steps_per_epoch=100, total_steps=900, checkpoint=lambda *of: saved)
    made = common.journal.Journal(run, 1, None, None, None)

    def note(loss, rate):
        run.step += 1
        made.note_step(run, torch.tensor(loss), rate)

    return made, run, note


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_refused_with_its_own_step_and_rate(loss, tmp_path, monkeypatch):
    _, _, note = journal(tmp_path / "run", monkeypatch)
    for value, rate in ((1.0, 0.1), (2.0, 0.2), (loss, 0.3)):
        note(value, rate)
    with pytest.raises(common.cli.Refused, match=r"at step 3 \(learning rate 0.3\)"):
        note(1.0, 0.4)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(weight, tmp_path, monkeypatch):
    noted, run, note = journal(tmp_path / "run", monkeypatch, weight)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    note(1.0, 0.1)
    with pytest.raises(common.cli.Refused, match="a weight is not finite at step 1"):
        noted.save(run)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_what_every_part_of_a_run_ran_on_is_kept(tmp_path):
    run = tmp_path / "run"
    common.run_folder.RunFolder(run, {"device": "a", "options": {"epochs": 1}}, contents(0)).close()
    for device in "bc":
        common.run_folder.RunFolder(run, {"device": device, "options": {"epochs": 2}}, step=0).close()
    about = json.loads((run / "config.json").read_text())
    assert about == {"device": "c", "options": {"epochs": 2}, "earlier": [{"device": "a"}, {"device": "b"}]}


def test_signals_are_noted_however_many_come():
    heeded = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2), signal.SIG_DFL)
    heeded |= {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}  # some may be ignored here
    try:
        asked, both = common.cli.Asked(), (*common.cli.ENDING, *common.cli.SAVING)
        with common.cli.signals_noted(asked, both):
            assert not asked.end and not asked.save
        assert {number: signal.getsignal(number) for number in heeded} == heeded  # where none came, as they were
        with common.cli.signals_noted(asked, both):
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
        assert asked.end == signal.SIGTERM and asked.save  # the first one that ends a run is its status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_an_epoch(folder, monkeypatch, loss, saved):
    """What is said at the end of an epoch of one step with this loss, of a run whose loss at collapse is 2."""
    told = []
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    monkeypatch.setattr(common.journal, "say", lambda words, err=False: told.append(words))
    config = SimpleNamespace(batch=5, epochs=1, save_minutes=1e9, log_every=1, keep_every=1, tensorboard=False,
                             workers=0, run=folder)
    run = StandIn(config=config, step=0, steps_per_epoch=1, total_steps=1, checkpoint=lambda *of: saved)
    journal = common.journal.Journal(run, 1, None, 2.0, 0.0)
    run.step = 1
    journal.note_step(run, torch.tensor(loss), 0.1)
    journal.note_epoch(run, {})
    journal.close(run)
    return told


@pytest.mark.parametrize("share, warns", [(0.98, False), (0.995, True), (1.005, True), (1.02, False)])
def test_a_loss_within_a_hundredth_of_its_collapse_value_is_warned_of(share, warns, tmp_path, monkeypatch):
    told = note_an_epoch(tmp_path / "run", monkeypatch, 2 * share, {"encoder": {}})
    assert any("collapse value" in words for words in told) == warns


def test_kept_weights_come_without_queue_and_optimizer(tmp_path, monkeypatch):
    saved = {"encoder": {}, "optimizer": {"x": 1}, "queue": {"z": torch.ones(2)}}
    note_an_epoch(tmp_path / "run", monkeypatch, 1.0, saved)
    assert torch.load(tmp_path / "run" / "epoch-0001.pt") == {"encoder": {}, "optimizer": {}}


@pytest.mark.parametrize("part", ["encoder", "projection", "classifier"])
def test_no_part_is_saved_with_a_weight_that_is_no_number(part, tmp_path, monkeypatch):
    saved = {name: {"w": torch.zeros(1)} for name in ("encoder", "projection", "classifier")}
    saved[part] = {"w": torch.tensor([float("nan")])}
    with pytest.raises(common.cli.Refused, match="a weight is not finite"):
        note_an_epoch(tmp_path / "run", monkeypatch, 1.0, saved)


def test_the_first_loss_that_is_no_number_is_named():
    losses = common.journal.Losses(())
    for value in (1.0, float("nan"), float("inf")):
        losses.add(torch.tensor(value), value)
    ago, value, _ = losses.read()
    assert ago == 1 and value != value


def test_whatever_a_killed_process_was_writing_goes(tmp_path):
    common.run_folder.RunFolder(tmp_path / "run", {}, contents(0)).close()
    for stem in ("ckpt", "epoch-0003", "config"):
        (tmp_path / "run" / f"{stem}-0f.tmp").touch()
    common.run_folder.RunFolder(tmp_path / "run", {}, step=0).close()
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_checkpoint_of_which_a_byte_has_changed_is_refused(tmp_path):
    torch.save(contents(3, encoder={"w": torch.arange(1000.0)}), tmp_path / "ckpt.pt")
    common.run_folder.load_checkpoint(tmp_path / "ckpt.pt")
    damaged = bytearray((tmp_path / "ckpt.pt").read_bytes())
    place = damaged.index(torch.arange(1000.0).numpy().tobytes())
    damaged[place + 100] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(damaged)
    with pytest.raises(common.cli.Refused, match="cannot be read as a checkpoint"):
        common.run_folder.load_checkpoint(tmp_path / "ckpt.pt")
