"""What a representation is worth: the probe's grid, calibration, neighbours, corruptions, against the oracle and by hand."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import corruptions
import images
import linear_probe
import metrics
import pretrain
import reference_numpy as ref
import robustness
from runs import FOLDER, files_in, folder_of, refusal

seeds = st.integers(0, 2**32 - 1)

# ---------------------------------------------------------------- metrics against the oracle


@given(seeds, st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 5, 15]), st.sampled_from([0.1, 1, 10]))
def test_calibration_error_is_the_oracles(seed, n, C, bins, scale):
    rng = np.random.default_rng(seed)
    scores, y = torch.tensor(scale * rng.normal(size=(n, C))), torch.tensor(rng.integers(0, C, n))
    error, table = metrics.reliability(scores, y, bins)
    assert error == pytest.approx(ref.expected_calibration_error(scores.softmax(1).numpy(), y.numpy(), bins), abs=1e-12)
    assert sum(row[0] for row in table) == n and all(0 <= row[2] <= 1 for row in table)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], dtype=torch.double)
    y = torch.tensor([0, 1, 1, 0])  # confidences .9 (half right), .6 (right), .5 (right)
    assert metrics.reliability(p.log(), y, 10)[0] == pytest.approx(0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.5)
    edge = torch.tensor([[0.6, 0.4]], dtype=torch.double)  # (0.4, 0.6] of five bins holds 0.6 itself
    assert ref.expected_calibration_error(edge.numpy(), [0], 5) == pytest.approx(0.4)


@given(seeds, st.integers(2, 30), st.integers(1, 8), st.integers(1, 40), st.sampled_from([0.01, 0.07, 1]))
def test_nearest_neighbours_are_the_oracles(seed, n, D, k, tau):
    rng = np.random.default_rng(seed)
    bank, query = rng.normal(size=(n, D)), rng.normal(size=(5, D))
    bank_y, query_y = rng.integers(0, 3, n), rng.integers(0, 3, 5)
    if D == 1 or np.isclose(np.diff(np.sort(bank / np.linalg.norm(bank, axis=1, keepdims=True) @ query.T, axis=0), axis=0), 0).any():
        return  # ties
    ours = metrics.knn_top1(*map(torch.tensor, (bank, bank_y, query, query_y)), k=k, tau=tau)
    assert ours == pytest.approx(ref.knn_top1(bank, bank_y, query, query_y, k, tau))


@given(seeds, st.floats(0.01, 0.4))
def test_corruption_errors_are_the_oracles(seed, clean):
    rng = np.random.default_rng(seed)
    errors = {name: list(rng.uniform(0.2, 1, 5)) for name in corruptions.NAMES}
    alexnet = {name: [e] * 5 for name, e in robustness.ALEXNET.items()}
    assert robustness.mean_corruption_error(errors) == pytest.approx(ref.mean_corruption_error(errors, alexnet))
    relative = ref.relative_mean_corruption_error(errors, clean, alexnet, robustness.ALEXNET_CLEAN)
    assert robustness.relative_mean_corruption_error(errors, clean) == pytest.approx(relative)


def test_alexnets_errors_are_the_published_ones():
    """github.com/google-research/augmix, imagenet.py; its clean error is that of torchvision's weights."""
    published = [0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324,
                 0.564592, 0.853204, 0.646056, 0.717840, 0.606500]  # fmt: skip
    assert [robustness.ALEXNET[name] for name in corruptions.NAMES] == published and robustness.ALEXNET_CLEAN == 0.43478
    errors = {name: [e] * 5 for name, e in robustness.ALEXNET.items()}
    assert robustness.mean_corruption_error(errors) == pytest.approx(100)
    assert robustness.relative_mean_corruption_error(errors, robustness.ALEXNET_CLEAN) == pytest.approx(100)


@pytest.mark.parametrize("accuracy, printed", [
    ([65.06, 54.96, 47.64, 35.93, 25.38], 68.6), ([72.89, 65.28, 60.55, 52.00, 43.11], 52.4),
    ([65.39, 55.55, 48.64, 37.27, 26.92], 67.2), ([73.29, 66.16, 61.80, 54.01, 45.71], 50.6),
], ids=["CE R50", "CE R200", "SupCon R50", "SupCon R200"])  # fmt: skip
def test_table_6s_accuracies_give_the_printed_mce(accuracy, printed):
    """Its rows are means over the corruptions, so they give the ratio of means where mCE is the mean of ratios."""
    mean_error = np.mean([1 - a / 100 for a in accuracy])
    assert 100 * mean_error / np.mean(list(robustness.ALEXNET.values())) == pytest.approx(printed, abs=0.35)


