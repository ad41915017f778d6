"""Views of a batch, against torchvision image by image."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

import common.data
import common.views

SEEDS = st.integers(0, 10**6)


def pictures(seed, n=6, size=17):
    return torch.rand(n, 3, size, size, generator=common.data.generator(seed))


@given(SEEDS, st.sampled_from([8, 17, 32]))
def test_each_crop_is_torchvisions_resized_crop_of_the_same_box(seed, size):
    x = pictures(seed, size=size)
    view = common.views.draw_view(6, size, "crop", common.data.generator(seed, 1))
    ours = common.views.crop_and_flip(x, view.box, view.flip)
    for image, box, flip, got in zip(x, view.box.int().tolist(), view.flip, ours):
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        expected = TF.horizontal_flip(expected) if flip else expected
        assert torch.allclose(got, expected, atol=1e-5)


@given(SEEDS, st.integers(5, 40), st.integers(5, 40))
def test_shrinking_and_stretching_are_torchvisions_antialiased_resize(seed, height, width):
    x = pictures(seed, n=1, size=40)
    got = common.views.crop_and_flip(x, torch.tensor([[0.0, 0.0, height, width]]), torch.tensor([False]))
    assert torch.allclose(got, TF.resize(x[:, :, :height, :width], [40, 40], antialias=True), atol=1e-5)


@pytest.mark.parametrize("ours, theirs, factors", [
    (common.views.brightness, TF.adjust_brightness, (0.6, 1.4)),
    (common.views.contrast, TF.adjust_contrast, (0.6, 1.4)),
    (common.views.saturation, TF.adjust_saturation, (0.6, 1.4)),
    (common.views.hue, TF.adjust_hue, (-0.5, 0.5)),
])
@given(seed=SEEDS)
def test_each_jitter_is_torchvisions_image_by_image(ours, theirs, factors, seed):
    x = pictures(seed)
    factor = torch.rand(len(x), generator=common.data.generator(seed, 2)) * (factors[1] - factors[0]) + factors[0]
    for image, f, got in zip(x, factor.tolist(), ours(x, factor[:, None, None, None])):
        assert torch.allclose(got, theirs(image, f), atol=2e-5)


def test_grey_images_stay_grey_under_a_turn_of_the_hue():
    x = pictures(0, size=5)[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(common.views.hue(x, torch.full((6, 1, 1, 1), 0.3)), x, atol=1e-6)


@given(SEEDS)
def test_boxes_lie_in_the_image_and_take_a_fifth_of_it_or_more(seed):
    top, left, height, width = common.views.draw_view(50, 32, "sim", common.data.generator(seed)).box.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert (height * width > 0.2 * 32**2 - 32).all()


def test_view_frequencies_are_the_recipes():
    view = common.views.draw_view(20_000, 32, "sim", common.data.generator(0))
    untouched = (view.jitter == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1).float().mean()
    assert abs(view.flip.float().mean() - 0.5) < 0.02
    assert abs(untouched - 0.2) < 0.02 and abs(view.gray.float().mean() - 0.2) < 0.02
    assert sorted(view.order) == [0, 1, 2, 3]


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([65, 80, 224]))
def test_blur_is_torchvisions(seed, size):
    x = pictures(seed, n=4, size=size)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    ours = common.views.blur(x, sigma)
    for image, blurred, s in zip(x, ours, sigma.tolist()):
        assert torch.allclose(blurred, TF.gaussian_blur(image, 2 * (size // 20) + 1, [s, s]), atol=1e-5)


def test_half_of_the_large_images_are_blurred_and_no_small_one():
    sigma = common.views.draw_view(10_000, 224, "sim", common.data.generator(0)).sigma
    assert abs((sigma > 0).float().mean() - 0.5) < 0.02 and sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2
    assert not common.views.draw_view(1000, 64, "sim", common.data.generator(0)).sigma.any()
    assert not common.views.draw_view(1000, 224, "crop", common.data.generator(0)).sigma.any()


@pytest.mark.parametrize("augment", common.views.POLICIES)
def test_a_policys_view_depends_on_its_key_alone(augment):
    pixels = (pictures(1, n=5, size=32) * 255).to(torch.uint8)
    views, before = common.views.WorkerViews(common.data.Data(pixels, None, None), augment), torch.get_rng_state()
    first = [views[row, 0, 2, row] for row in range(5)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in first)
    assert all(torch.equal(views[row, 0, 2, row], first[row]) for row in (3, 1, 4))
    assert not torch.equal(views[0, 0, 2, 9], first[0])
    assert torch.equal(torch.get_rng_state(), before)
    items = [[(0, 0, 2, 0), (1, 0, 2, 1)], [(2, 0, 2, 2)]]
    for workers in (0, 2):
        batches = list(common.views.worker_batches(views, items, workers))
        assert torch.equal(torch.cat(batches), torch.stack(first[:3]))


def test_the_policies_leave_crop_and_flip_to_the_workers_and_stacked_rand_keeps_the_colours():
    for augment in common.views.POLICIES:
        draw = common.views.draw_view(8, 32, augment, common.data.generator(0), crop=False)
        assert (draw.box == torch.tensor([0.0, 0, 32, 32])).all() and not draw.flip.any()
        assert bool(draw.order) == (augment == "stacked-rand")


def test_no_augmentation_is_normalisation_alone():
    pixels = (pictures(3) * 255).to(torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    view = common.views.make_view(pixels, common.views.draw_view(6, 17, "none", common.data.generator(0)), mean, std)
    assert torch.allclose(view, common.views.normalize(pixels.float() / 255, mean, std), atol=1e-5)


def test_a_ranks_views_are_its_part_of_the_global_batch():
    pixels = (pictures(4, n=8) * 255).to(torch.uint8)
    mean, std = torch.zeros(3), torch.ones(3)
    draw = common.views.draw_view(8, 17, "sim", common.data.generator(0, 1, 0, 0, 0))
    whole = common.views.make_view(pixels, draw, mean, std)
    for part in (slice(0, 3), slice(3, 8)):
        assert torch.equal(common.views.make_view(pixels[part], draw.of(part), mean, std), whole[part])
