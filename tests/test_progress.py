"""Where people look while a run trains: the line on a terminal, and TensorBoard."""

import io
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import common.cli
import common.journal
from runs import SMALL, StandIn, log_of, train

pytestmark = pytest.mark.seeds_torch


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """The lines as they stand on the screen: after a return, characters take the place of others."""
        lines = []
        for line in self.getvalue().split("\n"):
            screen = ""
            for part in line.split("\r"):
                screen = part + screen[len(part) :]
            lines.append(screen.rstrip())
        return lines


def without_numbers(lines):
    return [re.sub(r"-?\d[\d.e+-]*", "#", re.sub(r"/\S+", "PATH", line)) for line in lines]


def test_on_a_terminal_a_line_takes_the_place_of_the_last_and_elsewhere_each_has_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.journal.time, "perf_counter", iter(range(0, 10**6, 20)).__next__)  # 20 s at a time
    train(*SMALL, "--epochs", "2", "--run-dir", tmp_path / "plain")
    plain = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    train(*SMALL, "--epochs", "2", "--run-dir", tmp_path / "terminal")
    monkeypatch.undo()
    lines, steps = plain.splitlines(), [k for k, line in enumerate(plain.splitlines()) if line.startswith("epoch")]
    assert "\r" not in plain and len(steps) == 8 and all("images/s" in lines[k] and "left" in lines[k] for k in steps)
    kept = [line for k, line in enumerate(lines) if k not in steps or " step 4/" in line or " step 8/" in line]
    assert without_numbers(terminal.shown()[:-1]) == without_numbers(kept)
    assert "epoch 1/2 step 2/8  loss" in terminal.getvalue()


def test_a_long_line_is_cut_at_the_terminals_edge_and_a_refusal_takes_its_place(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: shutil.os.terminal_size((20, 9)))
    common.cli.say_in_place("x" * 50)
    assert terminal.shown() == ["x" * 19]
    common.cli.say("done")
    assert terminal.shown() == ["done", ""]


def test_tensorboard_reads_the_entries_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*SMALL, "--epochs", "2", "--tensorboard", "--run-dir", tmp_path)
    shutil.copy(tmp_path / "ckpt-previous.pt", tmp_path / "ckpt.pt")  # as if it had been killed in the second epoch
    train("--resume", tmp_path)
    board = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    entries = log_of(tmp_path)
    for name in ("loss", "lr", "mean_loss", "knn_top1", "uniformity"):
        expected = [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries if name in entry]
        assert [(event.step, event.value) for event in board.Scalars(name)] == expected and expected


def test_without_its_package_tensorboard_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.cli.Refused, match="needs the package tensorboard: pip install tensorboard"):
        train(*SMALL, "--tensorboard", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_that_a_terminal_cannot_write_are_written_with_question_marks(monkeypatch):
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding="utf-8", errors="strict"))
    common.cli.say("taken for caf\udce9")  # a class folder whose name is not UTF-8
    sys.stdout.flush()
    assert bytes_.getvalue() == b"taken for caf?\n"


def test_the_time_that_is_left_is_told_in_minutes(tmp_path, monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(common.journal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    monkeypatch.setattr(common.journal, "say_in_place", told.append)
    config = SimpleNamespace(batch=50, epochs=1, save_minutes=1e9, log_every=1, tensorboard=False, run=tmp_path / "run")
    run = StandIn(config=config, step=0, steps_per_epoch=100, total_steps=100, checkpoint=lambda *of: {"encoder": {}})
    journal = common.journal.Journal(run, 1, None, None, None)
    now[0], run.step = 240, 1  # four minutes a step
    journal.note_step(run, torch.tensor(1.0), 0.1)
    assert told[0].endswith(f"{99 * 4:.1f} min left")
    journal.folder.close()