def test_mce_is_named_so_for_all_of_imagenet_c_alone():
    errors = {name: [0.5] * 5 for name in corruptions.NAMES}
    some = {name: errors[name] for name in corruptions.MADE}
    assert "mce" in robustness.summary("ImageNet-C", (0.2, 0.1), errors, errors)
    for kind, found in (("ImageNet-C", some), ("made", some), ("CIFAR-10-C", errors)):
        found = robustness.summary(kind, (0.2, 0.1), found, found)
        assert not {"mce", "relative_mce"} & found.keys() and found["mean_error"] == 50


def test_a_summary_keeps_severities_and_corruptions_apart():
    errors, ece = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.3, 0.4, 0.5, 0.6, 0.9]}, {"fog": [0, 1, 2, 3, 4], "snow": [2, 3, 4, 5, 8]}
    found = robustness.summary("made", (0.05, 0.01), errors, ece)
    assert (found["clean_error"], found["clean_ece"], found["corruptions"]) == (0.05, 0.01, 2)
    assert found["accuracy_by_severity"] == pytest.approx([80, 70, 60, 50, 30]) and found["ece_by_severity"] == [1, 2, 3, 4, 6]
    assert found["mean_error"] == pytest.approx(42)


# ---------------------------------------------------------------- the probe


def fit(**options):
    defaults = {"epochs": 8, "batch": 16, "optimizer": "sgd", "momentum": 0.9, "nesterov": True, "schedule": "cosine", "warmup": 1.0, "warmup_from": 0.0,
                "label_smoothing": 0.0, "standardize": True, "seed": 0, "lr": 1.0}  # fmt: skip
    return SimpleNamespace(**defaults | options)


def clusters(n, classes=4, width=6, spread=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))[y] + spread * torch.randn(n, width, generator=g), y


@pytest.mark.parametrize("options", [{}, {"optimizer": "lars", "nesterov": False}, {"optimizer": "rmsprop", "nesterov": False, "schedule": "exponential"}])
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
    assert found.cell == (0.3, 0.0) and found.held_out_top1 == max(accuracy for _, _, accuracy in found.grid) and len(found.grid) == 3
    test_r, test_y = clusters(100, seed=1)
    assert metrics.topk(found.classifier(test_r), test_y, 1) > 95


def test_held_out_images_are_not_fitted_to():
    g = torch.Generator().manual_seed(0)
    r, y = torch.randn(200, 400, generator=g), torch.randint(4, (200,), generator=g)  # noise, wide enough to learn by heart
    found = linear_probe.probe(r, y, 4, [(0.1, 0.0), (0.3, 0.0)], fit(epochs=50))
    assert metrics.topk(found.classifier(r), y, 1) == 100 and found.held_out_top1 < 60


def test_every_class_of_several_images_gives_some_to_the_held_out_part():
    kept, held = linear_probe.hold_out(torch.tensor([0] * 30 + [1] * 10 + [2] * 2 + [3]), 0)
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
    with pytest.raises(images.Refused, match="lower --lr"):
        linear_probe.probe(r * 1e20, y, 4, [(1e30, 1e30)], fit(standardize=False))


def test_a_probe_finds_what_is_linear_at_any_scale_of_the_features():
    r, y = clusters(200, spread=0.3)
    scale = torch.tensor([1e-3, 1, 10, 1, 1, 1e2])
    found = linear_probe.probe(r[:100] * scale + 5, y[:100], 4, [(0.1, 0.0)], fit(epochs=50, batch=20))
    assert metrics.topk(found.classifier(r[100:] * scale + 5), y[100:], 1) == 100


def test_a_handful_of_images_is_probed_without_holding_any_out():
    r, y = torch.eye(3), torch.arange(3)
    found = linear_probe.probe(r, y, 3, [(0.1, 0.0), (1.0, 0.0)], fit())
    assert found.cell == (0.1, 0.0) and found.held_out_top1 is None and found.temperature == 1


