"""Whole runs of the two scripts: ranks and parts as one process, every loss, a probe that leaves the encoder alone."""

import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import torch

import common.frozen
import common.journal
import common.models
import common.objectives
import children
import pretrain
from runs import FOLDER, SMALL, folder_of, log_of, probe, state_of, torchrun, train

pytestmark = pytest.mark.seeds_torch
EXACT = [*SMALL, "--limit", "64", "--batch", "16", "--epochs", "2", "--precision", "float64", "--lr", "0.01"]
LOSSES = {
    "supcon": ["--ce-weight", "0.3", "--denominator", "one_positive", "--positives-cap", "2"],
    "n-pair": ["--lr", "0.001"],
    "triplet": ["--mining", "hard"],
    "hard-contrastive": ["--nearest", "3"],
    "simple-contrastive": ["--nearest", "7"],
    "simclr": ["--augment", "stacked-rand"],
    "ce": [],
    "supcon-in": ["--queue", "60", "--momentum-encoder", "0.5", "--denominator", "negatives"],
}


def frozen_statistics(encoder, width):
    """Batch norm does as in evaluation: its statistics depend on ranks and parts, which is another subject."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return encoder, width


@contextlib.contextmanager
def without_batch_statistics():
    make = common.models.build_encoder
    common.models.build_encoder = lambda *arguments: frozen_statistics(*make(*arguments))
    try:
        yield
    finally:
        common.models.build_encoder = make


@pytest.fixture(scope="module")
def exact_runs(tmp_path_factory):
    """A folder of runs of every loss, NAME-WAY: by one process, in parts, on two ranks, and on two ranks in parts."""
    folder = tmp_path_factory.mktemp("exact")
    stores = [children.store() for _ in range(2 * len(LOSSES))]
    two = children.Launch(train_on_two_ranks, (str(folder), [store.port for store in stores]), ranks=2)
    train_exactly(folder, "one", [])
    train_exactly(folder, "parts", ["--micro-batch", "4"])
    assert two.wait().status == 0, two.err
    return folder


def train_exactly(folder, way, more, before_each=lambda: None):
    with without_batch_statistics():
        for loss, options in LOSSES.items():
            before_each()
            train(*EXACT, "--loss", loss, *options, *more, "--run-dir", Path(folder, f"{loss}-{way}"))


def train_on_two_ranks(folder, ports):
    """In a rank: every run meets at a port of its own, for a meeting place remembers who has been there."""
    meet = lambda: os.environ.update(MASTER_PORT=str(ports.pop()))
    train_exactly(folder, "ranks", [], meet)
    train_exactly(folder, "both", ["--micro-batch", "2"], meet)


@pytest.mark.parametrize("way", ["parts", "ranks", "both"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_and_parts_take_the_steps_of_one_process(loss, way, exact_runs):
    a, b = ([line["loss"] for line in log_of(exact_runs / f"{loss}-{w}") if "loss" in line] for w in ("one", way))
    assert len(a) == 8 and len(set(a)) == 8
    assert a == pytest.approx(b, rel=1e-10, abs=1e-10)
    for name in ("alignment", "uniformity"):  # of the last batch
        a, b = (log_of(exact_runs / f"{loss}-{w}")[-1].get(name) for w in ("one", way))
        assert a is b is None or a == pytest.approx(b, rel=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("time", range(4))
def test_ranks_that_torchrun_starts_end_well_whether_they_finish_or_refuse(time, tmp_path):
    """gloo aborts a process now and then where a DistributedDataParallel outlives its group."""
    folder_of(tmp_path, ["train"], ["a", "b"])
    if time % 2:
        next((tmp_path / "train").rglob("2.png")).write_bytes(b"")
    process = torchrun("pretrain.py", *FOLDER, "--data", tmp_path, "--stream", "--run-dir", tmp_path / "run")
    _, err = process.communicate(timeout=300)
    assert "SIGABRT" not in err
    assert (process.returncode == 0) == (time % 2 == 0), err


def test_of_the_two_passes_over_a_part_one_moves_the_running_statistics(tmp_path):
    run = tmp_path / "run"
    train(*SMALL, "--epochs", "1", "--micro-batch", "10", "--run-dir", run)
    encoder = state_of(run)["encoder"]
    assert {int(v) for k, v in encoder.items() if k.endswith("num_batches_tracked")} == {4 * 5}


@pytest.mark.parametrize("loss", list(common.objectives.OBJECTIVES))
def test_every_loss_trains_and_its_checkpoint_is_probed(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(*SMALL, "--epochs", "1", "--loss", loss)
    run = tmp_path / f"runs/shapes-small-{loss}-s0"
    assert {line["step"] for line in log_of(run)} == {1, 2, 3, 4}
    last = log_of(run)[-1]
    assert last["uniformity"] <= 0 and 0 <= last["knn_top1"] <= 100
    result = probe(run / "ckpt.pt", "--limit", "200", "--epochs", "2")
    assert result["top1"] <= result["top5"] <= 100


def test_a_probe_leaves_the_checkpoint_and_the_encoder_as_they_were(trained):
    before = (trained / "ckpt.pt").read_bytes()
    frozen = common.frozen.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    bits = common.frozen.fingerprint(frozen.encoder)
    result = probe(trained / "ckpt.pt", "--limit", "300", "--epochs", "3", "--baselines")
    assert (trained / "ckpt.pt").read_bytes() == before
    assert (
        common.frozen.fingerprint(common.frozen.load_encoder(trained / "ckpt.pt", torch.device("cpu")).encoder) == bits
    )
    assert json.loads((trained / "probe-first300.json").read_text())["top1"] == result["top1"]
    assert {"raw_pixels_top1", "untrained_encoder_top1"} <= result.keys()
    frozen.encoder.train()(torch.rand(2, 3, 16, 16))
    assert common.frozen.fingerprint(frozen.encoder) != bits  # batch-norm statistics count


def test_transfer_resizes_another_data_set_to_the_checkpoints_size(trained, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["dark", "light"])
    result = probe(trained / "ckpt.pt", "--dataset", "folder", "--data", tmp_path)
    assert (
        result["top1"] == 100
        and result["test_images"] == 8
        and (trained / f"probe-folder-{tmp_path.name}.json").exists()
    )


@pytest.mark.parametrize("augment", ["sim", "auto"])
def test_a_streamed_folder_trains_on_the_same_views_with_and_without_workers(augment, tmp_path):
    folder_of(tmp_path, ["train"], ["dark", "light"], size=(90, 70))
    options = [
        "--dataset",
        "folder",
        "--data",
        str(tmp_path),
        "--size",
        "70",
        "--arch",
        "small",
        "--stream",
        "--augment",
        augment,
    ]
    options += [
        "--batch",
        "4",
        "--epochs",
        "1",
        "--log-every",
        "1",
        "--precision",
        "float64",
        "--lr",
        "1e-9",
        "--warmup",
        "0",
    ]
    logs = []
    for name, other in (("whole", []), ("workers", ["--workers", "0"])):
        train(*options, *other, "--run-dir", tmp_path / name)
        logs.append([line["loss"] for line in log_of(tmp_path / name) if "loss" in line])
    assert len(logs[0]) == 2 and logs[0] == logs[1]


@pytest.mark.parametrize("limit", ["8", "24"])
def test_a_handful_of_images_is_diagnosed_too(limit, tmp_path):
    train(*SMALL, "--limit", limit, "--batch", "4", "--epochs", "1", "--run-dir", tmp_path / "run")
    assert 0 <= log_of(tmp_path / "run")[-1]["knn_top1"] <= 100


def test_a_loss_that_sits_at_collapse_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        common.journal, "collapse_and_floor", lambda config, labels: (math.log(99) * config.loss_scale, 0.0)
    )
    monkeypatch.setattr(pretrain.F, "normalize", lambda z, **k: z * 0 + 1 / z.shape[1] ** 0.5)
    train(*SMALL, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert "collapse value" in capsys.readouterr().err
