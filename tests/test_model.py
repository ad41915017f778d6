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


def marks_and_loss(loss, tau, labels, views=2):
    """(collapse, floor, a function of z): of a batch that holds every one of the labels."""
    config = SimpleNamespace(loss=loss, batch=len(labels), views=views, loss_scale=1.5, tau=tau, ce_weight=0, mix=None,
                             queue=0, balanced=False, denominator="all", positives_cap=None)
    images = torch.arange(len(labels))
    loss_of = lambda z: common.objectives.total_loss(config, z, None, labels.repeat(views), images)
    return *common.objectives.collapse_and_floor(config, labels), loss_of


@pytest.mark.parametrize("loss", ["supcon", "supcon-in", "simclr"])
def test_collapsed_features_give_the_announced_loss(loss):
    collapse, _, loss_of = marks_and_loss(loss, 0.1, torch.arange(4).repeat(8))
    assert loss_of(torch.ones(64, 3, dtype=torch.double) / math.sqrt(3)).item() == pytest.approx(collapse)


@pytest.mark.parametrize("tau", [0.2, 0.5])
@pytest.mark.parametrize("loss, views", [("supcon", 2), ("supcon-in", 2), ("simclr", 2), ("simclr", 3)])
def test_rows_that_are_free_to_move_reach_the_floor_and_never_fall_below_it(loss, views, tau):
    labels = torch.arange(4).repeat(3)
    _, floor, loss_of = marks_and_loss(loss, tau, labels, views)
    z = torch.randn(12 * views, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=300, line_search_fn="strong_wolfe")
    seen = []

    def closure():
        optimizer.zero_grad()
        value = loss_of(torch.nn.functional.normalize(z))
        value.backward()
        seen.append(value.item())
        return value

    optimizer.step(closure)
    assert floor - 1e-9 < min(seen) < floor + 1e-4


def test_the_floor_of_simclr_is_not_zero():
    """Batch 1024 at tau 0.5 with the reference code's factor: users ask why their loss stays at 43."""
    config = SimpleNamespace(loss="simclr", batch=1024, views=2, loss_scale=0.5 / 0.07, tau=0.5, ce_weight=0, mix=None,
                             queue=0, balanced=False, denominator="all", positives_cap=None)
    collapse, floor = common.objectives.collapse_and_floor(config, torch.zeros(1024, dtype=torch.long))
    assert (collapse, floor) == (pytest.approx(54.46, abs=0.01), pytest.approx(40.18, abs=0.01))


def test_joint_loss_weighs_contrast_and_cross_entropy_and_detach_cuts_the_encoder():
    z, logits, labels = torch.randn(8, 3), torch.randn(8, 2), torch.tensor([0, 1, 0, 1])
    config = SimpleNamespace(loss="supcon", views=2, loss_scale=2.0, tau=0.1, ce_weight=0.25, label_smoothing=0.0,
                             denominator="all", positives_cap=None)
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


def test_the_3x3_stem_begins_with_weights_of_torchvisions_deviation():
    weight = common.models.build_encoder("resnet18", "3x3")[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
