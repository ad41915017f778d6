"""Views of a batch, against torchvision image by image."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as TF

import common.cli
import common.data
import common.views
from runs import folder_of

SEEDS = st.integers(0, 10**6)


def pictures(seed, n=6, size=17):
    return torch.rand(n, 3, size, size, generator=common.data.generator(seed))


@given(SEEDS, st.sampled_from([8, 17, 32]))
def test_each_crop_is_torchvisions_resized_crop_of_the_same_box(seed, size):
    x = pictures(seed, size=size)
    view = common.views.draw_view(6, size, "crop", (seed, 1))
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


@pytest.mark.parametrize(
    "ours, theirs, factors",
    [
        (common.views.brightness, TF.adjust_brightness, (0.6, 1.4)),
        (common.views.contrast, TF.adjust_contrast, (0.6, 1.4)),
        (common.views.saturation, TF.adjust_saturation, (0.6, 1.4)),
        (common.views.hue, TF.adjust_hue, (-0.5, 0.5)),
    ],
)
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
    top, left, height, width = common.views.draw_view(50, 32, "sim", (seed,)).box.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert (height * width > 0.2 * 32**2 - 32).all()


def test_view_frequencies_are_the_recipes():
    view = common.views.draw_view(20_000, 32, "sim", (0,))
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
    sigma = common.views.draw_view(10_000, 224, "sim", (0,)).sigma
    assert abs((sigma > 0).float().mean() - 0.5) < 0.02 and sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2
    assert not common.views.draw_view(1000, 64, "sim", (0,)).sigma.any()
    assert not common.views.draw_view(1000, 224, "crop", (0,)).sigma.any()


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
        draw = common.views.draw_view(8, 32, augment, (0,), crop=False)
        assert (draw.box == torch.tensor([0.0, 0, 32, 32])).all() and not draw.flip.any()
        assert bool(draw.order) == (augment == "stacked-rand")


def test_no_augmentation_is_normalisation_alone():
    pixels = (pictures(3) * 255).to(torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    view = common.views.make_view(pixels, common.views.draw_view(6, 17, "none", (0,)), mean, std)
    assert torch.allclose(view, common.views.normalize(pixels.float() / 255, mean, std), atol=1e-5)


def test_a_ranks_views_are_its_part_of_the_global_batch():
    pixels = (pictures(4, n=8) * 255).to(torch.uint8)
    mean, std = torch.zeros(3), torch.ones(3)
    draw = common.views.draw_view(8, 17, "sim", (0, 1, 0, 0, 0))
    whole = common.views.make_view(pixels, draw, mean, std)
    for part in (slice(0, 3), slice(3, 8)):
        assert torch.equal(common.views.make_view(pixels[part], draw.of(part), mean, std), whole[part])


def numbers_of(view, size):
    """What is drawn for each image, (numbers, images); places as a share of the room that the crop leaves."""
    top, left, height, width = view.box.double().T
    brightness, contrast, saturation, hue = view.jitter.double().T
    return torch.stack(
        [
            top / (size - height).clamp(min=1),
            left / (size - width).clamp(min=1),
            height * width,
            (height / width).log(),
            view.flip.double(),
            brightness,
            contrast,
            saturation,
            hue,
            view.gray.double(),
            (view.sigma > 0).double(),
        ]
    )


def test_what_is_drawn_of_an_image_is_independent_of_all_else_that_is_drawn_of_it():
    view = common.views.draw_view(20_000, 224, "sim", (0,))
    has_room = (view.box[:, 2:] < 200).all(1)
    drawn = numbers_of(view, 224)[:, has_room]
    correlations = drawn.corrcoef().fill_diagonal_(0)
    assert drawn.shape[1] > 10_000 and correlations.abs().max() < 0.04  # four deviations of chance


def test_what_is_drawn_of_an_image_is_independent_of_its_neighbours_in_the_batch_and_of_its_other_view():
    first, second = (
        numbers_of(common.views.draw_view(20_000, 224, "sim", (0, v)), 224) for v in range(2)
    )
    for other in (first.roll(1, 1), second):
        same = torch.stack([torch.stack([a, b]).corrcoef()[0, 1] for a, b in zip(first, other)])
        assert same.abs().max() < 0.03


def test_every_place_of_a_crop_is_equally_likely_its_last_one_too():
    top, left, height, width = common.views.draw_view(40_000, 8, "crop", (0,)).box.long().T
    for place, side in ((top, height), (left, width)):
        for room in (1, 2, 3):
            found = torch.bincount(place[side == 8 - room], minlength=room + 1).double()
            assert len(found) == room + 1 and found.sum() > 2000
            assert (found / found.sum() - 1 / (room + 1)).abs().max() < 0.04


@pytest.mark.seeds_torch
@pytest.mark.parametrize("crop_min", [0.08, 0.2])
def test_crops_are_as_large_and_as_tall_as_torchvisions(crop_min):
    _, _, height, width = (
        common.views.draw_view(20_000, 224, "crop", (0,), crop_min=crop_min).box.double().T
    )
    torch.manual_seed(0)
    blank = torch.empty(3, 224, 224)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(blank, (crop_min, 1), (3 / 4, 4 / 3))[2:] for _ in range(5000)]).double()
    areas, ratios = (height * width, theirs.prod(1)), ((height / width).log(), (theirs[:, 0] / theirs[:, 1]).log())
    for ours, other in (areas, ratios):
        deviation = other.std()
        assert (ours.mean() - other.mean()).abs() < 0.07 * deviation and (ours.std() / deviation - 1).abs() < 0.05
    assert (height / width).log().mean().abs() < 0.005  # tall as often as wide


@pytest.mark.parametrize("jitter", [0.5, 1.0])
def test_colours_are_as_strong_as_simclrs(jitter):
    """Factors in 1 +- 0.8 s, hue in +- 0.2 s: at half strength the reference code's ColorJitter(0.4, 0.4, 0.4, 0.1)."""
    drawn = common.views.draw_view(10_000, 32, "sim", (0,), jitter=jitter).jitter
    for values, middle, reach in zip(drawn.T, (1, 1, 1, 0), (0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter)):
        assert values.min().item() == pytest.approx(middle - reach, abs=0.01 * reach)
        assert values.max().item() == pytest.approx(middle + reach, abs=0.01 * reach)


