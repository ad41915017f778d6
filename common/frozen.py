"""A trained encoder that learns no more, and the classifier of its features: written, read and applied to images."""

import hashlib
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.cli import Refused
from common.config import config_of_checkpoint
from common.models import bfloat16_is_fast, build_encoder, build_projection, encode, encode_images, refuse_size
from common.models import load_state, widths_of
from common.objectives import OBJECTIVES
from common.run_folder import checkpoint_of, load_checkpoint, load_plain, write_aside
from common.views import WorkerViews, draw_view, make_view, send, worker_batches


class Frozen(nn.Module):
    """Images -> r (n, width). It does not learn.

    Images are (n, 3, size, size), or one of them without its first axis, which gives (width,): RGB, uint8 or of any
    floating-point type with values in [0, 1], and not normalised, for the module does that itself. Raises ValueError
    for anything else. The range is looked at in the first batch of floating-point numbers alone.

    config: the options of the run, a dict. step: the one that the weights are of, where it is known. r is brought to
    norm 1 where the heads saw it so in training, or if `unit`.
    """

    def __init__(self, encoder, mean, std, config, device, unit=False, step=None):
        super().__init__()
        self.step = step
        self.encoder, self.config, self.size = encoder, config, config["size"]
        self.unit = unit or config.get("normalize_encoder", False)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.eval().requires_grad_(False).to(device, torch.float32, memory_format=torch.channels_last)
        fast = config["precision"] in ("auto", "bfloat16") and bfloat16_is_fast(self.mean.device)
        self.autocast = torch.bfloat16 if fast else None
        self.range_is_known = False

    def forward(self, x):
        self.require_images(x)
        images = x.float() if x.is_floating_point() else x
        if x.ndim == 3:
            return self(images[None])[0]
        return self.scaled(encode_images(self.encoder, images, self.mean, self.std, self.autocast))

    def require_images(self, x):
        is_float = x.is_floating_point()
        H = self.size
        if x.ndim not in (3, 4) or x.shape[-3:] != (3, H, H) or not (is_float or x.dtype == torch.uint8):
            self.refuse(f"{x.dtype} of shape {tuple(x.shape)}")
        if is_float and not self.range_is_known and x.numel():
            low, high = (bound.item() for bound in x.aminmax())
            if not 0 <= low <= high <= 1:
                self.refuse(f"values from {low:.3g} to {high:.3g}")
            self.range_is_known = True

    def refuse(self, got):
        raise ValueError(f"images must be (n, 3, {self.size}, {self.size}), uint8 or floating-point numbers in [0, 1] "
                         f"that are not normalised, got {got}")

    def encode(self, x):
        """r of views, which are normalised already."""
        return self.scaled(encode(self.encoder, x.to(memory_format=torch.channels_last), self.autocast))

    def scaled(self, r):
        return F.normalize(r) if self.unit else r


def load_encoder(path, device="cpu", unit=False):
    """The Frozen encoder of the run whose folder or checkpoint is `path`. Raises Refused for anything else."""
    path = checkpoint_of(path)
    return frozen_from(load_checkpoint(path), path, torch.device(device), unit)


def load_projection(path):
    """A run's projection head with what follows it, r (n, width) -> z (n, D). None where its loss has no head."""
    contents = load_checkpoint(checkpoint_of(path))
    if "projection" not in contents:
        return None
    weights = contents["projection"]
    config = config_of_checkpoint(contents)
    projection = build_projection(widths_of(config.projection, weights["0.weight"].shape[1]))
    load_state(projection, weights, path)
    return lambda r: F.normalize(projection(r)) if OBJECTIVES[config.loss].unit else projection(r)


