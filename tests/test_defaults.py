"""What a run has where nothing is said: the options of a command line, completed as training completes them."""

import pytest
import torch
from click.core import ParameterSource

import common.cli
import common.config
import common.data
import linear_probe
import pretrain


def completed(*arguments, size=32, classes=10):
    """The options of a command line, before the first step."""
    context = pretrain.main.make_context("pretrain", list(arguments))
    given = {k: v for k, v in context.params.items() if k != "resume"}
    config, _ = common.config.read(context, None, given)
    common.config.complete(config, 1)
    labels = torch.arange(20_000) % classes
    data = common.data.Data(torch.empty(0, 3, size, size), labels, [str(c) for c in range(classes)])
    common.config.fit_to_data(config, data)
    return config


def test_a_run_on_cifar_is_the_reference_codes_where_nothing_is_said():
    expected = {
        "loss": "supcon",
        "tau": 0.1,
        "loss_scale": pytest.approx(0.1 / 0.07),
        "batch": 1024,
        "epochs": 1000,
        "lr": 0.5,
        "schedule": "cosine",
        "warmup": 10,
        "warmup_from": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "optimizer": "sgd",
        "weight_decay": 1e-4,
        "views": 2,
        "augment": "sim",
        "crop_min": 0.2,
        "jitter": 0.5,
        "arch": "resnet50",
        "stem": "3x3",
        "projection": "r-128",
        "normalize_encoder": False,
        "seed": 0,
        "label_smoothing": 0,
        "ce_weight": 0,
        "queue": 0,
        "mix": None,
        "balanced": False,
        "micro_batch": None,
        "run": "runs/cifar10-resnet50-supcon-s0",
    }
    config = vars(completed("--dataset", "cifar10"))
    assert {k: config[k] for k in expected} == expected


def test_a_run_on_shapes_is_small():
    config = completed()
    found = (config.dataset, config.arch, config.batch, config.epochs, config.size, config.lr, config.warmup)
    assert found == ("shapes", "small", 64, 12, 32, pytest.approx(0.5 * 64 / 1024), pytest.approx(1.2))


@pytest.mark.parametrize(
    "loss, tau, scale, views, rate",
    [
        ("supcon", 0.1, 0.1 / 0.07, 2, 0.5),
        ("supcon-in", 0.1, 0.1 / 0.07, 2, 0.5),
        ("simclr", 0.5, 0.5 / 0.07, 2, 0.5),
        ("hard-contrastive", 0.5, 0.5 / 0.07, 2, 0.5),
        ("simple-contrastive", None, 1, 2, 0.5),
        ("triplet", None, 1, 2, 0.5),
        ("n-pair", None, 1, 1, 0.1),
        ("max-margin", None, 1, 2, 0.5),
        ("ce", None, 1, 1, 0.8),
    ],
)
def test_temperature_scale_views_and_rate_go_with_the_loss_and_the_rate_with_the_batch(loss, tau, scale, views, rate):
    for batch in (1024, 256):
        config = completed("--dataset", "cifar10", "--loss", loss, "--batch", str(batch))
        assert (config.tau, config.views) == (tau, views)
        assert config.lr == pytest.approx(rate * batch / 1024) and config.loss_scale == pytest.approx(scale)


def test_an_anchor_keeps_the_papers_part_of_the_negatives_or_all_and_their_weights_add_up_to_1():
    """Wang & Liu 2021 keep 4095 of 50,000, which is 0.0819; here an anchor has 2 (batch - 1) negatives."""
    hard, simple = (completed("--loss", f"{name}-contrastive", "--batch", "51") for name in ("hard", "simple"))
    assert (hard.nearest, hard.lam) == (9, None) and (simple.nearest, simple.lam) == (100, pytest.approx(0.01))
    assert completed("--loss", "simple-contrastive", "--nearest", "4").lam == 0.25
    assert (completed().nearest, completed().lam) == (None, None)


