"""Data sets: generated, and read from folders."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

import common.cli
import common.data
import common.images
import common.views

from runs import folder_of


def test_shapes_are_reproducible_balanced_and_differ_between_training_and_test():
    a, b = common.data.shapes(500, 32, 1), common.data.shapes(500, 32, 1)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert torch.bincount(a.labels, minlength=10).min() > 25 and len(a.classes) == 10
    assert not torch.equal(a.images, common.data.shapes(500, 32, 0).images)


def test_folder_reads_classes_sizes_and_grey_images(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = torch.full((1 if i else 3, 20 + i, 30), 100 * label + 50, dtype=torch.uint8)
                TF.to_pil_image(image).save(tmp_path / split / name / f"{i}.png")
    data = common.data.load_data("folder", tmp_path, True, size=16)
    assert data.images.shape == (6, 3, 16, 16) and data.classes == ["cat", "dog"]
    assert torch.equal(data.images[:, 0, 8, 8].long(), 100 * data.labels + 50)
    assert torch.equal(data.images[:, 0], data.images[:, 2])
    assert len(common.data.load_data("folder", tmp_path, False, size=16).labels) == 2
    streamed = common.data.load_data("folder", tmp_path, True, size=16, stream=True)
    assert torch.equal(streamed.labels, data.labels) and torch.equal(streamed.images, data.images)
    views = common.views.WorkerViews(streamed, "none")
    assert all(torch.equal(views[row, 0], data.images[row]) for row in range(6))


def test_the_first_shapes_are_the_same_however_many_are_drawn():
    whole = common.data.load_data("shapes", None, True, size=16)
    assert len(whole.labels) == 10_000
    for limit in (1, common.data.BLOCK - 1, common.data.BLOCK, common.data.BLOCK + 1):
        part = common.data.load_data("shapes", None, True, size=16, limit=limit)
        assert torch.equal(part.images, whole.images[:limit]) and torch.equal(part.labels, whole.labels[:limit])
    first, second = whole.images[: 2 * common.data.BLOCK].split(common.data.BLOCK)
    assert not torch.equal(first, second)


def test_a_part_of_the_shapes_costs_a_part_of_the_work(monkeypatch):
    drawn, draw = [], common.data.draw_shapes
    monkeypatch.setattr(common.data, "draw_shapes", lambda n, size, g: drawn.append(n) or draw(n, size, g))
    common.data.load_data("shapes", None, True, size=16, limit=common.data.BLOCK + 1)
    assert sum(drawn) == 2 * common.data.BLOCK


def test_no_image_that_is_tested_on_is_trained_on():
    train, test = (common.data.load_data("shapes", None, train, size=16) for train in (True, False))
    bytes_of = lambda data: {image.numpy().tobytes() for image in data.images}
    assert len(bytes_of(train)) == 10_000 and len(bytes_of(test)) == 2_000 and not bytes_of(train) & bytes_of(test)


def test_the_first_images_of_a_folder_show_all_its_classes(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b", "c"], count=8, size=(9, 9))
    for stream in (False, True):
        first = common.data.load_data("folder", tmp_path, True, size=8, limit=8, stream=stream)
        assert len(first.labels) == 8 and set(first.labels.tolist()) == {0, 1, 2}


def test_measured_mean_and_deviation_are_those_of_all_pixels_of_a_channel():
    x = torch.randint(256, (20, 3, 9, 9), generator=common.data.generator(0))
    x = (x * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)).to(torch.uint8)
    mean, std = common.data.mean_and_std("folder", x)
    torch.testing.assert_close(mean, (x / 255).mean((0, 2, 3)))
    torch.testing.assert_close(std, (x / 255).std((0, 2, 3), correction=0))
    assert common.data.mean_and_std("folder", torch.zeros_like(x))[1].min() > 0  # of one value, it can be divided by


@pytest.mark.parametrize(
    "dataset, mean, std",
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_cifar_is_normalised_as_in_the_reference_code(dataset, mean, std):
    ours = common.data.mean_and_std(dataset, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert [v.tolist() for v in ours] == [pytest.approx(mean), pytest.approx(std)]


def test_large_images_are_the_middle_seven_eighths_and_small_ones_all_of_the_shorter_side():
    image = torch.randint(256, (3, 120, 90), generator=common.data.generator(1)).to(torch.uint8)
    for size, side in ((70, 80), (64, 64)):
        expected = TF.center_crop(TF.resize(image, side, antialias=True), size)
        assert torch.equal(common.images.resize_and_crop(image, size), expected)
    assert torch.equal(common.images.resize_and_crop(image[:, :70, :70], 70), image[:, :70, :70])


class Stored:
    """A data set as torchvision hands it over; a pixel of channel k in row i and column j is 60 k + 6 i + j."""

    def __init__(self, root, train=None, split=None, download=None):
        self.is_train = train if split is None else split == "train"
        pixels = torch.arange(3).view(3, 1, 1) * 60 + torch.arange(8).view(8, 1) * 6 + torch.arange(8)
        count = 5 if self.is_train else 3
        pixels = pixels.expand(count, 3, 8, 8).to(torch.uint8)
        self.data, self.targets, self.classes = self.layout(pixels), list(range(count)), [str(c) for c in range(5)]

    def layout(self, pixels):
        return pixels.permute(0, 2, 3, 1).numpy()


class StoredSVHN(Stored):
    labels = property(lambda self: torch.tensor(self.targets).numpy())

    def layout(self, pixels):
        return pixels.numpy()


class StoredFashionMNIST(Stored):
    def layout(self, pixels):
        return pixels[:, 0]


@pytest.mark.parametrize(
    "dataset, name, stored",
    [
        ("cifar10", "CIFAR10", Stored),
        ("cifar100", "CIFAR100", Stored),
        ("svhn", "SVHN", StoredSVHN),
        ("fashionmnist", "FashionMNIST", StoredFashionMNIST),
    ],
)
def test_torchvisions_data_sets_keep_channels_rows_and_columns_apart(dataset, name, stored, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, name, stored)
    for train in (True, False):
        data = common.data.load_data(dataset, "data", train, limit=4)
        assert data.labels.tolist() == list(range(4 if train else 3)) and data.images.is_contiguous()
        channels = torch.zeros(3) if dataset == "fashionmnist" else torch.arange(3)
        expected = channels.view(3, 1, 1) * 60 + torch.arange(8).view(8, 1) * 6 + torch.arange(8)
        assert all(torch.equal(image, expected.to(torch.uint8)) for image in data.images)


@pytest.mark.parametrize("dataset, name", [("cifar10", "CIFAR10"), ("svhn", "SVHN"), ("fashionmnist", "FashionMNIST")])
def test_a_test_set_that_cannot_be_read_is_refused_and_not_taken_for_none(dataset, name, monkeypatch):
    class Damaged(StoredSVHN):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            if not self.is_train:
                raise RuntimeError("file is truncated")

    monkeypatch.setattr(torchvision.datasets, name, Damaged)
    with pytest.raises(common.cli.Refused, match="file is truncated") as refused:
        common.data.load_data(dataset, "data", False)
    assert not isinstance(refused.value, common.data.Missing)


@pytest.mark.parametrize("size", [8, None])
def test_the_sample_of_a_streamed_subset_is_of_its_own_images(size, tmp_path, monkeypatch):
    """The mean and deviation of the images come from it, however few of the folder's first images are in the subset."""
    folder_of(tmp_path, ["train"], ["dark", "light"], count=10)
    monkeypatch.setattr(common.data, "SAMPLE", 3)
    options = {"dataset": "folder", "data": str(tmp_path), "size": size, "limit": None, "labels": None, "seed": 0}
    config = SimpleNamespace(**options, stream=True, subset=0.3, label_noise=0.0)
    chosen, _ = common.data.load(config, False, False)
    assert len(chosen.files) == 6
    expected = [common.images.resize_and_crop(common.images.read_image(path), size or 32) for path in chosen.files[:3]]
    assert torch.equal(chosen.images, torch.stack(expected))


@pytest.mark.parametrize("options", [{"label_noise": 0.5}, {"subset": 0.5}])
def test_wrong_labels_and_subsets_move_with_the_seed(options):
    plain = {"dataset": "shapes", "data": None, "size": 8, "stream": False, "labels": None, "limit": 60, "subset": 1.0,
             "label_noise": 0.0}
    configs = [SimpleNamespace(**plain | options, seed=seed) for seed in (0, 0, 1)]
    (first, again, other) = (common.data.load(config, False, False)[0] for config in configs)
    same = lambda a, b: torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)
    assert same(first, again) and not same(first, other)


def test_the_held_out_images_move_with_the_seed():
    y = torch.arange(100) % 2
    first, again, other = (common.data.hold_out(y, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_another_size_is_reached_without_aliases():
    x = torch.randint(256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(common.data.resize_square(x, 8), TF.resize(x, [8, 8], antialias=True))