@given(seeds, st.sampled_from([0.2, 1.0, 5.0]))
def test_the_temperature_is_the_minimum_of_the_cross_entropy(seed, scale):
    rng = np.random.default_rng(seed)
    y = torch.tensor(rng.integers(0, 3, 200))
    scores = torch.tensor(scale * (rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[y]))
    best = metrics.best_temperature(scores, y)
    nll = lambda t: torch.nn.functional.cross_entropy(scores / t, y).item()
    assert nll(best) <= min(nll(best * 1.01), nll(best / 1.01), nll(1.0)) + 1e-9


def test_temperature_undoes_a_scale():
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(5000, 4, generator=g, dtype=torch.double)
    y = torch.multinomial(scores.softmax(1), 1, generator=g).squeeze(1)  # calibrated as it is
    assert metrics.best_temperature(7 * scores, y) == pytest.approx(7, rel=0.1)
    assert metrics.reliability(7 * scores, y)[0] > 0.15 > 0.03 > metrics.reliability(scores, y)[0]


@pytest.fixture(scope="module")
def probed(trained):
    linear_probe.main([str(trained), "--limit", "400", "--epochs", "3"], standalone_mode=False)
    return trained / "classifier-first400.pt"


def test_a_saved_classifier_maps_images_to_the_reported_accuracy(probed):
    classifier = linear_probe.load_classifier(probed)
    test = images.load_data("shapes", None, False, size=16)
    result = json.loads((probed.parent / "probe-first400.json").read_text())
    with torch.no_grad():
        scores = torch.cat([classifier(x) for x in test.images.split(500)])
        torch.testing.assert_close(classifier(test.images[:9].float() / 255), scores[:9], rtol=0.02, atol=0.02)
    assert metrics.topk(scores, test.labels, 1) == pytest.approx(result["top1"], abs=0.11)
    assert metrics.reliability(scores, test.labels)[0] == pytest.approx(result["ece"], abs=2e-3)
    assert classifier.classes == test.classes and classifier.temperature == result["temperature"]
    assert np.mean(list(result["per_class_top1"].values())) == pytest.approx(result["top1"], abs=2.0)
    assert metrics.topk(scores, test.labels, 5) == pytest.approx(result["top5"], abs=0.11) and result["top5"] > result["top1"]
    calibrated = metrics.reliability(scores / classifier.temperature, test.labels)[0]
    assert calibrated == pytest.approx(result["ece_after_temperature"], abs=2e-3)


def test_neighbours_and_geometry_are_those_of_the_encoder(probed):
    frozen = linear_probe.load_encoder(probed.with_name("ckpt.pt"), torch.device("cpu"))
    result = json.loads((probed.parent / "probe-first400.json").read_text())
    train, test = images.load_data("shapes", None, True, size=16, limit=400), images.load_data("shapes", None, False, size=16)
    r, r_test = linear_probe.extract(frozen, train), linear_probe.extract(frozen, test)
    assert result["knn_top1"] == pytest.approx(metrics.knn_top1(r, train.labels, r_test, test.labels), abs=0.11) and result["test_images"] == 2000
    z = torch.nn.functional.normalize(r_test.double())
    assert result["uniformity"] == pytest.approx(ref.uniformity(z[:300].numpy()), abs=0.2)
    same = (test.labels[:, None] == test.labels).fill_diagonal_(False)
    assert result["tolerance"] == pytest.approx((z @ z.T)[same].mean().item(), abs=1e-3)
    views = [torch.nn.functional.normalize(linear_probe.extract(frozen, test, key=(0, 8, v))) for v in range(2)]
    assert result["alignment"] == pytest.approx((views[0] - views[1]).square().sum(1).mean().item(), abs=1e-5)


