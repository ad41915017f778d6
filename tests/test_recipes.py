"""The papers' numbers, the schedules, LARS, the queue, and what is done to labels and batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import images
import linear_probe
import options
import pretrain
import recipes
import reference_numpy as ref
from runs import SMALL, folder_of, log_of, options_of, refusal, same_bits, state_of

# ---------------------------------------------------------------- presets

# As published: batch, epochs, peak rate, tau, factor of the loss, weight decay, warm-up, optimiser; then the probe's peak rate.
PUBLISHED = {
    "cifar10-supcon": (1024, 1000, 0.5, 0.1, 1 / 0.7, 1e-4, 10, "sgd", 5),
    "cifar100-supcon": (1024, 1000, 0.5, 0.1, 1 / 0.7, 1e-4, 10, "sgd", 5),
    "cifar10-simclr": (1024, 1000, 0.5, 0.5, 5 / 0.7, 1e-4, 10, "sgd", 1),
    "cifar10-ce": (1024, 500, 0.8, None, None, 1e-4, 10, "sgd", None),
    "cifar10-supcon-tf": (4096, 1000, 8.0, 0.1, 0.1, 1e-4, 10, "sgd", 40),
    "cifar10-simclr-tf": (1024, 400, 2.0, 0.5, 1, 1e-4, 10, "sgd", 1),
    "cifar10-ce-tf": (1024, 1000, 0.4, None, None, 5e-4, 12, "nesterov", None),
    "imagenet-supcon-r50": (6144, 350, 9.6, 0.1, 0.1, 1e-3, 12, "lars", 1.2),
    "imagenet-supcon-r101": (4096, 350, 6.4, 0.1, 0.1, 1e-4, 12, "lars", 0.8),
    "imagenet-supcon-r200": (4096, 700, 3.2, 0.1, 0.1, 1e-4, 12, "lars", 0.8),
    "imagenet-simclr-r50": (6144, 100, 7.2, 0.1, 1, 1e-4, 12, "lars", 2.4),
    "imagenet-ce-r50": (6144, 200, 2.4, None, None, 1e-4, 12, "nesterov", None),
    "imagenet-ce-r200": (4096, 700, 1.6, None, None, 1e-4, 12, "nesterov", None),
    "imagenet-supcon-queue": (256, 200, 0.03, 0.07, 1, 1e-4, 0, "sgd", None),
    "cifar10-supcon-solo": (256, 1000, 0.4, 0.2, 1, 1e-5, 10, "sgd", None),
}


def peak(o):
    rates = o.get("lr", ()) if isinstance(o.get("lr"), tuple) else (o.get("lr"),)
    return o["lr_per_256"] * o["batch"] / 256 if "lr_per_256" in o else rates[0]


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_presets_hold_the_published_numbers(name):
    o, probe = recipes.PRESETS[name].pretrain, recipes.PRESETS[name].probe
    optimizer = "nesterov" if o.get("nesterov") else o.get("optimizer", "sgd")
    here = [o["batch"], o["epochs"], peak(o), o.get("tau"), o.get("loss_scale"), o["weight_decay"], o["warmup"], optimizer, peak(probe) if probe else None]
    for ours, published in zip(here, PUBLISHED[name]):
        assert ours == (pytest.approx(published) if isinstance(published, float) else published)


def test_the_presets_probes_and_heads_are_the_published_ones():
    for name, preset in recipes.PRESETS.items():
        o, probe = preset.pretrain, preset.probe
        imagenet, official = name.startswith("imagenet"), recipes.OFFICIAL in preset.source
        assert o["momentum"] == 0.9 and o["schedule"] == "cosine" and o["stem"] == ("7x7" if imagenet else "3x3")
        if imagenet and probe:
            assert probe["label_smoothing"] == 0.05 and probe["weight_decay"] == (1e-6,)
        if imagenet and official and o["loss"] == "supcon":
            assert o["normalize_encoder"] and o["proj_depth"] == 1 and o["proj_dim"] == 128
            assert probe["optimizer"] == "rmsprop"
            assert (probe["epochs"], probe["warmup"], probe["schedule"]) == (90, 12, "exponential")
        if official:  # its scripts' --projection_head_layers=2048,2048,128, and batch norm over all cores but for one script
            assert o["loss"] != "simclr" or o["proj_depth"] == 3
            assert o.get("sync_bn", False) == (name != "cifar10-supcon-tf")
        if o["loss"] == "ce":
            assert not probe and o.get("label_smoothing", 0) == (0.05 if imagenet else 0)
        if o["augment"] == "sim":
            assert o["jitter"] == (1.0 if "solo" in name or name == "imagenet-simclr-r50" else 0.5)
        if recipes.REFERENCE in preset.source and probe:
            assert (probe["epochs"], probe["batch"], probe["weight_decay"], probe["schedule"]) == (100, 512, (0.0,), "step")
    assert {o.pretrain["augment"] for n, o in recipes.PRESETS.items() if "r200" in n} == {"stacked-rand"}


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_every_preset_takes_a_step(name, tmp_path, capsys):
    folder_of(tmp_path, ["train"], ["a", "b", "c"], size=(40, 40))
    small = ["--dataset", "folder", "--data", str(tmp_path), "--limit", "8", "--size", "32", "--batch", "8", "--epochs", "1", "--device", "cpu"]
    small += ["--proj-hidden", "64"] if recipes.PRESETS[name].pretrain.get("proj_depth", 1) > 1 else []
    pretrain.main([*small, "--recipe", name, "--workers", "0", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    out, o = capsys.readouterr().out, recipes.PRESETS[name].pretrain
    assert f"recipe {name}: {recipes.PRESETS[name].source}" in out and f"--batch {o['batch']}" in out
    config = options_of(tmp_path / "run")
    kept = {k: v for k, v in o.items() if k not in ("dataset", "size", "batch", "epochs", "warmup", "lr", "lr_per_256", "stream", "sync_bn", "proj_hidden")}
    assert {k: config[k] for k in kept} == kept
    assert config["lr"] == pytest.approx(o["lr"] if "lr" in o else o["lr_per_256"] * 8 / 256)


def test_imagenets_preset_runs_to_its_probe_on_a_folder_of_jpegs(tmp_path):
    folder_of(tmp_path, ["train", "val"], ["a", "b", "c", "d", "e", "f"], count=2, size=(260, 240), kind="jpeg")
    run = tmp_path / "run"
    options = ["--recipe", "imagenet-supcon-r50", "--data", str(tmp_path), "--arch", "resnet18", "--batch", "6", "--epochs", "1", "--workers", "0"]
    pretrain.main([*options, "--run-dir", str(run)], standalone_mode=False)
    taken = options_of(run)
    assert (taken["size"], taken["stem"], taken["augment"], taken["stream"], taken["normalize_encoder"]) == (224, "7x7", "auto", True, True)
    result = linear_probe.main([str(run), "--recipe", "imagenet-supcon-r50", "--batch", "6", "--epochs", "2", "--workers", "0"], standalone_mode=False)
    assert 0 <= result["top1"] <= result["top5"] <= 100 and result["test_images"] == 12 and result["fit"]["label_smoothing"] == 0.05


def test_options_override_a_preset_and_what_is_bound_to_them():
    given = {"loss": "ce", "lr": 0.3, "epochs": 5}
    wanted = given | {"recipe": "imagenet-supcon-r50"}
    taken = options.of_preset(wanted, set(given))
    assert not {"loss", "tau", "loss_scale", "proj_depth", "lr", "lr_per_256", "epochs", "warmup"} & taken.keys()
    assert taken["optimizer"] == "lars" and taken["batch"] == 6144
    assert options.of_preset(wanted | {"loss": "supcon"}, {"loss"})["tau"] == 0.1  # given, but as the preset has it


def test_recipe_list_prints_every_number(capsys):
    pretrain.main(["--recipe", "list"], standalone_mode=False)
    out = capsys.readouterr().out
    parts = dict(zip(recipes.PRESETS, out.split("recipe ")[1:]))
    for name, preset in recipes.PRESETS.items():
        assert parts[name].startswith(f"{name}: {preset.source}") and preset.differs in parts[name]
        assert all(recipes.as_option(k, v) in parts[name] for stage in (preset.pretrain, preset.probe) for k, v in stage.items())


# ---------------------------------------------------------------- schedules and optimisers


def config(**options):
    return SimpleNamespace(**{"lr": 0.5, "epochs": 1000, "warmup": 10.0, "warmup_from": 0.01, "schedule": "cosine"} | options)


def test_warmup_and_cosine_are_the_reference_codes():
    lr = [recipes.learning_rate(config(), step, 10) for step in range(10001)]
    assert lr[0] == 0.01 and lr[50] == pytest.approx((0.01 + lr[100]) / 2) and lr[100] == pytest.approx(0.49988, abs=5e-6)
    assert all(a > b for a, b in zip(lr[100:], lr[101:])) and lr[10000] == pytest.approx(0.5e-3)
    assert lr[5000] == pytest.approx(0.5 * (1e-3 + 1) / 2)


def test_step_exponential_and_constant_by_hand():
    step = [recipes.learning_rate(config(schedule="step", warmup=0.0), s, 1) for s in (0, 699, 700, 800, 900, 999)]
    assert step == pytest.approx([0.5, 0.5, 0.05, 0.005, 0.0005, 0.0005])
    probe = [recipes.learning_rate(config(schedule="step", warmup=0.0, epochs=100, lr=5.0), s, 1, marks=(0.6, 0.75, 0.9), factor=0.2) for s in (59, 60, 75, 90)]
    assert probe == pytest.approx([5, 1, 0.2, 0.04])
    exponential = [recipes.learning_rate(config(schedule="exponential", warmup=0.0), s, 4) for s in (0, 1, 2, 3, 4, 400)]
    assert exponential == pytest.approx([0.5 * 0.97**k for k in (0, 0, 1, 1, 2, 200)])
    warmed = [recipes.learning_rate(config(schedule="exponential", warmup=2.0, warmup_from=0.0), s, 4) for s in (0, 4, 8, 10)]
    assert warmed == pytest.approx([0, 0.25, 0.5, 0.5 * 0.97])  # it decays from the end of the warm-up on
    assert recipes.learning_rate(config(schedule="constant", warmup=0.0), 7, 4) == 0.5


shapes = st.sampled_from([(3,), (2, 3), (4, 1), (2, 1, 3, 3)])


@given(st.integers(0, 2**32 - 1), shapes, st.sampled_from([0, 0.5, 0.9]), st.sampled_from([0, 1e-4, 0.1]), st.sampled_from([0, 1]), st.sampled_from([0, 1]))
def test_lars_is_the_oracles(seed, shape, momentum, decay, scale_w, scale_g):
    rng = np.random.default_rng(seed)
    w, grads = scale_w * rng.normal(size=shape), [scale_g * rng.normal(size=shape) for _ in range(20)]
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = recipes.LARS([{"params": [p], "weight_decay": decay}], 0.3, momentum, eta=0.02)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), ref.lars(w, grads, 0.3, momentum, decay, 0.02), rtol=1e-12, atol=1e-14)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.9]), st.sampled_from([0, 0.01]))
def test_lars_is_sgd_where_its_ratio_is_1(seed, momentum, decay):
    rng = np.random.default_rng(seed)
    vector, matrix = torch.tensor(rng.normal(size=5)), torch.tensor(rng.normal(size=(3, 4)))
    ours, sgd = ([torch.nn.Parameter(vector.clone()), torch.nn.Parameter(matrix.clone())] for _ in range(2))
    lars = recipes.LARS(ours, 0.1, momentum, decay, eta=1.0)
    plain = torch.optim.SGD([{"params": sgd[:1], "weight_decay": 0}, {"params": sgd[1:]}], 0.1, momentum, weight_decay=decay)
    for _ in range(20):
        g = torch.tensor(rng.normal(size=(3, 4)))
        with torch.no_grad():  # ||g + decay w|| = ||w||: the ratio eta ||w|| / ||g|| is 1
            g = g * ours[1].norm() / g.norm() - decay * ours[1]
        for parameters in (ours, sgd):
            parameters[0].grad, parameters[1].grad = torch.tensor(np.arange(5.0)), g.clone()
        lars.step()
        plain.step()
    for a, b in zip(ours, sgd):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 2**32 - 1), shapes, st.sampled_from([0, 0.9]), st.sampled_from([0, 0.1]), st.sampled_from([1e-4, 1]))
def test_rmsprop_is_the_oracles(seed, shape, momentum, decay, scale):
    rng = np.random.default_rng(seed)
    w, grads = rng.normal(size=shape), [scale * rng.normal(size=shape) for _ in range(20)]
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = recipes.RMSProp([{"params": [p], "weight_decay": decay}], 0.3, momentum)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), ref.rmsprop(w, grads, 0.3, momentum, decay), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [recipes.LARS, recipes.RMSProp])
def test_an_optimisers_state_survives_a_checkpoint(make):
    def run(restart):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = make(layer.parameters(), 0.1)
        for step in range(6):
            if step == 3 and restart:
                state, optimizer = optimizer.state_dict(), make(layer.parameters(), 0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return layer.weight

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize("optimizer", [["--optimizer", "lars", "--lr", "1"], ["--optimizer", "rmsprop", "--lr", "0.001"], ["--lr-per-256", "0.1"]])
def test_every_optimiser_trains(optimizer, tmp_path):
    pretrain.main([*SMALL, *optimizer, "--schedule", "exponential", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    epochs = [line["mean_loss"] for line in log_of(tmp_path / "run") if "mean_loss" in line]
    assert epochs[-1] < epochs[0]


# ---------------------------------------------------------------- the queue


def test_a_queue_of_the_previous_batch_gives_the_oracles_loss_on_both(tmp_path, monkeypatch):
    seen, total_loss = [], pretrain.total_loss

    def noted(config, z, logits, y, images, queue):
        loss = total_loss(config, z, logits, y, images, queue)
        seen.append((z.detach().clone(), y, queue, loss.item() / config.loss_scale))
        return loss

    monkeypatch.setattr(pretrain, "total_loss", noted)
    options = ["--precision", "float64", "--queue", "100", "--momentum-encoder", "0", "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    pretrain.main([*SMALL, *options], standalone_mode=False)
    assert seen[0][2] is None and len(seen) == 4
    for (z_before, y_before, _, _), (z, y, queue, loss) in zip(seen, seen[1:]):
        torch.testing.assert_close(queue[0], z_before, rtol=1e-12, atol=1e-12)  # 50 images, two views, as the same weights see them
        assert torch.equal(queue[1], y_before)
        contrast, labels = torch.cat([z, z_before]).numpy(), torch.cat([y, y_before]).numpy()
        assert loss == pytest.approx(ref.supcon_against(z.numpy(), y.numpy(), contrast, labels, 0.1, own=0), rel=1e-9)


def test_the_momentum_encoder_is_a_running_mean_of_the_weights():
    torch.manual_seed(0)
    model = pretrain.Model(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    queue = pretrain.Queue(model, 6, 0.9)
    mean = model.encoder.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.encoder.weight += torch.randn(4, 3)
        queue.follow(model)
        mean = 0.9 * mean + 0.1 * model.encoder.weight.detach()
    torch.testing.assert_close(queue.model.encoder.weight.detach(), mean)
    for k in range(4):
        queue.add(torch.full((4, 2), float(k)), torch.full((4,), k))
    assert queue.y.tolist() == [2, 2, 3, 3, 3, 3] and queue.z[:, 0].tolist() == queue.y.tolist()  # the oldest have gone


@pytest.mark.parametrize("loss", [["--loss", "supcon"], ["--loss", "simclr", "--micro-batch", "10"], ["--loss", "supcon-in", "--ce-weight", "0.2"]])
def test_a_run_with_a_queue_resumes_to_the_same_bits(loss, tmp_path):
    options = [*SMALL, *loss, "--queue", "150", "--momentum-encoder", "0.9", "--schedule", "constant", "--warmup", "0"]
    pretrain.main([*options, "--epochs", "3", "--run-dir", str(tmp_path / "whole")], standalone_mode=False)
    pretrain.main([*options, "--epochs", "1", "--run-dir", str(tmp_path / "parts")], standalone_mode=False)
    pretrain.main(["--resume", str(tmp_path / "parts"), "--epochs", "3"], standalone_mode=False)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert same_bits(whole, parts) and log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert whole["queue"]["z"].shape == (150, 128) and (loss[1] != "simclr" or set(whole["queue"]["y"].tolist()) == {-1})


# ---------------------------------------------------------------- labels and batches


@given(st.integers(0, 2**32 - 1), st.sampled_from(["mixup", "cutmix"]), st.sampled_from([0.2, 1.0]))
def test_mixed_images_and_labels_have_the_same_shares(seed, how, alpha):
    labels = torch.arange(4)
    x = labels.double().view(4, 1, 1, 1).expand(4, 3, 8, 8)  # an image is its label, everywhere
    made, y = images.mixed(x, labels, 4, how, alpha, images.generator(seed))
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    neighbour = labels.roll(1)
    share = y[labels, labels].double()
    torch.testing.assert_close(y[labels, neighbour].double(), 1 - share)
    torch.testing.assert_close(made.mean((1, 2, 3)), share * labels + (1 - share) * neighbour, rtol=1e-5, atol=1e-5)
    again, _ = images.mixed(x, labels, 4, how, alpha, images.generator(seed))
    assert torch.equal(made, again)


@pytest.mark.parametrize("options", [
    ["--mix", "mixup"], ["--mix", "cutmix", "--loss", "supcon-in"], ["--mix", "mixup", "--loss", "ce", "--label-smoothing", "0.1"],
    ["--mix", "cutmix", "--ce-weight", "0.5", "--micro-batch", "10"], ["--label-noise", "0.4"], ["--augment", "auto", "--workers", "0", "--crop-min", "0.5"],
], ids=" ".join)  # fmt: skip
def test_mixed_noisy_balanced_and_smaller_sets_train(options, tmp_path):
    pretrain.main([*SMALL, "--epochs", "2", *options, "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert log_of(tmp_path / "run")[-1]["epoch"] == 2


def test_balanced_and_smaller_sets_are_what_the_loss_sees(tmp_path, monkeypatch):
    seen, total_loss = [], pretrain.total_loss
    monkeypatch.setattr(pretrain, "total_loss", lambda *a: seen.append(a[3]) or total_loss(*a))
    pretrain.main([*SMALL, "--epochs", "1", "--balanced", "--run-dir", str(tmp_path / "balanced")], standalone_mode=False)
    assert len(seen) == 4 and all(torch.bincount(y, minlength=10).tolist() == [10] * 10 for y in seen)
    seen.clear()
    pretrain.main([*SMALL, "--epochs", "1", "--subset", "0.5", "--run-dir", str(tmp_path / "smaller")], standalone_mode=False)
    whole = torch.bincount(images.load_data("shapes", None, True, size=16, limit=200).labels).tolist()
    assert len(seen) == 2 and sum(torch.bincount(y, minlength=10) for y in seen).tolist() == pytest.approx([n for n in whole], abs=4)


def test_a_part_of_a_streamed_folder_keeps_images_and_labels_together(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b", "c"], count=8)
    whole = images.load_data("folder", tmp_path, True, size=16)
    stream = images.load_data("folder", tmp_path, True, size=16, stream=True)._replace(images=whole.images[:10])  # a sample of ten
    part = images.take(stream, images.stratified(stream.labels, 0.5, images.generator(0)))
    assert len(part.labels) == len(part.files) == 12 and 0 < len(part.images) < 10
    for image, file, label in zip(part.images, part.files, part.labels):
        assert torch.equal(image, images.to_size(images.read_image(file), 16)) and f"/{'abc'[label]}/" in file


def test_soft_labels_in_a_run_are_what_the_loss_sees(tmp_path, monkeypatch):
    seen, total_loss = [], pretrain.total_loss
    monkeypatch.setattr(pretrain, "total_loss", lambda *a: seen.append((a[1].detach().clone(), a[3], loss := total_loss(*a))) or loss)
    pretrain.main([*SMALL, "--epochs", "1", "--mix", "mixup", "--precision", "float64", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    z, y, loss = seen[1]
    assert y.shape == (100, 10) and ((y > 0) & (y < 1)).any()
    assert loss.item() * 0.7 == pytest.approx(ref.supcon_out(z.numpy(), y.double().numpy(), 0.1), rel=1e-6)


def test_balanced_batches_hold_every_class_equally():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    order = images.shuffled_balanced(labels, images.generator(0))
    assert len(order) == len(labels)
    for start in range(0, 60, 3):
        assert sorted(labels[order[start : start + 3]].tolist()) == [0, 1, 2]
    assert set(order[labels[order] == 2].tolist()) == {60, 61, 62}
    assert not torch.equal(order, images.shuffled_balanced(labels, images.generator(1)))


def test_subsets_are_stratified_and_noise_is_symmetric():
    labels = torch.arange(4).repeat_interleave(torch.tensor([1000, 200, 10, 1]))
    rows = images.stratified(labels, 0.1, images.generator(0))
    assert torch.bincount(labels[rows]).tolist() == [100, 20, 1, 1] and len(set(rows.tolist())) == len(rows)
    y = torch.arange(5).repeat(4000)
    noisy = images.with_label_noise(y, 0.4, 5, images.generator(0))
    assert (noisy != y).double().mean().item() == pytest.approx(0.4, abs=0.02)
    wrong = noisy[(noisy != y) & (y == 2)]
    assert torch.bincount(wrong, minlength=5)[[0, 1, 3, 4]].double().div(len(wrong)).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    assert torch.equal(images.with_label_noise(y, 0.0, 5, images.generator(0)), y)


def test_noisy_labels_are_counted_in_the_run(tmp_path):
    pretrain.main([*SMALL, "--epochs", "1", "--label-noise", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert options_of(tmp_path / "run")["noisy_labels"] == 200


def test_learning_curves_are_drawn_from_logs(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_bytes((trained / "log.jsonl").read_bytes())
    pretrain.main(["--figure", str(tmp_path), str(trained)], standalone_mode=False)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "name one or several" in refusal(pretrain, ["--figure"], monkeypatch, capsys)
    assert "no readable log.jsonl" in refusal(pretrain, ["--figure", tmp_path / "nowhere"], monkeypatch, capsys)


def test_contradictions_among_the_newer_options_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in [
        (["--lr", "1", "--lr-per-256", "1"], "leave one out"),
        (["--queue", "9", "--loss", "triplet"], "--queue has no meaning for --loss triplet"),
        (["--queue", "9", "--mix", "mixup"], "leave one out"),
        (["--mix", "mixup", "--loss", "simclr"], "--mix has no meaning for --loss simclr"),
        (["--mix-alpha", "2"], "--mix-alpha has a meaning for --mix alone"),
        (["--momentum-encoder", "0.9"], "--momentum-encoder has a meaning for --queue alone"),
        (["--label-smoothing", "0.1"], "--label-smoothing is cross-entropy's"),
        (["--balanced", "--loss", "n-pair"], "leave --balanced out"),
        (["--nesterov", "--optimizer", "lars"], "--nesterov is SGD's"),
        (["--mix", "mixup", "--micro-batch", "1"], "--mix needs two images at a time"),
        (["--proj-hidden", "9", "--proj-depth", "1"], "--proj-hidden has a meaning for --proj-depth 2"),
        (["--jitter", "1", "--augment", "crop"], "--jitter has a meaning for --augment sim"),
        (["--label-noise", "0.1", "--loss", "simclr"], "--label-noise has a meaning for losses that read labels"),
        (["--recipe", "cifar11"], "--recipe"),
        (["--subset", "0"], "--subset"),
        (["--label-noise", "1.5"], "--label-noise"),
    ]:
        assert words in refusal(pretrain, [*SMALL, *arguments], monkeypatch, capsys)
    assert not list(tmp_path.iterdir())