@pytest.mark.parametrize("size", [17, 80])
def test_a_view_is_torchvisions_steps_in_the_drawn_order(size):
    pixels = (pictures(7, n=40, size=size) * 255).to(torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    view = common.views.draw_view(40, size, "sim", (2,))
    jitters = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    assert view.gray.any() and view.flip.any() and bool((view.sigma > 0).any()) == (size > 64)
    for k, got in enumerate(common.views.make_view(pixels, view, mean, std)):
        x = TF.resized_crop(pixels[k].float() / 255, *view.box[k].int().tolist(), [size, size], antialias=True)
        x = TF.horizontal_flip(x) if view.flip[k] else x
        for j in view.order:
            x = jitters[j](x, view.jitter[k, j].item())
        x = TF.rgb_to_grayscale(x, 3) if view.gray[k] else x
        x = TF.gaussian_blur(x, 2 * (size // 20) + 1, [view.sigma[k].item()] * 2) if view.sigma[k] > 0 else x
        assert torch.allclose(got, TF.normalize(x, mean.tolist(), std.tolist()), atol=5e-4)


def test_workers_crop_no_more_than_they_are_asked_to_and_stacked_rand_changes_more_than_rand():
    pixels = (pictures(8, n=1, size=32) * 255).to(torch.uint8)
    of = lambda augment, crop_min: common.views.WorkerViews(common.data.Data(pixels, None, None), augment, crop_min)
    whole = [pixels[0], pixels[0].flip(2)]
    assert all(any(torch.equal(of("crop", 1.0)[0, k], image) for image in whole) for k in range(20))
    assert not any(torch.equal(of("crop", 0.2)[0, k], image) for k in range(20) for image in whole)
    change_of = lambda policy: sum((of(policy, 1.0)[0, k].float() - whole[0]).abs().mean() for k in range(60))
    assert change_of("stacked-rand") > 1.05 * change_of("rand")  # of the same keys


# ---------------------------------------------------------------- systems without forks


def streamed(folder):
    folder_of(folder, ["train"], ["a", "b"], count=3)
    return common.data.load_data("folder", folder, True, size=16, stream=True)


ITEMS = [[(0, "x", 1), (3, "x", 2)], [(5, "x", 3), (0, "x", 4)]]


@pytest.mark.parametrize("augment", common.views.AUGMENTATIONS)
def test_what_workers_do_reaches_a_process_that_starts_anew(augment, tmp_path):
    views = common.views.WorkerViews(streamed(tmp_path), augment)
    sent = pickle.loads(pickle.dumps(views))
    assert all(torch.equal(views[item], sent[item]) for batch in ITEMS for item in batch)


@pytest.mark.parametrize("method, sigchld", [("spawn", common.views.SIGCHLD), ("fork", None)])
def test_spawned_workers_and_systems_without_sigchld_make_the_same_bits(method, sigchld, tmp_path, monkeypatch):
    views = common.views.WorkerViews(streamed(tmp_path), "stacked-rand")
    alone = list(common.views.worker_batches(views, ITEMS, 0))
    monkeypatch.setattr(common.views, "START_METHOD", method)
    monkeypatch.setattr(common.views, "SIGCHLD", sigchld)
    assert all(map(torch.equal, common.views.worker_batches(views, ITEMS, 1), alone))


def test_a_file_that_a_spawned_worker_cannot_read_is_named(tmp_path, monkeypatch):
    data = streamed(tmp_path)
    Path(data.files[3]).write_bytes(b"no picture")
    monkeypatch.setattr(common.views, "START_METHOD", "spawn")
    with pytest.raises(common.cli.Refused, match=data.files[3]):
        list(common.views.worker_batches(common.views.WorkerViews(data, "crop"), ITEMS, 1))


@pytest.mark.parametrize("first, n", [(0, 1), (3, 5), (7, 1), (1000, 24)])
def test_the_views_of_an_image_are_the_same_whoever_draws_them(first, n):
    """A rank draws the views of its own images alone."""
    key = ("views", 7, 2, 41, 1)
    whole = common.views.draw_view(1024, 96, "sim", key).of(slice(first, first + n))
    part = common.views.draw_view(n, 96, "sim", key, first)
    assert part.order == whole.order
    for mine, same in zip(part[:-1], whole[:-1]):
        assert torch.equal(mine, same)


def test_numbers_of_places_and_keys_are_uniform_and_apart():
    """The mean of 2^18 numbers strays by 6e-4 (one deviation), and so do the products with the next place and key."""
    u = torch.stack([common.data.uniforms(8192, 32, "a key", k, first=5) for k in range(2)])
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) > 0.97 * u.numel()
    centred = u.double() - 0.5
    assert centred.mean().abs() < 3e-3 and (centred.square().mean() - 1 / 12).abs() < 1e-3
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2)):
        assert (centred * other).mean().abs() < 1e-3