def test_the_scale_of_the_loss_follows_tau_and_is_1_where_it_is_said_so():
    assert completed("--tau", "0.07").loss_scale == pytest.approx(1)
    assert completed("--tau", "0.2").loss_scale == pytest.approx(0.2 / 0.07)
    assert completed("--tau", "0.2", "--loss-scale", "1").loss_scale == 1


def test_rates_per_256_images_and_warm_ups_of_short_runs_and_low_rates():
    assert completed("--lr-per-256", "0.4", "--batch", "640").lr == pytest.approx(1.0)
    assert completed("--epochs", "5").warmup == pytest.approx(0.5) and completed("--epochs", "300").warmup == 10
    assert completed("--lr", "0.004").warmup_from == 0.004 and completed("--lr", "0.4").warmup_from == 0.01


def test_large_images_meet_the_stem_of_imagenets_resnets():
    for size, stem in ((32, "3x3"), (64, "3x3"), (65, "7x7"), (224, "7x7")):
        config = completed("--dataset", "folder", size=size)
        assert (config.size, config.stem) == (size, stem)
    assert completed("--dataset", "folder", "--stem", "3x3", size=224).stem == "3x3"


def test_a_resumed_run_may_change_what_changes_no_number_alone():
    """epochs prolong a run; the rest says where it reads, what it prints, how much it holds and how fast it is."""
    elsewhere = {"data", "labels", "download", "device"}
    shown = {"log_every", "save_minutes", "keep_every", "tensorboard"}
    fitted = {"micro_batch", "compile", "workers"}
    assert common.config.MAY_CHANGE == {"epochs"} | elsewhere | shown | fitted


def probe_of(*arguments):
    context = linear_probe.main.make_context("probe", ["ckpt.pt", *arguments])
    given = {k for k in context.params if context.get_parameter_source(k) is not ParameterSource.DEFAULT}
    names = (
        "standardize",
        "epochs",
        "batch",
        "lr",
        "lr_per_256",
        "weight_decay",
        "optimizer",
        "momentum",
        "nesterov",
        "schedule",
        "warmup",
        "label_smoothing",
        "seed",
    )
    options = {k: context.params[k] for k in names}
    return linear_probe.complete_fit(context.params["recipe"], options, given)


def holds(fit, **options):
    return {name: getattr(fit, name) for name in options} == options


def test_a_probe_is_a_logistic_regression_with_four_weight_decays():
    fit, cells = probe_of()
    assert cells == [(None, decay) for decay in (0, 1e-4, 1e-3, 1e-2)]
    assert holds(fit, optimizer="lbfgs", standardize=True, label_smoothing=0)


@pytest.mark.parametrize(
    "words", [["--lr", "1"], ["--epochs", "9"], ["--augment"], ["--recipe", "cifar10-supcon"], ["--optimizer", "lars"]]
)
def test_what_is_sgds_alone_asks_for_it(words):
    fit, cells = probe_of(*words)
    assert fit.optimizer == ("lars" if "lars" in words else "sgd") and all(lr for lr, _ in cells)
    if words[0] != "--optimizer":
        with pytest.raises(common.cli.Refused, match=f"--optimizer lbfgs has no {words[0]}: leave one out"):
            probe_of(*words, "--optimizer", "lbfgs")


def test_a_probe_by_sgd_is_a_grid_of_twenty_cells_of_a_standardised_linear_layer():
    fit, cells = probe_of("--optimizer", "sgd")
    assert cells == [(lr, decay) for lr in (0.01, 0.03, 0.1, 0.3, 1.0) for decay in (0, 1e-4, 1e-3, 1e-2)]
    assert holds(
        fit,
        epochs=100,
        batch=512,
        optimizer="sgd",
        momentum=0.9,
        nesterov=True,
        schedule="cosine",
        warmup=0,
        label_smoothing=0,
        standardize=True,
    )