def test_fractions_augmentation_recipes_and_normalised_features_are_probed(trained, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    classifiers = {}
    one = ["--lr", "0.1", "--weight-decay", "0"]
    for name, options in {
        "plain": one, "augment": [*one, "--augment"], "l2": [*one, "--l2-normalize", "--no-standardize"], "raw": [*one, "--no-standardize"],
        "lars": ["--lr-per-256", "0.2", "--optimizer", "lars"], "smooth": [*one, "--label-smoothing", "0.2"],
    }.items():  # fmt: skip
        result = linear_probe.main([str(tmp_path), "--limit", "600", "--epochs", "2", *options], standalone_mode=False)
        assert 0 < result["top1"] <= result["top5"] <= 100
        classifiers[name] = linear_probe.load_classifier(tmp_path / "classifier-first600.pt")
        if name == "l2":
            test = images.load_data("shapes", None, False, size=16)
            with torch.no_grad():
                assert metrics.topk(classifiers[name](test.images), test.labels, 1) == pytest.approx(result["top1"], abs=0.2)
            assert result["fit"]["l2_normalize"] and not result["fit"]["standardize"]
    weights = [c.linear.weight for c in classifiers.values()]
    assert all(not torch.allclose(a, b, rtol=1e-3) for k, a in enumerate(weights) for b in weights[:k])


def test_probes_of_other_settings_leave_files_of_their_own(trained, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    few = linear_probe.main([str(tmp_path), "--limit", "600", "--epochs", "2", "--fraction", "0.1"], standalone_mode=False)
    assert few["train_images"] == pytest.approx(60, abs=5) and (tmp_path / "probe-0.1-first600.json").exists()
    recipe = linear_probe.main([str(tmp_path), "--limit", "600", "--epochs", "2", "--recipe", "cifar10-supcon", "--lr", "3"], standalone_mode=False)
    assert (recipe["lr"], recipe["weight_decay"], recipe["fit"]["schedule"], recipe["fit"]["standardize"]) == (3, 0, "step", False)
    out = capsys.readouterr().out
    assert "--lr 3\n" in out and "--no-standardize" in out and (tmp_path / "classifier-first600-cifar10-supcon.pt").exists()
    linear_probe.main([str(tmp_path), "--limit", "600", "--recipe", "imagenet-supcon-r50", "--batch", "64", "--epochs", "2"], standalone_mode=False)
    for name in ("one", "two"):
        folder_of(tmp_path / name, ["train", "test"], ["a", "b"])
        linear_probe.main([str(tmp_path), "--dataset", "folder", "--data", str(tmp_path / name), "--epochs", "1"], standalone_mode=False)
    assert (tmp_path / "probe-folder-one.json").exists() and (tmp_path / "probe-folder-two.json").exists()
    assert not (tmp_path / "probe.json").exists()


def test_augmented_views_change_with_the_epoch_and_not_with_the_run(trained):
    frozen = linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    data = images.load_data("shapes", None, False, size=16, limit=30)
    a, b, c = (linear_probe.extract(frozen, data, key=key) for key in ((0, 6, 0), (0, 6, 0), (0, 6, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, linear_probe.extract(frozen, data))
    frozen.config["normalize_encoder"] = True
    torch.testing.assert_close(linear_probe.extract(frozen, data, key=(0, 6, 0)), torch.nn.functional.normalize(a))


def test_augmented_views_are_cropped_as_in_training(trained):
    frozen = linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    data = images.load_data("shapes", None, False, size=16, limit=200)
    still, moved = linear_probe.extract(frozen, data), []
    for crop_min in (1.0, 0.5, 0.05):
        frozen.config["crop_min"] = crop_min
        moved.append((linear_probe.extract(frozen, data, key=(0, 6, 0)) - still).norm())
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("size", [16, 72])
def test_a_streamed_folder_is_probed_as_one_in_memory(size, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["a", "b"], size=(100, 80))
    options = [*FOLDER, "--size", str(size), "--data", str(tmp_path), "--precision", "float32", "--augment", "crop"]
    pretrain.main([*options, "--stream", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    frozen = linear_probe.load_encoder(tmp_path / "run" / "ckpt.pt", torch.device("cpu"))
    memory, stream = (images.load_data("folder", tmp_path, True, size=size, stream=stream) for stream in (False, True))
    torch.testing.assert_close(linear_probe.extract(frozen, memory), linear_probe.extract(frozen, stream))
    assert linear_probe.main([str(tmp_path / "run"), "--epochs", "2"], standalone_mode=False)["test_images"] == 8


def test_views_of_a_streamed_folder_differ_from_image_to_image(tmp_path):
    folder_of(tmp_path, ["train"], ["a"], count=1)
    file = next(tmp_path.rglob("0.png"))
    for k in range(1, 6):  # six times the same picture
        (file.parent / f"{k}.png").write_bytes(file.read_bytes())
    data = images.load_data("folder", tmp_path, True, size=16, stream=True)
    frozen = linear_probe.Frozen(torch.nn.Flatten(), torch.zeros(3), torch.ones(3), {"size": 16, "precision": "float32"}, torch.device("cpu"))
    assert len(linear_probe.extract(frozen, data).unique(dim=0)) == 1
    assert len(linear_probe.extract(frozen, data, key=(0, 6, 0)).unique(dim=0)) == 6


def test_pictures_are_drawn(trained, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    linear_probe.main([str(tmp_path), "--limit", "200", "--epochs", "1", "--figure"], standalone_mode=False)
    robustness.main([str(tmp_path / "classifier-first200.pt"), "--limit", "20", "--figure"], standalone_mode=False)
    for name in ("probe-first200.png", "robustness-first200-first20.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- corruptions


def pictures(n=6, size=32):
    return images.shapes(n, size, seed=3).images


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", corruptions.MADE)
def test_corruptions_are_drawn_from_their_key_and_grow_with_severity(name, size):
    x = pictures(8, size)
    made = [corruptions.corrupt(x, name, s, images.generator(0, s)) for s in range(1, 6)]
    again = corruptions.corrupt(x, name, 5, images.generator(0, 5))
    assert torch.equal(made[4], again) and all(m.shape == x.shape and m.dtype == torch.uint8 for m in made)
    change = [(m.float() - x.float()).square().mean().item() for m in made]
    assert min(change) > 0 and (name == "elastic_transform" or change[4] > 1.2 * change[0])  # its kinds of severity differ


def test_the_parameters_are_the_benchmarks():
    """github.com/hendrycks/robustness, make_cifar_c.py and imagenet_c/corruptions.py."""
    small = {
        "gaussian_noise": "0.04 0.06 0.08 0.09 0.1", "shot_noise": "500 250 100 75 50", "impulse_noise": "0.01 0.02 0.03 0.05 0.07",
        "defocus_blur": "0.3 0.4 0.4 0.5 0.5 0.6 1 0.2 1.5 0.1", "brightness": "0.05 0.1 0.15 0.2 0.3", "contrast": "0.75 0.5 0.4 0.3 0.15",
        "elastic_transform": "0 0 0.08 0.05 0.2 0.07 0.08 0.06 0.06 0.1 0.04 0.05 0.1 0.03 0.03", "pixelate": "0.95 0.9 0.85 0.75 0.65",
        "jpeg_compression": "80 65 58 50 40",
    }  # fmt: skip
    large = {
        "gaussian_noise": "0.08 0.12 0.18 0.26 0.38", "shot_noise": "60 25 12 5 3", "impulse_noise": "0.03 0.06 0.09 0.17 0.27",
        "defocus_blur": "3 0.1 4 0.5 6 0.5 8 0.5 10 0.5", "brightness": "0.1 0.2 0.3 0.4 0.5", "contrast": "0.4 0.3 0.2 0.1 0.05",
        "elastic_transform": "2 0.7 0.1 2 0.08 0.2 0.05 0.01 0.02 0.07 0.01 0.02 0.12 0.01 0.02", "pixelate": "0.6 0.5 0.4 0.3 0.25",
        "jpeg_compression": "25 18 15 10 7",
    }  # fmt: skip
    for ours, theirs in ((corruptions.SMALL, small), (corruptions.LARGE, large)):
        assert {name: list(np.ravel(c)) for name, c in ours.items() if name != "zoom_blur"} == {name: [float(v) for v in c.split()] for name, c in theirs.items()}


def test_elastic_displacements_are_measured_in_the_benchmarks_244_pixels(monkeypatch):
    sigmas, rows = [], corruptions.gaussian_rows
    monkeypatch.setattr(corruptions, "gaussian_rows", lambda size, sigma: sigmas.append(sigma) or rows(size, sigma))
    for size in (224, 32):
        corruptions.elastic_transform(torch.zeros(1, 3, size, size), (0.1, 0.05, 0.1), images.generator(0))
    assert sigmas == pytest.approx([0.05 * 244, 0.05 * 32])


def test_zooms_are_as_many_as_the_benchmarks_float_ranges_have():
    small = [len(np.arange(1, end, 0.01)) for end in (1.06, 1.11, 1.16, 1.21, 1.26)]
    large = [len(np.arange(1, end, step)) for end, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))]
    assert [count for count, _ in corruptions.SMALL["zoom_blur"]] == small and [count for count, _ in corruptions.LARGE["zoom_blur"]] == large


def test_noises_have_their_variances():
    x = torch.full((4, 3, 64, 64), 0.5)
    assert corruptions.gaussian_noise(x, 0.1, images.generator(0)).std().item() == pytest.approx(0.1, rel=0.02)
    assert corruptions.shot_noise(x, 100, images.generator(0)).var().item() == pytest.approx(0.5 / 100, rel=0.05)
    hit = corruptions.impulse_noise(x, 0.06, images.generator(0))
    assert (hit == 1).float().mean().item() == pytest.approx(0.03, rel=0.1) and (hit == 0).float().mean().item() == pytest.approx(0.03, rel=0.1)


def test_deterministic_corruptions_by_hand():
    x = pictures().float() / 255
    flat = torch.full((1, 3, 32, 32), 0.4)
    for c in corruptions.SMALL["defocus_blur"] + corruptions.LARGE["defocus_blur"]:
        torch.testing.assert_close(corruptions.defocus_blur(flat, c, None), flat, rtol=0.02, atol=0)  # the kernel sums to 1, or nearly, as the benchmark's
    dot = torch.zeros(1, 3, 33, 33)
    dot[..., 16, 16] = 1
    spread = corruptions.defocus_blur(dot, (3, 0.1), None)[0, 0] > 1e-3
    assert spread.sum() == sum(i * i + j * j <= 9 for i in range(-3, 4) for j in range(-3, 4))
    torch.testing.assert_close(corruptions.contrast(x, 0.3, None).mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(corruptions.contrast(x, 0.3, None).std((2, 3)), 0.3 * x.std((2, 3)))
    torch.testing.assert_close(corruptions.zoom_blur(x, (1, 0.01), None), x)  # one enlargement, by 1
    torch.testing.assert_close(corruptions.zoom_blur(flat, (11, 0.01), None), flat)
    torch.testing.assert_close(corruptions.elastic_transform(x, (0, 0, 0), images.generator(0)), x, rtol=1e-3, atol=1e-3)
    red = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(corruptions.brightness(red, 0.3, None).flatten(), torch.tensor([0.8, 0.4, 0.0]))


def test_pixelate_and_jpeg_are_pillows():
    x = pictures(3)
    for image, small, jpeg in zip(x, corruptions.pixelate(x, 0.65), corruptions.jpeg_compression(x, 40)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        box = picture.resize((20, 20), Image.BOX).resize((32, 32), Image.BOX)
        assert torch.equal(small, torch.from_numpy(np.array(box)).permute(2, 0, 1))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=40)
        difference = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).int() - jpeg
        assert not difference.any()


# ---------------------------------------------------------------- robustness.py


@pytest.fixture(scope="module")
def other(trained):
    """Another classifier of the same encoder."""
    linear_probe.main([str(trained), "--limit", "100", "--epochs", "1"], standalone_mode=False)
    return trained / "classifier-first100.pt"


def test_a_baseline_is_tested_on_the_same_images(probed, other):
    arguments = lambda *paths: [*map(str, paths), "--limit", "40"]
    alone = robustness.main(arguments(other), standalone_mode=False)
    result = robustness.main(arguments(probed, "--baseline", other), standalone_mode=False)
    assert result["baseline"] == {k: alone[k] for k in result["baseline"]} and result["baseline"]["clean_ece"] != result["clean_ece"]
    ratios = [sum(result["errors"][name]) / sum(alone["errors"][name]) for name in alone["errors"]]
    assert result["ratio_to_baseline"] == pytest.approx(np.mean(ratios)) and result["ratio_to_baseline"] != 1


def test_an_interrupted_test_goes_on_where_it_was(probed, tmp_path, monkeypatch, capsys):
    for name in ("classifier-first400.pt", "ckpt.pt"):
        (tmp_path / name).write_bytes(probed.with_name(name).read_bytes())
    arguments = [str(tmp_path / probed.name), "--limit", "30"]
    whole = robustness.main(arguments, standalone_mode=False)
    corrupt, calls = robustness.corrupt, []

    def counted(images, name, severity, g):
        calls.append(name)
        if len(calls) == 24:  # of severity 4 of the fifth corruption
            raise MemoryError
        return corrupt(images, name, severity, g)

    monkeypatch.setattr(robustness, "corrupt", counted)
    with pytest.raises(MemoryError):
        robustness.main(arguments, standalone_mode=False)
    assert whole | {"seconds": 0} == robustness.main(arguments, standalone_mode=False) | {"seconds": 0}
    assert len(calls) == 24 + 50 - 20 and not list(tmp_path.glob("*.part"))


def test_only_the_same_test_is_taken_up(tmp_path):
    part, about = tmp_path / "robustness.part", {"clean": [[0.1, 0.01]], "data": "a"}
    part.write_text(json.dumps(about | {"errors": [{"fog": [0.5] * 5}], "ece": [{"fog": [0.1] * 5}]}))
    assert robustness.taken_up(part, about) == ([{"fog": [0.5] * 5}], [{"fog": [0.1] * 5}])
    assert robustness.taken_up(part, about | {"data": "b"}) is None and robustness.taken_up(part, about | {"clean": [[0.2, 0.01]]}) is None
    for damaged in ("", "[]", "{"):
        part.write_text(damaged)
        assert robustness.taken_up(part, about) is None
    assert robustness.taken_up(tmp_path / "none", about) is None


def test_corruptions_made_here_are_reported_as_such(probed, capsys):
    result = robustness.main([str(probed), "--limit", "40", "--baseline", str(probed)], standalone_mode=False)
    out = capsys.readouterr().out
    assert result["corruptions"] == 10 and "mean error over 10 corruptions" in out and "mCE" not in out
    assert result["ratio_to_baseline"] == 1 and set(result["errors"]) == set(corruptions.MADE)
    assert result["mean_error"] == pytest.approx(100 - np.mean(result["accuracy_by_severity"]))
    assert json.loads((probed.parent / "robustness-first400-first40.json").read_text())["errors"] == result["errors"]


def cifar10_c(folder, test, names=corruptions.NAMES, n=60):
    """Severity s is the clean images with their first 12 s images exchanged for black."""
    folder.mkdir()
    clean = test.images[:n].permute(0, 2, 3, 1).numpy()
    severities = np.concatenate([np.where((np.arange(n) < 12 * s)[:, None, None, None], 0, clean) for s in range(1, 6)])
    for name in names:
        np.save(folder / f"{name}.npy", severities.astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(test.labels[:n].numpy(), 5))
    return severities


def test_cifar_10_c_files_are_read_severity_by_severity(probed, tmp_path, capsys):
    test = images.load_data("shapes", None, False, size=16)
    severities = cifar10_c(tmp_path / "c", test)
    result = robustness.main([str(probed), "--corrupted", str(tmp_path / "c")], standalone_mode=False)
    classifier = linear_probe.load_classifier(probed)
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(severities.astype(np.uint8)).permute(0, 3, 1, 2)).argmax(1)
    expected = (predicted != test.labels[:60].repeat(5)).double().view(5, 60).mean(1).tolist()
    assert all(errors == pytest.approx(expected) for errors in result["errors"].values()) and result["corruptions"] == 15
    assert "mean corruption error" in capsys.readouterr().out and "mce" not in result and (probed.parent / "robustness-first400-c.json").exists()


@pytest.fixture(scope="module")
def folder_classifier(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    folder_of(root, ["train", "test"], ["a", "b"])
    pretrain.main([*FOLDER, "--data", str(root), "--run-dir", str(root / "run")], standalone_mode=False)
    linear_probe.main([str(root / "run"), "--epochs", "5"], standalone_mode=False)
    return root / "run" / "classifier.pt"


def imagenet_c(root, names=corruptions.NAMES, classes=("a", "b"), severities=range(1, 6)):
    for k, name in enumerate(names):
        for s in severities:
            folder_of(root / ("noise" if k < 3 else ".") / name, [str(s)], classes, count=2)
    return root


def test_imagenet_c_folders_give_mce_only_if_all_are_there(folder_classifier, tmp_path, capsys):
    result = robustness.main([str(folder_classifier), "--corrupted", str(imagenet_c(tmp_path / "all"))], standalone_mode=False)
    assert result["mce"] == pytest.approx(robustness.mean_corruption_error(result["errors"])) and "mCE" in capsys.readouterr().out
    some = imagenet_c(tmp_path / "some", corruptions.NAMES[:4])
    result = robustness.main([str(folder_classifier), "--corrupted", str(some)], standalone_mode=False)
    out = capsys.readouterr().out
    assert "mce" not in result and "mean error over 4 corruptions" in out and "mCE" not in out


def missing_severity(here, probed, folder):
    return folder, ["--corrupted", imagenet_c(here / "c", corruptions.NAMES[:2], severities=(1, 2, 4, 5))], "has no severity 3"


def other_classes(here, probed, folder):
    return folder, ["--corrupted", imagenet_c(here / "c", corruptions.NAMES[:2], classes=("a", "b", "c"))], "holds 3 classes that are not, by name, the 2"


def an_empty_severity(here, probed, folder):
    root = imagenet_c(here / "c", corruptions.NAMES[3:5])
    for file in (root / "noise" / "defocus_blur" / "2").rglob("*.png"):
        file.unlink()
    return folder, ["--corrupted", root], "Found no valid file"


def cifar10_c_with(here, **files):
    """A sound CIFAR-10-C but for these files."""
    cifar10_c(here / "c", images.load_data("shapes", None, False, size=16))
    for name, values in files.items():
        np.save(here / "c" / f"{name}.npy", values)
    return here / "c"


def labels_out_of_range(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 11)], "out of range for the classifier's 10 classes"


def fewer_classes(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 7)], "has 7 classes, and the classifier 10"


def too_few_labels(here, probed, folder):
    labels = images.load_data("shapes", None, False, size=16).labels[:50].numpy()
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.tile(labels, 5))], "labels.npy has 250 labels"


def more_labels_than_test_images(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.arange(50_000) % 10)], "are not the labels of the test set"


def labels_of_another_test_set(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 10)], "are not the labels of the test set"


