"""The corruptions that are made here: the benchmark's parameters, and each by hand or against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
import common.corruptions
import common.data


def pictures(n=6, size=32):
    return common.data.shapes(n, size, seed=3).images


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", common.corruptions.MADE)
def test_corruptions_are_drawn_from_their_key_and_grow_with_severity(name, size):
    x = pictures(8, size)
    made = [common.corruptions.corrupt(x, name, s, common.data.generator(0, s)) for s in range(1, 6)]
    again = common.corruptions.corrupt(x, name, 5, common.data.generator(0, 5))
    assert torch.equal(made[4], again) and all(m.shape == x.shape and m.dtype == torch.uint8 for m in made)
    change = [(m.float() - x.float()).square().mean().item() for m in made]
    assert min(change) > 0 and (
        name == "elastic_transform" or change[4] > 1.2 * change[0]
    )  # its kinds of severity differ


def test_the_parameters_are_the_benchmarks():
    """github.com/hendrycks/robustness, make_cifar_c.py and imagenet_c/corruptions.py."""
    small = {
        "gaussian_noise": "0.04 0.06 0.08 0.09 0.1",
        "shot_noise": "500 250 100 75 50",
        "impulse_noise": "0.01 0.02 0.03 0.05 0.07",
        "defocus_blur": "0.3 0.4 0.4 0.5 0.5 0.6 1 0.2 1.5 0.1",
        "brightness": "0.05 0.1 0.15 0.2 0.3",
        "contrast": "0.75 0.5 0.4 0.3 0.15",
        "elastic_transform": "0 0 0.08 0.05 0.2 0.07 0.08 0.06 0.06 0.1 0.04 0.05 0.1 0.03 0.03",
        "pixelate": "0.95 0.9 0.85 0.75 0.65",
        "jpeg_compression": "80 65 58 50 40",
    }
    large = {
        "gaussian_noise": "0.08 0.12 0.18 0.26 0.38",
        "shot_noise": "60 25 12 5 3",
        "impulse_noise": "0.03 0.06 0.09 0.17 0.27",
        "defocus_blur": "3 0.1 4 0.5 6 0.5 8 0.5 10 0.5",
        "brightness": "0.1 0.2 0.3 0.4 0.5",
        "contrast": "0.4 0.3 0.2 0.1 0.05",
        "elastic_transform": "2 0.7 0.1 2 0.08 0.2 0.05 0.01 0.02 0.07 0.01 0.02 0.12 0.01 0.02",
        "pixelate": "0.6 0.5 0.4 0.3 0.25",
        "jpeg_compression": "25 18 15 10 7",
    }
    for ours, theirs in ((common.corruptions.SMALL, small), (common.corruptions.LARGE, large)):
        assert {name: list(np.ravel(c)) for name, c in ours.items() if name != "zoom_blur"} == {
            name: [float(v) for v in c.split()] for name, c in theirs.items()
        }


def test_elastic_displacements_are_measured_in_the_benchmarks_244_pixels(monkeypatch):
    sigmas, rows = [], common.corruptions.gaussian_rows
    monkeypatch.setattr(
        common.corruptions, "gaussian_rows", lambda size, sigma: sigmas.append(sigma) or rows(size, sigma)
    )
    for size in (224, 32):
        common.corruptions.elastic_transform(torch.zeros(1, 3, size, size), (0.1, 0.05, 0.1), common.data.generator(0))
    assert sigmas == pytest.approx([0.05 * 244, 0.05 * 32])


def zoom_blurred(image, zooms):
    """The benchmark's zoom blur of (H, H, 3), pixel by pixel: the mean of the image and of its enlarged middles."""
    H, total = len(image), image.copy()
    for zoom in zooms:
        part = int(np.ceil(H / zoom))
        top = (H - part) // 2
        size = round(part * zoom)
        places = np.arange(size) * (part - 1) / (size - 1)  # linear, from the first pixel to the last one
        below = np.minimum(places.astype(int), part - 2)
        share = (places - below)[:, None]
        middle = image[top : top + part, top : top + part]
        rows = middle[below] * (1 - share[:, None]) + middle[below + 1] * share[:, None]
        enlarged = rows[:, below] * (1 - share) + rows[:, below + 1] * share
        trim = (size - H) // 2
        total += enlarged[trim : trim + H, trim : trim + H]
    return total / (len(zooms) + 1)


@pytest.mark.parametrize("size, severity", [(32, 1), (32, 5), (64, 5), (34, 5), (80, 3), (88, 5), (96, 2)])
def test_zooms_are_those_of_the_benchmarks_float_ranges(size, severity):
    """np.arange(1, 1.26, 0.01)[25] is 1.2500000000000002, so that 26 rows become 33 and not 32."""
    small = [np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)]
    ends_and_steps = (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)
    large = [np.arange(1, end, step) for end, step in ends_and_steps]
    zooms = (small if size <= 64 else large)[severity - 1]
    x = pictures(2, size)
    made = common.corruptions.corrupt(x, "zoom_blur", severity, None, as_files=False)
    for image, ours in zip(x, made):
        theirs = zoom_blurred(image.permute(1, 2, 0).double().numpy() / 255, zooms)
        assert np.abs(255 * theirs - ours.permute(1, 2, 0).numpy()).max() < 1.01  # ours is cut off to whole numbers


