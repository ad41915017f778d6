"""Data sets: generated, and read from folders."""
import torch
from torchvision.transforms.v2 import functional as TF
import common.data
import common.views



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
