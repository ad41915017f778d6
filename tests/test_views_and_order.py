"""images.py, and the schedule and marks of pretrain.py, against torchvision and by hand."""
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF
from types import SimpleNamespace

import images
import metrics
import pretrain

SEEDS = st.integers(0, 10**6)


def pictures(seed, n=6, size=17):
    return torch.rand(n, 3, size, size, generator=images.generator(seed))


@given(SEEDS, st.sampled_from([8, 17, 32]))
def test_each_crop_is_torchvisions_resized_crop_of_the_same_box(seed, size):
    x = pictures(seed, size=size)
    view = images.draw_view(6, size, "crop", images.generator(seed, 1))
    ours = images.crop_and_flip(x, view.box, view.flip)
    for image, box, flip, got in zip(x, view.box.int().tolist(), view.flip, ours):
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        expected = TF.horizontal_flip(expected) if flip else expected
        assert torch.allclose(got, expected, atol=1e-5)


@given(SEEDS, st.integers(5, 40), st.integers(5, 40))
def test_shrinking_and_stretching_are_torchvisions_antialiased_resize(seed, height, width):
    x = pictures(seed, n=1, size=40)
    got = images.crop_and_flip(x, torch.tensor([[0.0, 0.0, height, width]]), torch.tensor([False]))
    assert torch.allclose(got, TF.resize(x[:, :, :height, :width], [40, 40], antialias=True), atol=1e-5)


@pytest.mark.parametrize("ours, theirs, factors", [
    (images.brightness, TF.adjust_brightness, (0.6, 1.4)),
    (images.contrast, TF.adjust_contrast, (0.6, 1.4)),
    (images.saturation, TF.adjust_saturation, (0.6, 1.4)),
    (images.hue, TF.adjust_hue, (-0.5, 0.5)),
])
@given(seed=SEEDS)
def test_each_jitter_is_torchvisions_image_by_image(ours, theirs, factors, seed):
    x = pictures(seed)
    factor = torch.rand(len(x), generator=images.generator(seed, 2)) * (factors[1] - factors[0]) + factors[0]
    for image, f, got in zip(x, factor.tolist(), ours(x, factor[:, None, None, None])):
        assert torch.allclose(got, theirs(image, f), atol=2e-5)


def test_grey_images_stay_grey_under_a_turn_of_the_hue():
    x = torch.rand(4, 1, 5, 5).expand(4, 3, 5, 5)
    assert torch.allclose(images.hue(x, torch.full((4, 1, 1, 1), 0.3)), x, atol=1e-6)


@given(SEEDS)
def test_boxes_lie_in_the_image_and_take_a_fifth_of_it_or_more(seed):
    top, left, height, width = images.draw_view(50, 32, "sim", images.generator(seed)).box.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert (height * width > 0.2 * 32**2 - 32).all()


