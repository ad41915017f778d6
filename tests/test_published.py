"""Every number of every preset as its source has it, written out here, not read from common/presets.py. The sources are
HobbitLong/SupContrast 66a8fe5, google-research/supcon's scripts, solo-learn 9187ea3, and the paper."""

import pytest
import torch
import common.config
import common.models
import common.objectives
import common.presets

pytestmark = pytest.mark.seeds_torch


# SupContrast: ResNet-50 with a 3x3 stem, SGD of momentum .9, cosine, 10 epochs of warm-up from .01, crops of (.2, 1),
# ColorJitter(.4, .4, .4, .1) = half of SimCLR's, decay 1e-4, 1000 epochs at batch 1024 and rate .5, head 2048-2048-128;
# the published runs kept base_temperature .07, so the loss is multiplied by tau/.07.
REFERENCE = {
    "arch": "resnet50",
    "stem": "3x3",
    "batch": 1024,
    "schedule": "cosine",
    "warmup": 10,
    "warmup_from": 0.01,
    "momentum": 0.9,
    "augment": "sim",
    "crop_min": 0.2,
    "jitter": 0.5,
    "projection": "r-128",
    "loss": "supcon",
    "tau": 0.1,
    "loss_scale": 1.4285714,
    "epochs": 1000,
    "lr": 0.5,
    "weight_decay": 1e-4,
}
REFERENCE_PROBE = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "epochs": 100,
    "batch": 512,
    "weight_decay": (0,),
    "schedule": "step",
    "lr": (5,),
}
# google-research on CIFAR-10: the same views and network, rates per 256 images, warm-up from 0; SupCon times tau.
OFFICIAL_CIFAR = {
    "dataset": "cifar10",
    "arch": "resnet50",
    "stem": "3x3",
    "schedule": "cosine",
    "warmup_from": 0,
    "momentum": 0.9,
    "augment": "sim",
    "crop_min": 0.2,
    "jitter": 0.5,
}
# google-research on ImageNet: 224 pixels, 7x7 stem, crops of (.08, 1), 12 epochs of warm-up from 0, global batch norm.
OFFICIAL_IMAGENET = {
    "dataset": "folder",
    "size": 224,
    "stem": "7x7",
    "stream": True,
    "crop_min": 0.08,
    "schedule": "cosine",
    "warmup": 12,
    "warmup_from": 0,
    "momentum": 0.9,
    "sync_bn": True,
}
# SupCon there: LARS, encoder output on the sphere, one linear layer 2048 -> 128, loss times tau; RMSProp's probe.
OFFICIAL_SUPCON = OFFICIAL_IMAGENET | {
    "loss": "supcon",
    "tau": 0.1,
    "loss_scale": 0.1,
    "optimizer": "lars",
    "normalize_encoder": True,
    "projection": "128",
    "weight_decay": 1e-4,
    "batch": 4096,
}
OFFICIAL_PROBE = {
    "optimizer": "rmsprop",
    "momentum": 0.9,
    "schedule": "exponential",
    "warmup": 12,
    "epochs": 90,
    "weight_decay": (1e-6,),
    "label_smoothing": 0.05,
    "batch": 4096,
    "lr_per_256": 0.05,
}
CROSS_ENTROPY = {"loss": "ce", "nesterov": True, "lr_per_256": 0.1}


def without(options, *names):
    return {k: v for k, v in options.items() if k not in names}


