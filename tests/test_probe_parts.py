"""The parts of the probe, one by one and in a moment: its frozen encoder, its views, its choice, its baselines."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common.data
import common.frozen
import common.metrics
import common.models
import linear_probe
from runs import folder_of

pytestmark = pytest.mark.seeds_torch
FIT = {
    "epochs": 20,
    "batch": 16,
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "schedule": "cosine",
    "warmup": 0.0,
    "warmup_from": 0.0,
    "label_smoothing": 0.0,
    "standardize": True,
    "seed": 0,
    "lr": 1.0,
}


def frozen(encoder, size=16, **config):
    config = {"size": size, "precision": "float32", "arch": "small", "stem": "3x3"} | config
    return common.frozen.Frozen(encoder, torch.zeros(3), torch.ones(3), config, torch.device("cpu"))


def clusters(n, spread):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    return 2 * torch.randn(4, 6, generator=g)[y] + spread * torch.randn(n, 6, generator=g), y


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_augmented_views_crop_as_in_training_and_each_image_has_its_own(stream, tmp_path):
    folder_of(tmp_path, ["train"], ["a"], count=1, size=(16, 16))
    file = next(tmp_path.rglob("0.png"))
    for k in range(1, 6):  # six times the same picture
        (file.parent / f"{k}.png").write_bytes(file.read_bytes())
    data = common.data.load_data("folder", tmp_path, True, size=16, stream=stream)
    picture = data.images[0] / 255
    for crop_min, kinds in ((1.0, 2), (0.2, 6)):
        pixels = frozen(torch.nn.Flatten(), crop_min=crop_min)
        r = common.frozen.extract(pixels, data, key=(0, 6, 0), workers=0).view(-1, 3, 16, 16)
        assert len((r * 1000).round().unique(dim=0)) == kinds  # whole, as it is or mirrored; or each cropped otherwise
        wholes = picture, picture.flip(2)
        mirrored = [any(torch.isclose(image, whole, atol=1e-5).all() for whole in wholes) for image in r]
        assert all(mirrored) if crop_min == 1 else not any(mirrored)


def test_features_of_an_image_do_not_depend_on_those_beside_it():
    encoder, _ = common.models.build_encoder("small", "3x3")
    x = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    one = frozen(encoder)
    torch.testing.assert_close(one(x)[:2], one(x[:2]), rtol=1e-4, atol=1e-5)
    assert not any(w.requires_grad for w in one.parameters())


def test_features_are_brought_to_norm_1_where_training_did_so():
    x = torch.rand(4, 3, 16, 16)
    raw, unit = (frozen(torch.nn.Flatten(), normalize_encoder=normalize) for normalize in (False, True))
    torch.testing.assert_close(raw(x), x.flatten(1))
    torch.testing.assert_close(unit(x), F.normalize(x.flatten(1)))
    torch.testing.assert_close(unit.encode(x), F.normalize(x.flatten(1)))


@pytest.mark.parametrize("cells", [[(0.003, 0.0), (0.3, 0.0)], [(0.3, 0.0), (0.003, 0.0)]])
def test_of_cells_that_are_as_accurate_the_surer_one_is_chosen(cells):
    r, y = clusters(120, 0.05)
    found = linear_probe.probe(r, y, 4, cells, SimpleNamespace(**FIT))
    assert [accuracy for *_, accuracy in found.grid] == [100, 100] and found.cell == (0.3, 0.0)


def test_augmented_features_that_are_the_images_own_give_the_same_classifier():
    r, y = clusters(120, 0.5)
    r = 10 * r + 3  # so that it matters that both are brought to the same mean and deviation
    fit = SimpleNamespace(**FIT)
    plain, augmented = (linear_probe.probe(r, y, 4, [(0.1, 0.0)], fit, of) for of in (None, lambda epoch: r.clone()))
    torch.testing.assert_close(plain.classifier.weight, augmented.classifier.weight)
    torch.testing.assert_close(plain.classifier.bias, augmented.classifier.bias)


def test_baselines_are_pixels_and_an_encoder_that_nobody_trained():
    shade = torch.tensor([[40, 180], [180, 40]])  # of the upper and of the lower half
    labels = torch.arange(60) % 2
    noise = torch.randint(-20, 20, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    pixels = (shade[labels].repeat_interleave(8, 1)[:, None, :, None] + noise).to(torch.uint8)
    data = common.data.Data(pixels, labels, ["a", "b"])
    encoder, _ = common.models.build_encoder("small", "3x3")
    dead = frozen(encoder)
    for w in dead.encoder.parameters():
        w.zero_()  # all features alike: worth nothing
    cells, fit = [(0.1, 0.0)], SimpleNamespace(**FIT)
    of_the_dead = linear_probe.probe(dead(pixels), labels, 2, cells, fit).classifier
    assert common.metrics.topk(of_the_dead(dead(pixels)), labels, 1) == 50
    found = linear_probe.baselines(dead, data, data, cells, fit)
    assert found["raw_pixels_top1"] == 100 and found["untrained_encoder_top1"] > 60
    assert found == linear_probe.baselines(dead, data, data, cells, fit)


def test_label_smoothing_reaches_logistic_regression():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    r = 2 * torch.randn(4, 6, generator=g)[y] + torch.randn(80, 6, generator=g)
    fit = SimpleNamespace(optimizer="lbfgs", label_smoothing=0.2)
    weights, biases = linear_probe.fit_cells(lambda epoch: r, y, 4, [(None, 1e-2)], fit)
    weight, bias = common.optim.logistic_regression(r, y, 4, 1e-2, 0.2)
    torch.testing.assert_close(weights[0], weight)
    torch.testing.assert_close(biases[0], bias)


def test_images_fewer_than_a_batch_are_learned():
    r, y = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    fit = SimpleNamespace(epochs=20, batch=512, optimizer="sgd", momentum=0.9, nesterov=True, schedule="cosine",
                          warmup=0.0, warmup_from=0.0, label_smoothing=0.0, seed=0, lr=1.0)
    weights, biases = linear_probe.train_cells(lambda epoch: r, y, 3, [(1.0, 0.0)], fit)
    assert torch.equal((r @ weights[0].T + biases[0]).argmax(1), y)


def test_each_number_of_a_probe_is_of_the_set_that_its_name_says():
    encoder, _ = common.models.build_encoder("small", "3x3")
    config = {"size": 16, "precision": "float32", "crop_min": 0.2}
    frozen = common.frozen.Frozen(encoder, torch.zeros(3), torch.ones(3), config, torch.device("cpu"))
    train, test = (common.data.load_data("shapes", None, part, size=16, limit=60) for part in (True, False))
    job = linear_probe.Job(None, "", frozen, "shapes", None, train, test, "")
    features = linear_probe.extract_both(job, 0)
    fit = SimpleNamespace(optimizer="lbfgs", label_smoothing=0.0, standardize=True, seed=0)
    fitted = linear_probe.fit_classifier(job, features, [(None, 1e-4)], fit, False, 0)
    found = linear_probe.measure(job, fitted, features, 0)
    of_train = common.metrics.topk(fitted.classifier(features.r_train), features.y_train, 1)
    of_test = common.metrics.topk(fitted.classifier(features.r_test), features.y_test, 1)
    assert found["train_top1"] == of_train != of_test == found["top1"]
    retrieved = common.metrics.retrieval(features.r_test, features.y_test)
    assert {name: found[name] for name in retrieved} == retrieved
    assert retrieved != common.metrics.retrieval(features.r_train, features.y_train)