def frozen_from(contents, path, device, unit=False):
    config = contents["config"]
    try:
        encoder, _ = build_encoder(config["arch"], config["stem"])
        refuse_size(encoder, config["arch"], config["size"])
        frozen = Frozen(encoder, contents["mean"], contents["std"], config, device, unit, contents.get("step"))
    except (Refused, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as e:
        raise Refused(f"{path} names no encoder that pretrain.py builds: "
                      "it is damaged or changed by hand, name another") from e
    load_state(encoder, contents["encoder"], path)
    return frozen


def untrained_encoder(frozen, seed):
    """A Frozen of the same kind whose encoder has its first weights."""
    torch.manual_seed(seed)
    encoder, _ = build_encoder(frozen.config["arch"], frozen.config["stem"])
    return Frozen(encoder, frozen.mean, frozen.std, frozen.config, frozen.mean.device, frozen.unit)


def fingerprint(module):
    """A digest of every parameter and buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, entry in module.state_dict().items():
        digest.update(name.encode())
        digest.update(entry.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def extract(frozen, data, key=None, batch=500, workers=2):
    """r (n, width) of the images. With a key, r of random views of them instead, cropped as in training and flipped."""
    rows = torch.arange(len(data.labels)).split(batch)
    crop_min = frozen.config.get("crop_min", 0.2)
    if data.files is not None:
        items = ([(row, *key, row) if key else (row,) for row in part.tolist()] for part in rows)
        read = worker_batches(WorkerViews(data, "crop" if key else "none", crop_min), items, workers)
        return torch.cat([frozen(x) for x in read])
    if key is None:
        return torch.cat([frozen(data.images[part]) for part in rows])
    parts = []
    device = frozen.mean.device
    for k, part in enumerate(rows):
        view = draw_view(len(part), frozen.size, "crop", (*key, k), crop_min=crop_min)
        images = send(data.images[part], device)
        parts.append(frozen.encode(make_view(images, view.to(device), frozen.mean, frozen.std)))
    return torch.cat(parts)


def refuse_features_file(path, l2_normalize):
    """Raises Refused, before any long work, where save_features could not write, or would write another r and z.

    path: None where nothing is to be written.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.suffix != ".npz" or path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise Refused(f"--save-features {path} must be FILE.npz in a folder that can be written: name another")
    if l2_normalize:
        raise Refused("--save-features writes r as the run's own heads see it: leave --l2-normalize out")


@torch.no_grad()
def save_features(path, checkpoint, train, test, r_train, r_test):
    """Writes an .npz file, whose arrays numpy.load reads without running code.

    train, test: the Data that the features r (n, width) are of. NAME_features, NAME_labels, NAME_z (n, D) where the run
    has a projection head, NAME_paths where the images are files, for the names train and test; and class_names.
    """
    projection = load_projection(checkpoint)
    arrays = {"class_names": np.array(train.classes)}
    for name, data, r in (("train", train, r_train.cpu()), ("test", test, r_test.cpu())):
        arrays |= {f"{name}_features": r.numpy(), f"{name}_labels": data.labels.numpy()}
        if projection:
            arrays[f"{name}_z"] = projection(r).numpy()
        if data.paths:
            arrays[f"{name}_paths"] = np.array(data.paths)
    write(path, lambda f: np.savez(f, **arrays))


# ---------------------------------------------------------------- classifiers


def as_linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight.data, linear.bias.data = weight, bias
    return linear.requires_grad_(False)


class Classifier(nn.Module):
    """Images, as Frozen takes them -> class scores (n, C). Divided by `temperature`, they have a softmax that is better
    calibrated."""

    def __init__(self, frozen, linear, classes, temperature, dataset):
        super().__init__()
        self.frozen, self.linear = frozen, linear
        self.classes, self.temperature, self.dataset, self.size = classes, temperature, dataset, frozen.size

    def forward(self, x):
        return self.linear(self.frozen(x))


FORMAT = "supcon-probe-2"
ENTRIES = {"config": dict, "dataset": str, "encoder": dict, "mean": torch.Tensor, "std": torch.Tensor,
           "weight": torch.Tensor, "bias": torch.Tensor, "temperature": float, "classes": list}


def load_classifier(path, device="cpu"):
    """The Classifier in a classifier.pt of linear_probe.py. Raises Refused for anything else."""
    remedy = "run linear_probe.py, and name the classifier.pt that it leaves"
    contents = load_plain(path, "classifier", "linear_probe.py", FORMAT, ENTRIES, remedy)
    frozen = frozen_from(contents, path, torch.device(device))
    linear = as_linear(contents["weight"].to(device), contents["bias"].to(device))
    return Classifier(frozen, linear, contents["classes"], contents["temperature"], contents["dataset"]).eval()


def write_classifier(path, classifier):
    """Writes a Classifier so that load_classifier gives it back."""
    frozen = classifier.frozen
    contents = {
        "format": FORMAT,
        "config": frozen.config,
        "step": frozen.step,
        "dataset": classifier.dataset,
        "encoder": frozen.encoder.state_dict(),
        "mean": frozen.mean,
        "std": frozen.std,
        "weight": classifier.linear.weight,
        "bias": classifier.linear.bias,
        "temperature": classifier.temperature,
        "classes": classifier.classes,
    }
    write(path, lambda f: torch.save(contents, f))


def write_json(path, contents):
    write(path, lambda f: f.write(json.dumps(contents, indent=1).encode() + b"\n"))


def write(path, write_to):
    try:
        write_aside(path, write_to)
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
        raise Refused(f"{path.parent} cannot be written ({e}): "
                      "free space, or copy what is there to a folder that can") from e