def test_a_probe_by_a_recipe_takes_its_numbers_and_features_as_they_are():
    fit, cells = probe_of("--recipe", "cifar10-supcon")
    assert cells == [(5, 0)]
    assert holds(fit, epochs=100, batch=512, schedule="step", nesterov=False, standardize=False, warmup=0)
    fit, cells = probe_of("--recipe", "imagenet-supcon-r50")
    assert cells == [(pytest.approx(0.05 * 6144 / 256), 1e-6)]
    assert holds(fit, optimizer="rmsprop", schedule="exponential", warmup=12, warmup_from=0, label_smoothing=0.05)
    assert probe_of("--recipe", "cifar10-supcon", "--lr", "2", "--lr", "3")[1] == [(2, 0), (3, 0)]
    assert holds(probe_of("--recipe", "cifar10-supcon", "--epochs", "7")[0], epochs=7, batch=512, schedule="step")
    assert probe_of("--lr-per-256", "0.2", "--batch", "1280")[1][0][0] == pytest.approx(1.0)


def test_what_is_given_beside_a_recipe_takes_along_what_is_bound_to_it():
    other_loss = completed("--recipe", "imagenet-supcon-r50", "--loss", "simclr")
    assert (other_loss.tau, other_loss.loss_scale, other_loss.projection) == (0.5, pytest.approx(0.5 / 0.07), "r-128")
    same_loss = completed("--recipe", "imagenet-supcon-r50", "--loss", "supcon")
    assert (same_loss.tau, same_loss.loss_scale, same_loss.projection) == (0.1, 0.1, "128")
    assert completed("--recipe", "imagenet-supcon-r50", "--lr", "0.3").lr == 0.3
    assert completed("--recipe", "imagenet-supcon-r50").lr == pytest.approx(0.4 * 6144 / 256)
    assert completed("--recipe", "cifar10-supcon", "--lr-per-256", "0.1").lr == pytest.approx(0.1 * 1024 / 256)
    # a tenth, not the source's ten of a thousand
    assert completed("--recipe", "cifar10-supcon", "--epochs", "20").warmup == 2
    assert completed("--recipe", "imagenet-ce-r50", "--momentum", "0.8").nesterov is False


@pytest.mark.parametrize(
    "images_then, classes_then", [(199, ["a", "b"]), (201, ["a", "b"]), (200, ["b", "a"]), (200, ["a", "b", "c"])]
)
def test_a_run_goes_on_with_the_data_that_it_began_with_alone(images_then, classes_then):
    found = common.data.describe_data(common.data.Data(None, torch.zeros(200), ["a", "b"]), "")
    common.config.require_same_data(completed(), found, {"classes": ["a", "b"], "images": 200})
    with pytest.raises(common.cli.Refused):
        common.config.require_same_data(completed(), found, {"classes": classes_then, "images": images_then})


def test_a_run_of_an_earlier_version_goes_on_but_not_with_other_images(capsys):
    """Its random streams were others: the images of its --subset, and the labels of its --label-noise, were as well."""
    found = common.data.describe_data(common.data.Data(None, torch.zeros(200), ["a", "b"]), "")
    contents = {"classes": ["a", "b"], "images": 200}
    for words in (["--subset", "0.5"], ["--label-noise", "0.1"], ["--dataset", "folder", "--limit", "9"]):
        config = completed(*words)
        common.config.require_same_data(config, found, contents)
        config.streams = None
        with pytest.raises(common.cli.Refused, match="of an earlier version"):
            common.config.require_same_data(config, found, contents)
    assert not capsys.readouterr().out
    config = completed("--limit", "150")
    config.streams = None
    common.config.require_same_data(config, found, contents)
    assert "of an earlier version: from here on its order and its views" in capsys.readouterr().out
    config = completed("--subset", "0.5")
    config.streams = 2  # whose views were others, but not its subsets
    common.config.require_same_data(config, found, contents)
    assert "of an earlier version: from here on its views" in capsys.readouterr().out