def test_images_above_64_pixels_pass_through_a_jpeg_file_of_quality_85():
    for size, passes in ((64, False), (80, True)):
        x = pictures(3, size)
        g = lambda: common.data.generator(0, 1)
        made = common.corruptions.corrupt(x, "gaussian_noise", 3, g())
        plain = common.corruptions.corrupt(x, "gaussian_noise", 3, g(), as_files=False)
        assert torch.equal(made, plain) != passes
        assert torch.equal(made, common.corruptions.jpeg_compression(plain, 85)) == passes


def test_noises_have_their_variances():
    x = torch.full((4, 3, 64, 64), 0.5)
    assert common.corruptions.gaussian_noise(x, 0.1, common.data.generator(0)).std().item() == pytest.approx(
        0.1, rel=0.02
    )
    assert common.corruptions.shot_noise(x, 100, common.data.generator(0)).var().item() == pytest.approx(
        0.5 / 100, rel=0.05
    )
    hit = common.corruptions.impulse_noise(x, 0.06, common.data.generator(0))
    assert (hit == 1).float().mean().item() == pytest.approx(0.03, rel=0.1) and (
        hit == 0
    ).float().mean().item() == pytest.approx(0.03, rel=0.1)


def test_deterministic_corruptions_by_hand():
    x = pictures().float() / 255
    flat = torch.full((1, 3, 32, 32), 0.4)
    for c in common.corruptions.SMALL["defocus_blur"] + common.corruptions.LARGE["defocus_blur"]:
        torch.testing.assert_close(
            common.corruptions.defocus_blur(flat, c, None), flat, rtol=0.02, atol=0
        )  # the kernel sums to 1, or nearly, as the benchmark's
    dot = torch.zeros(1, 3, 33, 33)
    dot[..., 16, 16] = 1
    spread = common.corruptions.defocus_blur(dot, (3, 0.1), None)[0, 0] > 1e-3
    assert spread.sum() == sum(i * i + j * j <= 9 for i in range(-3, 4) for j in range(-3, 4))
    torch.testing.assert_close(common.corruptions.contrast(x, 0.3, None).mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(common.corruptions.contrast(x, 0.3, None).std((2, 3)), 0.3 * x.std((2, 3)))
    torch.testing.assert_close(common.corruptions.zoom_blur(x, (1, 0.01), None), x)  # one enlargement, by 1
    torch.testing.assert_close(common.corruptions.zoom_blur(flat, (11, 0.01), None), flat)
    torch.testing.assert_close(
        common.corruptions.elastic_transform(x, (0, 0, 0), common.data.generator(0)), x, rtol=1e-3, atol=1e-3
    )
    red = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(common.corruptions.brightness(red, 0.3, None).flatten(), torch.tensor([0.8, 0.4, 0.0]))


def test_pixelate_and_jpeg_are_pillows():
    x = pictures(3)
    for image, small, jpeg in zip(x, common.corruptions.pixelate(x, 0.65), common.corruptions.jpeg_compression(x, 40)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        box = picture.resize((20, 20), Image.BOX).resize((32, 32), Image.BOX)
        assert torch.equal(small, torch.from_numpy(np.array(box)).permute(2, 0, 1))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=40)
        difference = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).int() - jpeg
        assert not difference.any()


def test_corrupted_images_are_cut_off_to_whole_numbers_not_rounded(monkeypatch):
    monkeypatch.setitem(common.corruptions.OF_FLOATS, "contrast", lambda x, c, g: torch.full_like(x, 100.9 / 255))
    assert (common.corruptions.corrupt(pictures(1), "contrast", 1, None) == 100).all()


@pytest.mark.parametrize("size, table", [(63, "SMALL"), (64, "SMALL"), (65, "LARGE")])
def test_images_above_64_pixels_are_corrupted_as_imagenets(size, table, monkeypatch):
    for severity in range(1, 6):
        seen = []
        monkeypatch.setitem(common.corruptions.OF_FLOATS, "contrast", lambda x, c, g: seen.append(c) or x)
        common.corruptions.corrupt(torch.zeros(1, 3, size, size, dtype=torch.uint8), "contrast", severity, None)
        assert seen == [getattr(common.corruptions, table)["contrast"][severity - 1]]


def test_the_smoothing_of_the_elastic_transform_reaches_three_deviations():
    offset = torch.arange(32.0) - 16
    weights = (-0.5 * (offset / 2) ** 2).exp() * (offset.abs() <= 6)
    torch.testing.assert_close(common.corruptions.gaussian_rows(32, 2.0)[16], weights / weights.sum())