def test_view_frequencies_are_the_recipes():
    view = images.draw_view(20_000, 32, "sim", images.generator(0))
    untouched = (view.jitter == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1).float().mean()
    assert abs(view.flip.float().mean() - 0.5) < 0.02
    assert abs(untouched - 0.2) < 0.02 and abs(view.gray.float().mean() - 0.2) < 0.02
    assert sorted(view.order) == [0, 1, 2, 3]


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([65, 80, 224]))
def test_blur_is_torchvisions(seed, size):
    x = pictures(seed, n=4, size=size)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    ours = images.blur(x, sigma)
    for image, blurred, s in zip(x, ours, sigma.tolist()):
        assert torch.allclose(blurred, TF.gaussian_blur(image, 2 * (size // 20) + 1, [s, s]), atol=1e-5)


def test_half_of_the_large_images_are_blurred_and_no_small_one():
    sigma = images.draw_view(10_000, 224, "sim", images.generator(0)).sigma
    assert abs((sigma > 0).float().mean() - 0.5) < 0.02 and sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2
    assert not images.draw_view(1000, 64, "sim", images.generator(0)).sigma.any()
    assert not images.draw_view(1000, 224, "crop", images.generator(0)).sigma.any()


@pytest.mark.parametrize("augment", images.POLICIES)
def test_a_policys_view_depends_on_its_key_alone(augment):
    pixels = (pictures(1, n=5, size=32) * 255).to(torch.uint8)
    views, before = images.WorkerViews(images.Data(pixels, None, None), augment), torch.get_rng_state()
    first = [views[row, 0, 2, row] for row in range(5)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in first)
    assert all(torch.equal(views[row, 0, 2, row], first[row]) for row in (3, 1, 4))
    assert not torch.equal(views[0, 0, 2, 9], first[0])
    assert torch.equal(torch.get_rng_state(), before)
    items = [[(0, 0, 2, 0), (1, 0, 2, 1)], [(2, 0, 2, 2)]]
    for workers in (0, 2):
        batches = list(images.worker_batches(views, items, workers))
        assert torch.equal(torch.cat(batches), torch.stack(first[:3]))


def test_the_policies_leave_crop_and_flip_to_the_workers_and_stacked_rand_keeps_the_colours():
    for augment in images.POLICIES:
        draw = images.draw_view(8, 32, augment, images.generator(0), crop=False)
        assert (draw.box == torch.tensor([0.0, 0, 32, 32])).all() and not draw.flip.any()
        assert bool(draw.order) == (augment == "stacked-rand")


def test_no_augmentation_is_normalisation_alone():
    pixels = (pictures(3) * 255).to(torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    view = images.make_view(pixels, images.draw_view(6, 17, "none", images.generator(0)), mean, std)
    assert torch.allclose(view, images.normalize(pixels.float() / 255, mean, std), atol=1e-5)


def test_a_ranks_views_are_its_part_of_the_global_batch():
    pixels = (pictures(4, n=8) * 255).to(torch.uint8)
    mean, std = torch.zeros(3), torch.ones(3)
    draw = images.draw_view(8, 17, "sim", images.generator(0, 1, 0, 0, 0))
    whole = images.make_view(pixels, draw, mean, std)
    for part in (slice(0, 3), slice(3, 8)):
        assert torch.equal(images.make_view(pixels[part], pretrain.part_of(draw, part, "cpu"), mean, std), whole[part])


@given(SEEDS, st.integers(2, 6), st.integers(0, 5))
def test_pairs_show_two_images_of_a_class_and_any_row_of_c_pairs_shows_c_classes(seed, classes, start):
    labels = torch.cat([torch.arange(classes).repeat(7), torch.tensor([0, 0, 0])])
    order = images.shuffled_pairs(labels, images.generator(seed))
    assert len(order) == len(labels)
    a, b = order[: len(order) // 2 * 2].view(-1, 2).T
    assert (labels[a] == labels[b]).all() and (a != b).all()
    for group in labels[a][start:].split(classes)[:-1]:
        assert len(group.unique()) == classes


def test_n_pair_of_groups_never_sets_a_class_against_itself():
    f = torch.randn(12, 4, dtype=torch.double)
    expected = sum(pretrain.losses.n_pair(f[i : i + 3], f[i : i + 3] * 2) for i in (0, 3, 6, 9)) / 4
    assert torch.isclose(pretrain.grouped_n_pair(f, f * 2, 3), expected)


def test_schedule_is_the_reference_codes():
    config = SimpleNamespace(lr=0.5, epochs=1000, warmup=10, warmup_from=0.01, schedule="cosine")
    rate = lambda step: pretrain.learning_rate(config, step, 48)
    assert rate(0) == pytest.approx(0.01)
    # the reference warms up to its cosine's value at epoch 10: 5e-4 + (0.5 - 5e-4) (1 + cos(pi 10/1000)) / 2 = 0.49988
    assert rate(480) == pytest.approx(0.49988, abs=1e-5)
    assert rate(240) == pytest.approx((0.01 + 0.49988) / 2, abs=1e-5)
    assert rate(48_000) == pytest.approx(0.5e-3)
    config.schedule = "step"
    assert [round(rate(48 * e), 6) for e in (20, 700, 800, 900)] == [0.5, 0.05, 0.005, 0.0005]


def test_collapsed_features_give_the_announced_loss_and_nothing_falls_below_the_floor():
    labels = torch.arange(4).repeat(8)
    config = SimpleNamespace(loss="supcon", batch=32, views=2, loss_scale=1.5, tau=0.1, ce_weight=0, mix=None, queue=0, balanced=False)
    collapse, floor = pretrain.collapse_and_floor(config, labels)
    same = torch.ones(64, 3, dtype=torch.double) / math.sqrt(3)
    assert 1.5 * pretrain.contrastive_loss(config, same, labels.repeat(2), torch.arange(len(labels)), None).item() == pytest.approx(collapse)
    apart = torch.eye(4, dtype=torch.double)[labels.repeat(2)]
    assert floor <= 1.5 * pretrain.contrastive_loss(config, apart, labels.repeat(2), torch.arange(len(labels)), None).item() < floor + 0.01
    config.loss, config.tau = "simclr", 0.01
    collapse, floor = pretrain.collapse_and_floor(config, labels)
    assert floor == 0 and 1.5 * pretrain.contrastive_loss(config, same, labels.repeat(2), torch.arange(len(labels)), None).item() == pytest.approx(collapse)


def test_joint_loss_weighs_contrast_and_cross_entropy_and_detach_cuts_the_encoder():
    z, logits, labels = torch.randn(8, 3), torch.randn(8, 2), torch.tensor([0, 1, 0, 1])
    config = SimpleNamespace(loss="supcon", views=2, loss_scale=2.0, tau=0.1, ce_weight=0.25, label_smoothing=0.0)
    y = labels.repeat(2)
    expected = 0.75 * 2 * pretrain.losses.supcon_out(z, y) + 0.25 * torch.nn.functional.cross_entropy(logits, y)
    assert torch.isclose(pretrain.total_loss(config, z, logits, y, torch.arange(len(labels))), expected)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    for detach in (True, False):
        model = pretrain.Model(encoder, None, torch.nn.Linear(5, 2), detach=detach)
        encoder.zero_grad()
        model(torch.randn(4, 3, 2, 2))[1].sum().backward()
        assert (encoder[1].weight.grad is None) == detach


def test_weighted_neighbours_outvote_the_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-0.1, 1.0]])
    query = torch.tensor([[1.0, 0.1], [0.0, 2.0]])  # nearest: the one row of class 1; then three rows of class 0
    assert metrics.knn_top1(bank, torch.tensor([1, 0, 0, 0]), query, torch.tensor([1, 0])) == 100
    assert metrics.knn_top1(bank, torch.tensor([1, 0, 0, 0]), query, torch.tensor([0, 0])) == 50


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_encoder_entries_load_into_torchvisions_model(arch):
    encoder, width = pretrain.build_encoder(arch, "7x7")
    net = getattr(torchvision.models, arch)()
    missing, unexpected = net.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected and width == net.fc.in_features


def test_small_images_keep_their_resolution_through_the_3x3_stem():
    encoder, _ = pretrain.build_encoder("resnet18", "3x3")
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-1]))
    with torch.no_grad():
        encoder.eval()(torch.rand(1, 3, 32, 32))
    assert shapes == [32]