PUBLISHED = {
    "cifar10-supcon": (REFERENCE | {"dataset": "cifar10"}, REFERENCE_PROBE),
    "cifar100-supcon": (REFERENCE | {"dataset": "cifar100"}, REFERENCE_PROBE),
    "cifar10-simclr": (
        REFERENCE | {"dataset": "cifar10", "loss": "simclr", "tau": 0.5, "loss_scale": 7.1428571},
        REFERENCE_PROBE | {"lr": (1,)},
    ),
    "cifar10-ce": (
        without(REFERENCE, "tau", "loss_scale", "projection", "jitter")
        | {"dataset": "cifar10", "loss": "ce", "augment": "crop", "epochs": 500, "lr": 0.8},
        {},
    ),
    "cifar10-supcon-tf": (
        OFFICIAL_CIFAR
        | {
            "loss": "supcon",
            "tau": 0.1,
            "loss_scale": 0.1,
            "batch": 4096,
            "epochs": 1000,
            "lr_per_256": 0.5,
            "weight_decay": 1e-4,
            "warmup": 10,
            "projection": "r-128",
        },
        without(REFERENCE_PROBE, "lr") | {"batch": 4096, "lr_per_256": 2.5},
    ),
    "cifar10-simclr-tf": (
        OFFICIAL_CIFAR
        | {
            "loss": "simclr",
            "tau": 0.5,
            "loss_scale": 1,
            "batch": 1024,
            "epochs": 400,
            "lr_per_256": 0.5,
            "weight_decay": 1e-4,
            "warmup": 10,
            "projection": "r-r-128",
            "sync_bn": True,
        },
        {
            "optimizer": "sgd",
            "momentum": 0.9,
            "epochs": 90,
            "batch": 1024,
            "lr_per_256": 0.25,
            "weight_decay": (0,),
            "schedule": "cosine",
        },
    ),
    "cifar10-ce-tf": (
        OFFICIAL_CIFAR
        | CROSS_ENTROPY
        | {"batch": 1024, "epochs": 1000, "weight_decay": 5e-4, "warmup": 12, "sync_bn": True},
        {},
    ),
    "imagenet-supcon-r50": (
        OFFICIAL_SUPCON
        | {
            "arch": "resnet50",
            "augment": "auto",
            "batch": 6144,
            "epochs": 350,
            "lr_per_256": 0.4,
            "weight_decay": 1e-3,
        },
        OFFICIAL_PROBE | {"batch": 6144},
    ),
    "imagenet-supcon-r101": (
        OFFICIAL_SUPCON | {"arch": "resnet101", "augment": "auto", "epochs": 350, "lr_per_256": 0.4},
        OFFICIAL_PROBE,
    ),
    "imagenet-supcon-r200": (
        OFFICIAL_SUPCON
        | {"arch": "resnet200", "augment": "stacked-rand", "jitter": 1, "epochs": 700, "lr_per_256": 0.2},
        OFFICIAL_PROBE,
    ),
    "imagenet-simclr-r50": (
        OFFICIAL_IMAGENET
        | {
            "arch": "resnet50",
            "loss": "simclr",
            "tau": 0.1,
            "loss_scale": 1,
            "augment": "sim",
            "jitter": 1,
            "optimizer": "lars",
            "batch": 6144,
            "epochs": 100,
            "lr_per_256": 0.3,
            "weight_decay": 1e-4,
            "projection": "r-r-128",
        },
        {
            "optimizer": "sgd",
            "nesterov": True,
            "momentum": 0.9,
            "schedule": "cosine",
            "warmup": 12,
            "epochs": 90,
            "batch": 6144,
            "lr_per_256": 0.1,
            "weight_decay": (1e-6,),
            "label_smoothing": 0.05,
        },
    ),
    "imagenet-ce-r50": (
        OFFICIAL_IMAGENET
        | CROSS_ENTROPY
        | {
            "arch": "resnet50",
            "augment": "auto",
            "batch": 6144,
            "epochs": 200,
            "weight_decay": 1e-4,
            "label_smoothing": 0.05,
        },
        {},
    ),
    "imagenet-ce-r200": (
        OFFICIAL_IMAGENET
        | CROSS_ENTROPY
        | {
            "arch": "resnet200",
            "augment": "stacked-rand",
            "jitter": 1,
            "batch": 4096,
            "epochs": 700,
            "weight_decay": 1e-4,
            "label_smoothing": 0.05,
        },
        {},
    ),
    "imagenet-supcon-queue": (  # the paper's section 4 and SupContrast's issue 120; MoCo v2's epochs, rate and views
        OFFICIAL_IMAGENET
        | {
            "arch": "resnet50",
            "loss": "supcon",
            "tau": 0.07,
            "loss_scale": 1,
            "augment": "sim",
            "crop_min": 0.2,
            "jitter": 0.5,
            "batch": 256,
            "epochs": 200,
            "lr": 0.03,
            "weight_decay": 1e-4,
            "warmup": 0,
            "queue": 8192,
            "momentum_encoder": 0.999,
            "projection": "r-128",
        },
        {},
    ),
    "cifar10-supcon-solo": (
        {
            "dataset": "cifar10",
            "arch": "resnet18",
            "stem": "3x3",
            "loss": "supcon-in",
            "tau": 0.2,
            "loss_scale": 1,
            "batch": 256,
            "epochs": 1000,
            "lr_per_256": 0.4,
            "weight_decay": 1e-5,
            "momentum": 0.9,
            "schedule": "cosine",
            "warmup": 10,
            "warmup_from": 3e-5,
            "augment": "sim",
            "crop_min": 0.08,
            "jitter": 1,
            "projection": "2048-256",
        },
        {},
    ),
}


def near(options):
    return {k: v if isinstance(v, (str, bool, tuple)) else pytest.approx(v, rel=1e-6) for k, v in options.items()}


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() | common.presets.PRESETS.keys()))
def test_every_number_of_a_preset_is_its_sources(name):
    preset = common.presets.PRESETS[name]
    for ours, published in zip((preset.pretrain, preset.probe), PUBLISHED[name]):
        assert ours == near(published)


def test_defaults_of_the_losses_are_the_papers_and_the_reference_codes():
    """tau .1, and .5 for SimCLR; two views, one for cross-entropy and for Sohn's pairs; rates per 1024 images."""
    expected = {
        "supcon": (0.1, 2, 0.5, True),
        "supcon-in": (0.1, 2, 0.5, True),
        "simclr": (0.5, 2, 0.5, True),
        "hard-contrastive": (0.5, 2, 0.5, True),
        "simple-contrastive": (None, 2, 0.5, False),
        "triplet": (None, 2, 0.5, False),
        "n-pair": (None, 1, 0.1, False),
        "max-margin": (None, 2, 0.5, False),
        "ce": (None, 1, 0.8, False),
    }
    found = {name: (o.tau, o.views, o.lr, o.scaled) for name, o in common.objectives.OBJECTIVES.items()}
    assert found == expected


def test_heads_of_the_presets_have_the_published_layers():
    """SupContrast: Linear(2048, 2048), ReLU, Linear(2048, 128); google-research's SimCLR: 2048, 2048, 128."""
    widths = lambda head: [layer.out_features for layer in head if isinstance(layer, torch.nn.Linear)]
    for projection, expected in (("128", [128]), ("r-128", [2048, 128]), ("r-r-128", [2048, 2048, 128])):
        head = common.models.build_projection(common.models.widths_of(projection, 2048))
        assert widths(head) == expected and head[0].in_features == 2048
        assert [type(layer) for layer in head[1::2]] == [torch.nn.ReLU] * (len(expected) - 1)
