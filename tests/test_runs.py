"""Whole runs of the two scripts: ranks and parts as one process, every loss, a probe that leaves the encoder alone."""
import json
import subprocess
import sys

import pytest
import torch

import linear_probe
import pretrain
import recipes
from runs import ONE_THREAD, PROJECT, SMALL, TORCHRUN, folder_of, log_of, state_of

RANKS = '''
import sys, torch, options, pretrain
make = pretrain.build_encoder
def frozen_statistics(*arguments):
    encoder, width = make(*arguments)
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return encoder, width
pretrain.build_encoder = frozen_statistics
options.run_command(pretrain.main)
'''


@pytest.mark.parametrize("ranks, other", [(2, []), (1, ["--micro-batch", "4"]), (2, ["--micro-batch", "2"])], ids=["ranks", "parts", "both"])
@pytest.mark.parametrize("loss", [
    ["--loss", "supcon", "--ce-weight", "0.3"],
    ["--loss", "n-pair", "--lr", "0.001"],
    ["--loss", "triplet", "--mining", "hard"],
    ["--loss", "simclr", "--augment", "stacked-rand"],
    ["--loss", "ce"],
    ["--loss", "supcon-in", "--queue", "60", "--momentum-encoder", "0.5"],
], ids=lambda loss: loss[1])
def test_ranks_and_parts_take_the_steps_of_one_process(loss, ranks, other, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    options = [*SMALL, "--limit", "64", "--batch", "16", "--epochs", "2", "--precision", "float64", "--lr", "0.01", *loss]
    environment = {"env": ONE_THREAD | {"PYTHONPATH": str(PROJECT)}, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    one = subprocess.run([sys.executable, script, *options, "--run-dir", "one"], **environment)
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, *TORCHRUN[:-1], f"--nproc_per_node={ranks}"]
    two = subprocess.run([*torchrun, script, *options, *other, "--run-dir", "two"], **environment)
    assert two.returncode == 0, two.stderr
    a, b = ([line["loss"] for line in log_of(tmp_path / run) if "loss" in line] for run in ("one", "two"))
    assert len(a) == 8 and len(set(a)) == 8
    assert a == pytest.approx(b, rel=1e-10, abs=1e-10)


def test_of_the_two_passes_over_a_part_one_moves_the_running_statistics(tmp_path):
    run = tmp_path / "run"
    pretrain.main([*SMALL, "--epochs", "1", "--micro-batch", "10", "--run-dir", str(run)], standalone_mode=False)
    encoder = state_of(run)["encoder"]
    assert {int(v) for k, v in encoder.items() if k.endswith("num_batches_tracked")} == {4 * 5}


@pytest.mark.parametrize("loss", list(recipes.LOSSES))
def test_every_loss_trains_and_its_checkpoint_is_probed(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain.main([*SMALL, "--epochs", "1", "--loss", loss], standalone_mode=False)
    run = tmp_path / f"runs/shapes-small-{loss}-s0"
    assert {line["step"] for line in log_of(run)} == {1, 2, 3, 4}
    last = log_of(run)[-1]
    assert last["uniformity"] <= 0 and 0 <= last["knn_top1"] <= 100
    result = linear_probe.main([str(run / "ckpt.pt"), "--limit", "200", "--epochs", "2"], standalone_mode=False)
    assert result["top1"] <= result["top5"] <= 100


def test_a_probe_leaves_the_checkpoint_and_the_encoder_as_they_were(trained):
    before = (trained / "ckpt.pt").read_bytes()
    frozen = linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    bits = linear_probe.fingerprint(frozen.encoder)
    result = linear_probe.main([str(trained / "ckpt.pt"), "--limit", "300", "--epochs", "3", "--baselines"], standalone_mode=False)
    assert (trained / "ckpt.pt").read_bytes() == before
    assert linear_probe.fingerprint(linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu")).encoder) == bits
    assert json.loads((trained / "probe-first300.json").read_text())["top1"] == result["top1"]
    assert {"raw_pixels_top1", "untrained_encoder_top1"} <= result.keys()
    frozen.encoder.train()(torch.rand(2, 3, 16, 16))
    assert linear_probe.fingerprint(frozen.encoder) != bits  # batch-norm statistics count


def test_transfer_resizes_another_data_set_to_the_checkpoints_size(trained, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["dark", "light"])
    result = linear_probe.main([str(trained / "ckpt.pt"), "--dataset", "folder", "--data", str(tmp_path)], standalone_mode=False)
    assert result["top1"] == 100 and result["test_images"] == 8 and (trained / f"probe-folder-{tmp_path.name}.json").exists()


@pytest.mark.parametrize("augment", ["sim", "auto"])
def test_a_streamed_folder_trains_on_the_same_views_with_and_without_workers(augment, tmp_path):
    folder_of(tmp_path, ["train"], ["dark", "light"], size=(90, 70))
    options = ["--dataset", "folder", "--data", str(tmp_path), "--size", "70", "--arch", "small", "--stream", "--augment", augment]
    options += ["--batch", "4", "--epochs", "1", "--log-every", "1", "--precision", "float64", "--lr", "1e-9", "--warmup", "0"]
    logs = []
    for name, other in (("whole", []), ("workers", ["--workers", "0"])):
        pretrain.main([*options, *other, "--run-dir", str(tmp_path / name)], standalone_mode=False)
        logs.append([line["loss"] for line in log_of(tmp_path / name) if "loss" in line])
    assert len(logs[0]) == 2 and logs[0] == logs[1]


@pytest.mark.parametrize("limit", ["8", "24"])
def test_a_handful_of_images_is_diagnosed_too(limit, tmp_path):
    pretrain.main([*SMALL, "--limit", limit, "--batch", "4", "--epochs", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert 0 <= log_of(tmp_path / "run")[-1]["knn_top1"] <= 100


def test_a_loss_that_sits_at_collapse_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "collapse_and_floor", lambda config, labels: (pretrain.losses.math.log(99) * config.loss_scale, 0.0))
    monkeypatch.setattr(pretrain.F, "normalize", lambda z, **k: z * 0 + 1 / z.shape[1] ** 0.5)
    pretrain.main([*SMALL, "--epochs", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert "collapse value" in capsys.readouterr().err
