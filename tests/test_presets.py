"""The published settings, number by number."""

import pytest
import torch

import common.config
import common.models
import common.presets
from runs import folder_of, options_of, probe, train

pytestmark = pytest.mark.seeds_torch


# As published: batch, epochs, peak rate, tau, loss factor, weight decay, warm-up, optimiser, the probe's peak rate.
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


@pytest.mark.parametrize("name", common.presets.PRESETS)
def test_presets_hold_the_published_numbers(name):
    o, probe = common.presets.PRESETS[name].pretrain, common.presets.PRESETS[name].probe
    optimizer = "nesterov" if o.get("nesterov") else o.get("optimizer", "sgd")
    here = [
        o["batch"],
        o["epochs"],
        peak(o),
        o.get("tau"),
        o.get("loss_scale"),
        o["weight_decay"],
        o["warmup"],
        optimizer,
        peak(probe) if probe else None,
    ]
    for ours, published in zip(here, PUBLISHED[name]):
        assert ours == (pytest.approx(published) if isinstance(published, float) else published)


def test_the_presets_probes_and_heads_are_the_published_ones():
    for name, preset in common.presets.PRESETS.items():
        o, probe = preset.pretrain, preset.probe
        imagenet, official = name.startswith("imagenet"), common.presets.OFFICIAL in preset.source
        assert o["momentum"] == 0.9 and o["schedule"] == "cosine" and o["stem"] == ("7x7" if imagenet else "3x3")
        if imagenet and probe:
            assert probe["label_smoothing"] == 0.05 and probe["weight_decay"] == (1e-6,)
        if imagenet and official and o["loss"] == "supcon":
            assert o["normalize_encoder"] and o["projection"] == "128"
            assert probe["optimizer"] == "rmsprop"
            assert (probe["epochs"], probe["warmup"], probe["schedule"]) == (90, 12, "exponential")
        if (
            official
        ):  # its scripts' --projection_head_layers=2048,2048,128, and batch norm over all cores but for one script
            assert o["loss"] != "simclr" or o["projection"] == "r-r-128"
            assert o.get("sync_bn", False) == (name != "cifar10-supcon-tf")
        if o["loss"] == "ce":
            assert not probe and o.get("label_smoothing", 0) == (0.05 if imagenet else 0)
        if o["augment"] == "sim":
            assert o["jitter"] == (1.0 if "solo" in name or name == "imagenet-simclr-r50" else 0.5)
        if common.presets.REFERENCE in preset.source and probe:
            assert (probe["epochs"], probe["batch"], probe["weight_decay"], probe["schedule"]) == (
                100,
                512,
                (0.0,),
                "step",
            )
    assert {o.pretrain["augment"] for n, o in common.presets.PRESETS.items() if "r200" in n} == {"stacked-rand"}


@pytest.mark.parametrize("name", common.presets.PRESETS)
def test_every_preset_builds_its_encoder_and_takes_a_step(name, tmp_path, monkeypatch, capsys):
    """The real encoder is built without memory; the step is a small one's. One real ResNet is stepped below."""
    built = []
    monkeypatch.setattr(
        common.models, "build_encoder", lambda *how: built.append(how) or (common.models.small_encoder(), 144)
    )
    folder_of(tmp_path, ["train"], ["a", "b", "c"], size=(40, 40))
    small = [
        "--dataset",
        "folder",
        "--data",
        str(tmp_path),
        "--limit",
        "8",
        "--size",
        "32",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    train(*small, "--recipe", name, "--workers", "0", "--run-dir", tmp_path / "run")
    out, o = capsys.readouterr().out, common.presets.PRESETS[name].pretrain
    assert f"recipe {name}: {common.presets.PRESETS[name].source}" in out and f"--batch {o['batch']}" in out
    config = options_of(tmp_path / "run")
    kept = {
        k: v
        for k, v in o.items()
        if k not in ("dataset", "size", "batch", "epochs", "warmup", "lr", "lr_per_256", "stream", "sync_bn")
    }
    assert {k: config[k] for k in kept} == kept
    assert config["lr"] == pytest.approx(o["lr"] if "lr" in o else o["lr_per_256"] * 8 / 256)
    assert built == [(o["arch"], o["stem"])]
    monkeypatch.undo()
    with torch.device("meta"):
        encoder, width = common.models.build_encoder(*built[0])
    r = encoder(torch.empty(2, 3, 64, 64, device="meta"))
    assert r.shape == (2, width) and width == (512 if o["arch"] in ("resnet18", "resnet34") else 2048)


def test_imagenets_preset_runs_to_its_probe_on_a_folder_of_jpegs(tmp_path):
    folder_of(tmp_path, ["train", "val"], ["a", "b", "c", "d", "e", "f"], count=2, size=(260, 240), kind="jpeg")
    run = tmp_path / "run"
    options = [
        "--recipe",
        "imagenet-supcon-r50",
        "--data",
        str(tmp_path),
        "--arch",
        "resnet18",
        "--batch",
        "6",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    train(*options, "--run-dir", run)
    taken = options_of(run)
    assert (taken["size"], taken["stem"], taken["augment"], taken["stream"], taken["normalize_encoder"]) == (
        224,
        "7x7",
        "auto",
        True,
        True,
    )
    result = probe(run, "--recipe", "imagenet-supcon-r50", "--batch", "6", "--epochs", "2", "--workers", "0")
    assert (
        0 <= result["top1"] <= result["top5"] <= 100
        and result["test_images"] == 12
        and result["fit"]["label_smoothing"] == 0.05
    )


def test_options_override_a_preset_and_what_is_bound_to_them():
    given = {"loss": "ce", "lr": 0.3, "epochs": 5}
    wanted = given | {"recipe": "imagenet-supcon-r50"}
    taken = common.config.options_of_preset(wanted, set(given))
    assert not {"loss", "tau", "loss_scale", "projection", "lr", "lr_per_256", "epochs", "warmup"} & taken.keys()
    assert taken["optimizer"] == "lars" and taken["batch"] == 6144
    assert (
        common.config.options_of_preset(wanted | {"loss": "supcon"}, {"loss"})["tau"] == 0.1
    )  # given, but as the preset has it


def test_recipe_list_prints_every_number(capsys):
    train("--recipe", "list")
    out = capsys.readouterr().out
    parts = dict(zip(common.presets.PRESETS, out.split("recipe ")[1:]))
    for name, preset in common.presets.PRESETS.items():
        assert parts[name].startswith(f"{name}: {preset.source}") and preset.differs in parts[name]
        assert all(
            common.presets.as_option(k, v) in parts[name]
            for stage in (preset.pretrain, preset.probe)
            for k, v in stage.items()
        )


@pytest.mark.parametrize(
    "recipe, given, dropped",
    [
        ("cifar10-supcon", {"arch": "vit_b_16"}, {"stem"}),
        ("imagenet-ce-r50", {"optimizer": "lars"}, {"nesterov"}),
        ("imagenet-ce-r50", {"loss": "supcon"}, {"label_smoothing"}),
        ("imagenet-supcon-r50", {"dataset": "cifar10"}, {"stream"}),
        ("imagenet-supcon-queue", {"loss": "triplet"}, {"queue", "momentum_encoder"}),
    ],
)
def test_what_belongs_to_an_overridden_option_is_dropped_with_it(recipe, given, dropped):
    assert dropped <= common.presets.PRESETS[recipe].pretrain.keys()
    assert not dropped & common.config.options_of_preset(given | {"recipe": recipe}, set(given)).keys()
