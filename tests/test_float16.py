"""Training in float16: its gradients are scaled, a step whose gradients overflow is skipped, and nothing is lost.

A CPU takes a second for two images in float16. So all tests but one compute in float32, where the gradients are scaled
alike.
"""

import pytest
import torch

import pretrain
from children import Launch, run_script
from runs import SMALL, log_of, same_bits, state_of, train

pytestmark = pytest.mark.seeds_torch
SCALED = [*SMALL, "--precision", "float16", "--epochs", "2"]
OVERFLOWS = 2.0**127  # in float32 too, with gradients above 2
LARGE = ["--loss-scale", "40"]


def computing_in_float32(monkeypatch, first_factor):
    made = torch.amp.GradScaler
    monkeypatch.setattr(pretrain, "type_of_autocast", lambda precision, device: None)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **how: made(device, **how, init_scale=first_factor))


@pytest.mark.parametrize("more", [[], ["--optimizer", "lars"], ["--optimizer", "rmsprop"], ["--micro-batch", "10"]],
                         ids=["SGD", "LARS", "RMSProp", "in parts"])
def test_the_factor_of_the_gradients_leaves_no_trace(more, tmp_path, monkeypatch):
    """A power of two changes no digit of a number."""
    for factor in (1.0, 2.0**20):
        with monkeypatch.context() as patched:
            computing_in_float32(patched, factor)
            train(*SCALED, *more, "--run-dir", tmp_path / str(factor))
    runs = [state_of(tmp_path / str(factor)) for factor in (1.0, 2.0**20)]
    assert runs[0].pop("scaler")["scale"] == 1 and runs[1].pop("scaler")["scale"] == 2.0**20
    assert same_bits(*runs)


def test_a_step_whose_gradients_overflow_is_skipped_and_logged(tmp_path, monkeypatch):
    computing_in_float32(monkeypatch, OVERFLOWS)
    weights, descend = [], pretrain.Run.descend

    def watched(run):
        weights.append(next(run.model.parameters()).detach().clone())
        return descend(run)

    monkeypatch.setattr(pretrain.Run, "descend", watched)
    train(*SCALED, *LARGE, "--log-every", "1", "--run-dir", tmp_path / "run")
    log = log_of(tmp_path / "run")
    skipped = [line for line in log if "skipped" in line]
    assert skipped[0] == {"step": 1, "skipped": True, "gradient_scale": OVERFLOWS / 2}
    assert 1 <= len(skipped) < len(weights) == sum("loss" in line for line in log)  # it is a step of the schedule
    for step, (before, after) in enumerate(zip(weights, weights[1:]), 1):
        assert torch.equal(before, after) == (step in {line["step"] for line in skipped})


def test_a_run_that_goes_on_has_its_factor_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    options = [*SMALL, *LARGE, "--lr", "0.001", "--precision", "float16", "--schedule", "constant", "--warmup", "0"]
    with monkeypatch.context() as patched:
        computing_in_float32(patched, OVERFLOWS)
        train(*options, "--epochs", "2", "--run-dir", tmp_path / "whole")
        train(*options, "--epochs", "1", "--run-dir", tmp_path / "half")
    assert state_of(tmp_path / "half")["scaler"]["scale"] < OVERFLOWS
    computing_in_float32(monkeypatch, 1.0)  # the factor is the checkpoint's
    train("--resume", tmp_path / "half", "--epochs", "2")
    assert same_bits(state_of(tmp_path / "half"), state_of(tmp_path / "whole"))
    assert log_of(tmp_path / "half") == log_of(tmp_path / "whole")


def scale_up_on_rank_1(*arguments):
    """In a rank: the gradients of rank 1 alone overflow in the second step."""
    pretrain.type_of_autocast = lambda precision, device: None
    total = pretrain.total_loss

    def overflowing(*args):
        overflowing.calls += 1
        loss = total(*args)
        too_large = overflowing.calls == 2 and torch.distributed.get_rank() == 1
        return loss + (2.0**127 * args[1]).sum() * 4 * too_large if too_large else loss

    overflowing.calls = 0
    pretrain.total_loss = overflowing
    run_script("pretrain", *arguments)


def test_all_ranks_skip_a_step_that_overflows_on_one(tmp_path):
    launch = Launch(scale_up_on_rank_1, (*map(str, [*SCALED, "--run-dir", tmp_path / "two"]),), ranks=2).wait()
    assert launch.status == 0, launch.err
    assert [line["step"] for line in log_of(tmp_path / "two") if "skipped" in line] == [2]


def test_float16_trains(tmp_path):
    train(*SMALL, "--limit", "8", "--batch", "4", "--size", "8", "--epochs", "1", "--precision", "float16", "--run-dir",
          tmp_path)
    assert state_of(tmp_path)["step"] == 2 and "scale" in state_of(tmp_path)["scaler"]
