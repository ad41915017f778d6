"""The linear probe: its grid, what it holds out, what it reports, the classifier that it leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.cli
import common.data
import common.frozen
import common.images
import common.metrics
import linear_probe
import reference_numpy as ref
from runs import FOLDER, folder_of, probe, train

pytestmark = pytest.mark.seeds_torch


def fit(**options):
    defaults = {
        "epochs": 8,
        "batch": 16,
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": True,
        "schedule": "cosine",
        "warmup": 1.0,
        "warmup_from": 0.0,
        "label_smoothing": 0.0,
        "standardize": True,
        "seed": 0,
        "lr": 1.0,
    }
    return SimpleNamespace(**defaults | options)


def clusters(n, classes=4, width=6, spread=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))[y] + spread * torch.randn(
        n, width, generator=g
    ), y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "lars", "nesterov": False},
        {"optimizer": "rmsprop", "nesterov": False, "schedule": "exponential"},
    ],
)
def test_a_cell_of_the_grid_is_the_same_alone(options):
    r, y = clusters(80)
    cells = [(0.1, 0.0), (1.0, 0.0), (0.1, 0.1)]
    weights, biases = linear_probe.fit_cells(lambda epoch: r, y, 4, cells, fit(**options))
    for k, cell in enumerate(cells):
        weight, bias = linear_probe.fit_cells(lambda epoch: r, y, 4, [cell], fit(**options))
        torch.testing.assert_close(weights[k], weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(biases[k], bias[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_one_cell_is_torchs_own_linear_layer_and_optimizer(schedule):
    r, y = clusters(64)
    linear = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), 0.3, 0.9, weight_decay=0.01, nesterov=True)
    g = torch.Generator().manual_seed(0)
    for epoch in range(20):
        if schedule == "step":  # the reference code's, at 60, 75 and 90 %
            optimizer.param_groups[0]["lr"] = 0.3 * 0.2 ** sum(epoch >= mark for mark in (12, 15, 18))
        for rows in torch.randperm(64, generator=g).split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(r[rows]), y[rows]).backward()
            optimizer.step()
    options = fit(epochs=20, schedule=schedule, warmup=0.0)
    weight, bias = linear_probe.fit_cells(lambda epoch: r, y, 4, [(0.3, 0.01)], options)
    torch.testing.assert_close(weight[0], linear.weight.detach())
    torch.testing.assert_close(bias[0], linear.bias.detach())


def test_the_best_cell_is_chosen_on_the_held_out_part_of_the_training_set():
    r, y = clusters(200)
    found = linear_probe.probe(r, y, 4, [(1e-6, 0.0), (0.3, 0.0), (1e-6, 1.0)], fit(epochs=20))
    assert (
        found.cell == (0.3, 0.0)
        and found.held_out_top1 == max(accuracy for _, _, accuracy in found.grid)
        and len(found.grid) == 3
    )
    test_r, test_y = clusters(100, seed=1)
    assert common.metrics.topk(found.classifier(test_r), test_y, 1) > 95


def test_held_out_images_are_not_fitted_to():
    g = torch.Generator().manual_seed(0)
    r, y = (
        torch.randn(200, 400, generator=g),
        torch.randint(4, (200,), generator=g),
    )  # noise, wide enough to learn by heart
    found = linear_probe.probe(r, y, 4, [(0.1, 0.0), (0.3, 0.0)], fit(epochs=50))
    assert common.metrics.topk(found.classifier(r), y, 1) == 100 and found.held_out_top1 < 60


def test_every_class_of_several_images_gives_some_to_the_held_out_part():
    kept, held = common.data.hold_out(torch.tensor([0] * 30 + [1] * 10 + [2] * 2 + [3]), 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(43))
    assert torch.bincount(torch.tensor([0] * 30 + [1] * 10 + [2] * 2 + [3])[held], minlength=4).tolist() == [3, 1, 1, 0]


def test_a_feature_that_only_moves_in_augmented_images_does_no_harm():
    r, y = clusters(100)
    still = torch.cat([r, torch.zeros(100, 1)], 1)
    moving = torch.cat([r, torch.full((100, 1), 0.05)], 1)
    found = linear_probe.probe(still, y, 4, [(0.1, 0.0)], fit(), augmented=lambda epoch: moving)
    assert found.classifier.weight.abs().max() < 100


def test_a_probe_that_explodes_is_refused():
    r, y = clusters(100)
    with pytest.raises(common.cli.Refused, match="lower --lr"):
        linear_probe.probe(r * 1e20, y, 4, [(1e30, 1e30)], fit(standardize=False))


def test_a_probe_finds_what_is_linear_at_any_scale_of_the_features():
    r, y = clusters(200, spread=0.3)
    scale = torch.tensor([1e-3, 1, 10, 1, 1, 1e2])
    found = linear_probe.probe(r[:100] * scale + 5, y[:100], 4, [(0.1, 0.0)], fit(epochs=50, batch=20))
    assert common.metrics.topk(found.classifier(r[100:] * scale + 5), y[100:], 1) == 100


def test_a_handful_of_images_is_probed_without_holding_any_out():
    r, y = torch.eye(3), torch.arange(3)
    found = linear_probe.probe(r, y, 3, [(0.1, 0.0), (1.0, 0.0)], fit())
    assert found.cell == (0.1, 0.0) and found.held_out_top1 is None and found.temperature == 1


def test_a_saved_classifier_maps_images_to_the_reported_accuracy(probed):
    classifier = common.frozen.load_classifier(probed)
    test = common.data.load_data("shapes", None, False, size=16)
    result = json.loads((probed.parent / "probe-first400.json").read_text())
    with torch.no_grad():
        scores = torch.cat([classifier(x) for x in test.images.split(500)])
        torch.testing.assert_close(classifier(test.images[:9].float() / 255), scores[:9], rtol=0.02, atol=0.02)
    assert common.metrics.topk(scores, test.labels, 1) == pytest.approx(result["top1"], abs=0.11)
    assert common.metrics.reliability(scores, test.labels)[0] == pytest.approx(result["ece"], abs=2e-3)
    assert classifier.classes == test.classes and classifier.temperature == result["temperature"]
    assert np.mean(list(result["per_class_top1"].values())) == pytest.approx(result["top1"], abs=2.0)
    assert (
        common.metrics.topk(scores, test.labels, 5) == pytest.approx(result["top5"], abs=0.11)
        and result["top5"] > result["top1"]
    )
    calibrated = common.metrics.reliability(scores / classifier.temperature, test.labels)[0]
    assert calibrated == pytest.approx(result["ece_after_temperature"], abs=2e-3)


def test_neighbours_and_geometry_are_those_of_the_encoder(probed):
    frozen = common.frozen.load_encoder(probed.with_name("ckpt.pt"), torch.device("cpu"))
    result = json.loads((probed.parent / "probe-first400.json").read_text())
    train, test = (
        common.data.load_data("shapes", None, True, size=16, limit=400),
        common.data.load_data("shapes", None, False, size=16),
    )
    r, r_test = common.frozen.extract(frozen, train), common.frozen.extract(frozen, test)
    assert (
        result["knn_top1"] == pytest.approx(common.metrics.knn_top1(r, train.labels, r_test, test.labels), abs=0.11)
        and result["test_images"] == 2000
    )
    z = torch.nn.functional.normalize(r_test.double())
    assert result["uniformity"] == pytest.approx(ref.uniformity(z[:300].numpy()), abs=0.2)
    same = (test.labels[:, None] == test.labels).fill_diagonal_(False)
    assert result["tolerance"] == pytest.approx((z @ z.T)[same].mean().item(), abs=1e-3)
    of_view = lambda v: torch.nn.functional.normalize(common.frozen.extract(frozen, test, key=("geometry", 0, v)))
    views = [of_view(v) for v in range(2)]
    assert result["alignment"] == pytest.approx((views[0] - views[1]).square().sum(1).mean().item(), abs=1e-5)


def test_fractions_augmentation_recipes_and_normalised_features_are_probed(trained, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    classifiers = {}
    one = ["--lr", "0.1", "--weight-decay", "0"]
    for name, options in {
        "plain": one,
        "augment": [*one, "--augment"],
        "l2": [*one, "--l2-normalize", "--no-standardize"],
        "raw": [*one, "--no-standardize"],
        "lars": ["--lr-per-256", "0.2", "--optimizer", "lars"],
        "smooth": [*one, "--label-smoothing", "0.2"],
    }.items():
        result = probe(tmp_path, "--limit", "600", "--epochs", "2", *options)
        assert 0 < result["top1"] <= result["top5"] <= 100
        classifiers[name] = common.frozen.load_classifier(tmp_path / "classifier-first600.pt")
        if name == "l2":
            test = common.data.load_data("shapes", None, False, size=16)
            with torch.no_grad():
                assert common.metrics.topk(classifiers[name](test.images), test.labels, 1) == pytest.approx(
                    result["top1"], abs=0.2
                )
            assert result["fit"]["l2_normalize"] and not result["fit"]["standardize"]
    weights = [c.linear.weight for c in classifiers.values()]
    assert all(not torch.allclose(a, b, rtol=1e-3) for k, a in enumerate(weights) for b in weights[:k])


def test_probes_of_other_settings_leave_files_of_their_own(trained, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    few = probe(tmp_path, "--limit", "600", "--epochs", "2", "--subset", "0.1")
    assert few["train_images"] == pytest.approx(60, abs=5) and (tmp_path / "probe-0.1-first600.json").exists()
    recipe = probe(tmp_path, "--limit", "600", "--epochs", "2", "--recipe", "cifar10-supcon", "--lr", "3")
    assert (recipe["lr"], recipe["weight_decay"], recipe["fit"]["schedule"], recipe["fit"]["standardize"]) == (
        3,
        0,
        "step",
        False,
    )
    out = capsys.readouterr().out
    assert (
        "--lr 3\n" in out
        and "--no-standardize" in out
        and (tmp_path / "classifier-first600-cifar10-supcon.pt").exists()
    )
    probe(tmp_path, "--limit", "600", "--recipe", "imagenet-supcon-r50", "--batch", "64", "--epochs", "2")
    for name in ("one", "two"):
        folder_of(tmp_path / name, ["train", "test"], ["a", "b"])
        probe(tmp_path, "--dataset", "folder", "--data", tmp_path / name, "--epochs", "1")
    assert (tmp_path / "probe-folder-one.json").exists() and (tmp_path / "probe-folder-two.json").exists()
    assert not (tmp_path / "probe.json").exists()


def test_augmented_views_change_with_the_epoch_and_not_with_the_run(trained):
    frozen = common.frozen.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    data = common.data.load_data("shapes", None, False, size=16, limit=30)
    a, b, c = (common.frozen.extract(frozen, data, key=key) for key in ((0, 6, 0), (0, 6, 0), (0, 6, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, common.frozen.extract(frozen, data))
    frozen.unit = True
    torch.testing.assert_close(common.frozen.extract(frozen, data, key=(0, 6, 0)), torch.nn.functional.normalize(a))


def test_augmented_views_are_cropped_as_in_training(trained):
    frozen = common.frozen.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    data = common.data.load_data("shapes", None, False, size=16, limit=200)
    still, moved = common.frozen.extract(frozen, data), []
    for crop_min in (1.0, 0.5, 0.05):
        frozen.config["crop_min"] = crop_min
        moved.append((common.frozen.extract(frozen, data, key=(0, 6, 0)) - still).norm())
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("size", [16, 72])
def test_a_streamed_folder_is_probed_as_one_in_memory(size, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["a", "b"], size=(100, 80))
    options = [*FOLDER, "--size", str(size), "--data", str(tmp_path), "--precision", "float32", "--augment", "crop"]
    train(*options, "--stream", "--run-dir", tmp_path / "run")
    frozen = common.frozen.load_encoder(tmp_path / "run" / "ckpt.pt", torch.device("cpu"))
    memory, stream = (
        common.data.load_data("folder", tmp_path, True, size=size, stream=stream) for stream in (False, True)
    )
    torch.testing.assert_close(common.frozen.extract(frozen, memory), common.frozen.extract(frozen, stream))
    assert probe(tmp_path / "run", "--epochs", "2")["test_images"] == 8


def test_views_of_a_streamed_folder_differ_from_image_to_image(tmp_path):
    folder_of(tmp_path, ["train"], ["a"], count=1)
    file = next(tmp_path.rglob("0.png"))
    for k in range(1, 6):  # six times the same picture
        (file.parent / f"{k}.png").write_bytes(file.read_bytes())
    data = common.data.load_data("folder", tmp_path, True, size=16, stream=True)
    frozen = common.frozen.Frozen(
        torch.nn.Flatten(), torch.zeros(3), torch.ones(3), {"size": 16, "precision": "float32"}, torch.device("cpu")
    )
    assert len(common.frozen.extract(frozen, data).unique(dim=0)) == 1
    assert len(common.frozen.extract(frozen, data, key=(0, 6, 0)).unique(dim=0)) == 6


def test_an_encoder_that_moves_while_it_is_probed_is_an_error(trained, monkeypatch):
    extract = linear_probe.extract

    def moving(frozen, *arguments, **options):
        frozen.encoder[-1].running_mean += 1
        return extract(frozen, *arguments, **options)

    monkeypatch.setattr(linear_probe, "extract", moving)
    with pytest.raises(RuntimeError, match="the encoder changed while it was probed"):
        probe(trained, "--limit", "50", "--epochs", "1")


def test_a_classifier_takes_images_in_any_form_that_cannot_be_mistaken(probed):
    classifier = common.frozen.load_classifier(probed)
    H = classifier.size
    images = torch.randint(256, (5, 3, H, H), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = images / 255
    scores = classifier(images)
    assert scores.shape == (5, len(classifier.classes))
    assert torch.equal(classifier(images[2]), classifier(images[2:3])[0])
    for same in (x, x.double(), x.half(), x.bfloat16()):
        torch.testing.assert_close(classifier(same), scores, rtol=0.05, atol=0.3)
    wrong = [images.float(), x * 2 - 1, images.int(), images[:, :, :-1], images[:, :1], images[None], images.bool()]
    for x in [*wrong, torch.full((1, 3, H, H), torch.nan), images.permute(0, 2, 3, 1)]:
        with pytest.raises(ValueError, match=rf"images must be \(n, 3, {H}, {H}\), uint8 or floating-point numbers in"):
            common.frozen.load_classifier(probed)(x)


def test_a_loaded_encoder_gives_r_of_images_in_any_form_that_cannot_be_mistaken(trained, probed):
    encoder, classifier = common.frozen.load_encoder(trained), common.frozen.load_classifier(probed)
    images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    r = encoder(images)
    assert r.shape == (5, 144) and torch.equal(encoder(images[2]), encoder(images[2:3])[0])
    torch.testing.assert_close(classifier(images), classifier.linear(r))
    assert torch.equal(common.frozen.load_encoder(trained / "ckpt.pt")(images), r)
    with pytest.raises(ValueError, match="images must be"):
        encoder(images.float())


@pytest.mark.parametrize("loss", ["supcon", "n-pair", "ce"])
def test_saved_features_are_those_of_the_run(loss, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["a", "b"], count=6)
    run, file = tmp_path / "run", tmp_path / "features.npz"
    train(*FOLDER, "--data", tmp_path, "--loss", loss, "--precision", "float32", "--run-dir", run)
    result = probe(run, "--subset", "0.5", "--save-features", file)
    assert result["recall_at_1"] == 100 and 0 < result["map_at_r"] <= result["r_precision"] <= 100
    with np.load(file) as saved:  # which refuses to run code
        arrays = dict(saved)
    assert arrays["class_names"].tolist() == ["a", "b"] and arrays["train_features"].shape == (6, 144)
    contents = common.frozen.load_checkpoint(run / "ckpt.pt")
    encoder = common.frozen.load_encoder(run)
    for name in ("train", "test"):
        assert len(arrays[f"{name}_paths"]) == len(arrays[f"{name}_labels"])
        for path, label, r in zip(arrays[f"{name}_paths"], arrays[f"{name}_labels"], arrays[f"{name}_features"]):
            assert f"/{name}/{'ab'[label]}/" in path
            image = common.images.resize_and_crop(common.images.read_image(path), 16)
            np.testing.assert_allclose(encoder(image), r, rtol=1e-4, atol=1e-5)
        if loss == "ce":
            assert f"{name}_z" not in arrays
            continue
        w = contents["projection"]
        hidden = np.maximum(arrays[f"{name}_features"] @ w["0.weight"].numpy().T + w["0.bias"].numpy(), 0)
        z = hidden @ w["2.weight"].numpy().T + w["2.bias"].numpy()
        z = z / np.linalg.norm(z, axis=1, keepdims=True) if loss == "supcon" else z
        np.testing.assert_allclose(arrays[f"{name}_z"], z, rtol=1e-4, atol=1e-5)
