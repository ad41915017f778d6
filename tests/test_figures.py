"""Every picture is drawn."""

import shutil

import pytest
from click.testing import CliRunner

import common.figures
import results_table
import robustness
from children import PROJECT
from runs import probe, refusal

pytestmark = pytest.mark.seeds_torch


def test_pictures_are_drawn(trained, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    probe(tmp_path, "--limit", "200", "--epochs", "1", "--figure")
    robustness.main([str(tmp_path / "classifier-first200.pt"), "--limit", "20", "--figure"], standalone_mode=False)
    for name in ("probe-first200.png", "robustness-first200-first20.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_learning_curves_are_drawn_from_logs(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_bytes((trained / "log.jsonl").read_bytes())
    (tmp_path / "no run").mkdir()  # as runs/* may name
    common.figures.main([str(tmp_path), str(tmp_path / "no run"), str(trained)], standalone_mode=False)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "RUNS" in refusal(common.figures, [], monkeypatch, capsys)
    assert "no readable log.jsonl" in refusal(common.figures, [tmp_path / "nowhere"], monkeypatch, capsys)


def test_runs_whose_labels_are_alike_are_told_apart_by_their_names(tmp_path):
    runs = [shutil.copytree(PROJECT / "results" / "shapes-supcon", tmp_path / name) for name in ("one", "two")]
    shown = CliRunner().invoke(results_table.main, ["--short", *map(str, runs)], catch_exceptions=False)
    assert "| supcon, one |" in shown.output and "| supcon, two |" in shown.output
