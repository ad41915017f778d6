"""Encoders, heads, and the losses as pretrain.py puts them together."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchvision

import common.models
import common.objectives
import pretrain

pytestmark = pytest.mark.seeds_torch  # layers draw their first weights


def test_n_pair_of_groups_never_sets_a_class_against_itself():
    f = torch.randn(12, 4, dtype=torch.double)
    expected = sum(pretrain.losses.n_pair(f[i : i + 3], f[i : i + 3] * 2) for i in (0, 3, 6, 9)) / 4
    assert torch.isclose(common.objectives.grouped_n_pair(f, f * 2, 3), expected)


def test_collapsed_features_give_the_announced_loss_and_nothing_falls_below_the_floor():
    labels = torch.arange(4).repeat(8)
    config = SimpleNamespace(
        loss="supcon", batch=32, views=2, loss_scale=1.5, tau=0.1, ce_weight=0, mix=None, queue=0, balanced=False
    )
    images = torch.arange(len(labels))
    loss_of = lambda z: common.objectives.total_loss(config, z, None, labels.repeat(2), images).item()
    collapse, floor = common.objectives.collapse_and_floor(config, labels)
    same = torch.ones(64, 3, dtype=torch.double) / math.sqrt(3)
    assert loss_of(same) == pytest.approx(collapse)
    apart = torch.eye(4, dtype=torch.double)[labels.repeat(2)]
    assert floor <= loss_of(apart) < floor + 0.01
    config.loss, config.tau = "simclr", 0.01
    collapse, floor = common.objectives.collapse_and_floor(config, labels)
    assert floor == 0 and loss_of(same) == pytest.approx(collapse)


def test_joint_loss_weighs_contrast_and_cross_entropy_and_detach_cuts_the_encoder():
    z, logits, labels = torch.randn(8, 3), torch.randn(8, 2), torch.tensor([0, 1, 0, 1])
    config = SimpleNamespace(loss="supcon", views=2, loss_scale=2.0, tau=0.1, ce_weight=0.25, label_smoothing=0.0)
    y = labels.repeat(2)
    expected = 0.75 * 2 * pretrain.losses.supcon_out(z, y) + 0.25 * torch.nn.functional.cross_entropy(logits, y)
    assert torch.isclose(common.objectives.total_loss(config, z, logits, y, torch.arange(len(labels))), expected)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    for detach in (True, False):
        model = common.models.Model(encoder, None, torch.nn.Linear(5, 2), detach=detach)
        encoder.zero_grad()
        model(torch.randn(4, 3, 2, 2))[1].sum().backward()
        assert (encoder[1].weight.grad is None) == detach


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_encoder_entries_load_into_torchvisions_model(arch):
    encoder, width = common.models.build_encoder(arch, "7x7")
    net = getattr(torchvision.models, arch)()
    missing, unexpected = net.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected and width == net.fc.in_features


def test_small_images_keep_their_resolution_through_the_3x3_stem():
    encoder, _ = common.models.build_encoder("resnet18", "3x3")
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-1]))
    with torch.no_grad():
        encoder.eval()(torch.rand(1, 3, 32, 32))
    assert shapes == [32]


def test_resnet200_is_as_deep_as_its_name():
    with torch.device("meta"):
        encoder, _ = common.models.build_encoder("resnet200", "7x7")
    on_the_path = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in n]
    assert len(on_the_path) + 1 == 200  # and the linear layer that is left off
