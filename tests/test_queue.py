"""The queue and its momentum encoder."""

import pytest
import torch

import common.models
import common.objectives
import pretrain
import reference_numpy as ref
from runs import SMALL, log_of, same_bits, state_of, train

pytestmark = pytest.mark.seeds_torch


def test_a_queue_of_the_previous_batch_gives_the_oracles_loss_on_both(tmp_path, monkeypatch):
    seen, total_loss = [], common.objectives.total_loss

    def noted(config, z, logits, y, images, queue):
        loss = total_loss(config, z, logits, y, images, queue)
        seen.append((z.detach().clone(), y, queue, loss.item() / config.loss_scale))
        return loss

    monkeypatch.setattr(pretrain, "total_loss", noted)
    options = [
        "--precision",
        "float64",
        "--queue",
        "100",
        "--momentum-encoder",
        "0",
        "--epochs",
        "1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    train(*SMALL, *options)
    assert seen[0][2] is None and len(seen) == 4
    for (z_before, y_before, _, _), (z, y, queue, loss) in zip(seen, seen[1:]):
        torch.testing.assert_close(
            queue[0], z_before, rtol=1e-12, atol=1e-12
        )  # 50 images, two views, as the same weights see them
        assert torch.equal(queue[1], y_before)
        contrast, labels = torch.cat([z, z_before]).numpy(), torch.cat([y, y_before]).numpy()
        assert loss == pytest.approx(ref.supcon_against(z.numpy(), y.numpy(), contrast, labels, 0.1, own=0), rel=1e-9)


def test_the_momentum_encoder_is_a_running_mean_of_the_weights():
    torch.manual_seed(0)
    model = common.models.Model(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    queue = common.models.Queue(model, 6, 0.9)
    mean = model.encoder.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.encoder.weight += torch.randn(4, 3)
        queue.follow(model)
        mean = 0.9 * mean + 0.1 * model.encoder.weight.detach()
    torch.testing.assert_close(queue.model.encoder.weight.detach(), mean)
    for k in range(4):
        queue.add(torch.full((4, 2), float(k)), torch.full((4,), k))
    assert queue.y.tolist() == [2, 2, 3, 3, 3, 3] and queue.z[:, 0].tolist() == queue.y.tolist()  # the oldest have gone


@pytest.mark.parametrize(
    "loss",
    [["--loss", "supcon"], ["--loss", "simclr", "--micro-batch", "10"], ["--loss", "supcon-in", "--ce-weight", "0.2"]],
)
def test_a_run_with_a_queue_resumes_to_the_same_bits(loss, tmp_path):
    options = [*SMALL, *loss, "--queue", "150", "--momentum-encoder", "0.9", "--schedule", "constant", "--warmup", "0"]
    train(*options, "--epochs", "3", "--run-dir", tmp_path / "whole")
    train(*options, "--epochs", "1", "--run-dir", tmp_path / "parts")
    train("--resume", tmp_path / "parts", "--epochs", "3")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert same_bits(whole, parts) and log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert whole["queue"]["z"].shape == (150, 128) and (
        loss[1] != "simclr" or set(whole["queue"]["y"].tolist()) == {-1}
    )


def test_a_queue_smaller_than_a_batch_keeps_its_last_rows_with_their_labels():
    queue = common.models.Queue(torch.nn.Linear(2, 2), 3, 0.9)
    queue.add(torch.arange(5.0)[:, None].expand(5, 2), torch.arange(5))
    assert queue.y.tolist() == queue.z[:, 0].tolist() == [2, 3, 4]


def test_the_momentum_encoder_is_frozen_with_the_model():
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model = common.models.Model(encoder, torch.nn.Linear(4, 2))
    queue, x = common.models.Queue(model, 6, 0.9), torch.randn(5, 3)
    for is_frozen in (True, False):
        model.freeze(is_frozen)
        queue.follow(model)
        with common.models.still_statistics(model):
            torch.testing.assert_close(queue.encode(x), model(x)[0].detach())
