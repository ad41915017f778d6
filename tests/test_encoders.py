"""Encoders of torchvision's: one of each family trains, is probed and meets corruptions; what they draw at random."""

import shutil

import pytest
import torch
import torchvision
from torchvision.models import _api
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import common.cli
import common.frozen
import common.models
import common.views
from runs import FOLDER, folder_of, log_of, probe, run_here, same_bits, state_of, train

pytestmark = pytest.mark.seeds_torch
RUN = ["--dataset", "shapes", "--size", "32", "--limit", "20", "--batch", "10", "--epochs", "1", "--device", "cpu"]
SMALL = {  # a model of the family with few weights, in the place of torchvision's smallest
    "convnext_tiny": lambda **_: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], 0.5, num_classes=9),
    "vit_b_16": lambda **_: VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=9),
    "swin_t": lambda **_: SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.5, num_classes=9),
}
FAMILIES = [*SMALL, "efficientnet_b0", "mobilenet_v3_small"]
OTHERS = ["densenet121", "regnet_x_400mf", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "resnext50_32x4d"]


@pytest.fixture
def small_families(monkeypatch):
    for name, make in SMALL.items():
        monkeypatch.setitem(_api.BUILTIN_MODELS, name, make)


def train_probe_and_corrupt(arch, here, *more):
    """A step of four images, a probe and a test under corruptions, of an encoder that the folder `here` then holds."""
    folder_of(here, ["train", "test"], ["dark", "light"], size=(40, 40))
    options = [*FOLDER, "--data", here, "--size", "32", "--arch", arch, "--precision", "float32", *more]
    train(*options, "--log-every", "1", "--run-dir", here / "run")
    found = probe(here / "run")
    corrupted = run_here("robustness", here / "run")
    assert [line["step"] for line in log_of(here / "run") if "loss" in line] == [1, 2]
    assert 0 <= found["top1"] <= 100 and 0 <= corrupted["mean_error"] <= 100


@pytest.mark.parametrize("arch", FAMILIES)
def test_one_of_each_family_trains_is_probed_and_meets_corruptions(arch, small_families, tmp_path):
    train_probe_and_corrupt(arch, tmp_path)
    classifier = common.frozen.load_classifier(tmp_path / "run" / "classifier.pt")
    net = torchvision.models.get_model(arch)
    inputs = []
    last = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    missing, unexpected = net.load_state_dict(classifier.frozen.encoder.state_dict(), strict=False)
    assert len(missing) == 2 and not unexpected  # the last layer's weight and bias
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    net.eval()(common.models.normalize(images.float() / 255, classifier.frozen.mean, classifier.frozen.std))
    assert (classifier.frozen(images) - inputs[0]).norm() < 1e-5 * inputs[0].norm()


@pytest.mark.long
@pytest.mark.parametrize("arch, size", [("convnext_tiny", 32), ("swin_t", 32), ("densenet121", 32)])
def test_large_ones_do_too(arch, size, tmp_path):
    train_probe_and_corrupt(arch, tmp_path, "--size", size)


@pytest.mark.parametrize("arch", [*FAMILIES, *OTHERS])
def test_r_is_as_wide_as_it_is_said(arch, small_families):
    encoder, width = common.models.build_encoder(arch, None)
    with torch.no_grad():
        assert encoder.eval()(torch.rand(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.long
@pytest.mark.parametrize("arch", common.models.ARCHS)
def test_every_encoder_takes_images_of_224_pixels(arch):
    if sum(map(arch.startswith, ("vit_h", "vit_l", "regnet_y_128", "vgg1"))):
        pytest.skip("gigabytes")
    encoder, width = common.models.build_encoder(arch, "7x7")
    common.models.refuse_size(encoder, arch, 224)
    assert encoder.training and width > 100


def test_images_of_another_size_than_a_vit_takes_are_refused_before_the_run(small_families, tmp_path):
    with pytest.raises(common.cli.Refused, match="--arch vit_b_16 cannot take images of --size 40"):
        train(*RUN, "--size", "40", "--arch", "vit_b_16", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_whose_size_its_encoder_cannot_take_is_refused(small_families, tmp_path):
    train(*RUN, "--arch", "vit_b_16", "--run-dir", tmp_path)
    contents = common.frozen.load_checkpoint(tmp_path / "ckpt.pt")
    contents["config"]["size"] = 40
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(common.cli.Refused, match="names no encoder that pretrain.py builds"):
        common.frozen.load_encoder(tmp_path)


def test_an_encoder_that_asks_for_the_version_of_its_entries_goes_on_and_hands_on_its_weights(tmp_path):
    options = [*RUN, "--arch", "mnasnet0_5"]
    train(*options, "--queue", "10", "--run-dir", tmp_path / "run")
    train("--resume", tmp_path / "run", "--epochs", "2")
    assert probe(tmp_path / "run")["top1"] >= 0
    train(*options, "--init", tmp_path / "run", "--run-dir", tmp_path / "from it")


# ---------------------------------------------------------------- layers that draw at random


def test_both_passes_over_a_part_drop_the_same_paths(small_families, tmp_path, monkeypatch):
    """Gradient caching encodes each part twice; with other draws the gradient would be of another encoder."""
    seen, forward = [], common.models.Model.forward
    monkeypatch.setattr(common.models.Model, "forward", lambda self, x: seen.append(forward(self, x)) or seen[-1])
    train(*RUN, "--arch", "convnext_tiny", "--micro-batch", "5", "--precision", "float64", "--run-dir", tmp_path)
    z = [outputs[0].detach() for outputs in seen]
    assert len(z) == 2 * 2 * 2  # steps, passes, parts
    for first in (0, 4):
        for part in (0, 1):
            torch.testing.assert_close(z[first + part], z[first + 2 + part], rtol=0, atol=1e-12)


def test_a_run_that_goes_on_drops_the_paths_that_it_would_have_dropped(small_families, tmp_path):
    options = [*RUN, "--epochs", "2", "--arch", "convnext_tiny"]
    train(*options, "--run-dir", tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt-previous.pt", tmp_path / "resumed" / "ckpt.pt")
    torch.manual_seed(99)
    train("--resume", tmp_path / "resumed")
    assert same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "resumed"))


def test_the_paths_that_are_dropped_move_with_step_and_part_and_seed():
    drawn = []
    for key, place in (((0, 0, 0), 0), ((0, 0, 0), 5), ((0, 0, 1), 0), ((0, 1, 0), 0), ((1, 0, 0), 0), ((0, 0, 0), 0)):
        common.views.Batch(None, [], [], torch.tensor([place]), place, [], key, None, None).seed_layers()
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[-1] and len(set(drawn)) == 5
