"""Published settings, number by number.

`python pretrain.py --recipe NAME` and `python linear_probe.py CKPT --recipe NAME` take them. An option that is given
beside the recipe overrides its number. `--recipe list` prints them all.
"""

from typing import NamedTuple


class Preset(NamedTuple):
    source: str  # where its numbers are published
    pretrain: dict  # options of pretrain.py
    probe: dict  # options of linear_probe.py; empty where the source has no second stage
    differs: str = ""  # what this code does differently from the source


REFERENCE = "github.com/HobbitLong/SupContrast"
OFFICIAL = "github.com/google-research/google-research/tree/master/supcon"
SOLO = "github.com/vturrisi/solo-learn, scripts/pretrain/cifar/supcon.yaml"
CIFAR = {
    "arch": "resnet50", "stem": "3x3", "batch": 1024, "schedule": "cosine", "warmup": 10.0, "warmup_from": 0.01,
    "momentum": 0.9,
}
HEAD = {"projection": "r-128"}
SIM = {"augment": "sim", "crop_min": 0.2, "jitter": 0.5}  # colour jitter (0.4, 0.4, 0.4, 0.1)
SUPCON_CIFAR = CIFAR | SIM | HEAD | {
    "loss": "supcon", "tau": 0.1, "loss_scale": 0.1 / 0.07, "epochs": 1000, "lr": 0.5, "weight_decay": 1e-4,
}
STEPS = {"optimizer": "sgd", "momentum": 0.9, "epochs": 100, "batch": 512, "weight_decay": (0.0,), "schedule": "step"}
IMAGENET = {
    "dataset": "folder", "size": 224, "stem": "7x7", "stream": True, "crop_min": 0.08, "schedule": "cosine",
    "warmup_from": 0.0, "momentum": 0.9, "sync_bn": True,
}
LARS_IMAGENET = IMAGENET | {
    "optimizer": "lars", "warmup": 12.0, "loss": "supcon", "tau": 0.1, "loss_scale": 0.1, "normalize_encoder": True,
    "projection": "128",
}
PROBE_IMAGENET = {
    "optimizer": "rmsprop", "momentum": 0.9, "schedule": "exponential", "warmup": 12.0, "epochs": 90,
    "weight_decay": (1e-6,), "label_smoothing": 0.05,
}
TF_HEAD = {"projection": "r-r-128"}
COSINE = "the source's cosine starts at the end of the warm-up and ends at 0"
BN_DECAY = f"weight decay takes in batch norm, which the source leaves out; {COSINE}"
TF_INPUT = "its images are in [-1, 1], not standardised"
TF_IMAGENET = f"{COSINE}; its LARS adapts biases; its colours add brightness; {TF_INPUT}"
TF_RAND = "its RandAugment comes between colours and grey, has Cutout, Invert and SolarizeAdd as well"
PRESETS = {
    "cifar10-supcon": Preset(
        f"{REFERENCE}, README: SupCon on CIFAR-10, 96.0 %",
        SUPCON_CIFAR | {"dataset": "cifar10"},
        STEPS | {"lr": (5.0,)},
        "the source keeps the last, incomplete batch of an epoch, and reports its best test epoch",
    ),
    "cifar100-supcon": Preset(
        f"{REFERENCE}, README: SupCon on CIFAR-100, 76.5 %",
        SUPCON_CIFAR | {"dataset": "cifar100"},
        STEPS | {"lr": (5.0,)},
        "as cifar10-supcon",
    ),
    "cifar10-simclr": Preset(
        f"{REFERENCE}, README: SimCLR on CIFAR-10, 93.6 %",
        CIFAR | SIM | HEAD | {
            "dataset": "cifar10", "loss": "simclr", "tau": 0.5, "loss_scale": 0.5 / 0.07, "epochs": 1000, "lr": 0.5,
            "weight_decay": 1e-4,
        },
        STEPS | {"lr": (1.0,)},
        "as cifar10-supcon",
    ),
    "cifar10-ce": Preset(
        f"{REFERENCE}, README: cross-entropy on CIFAR-10, 95.0 %",
        CIFAR | {
            "dataset": "cifar10", "loss": "ce", "augment": "crop", "crop_min": 0.2, "epochs": 500, "lr": 0.8,
            "weight_decay": 1e-4,
        },
        {},
        "as cifar10-supcon",
    ),
    "cifar10-supcon-tf": Preset(
        f"{OFFICIAL}, scripts: SupCon on CIFAR-10",
        CIFAR | SIM | HEAD | {
            "dataset": "cifar10", "loss": "supcon", "tau": 0.1, "loss_scale": 0.1, "batch": 4096, "epochs": 1000,
            "lr_per_256": 0.5, "weight_decay": 1e-4, "warmup_from": 0.0,
        },
        STEPS | {"batch": 4096, "lr_per_256": 2.5},
        BN_DECAY,
    ),
    "cifar10-simclr-tf": Preset(
        f"{OFFICIAL}, scripts: SimCLR on CIFAR-10",
        CIFAR | SIM | TF_HEAD | {
            "dataset": "cifar10", "loss": "simclr", "tau": 0.5, "loss_scale": 1.0, "epochs": 400, "lr_per_256": 0.5,
            "weight_decay": 1e-4, "warmup_from": 0.0, "sync_bn": True,
        },
        {
            "optimizer": "sgd", "momentum": 0.9, "epochs": 90, "batch": 1024, "lr_per_256": 0.25,
            "weight_decay": (0.0,), "schedule": "cosine",
        },
        f"{BN_DECAY}; its projection head has batch norm",
    ),
    "cifar10-ce-tf": Preset(
        f"{OFFICIAL}, scripts: cross-entropy on CIFAR-10",
        CIFAR | SIM | {
            "dataset": "cifar10", "loss": "ce", "nesterov": True, "epochs": 1000, "lr_per_256": 0.1,
            "weight_decay": 5e-4, "warmup": 12.0, "warmup_from": 0.0, "sync_bn": True,
        },
        {},
        BN_DECAY,
    ),
    "imagenet-supcon-r50": Preset(
        f"{OFFICIAL}, scripts/supcon_imagenet_resnet50.sh: 78.7 %",
        LARS_IMAGENET | {
            "arch": "resnet50", "augment": "auto", "batch": 6144, "epochs": 350, "lr_per_256": 0.4,
            "weight_decay": 1e-3,
        },
        PROBE_IMAGENET | {"batch": 6144, "lr_per_256": 0.05},
        TF_IMAGENET,
    ),
    "imagenet-supcon-r101": Preset(
        f"{OFFICIAL}, scripts: SupCon on ImageNet, ResNet-101 (80.2 %; the paper's table says stacked RandAugment)",
        LARS_IMAGENET | {
            "arch": "resnet101", "augment": "auto", "batch": 4096, "epochs": 350, "lr_per_256": 0.4,
            "weight_decay": 1e-4,
        },
        PROBE_IMAGENET | {"batch": 4096, "lr_per_256": 0.05},
        TF_IMAGENET,
    ),
    "imagenet-supcon-r200": Preset(
        f"{OFFICIAL}, scripts: SupCon on ImageNet, ResNet-200, 81.4 %",
        LARS_IMAGENET | {
            "arch": "resnet200", "augment": "stacked-rand", "jitter": 1.0, "batch": 4096, "epochs": 700,
            "lr_per_256": 0.2, "weight_decay": 1e-4,
        },
        PROBE_IMAGENET | {"batch": 4096, "lr_per_256": 0.05},
        f"{TF_IMAGENET}; {TF_RAND}",
    ),
    "imagenet-simclr-r50": Preset(
        f"{OFFICIAL}, scripts: SimCLR on ImageNet, ResNet-50",
        IMAGENET | {
            "arch": "resnet50", "loss": "simclr", "tau": 0.1, "loss_scale": 1.0, "augment": "sim", "jitter": 1.0,
            "optimizer": "lars", "batch": 6144, "epochs": 100, "lr_per_256": 0.3, "weight_decay": 1e-4, "warmup": 12.0,
        } | TF_HEAD,
        {
            "optimizer": "sgd", "nesterov": True, "momentum": 0.9, "schedule": "cosine", "warmup": 12.0, "epochs": 90,
            "batch": 6144, "lr_per_256": 0.1, "weight_decay": (1e-6,), "label_smoothing": 0.05,
        },
        f"{TF_IMAGENET}; its projection head has batch norm",
    ),
    "imagenet-ce-r50": Preset(
        f"{OFFICIAL}, scripts: cross-entropy on ImageNet, ResNet-50, 78.2 %",
        IMAGENET | {
            "arch": "resnet50", "loss": "ce", "augment": "auto", "nesterov": True, "batch": 6144, "epochs": 200,
            "lr_per_256": 0.1, "weight_decay": 1e-4, "warmup": 12.0, "label_smoothing": 0.05,
        },
        {},
        f"{BN_DECAY}; {TF_INPUT}",
    ),
    "imagenet-ce-r200": Preset(
        f"{OFFICIAL}, scripts: cross-entropy on ImageNet, ResNet-200, 80.9 %",
        IMAGENET | {
            "arch": "resnet200", "loss": "ce", "augment": "stacked-rand", "jitter": 1.0, "nesterov": True,
            "batch": 4096, "epochs": 700, "lr_per_256": 0.1, "weight_decay": 1e-4, "warmup": 12.0,
            "label_smoothing": 0.05,
        },
        {},
        f"{BN_DECAY}; {TF_INPUT}; {TF_RAND}",
    ),
    "imagenet-supcon-queue": Preset(
        f"Khosla et al. 2020, section 4, and {REFERENCE}/issues/120: a memory of 8192 features, batch 256, SGD, "
        "79.1 % on ResNet-50",
        IMAGENET | {
            "arch": "resnet50", "loss": "supcon", "tau": 0.07, "loss_scale": 1.0, "augment": "sim", "crop_min": 0.2,
            "jitter": 0.5, "batch": 256, "epochs": 200, "lr": 0.03, "weight_decay": 1e-4, "warmup": 0.0, "queue": 8192,
            "momentum_encoder": 0.999,
        } | HEAD,
        {},
        "batch and memory are the paper's, tau the authors'; epochs, rate and views are MoCo v2's, which they name "
        "and which shuffles batch norm",
    ),
    "cifar10-supcon-solo": Preset(
        f"{SOLO}: ResNet-18, 93.8 % (online probe)",
        CIFAR | {
            "dataset": "cifar10", "loss": "supcon-in", "tau": 0.2, "loss_scale": 1.0, "arch": "resnet18", "batch": 256,
            "epochs": 1000, "lr_per_256": 0.4, "weight_decay": 1e-5, "warmup_from": 3e-5, "augment": "sim",
            "crop_min": 0.08, "jitter": 1.0, "projection": "2048-256",
        },
        {},
        "no blur below 65 pixels, bilinear crops, a 3x3 stem with padding 1 (that code's loss, called SupCon, is L_in)",
    ),
}


def describe(name):
    """A preset as lines of text: its source, what it sets in each stage, what differs."""
    preset = PRESETS[name]
    yield f"recipe {name}: {preset.source}"
    for stage, options in (("pretrain.py", preset.pretrain), ("linear_probe.py", preset.probe)):
        if options:
            yield f"  {stage} " + " ".join(as_option(k, v) for k, v in options.items())
    if preset.differs:
        yield f"  differs: {preset.differs}"


def as_option(name, value):
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{option} {v:g}" if isinstance(v, float) else f"{option} {v}" for v in values)