def test_resnet200_is_as_deep_as_its_name():
    with torch.device("meta"):
        encoder, _ = pretrain.build_encoder("resnet200", "7x7")
    on_the_path = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in n]
    assert len(on_the_path) + 1 == 200  # and the linear layer that is left off


def test_shapes_are_reproducible_balanced_and_differ_between_training_and_test():
    a, b = images.shapes(500, 32, 1), images.shapes(500, 32, 1)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert torch.bincount(a.labels, minlength=10).min() > 25 and len(a.classes) == 10
    assert not torch.equal(a.images, images.shapes(500, 32, 0).images)


def test_folder_reads_classes_sizes_and_grey_images(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = torch.full((1 if i else 3, 20 + i, 30), 100 * label + 50, dtype=torch.uint8)
                TF.to_pil_image(image).save(tmp_path / split / name / f"{i}.png")
    data = images.load_data("folder", tmp_path, True, size=16)
    assert data.images.shape == (6, 3, 16, 16) and data.classes == ["cat", "dog"]
    assert torch.equal(data.images[:, 0, 8, 8].long(), 100 * data.labels + 50)
    assert torch.equal(data.images[:, 0], data.images[:, 2])
    assert len(images.load_data("folder", tmp_path, False, size=16).labels) == 2
    streamed = images.load_data("folder", tmp_path, True, size=16, stream=True)
    assert torch.equal(streamed.labels, data.labels) and torch.equal(streamed.images, data.images)
    views = images.WorkerViews(streamed, "none")
    assert all(torch.equal(views[row, 0], data.images[row]) for row in range(6))
