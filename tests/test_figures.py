"""Every picture is drawn."""

import pytest

import common.figures
import robustness
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
    common.figures.main([str(tmp_path), str(trained)], standalone_mode=False)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "RUNS" in refusal(common.figures, [], monkeypatch, capsys)
    assert "no readable log.jsonl" in refusal(common.figures, [tmp_path / "nowhere"], monkeypatch, capsys)