def test_the_order_of_the_colours_is_drawn_apart_from_the_crop_and_for_each_view():
    views = [common.views.draw_view(1, 224, "sim", ("views", k)) for k in range(2000)]
    area = torch.tensor([view.box[0, 2:].prod() for view in views])
    place = torch.tensor([view.order.index(0) for view in views], dtype=torch.float)
    assert torch.stack([area, place]).corrcoef()[0, 1].abs() < 0.1
    first, second = ([common.views.draw_view(1, 8, "sim", ("views", k, v)).order for k in range(20)] for v in range(2))
    assert first != second


@pytest.mark.parametrize("size, policy", [(32, "CIFAR10"), (64, "CIFAR10"), (65, "IMAGENET")])
def test_small_images_take_the_policies_of_cifar(size, policy):
    data = common.data.Data(torch.zeros(1, 3, size, size, dtype=torch.uint8), None, None)
    steps = common.views.WorkerViews(data, "auto").transform.transforms
    (step,) = [step for step in steps if isinstance(step, transforms.AutoAugment)]
    assert step.policy == transforms.AutoAugmentPolicy[policy]


def test_colours_and_blur_have_the_range_of_simclrs():
    assert common.views.draw_view(500, 8, "sim", (0,), jitter=2.0).jitter[:, :3].min() >= 0
    sigma = common.views.draw_view(10_000, 224, "sim", (0,)).sigma
    assert 1.99 < sigma.max() <= 2 and 0.1 <= sigma[sigma > 0].min() < 0.11