def labels_that_are_words(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.array(["cat"] * 300))], "must hold whole numbers"


def no_labels(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.zeros(0, dtype=int))], "must hold five severities"


def images_that_are_floats(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, fog=np.zeros((300, 16, 16, 3)))], "must hold uint8 images"


def half_a_classifier(here, probed, folder):
    torch.save({"format": linear_probe.FORMAT, "weight": torch.zeros(3)}, here / "classifier.pt")
    return here / "classifier.pt", [], "is not a classifier of linear_probe.py"


def a_cut_file(here, probed, folder):
    (cifar10_c_with(here) / "fog.npy").write_bytes(b"\x93NUMPY")
    return probed, ["--corrupted", here / "c"], "fog.npy cannot be read"


def nothing_there(here, probed, folder):
    return probed, ["--corrupted", here], "holds neither"


def a_checkpoint_of_pretrain(here, probed, folder):
    return probed.with_name("ckpt.pt"), [], "is not a classifier of linear_probe.py"


def no_classifier(here, probed, folder):
    return here / "classifier.pt", [], "there is no classifier"


def a_baseline_of_another_data_set(here, probed, folder):
    return probed, ["--baseline", folder], "was fitted to other classes"


def a_name_too_long(here, probed, folder):
    return here / ("c" * 300), [], "is too long a name"


def another_test_set(here, probed, folder):
    folder_of(here, ["test"], ["x", "y", "z"])
    return folder, ["--data", here], "has other classes than"


@pytest.mark.parametrize("situation", [
    missing_severity, other_classes, an_empty_severity, labels_out_of_range, fewer_classes, too_few_labels,
    more_labels_than_test_images, labels_of_another_test_set, labels_that_are_words, no_labels, images_that_are_floats, half_a_classifier, a_cut_file, nothing_there, a_checkpoint_of_pretrain, no_classifier, a_baseline_of_another_data_set, a_name_too_long, another_test_set,
], ids=lambda situation: situation.__name__)  # fmt: skip
def test_what_cannot_be_tested_gives_one_line_and_status_2(situation, probed, folder_classifier, tmp_path, monkeypatch, capsys):
    path, options, words = situation(tmp_path, probed, folder_classifier)
    before = files_in(tmp_path)
    assert words in refusal(robustness, [path, *options], monkeypatch, capsys)
    assert files_in(tmp_path) == before
