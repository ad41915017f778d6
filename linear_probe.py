"""Stage 2: what a frozen encoder is worth to a linear classifier (Khosla et al. 2020, section 3.1).

    python linear_probe.py runs/shapes-small-supcon-s0 --baselines
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --recipe cifar10-supcon --augment    # the reference code's probe
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --dataset cifar100                   # transfer
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --fraction 0.1 --figure              # few labels; pictures

Features of un-augmented images are extracted once. A grid of learning rates and weight decays is fitted to nine tenths of
the training images, all cells together as one linear layer; the cell that is best on the other tenth is fitted again, to
all of them, and meets the test images once, at its last epoch. Beside the checkpoint it leaves probe.json and
classifier.pt, their names with another data set, a fraction, a limit or a recipe at the end where there is one;
load_classifier makes one module of the latter.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from click.core import ParameterSource
from torch import nn

import losses
from figures import draw_probe, pyplot
from images import (
    DATASETS, Refused, ViewParameters, WorkerViews, draw_view, generator, load_data, make_view, require_same_classes,
    stratified, take, worker_batches,
)  # fmt: skip
from metrics import best_temperature, confusion, knn_top1, per_class, reliability, topk, worst_confusions
from options import NOT_NEGATIVE, POSITIVE, Finite, refuse_two_rates, run_command
from pretrain import bfloat16_is_fast, build_encoder, choose_device, encode, encode_images
from recipes import PRESETS, as_option, learning_rate, make_optimizer
from run_folder import load_checkpoint, load_plain, load_state, say, suffix, write_aside

LRS, DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)  # the grid, on standardised features
HELD_OUT = 0.1

# ---------------------------------------------------------------- the frozen encoder


class Frozen(nn.Module):
    """x (n, 3, H, H) uint8, or float in [0, 1] -> r (n, width), brought to norm 1 where the heads saw it so in training."""

    def __init__(self, encoder, mean, std, config, device):
        super().__init__()
        self.encoder, self.config, self.size = encoder, config, config["size"]
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.eval().requires_grad_(False).to(device, torch.float32, memory_format=torch.channels_last)
        self.autocast = torch.bfloat16 if config["precision"] in ("auto", "bfloat16") and bfloat16_is_fast(self.mean.device) else None

    def forward(self, x):
        return self.scaled(encode_images(self.encoder, x, self.mean, self.std, self.autocast))

    def encode(self, x):
        """Of images that are normalised already."""
        return self.scaled(encode(self.encoder, x.to(memory_format=torch.channels_last), self.autocast))

    def scaled(self, r):
        return F.normalize(r) if self.config.get("normalize_encoder") else r


def load_encoder(path, device):
    """The frozen encoder of a checkpoint of pretrain.py; every entry of the encoder must be there, and no other."""
    return frozen_from(load_checkpoint(path), path, device)


def frozen_from(contents, path, device):
    config = contents["config"]
    try:
        encoder, _ = build_encoder(config["arch"], config["stem"])
        frozen = Frozen(encoder, contents["mean"], contents["std"], config, device)
    except (KeyError, AttributeError, RuntimeError) as e:
        raise Refused(f"{path} names no encoder that pretrain.py builds: it is damaged or changed by hand, name another") from e
    load_state(encoder, contents["encoder"], path)
    return frozen


def fingerprint(module):
    """A digest of every parameter and buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, entry in module.state_dict().items():
        digest.update(name.encode())
        digest.update(entry.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def extract(frozen, data, key=None, batch=500, workers=2):
    """r (n, width) of the images as they are; with a key, of views that it draws: cropped as in training, and flipped."""
    rows, crop_min = torch.arange(len(data.labels)).split(batch), frozen.config.get("crop_min", 0.2)
    if data.files is not None:
        items = ([(row, *key, row) if key else (row,) for row in part.tolist()] for part in rows)
        read = worker_batches(WorkerViews(data, "crop" if key else "none", crop_min), items, workers)
        return torch.cat([frozen(x) for x in read])
    if key is None:
        return torch.cat([frozen(data.images[part]) for part in rows])
    parts, device = [], frozen.mean.device
    for k, part in enumerate(rows):
        view = draw_view(len(part), frozen.size, "crop", generator(*key, k), crop_min=crop_min)
        view = ViewParameters(*(p.to(device) for p in view[:-1]), view.order)
        parts.append(frozen.encode(make_view(data.images[part].to(device), view, frozen.mean, frozen.std)))
    return torch.cat(parts)


# ---------------------------------------------------------------- the linear classifier


def fit_cells(features_of, labels, num_classes, cells, fit):
    """Linear classifiers of r, one for each (learning rate, weight decay) of `cells`, trained together as one layer.

    features_of(epoch) gives r (n, D), and fit the epochs, batch, optimizer, schedule, ... that all cells share.
    Returns weights (K, C, D) and biases (K, C).
    """
    r, K = features_of(0), len(cells)
    n, D = r.shape
    weights = [nn.Parameter(r.new_zeros(num_classes, D)) for _ in cells]
    biases = [nn.Parameter(r.new_zeros(num_classes)) for _ in cells]
    groups = [{"params": [w, b], "lr": lr, "weight_decay": decay} for w, b, (lr, decay) in zip(weights, biases, cells)]
    optimizer = make_optimizer(fit, groups, 1.0)
    batch = min(fit.batch, n)
    steps, g = n // batch, torch.Generator().manual_seed(fit.seed)
    for epoch in range(fit.epochs):
        r = features_of(epoch) if epoch else r
        order = torch.randperm(n, generator=g).to(r.device)
        for step, rows in enumerate(order.split(batch)[:steps], epoch * steps):
            rate = learning_rate(fit, step, steps, marks=(0.6, 0.75, 0.9), factor=0.2)
            for group, (lr, _) in zip(optimizer.param_groups, cells):
                group["lr"] = lr * rate
            optimizer.zero_grad()
            weight, bias = torch.stack(weights, 1).flatten(0, 1), torch.stack(biases, 1).flatten()  # (C K, D), (C K,)
            scores = torch.addmm(bias, r.index_select(0, rows), weight.T).view(-1, num_classes, K)
            y = labels[rows, None].expand(-1, K)
            (K * F.cross_entropy(scores, y, label_smoothing=fit.label_smoothing)).backward()
            optimizer.step()
    return torch.stack(weights).detach(), torch.stack(biases).detach()


def as_linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight.data, linear.bias.data = weight, bias
    return linear.requires_grad_(False)


class Probe(NamedTuple):
    classifier: nn.Linear  # of r
    temperature: float  # that the held-out images ask for, of the cell as it was fitted to the others
    cell: tuple  # the learning rate and weight decay that were best there
    held_out_top1: float | None  # of that cell; None where there were too few images to hold any out
    grid: list  # [learning rate, weight decay, top-1 on the held-out images] of every cell


def probe(r, labels, num_classes, cells, fit, augmented=None):
    """Chooses a cell and a temperature on a tenth of the training features r (n, D), then fits that cell to all of them.

    augmented(epoch) gives r of augmented images for the second fit. Raises Refused where a fit does not stay finite.
    """
    centre, spread = r.new_zeros(1), r.new_ones(1)
    if fit.standardize:
        centre, spread = r.mean(0), r.std(0, correction=0)
        spread = torch.where(spread > 1e-6, spread, 1)  # what never moves here may move in augmented images
    x = (r - centre).div_(spread)
    kept, held = hold_out(labels, fit.seed)
    cell, temperature, held_out_top1, grid = cells[0], 1.0, None, []
    if len(held):
        x_kept = x[kept]
        fitted = fit_cells(lambda epoch: x_kept, labels[kept], num_classes, cells, fit)
        best, y = None, labels[held]
        for cell_k, weight, bias in zip(cells, *fitted):
            scores = x[held] @ weight.T + bias
            top1, nll = topk(scores, y, 1), F.cross_entropy(scores, y).item()
            grid.append([*cell_k, round(top1, 3)])
            if scores.isfinite().all() and (best is None or (top1, -nll) > best):
                best, cell, held_out_top1, temperature = (top1, -nll), cell_k, top1, best_temperature(scores, y)

    def features_of(epoch):
        return x if augmented is None else (augmented(epoch) - centre) / spread

    weights, biases = fit_cells(features_of, labels, num_classes, [cell], fit)
    if not (weights.isfinite().all() and biases.isfinite().all()):
        raise Refused(f"the probe did not stay finite at a learning rate of {cell[0]:g}: lower --lr or lengthen --warmup")
    weight = weights[0] / spread
    return Probe(as_linear(weight, biases[0] - (weight * centre).sum(1)), temperature, cell, held_out_top1, grid)


def hold_out(labels, seed):
    """(kept, held): rows of a tenth of every class that has two images or more, and all others."""
    labels = labels.cpu()
    several = torch.nonzero(torch.bincount(labels)[labels] > 1).squeeze(1)
    held = several[stratified(labels[several], HELD_OUT, generator(seed, 7))] if len(several) else several
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill(0, held, False)
    return torch.nonzero(kept).squeeze(1), held


class Classifier(nn.Module):
    """Images, as Frozen takes them, -> class scores (n, C), whose softmax is better calibrated when divided by `temperature`."""

    def __init__(self, frozen, linear, classes, temperature, dataset):
        super().__init__()
        self.frozen, self.linear = frozen, linear
        self.classes, self.temperature, self.dataset, self.size = classes, temperature, dataset, frozen.size

    def forward(self, x):
        return self.linear(self.frozen(x))


FORMAT = "supcon-probe-2"
ENTRIES = {"config": dict, "dataset": str, "encoder": dict, "mean": torch.Tensor, "std": torch.Tensor, "weight": torch.Tensor, "bias": torch.Tensor,
           "temperature": float, "classes": list}  # fmt: skip


def load_classifier(path, device="cpu"):
    """The Classifier in a classifier.pt of this script. Raises Refused for anything else."""
    contents = load_plain(path, "classifier", "linear_probe.py", FORMAT, ENTRIES, "run linear_probe.py, and name the classifier.pt that it leaves")
    frozen = frozen_from(contents, path, torch.device(device))
    linear = as_linear(contents["weight"].to(device), contents["bias"].to(device))
    return Classifier(frozen, linear, contents["classes"], contents["temperature"], contents["dataset"]).eval()


# ---------------------------------------------------------------- what is measured beside


def geometry(frozen, test, seed, count=2000):
    """Alignment (of two cropped views), uniformity and tolerance of the first test images' features on the sphere."""
    some = take(test, torch.arange(min(count, len(test.labels))))
    r = F.normalize(extract(frozen, some))
    views = torch.cat([F.normalize(extract(frozen, some, key=(seed, 8, v))) for v in range(2)])
    labels = some.labels.to(r.device)
    found = {"alignment": losses.alignment(views), "uniformity": losses.uniformity(r), "tolerance": losses.tolerance(r, labels)}
    return {name: value.item() for name, value in found.items()}


def baselines(frozen, train, test, cells, fit):
    """Top-1 of the same grid on raw pixels, where they are in memory, and on an untrained encoder of the same kind."""
    device, C = frozen.mean.device, len(train.classes)
    torch.manual_seed(fit.seed)
    encoder, _ = build_encoder(frozen.config["arch"], frozen.config["stem"])
    untrained = Frozen(encoder, frozen.mean, frozen.std, frozen.config, device)
    kinds = {"untrained_encoder": lambda d: extract(untrained, d)}
    if train.files is None:
        kinds = {"raw_pixels": lambda d: d.images.flatten(1).to(device).float() / 255} | kinds
    found, y_train, y_test = {}, train.labels.to(device), test.labels.to(device)
    for name, r_of in kinds.items():
        classifier = probe(r_of(train), y_train, C, cells, fit).classifier
        found[f"{name}_top1"] = topk(classifier(r_of(test)), y_test, 1)
        say(f"the same grid on {'raw pixels' if name == 'raw_pixels' else 'the untrained encoder'}: top-1 {found[f'{name}_top1']:.2f} %")
    return found


# ---------------------------------------------------------------- the command line


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Choice([name for name, preset in PRESETS.items() if preset.probe]), help="The probe of a published setting; other options override it. Add --augment for its views.")
@click.option("--dataset", type=click.Choice(DATASETS), show_default="the checkpoint's", help="Transfer: another data set, resized to the checkpoint's size.")
@click.option("--data", show_default="the checkpoint's", help="Folder of the data sets.")
@click.option("--download/--no-download", default=True, help="Fetch what is missing.")
@click.option("--limit", type=click.IntRange(min=2), show_default="all", help="Fit to the first N training images.")
@click.option("--fraction", type=Finite(0, 1, min_open=True), default=1.0, help="Fit to this part of every class.")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read a streamed folder.")
@click.option("--augment", is_flag=True, help="Fit to crops and flips, encoded anew in every epoch, as the papers do.")
@click.option("--standardize/--no-standardize", default=True, help="Bring every feature to mean 0 and deviation 1.")
@click.option("--l2-normalize", is_flag=True, help="Bring r to norm 1 first.")
@click.option("--epochs", type=click.IntRange(min=1), default=100, help="Passes over the features.")
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Images in a step.")
@click.option("--lr", type=POSITIVE, multiple=True, default=LRS, help="Peak learning rate; several make a grid.")
@click.option("--lr-per-256", type=POSITIVE, help="Peak learning rate per 256 images of the batch, instead of --lr.")
@click.option("--weight-decay", type=NOT_NEGATIVE, multiple=True, default=DECAYS, help="On the classifier; several make a grid.")
@click.option("--optimizer", type=click.Choice(["sgd", "lars", "rmsprop"]), default="sgd", help="Of all cells.")
@click.option("--momentum", type=Finite(0, 1, max_open=True), default=0.9, help="The optimiser's.")
@click.option("--nesterov/--no-nesterov", default=True, help="Nesterov's momentum, of SGD.")
@click.option("--schedule", type=click.Choice(["cosine", "step", "exponential", "constant"]), default="cosine", help="cosine to lr/1000; step: x0.2 at 60, 75, 90 %; exponential: x0.97 every half epoch.")
@click.option("--warmup", type=NOT_NEGATIVE, default=0.0, help="Epochs of linear warm-up from 0.")
@click.option("--label-smoothing", type=Finite(0, 1, max_open=True), default=0.0, help="Of cross-entropy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of orders, parts and views.")
@click.option("--baselines", "with_baselines", is_flag=True, help="Also probe raw pixels and an untrained encoder.")
@click.option("--figure", is_flag=True, help="Draw reliability, confusions and a 2-D projection as PNG (needs matplotlib).")
@click.option("--device", show_default="cuda if there is one, else cpu", help="torch device.")
@click.pass_context
def main(context, checkpoint, recipe, dataset, data, download, limit, fraction, workers, augment, l2_normalize, with_baselines, figure, device, **options):
    """Fit a linear classifier to the frozen features of CHECKPOINT (a ckpt.pt of pretrain.py, or its folder) and test it."""
    given = {k for k in context.params if context.get_parameter_source(k) is not ParameterSource.DEFAULT}
    fit, cells = complete_fit(recipe, options, given)
    if figure:
        pyplot()  # said now, not after the fit
    device = choose_device(device)
    checkpoint = checkpoint / "ckpt.pt" if checkpoint.is_dir() else checkpoint
    frozen = load_encoder(checkpoint, device)
    folder = checkpoint.parent
    if not os.access(folder, os.W_OK):
        raise Refused(f"{folder} cannot be written: copy the checkpoint to a folder that can")
    own, before = (frozen.config["dataset"], frozen.config["data"]), fingerprint(frozen)
    dataset, data = dataset or own[0], data or own[1]
    elsewhere = data != own[1] and dataset in (own[0], "folder")
    kind = suffix(dataset != own[0] and dataset, elsewhere and Path(data).resolve().name, fraction < 1 and f"{fraction:g}", limit and f"first{limit}", recipe)
    frozen.config |= {"data": data} | ({"normalize_encoder": True} if l2_normalize else {})
    source = {"size": frozen.size, "download": download, "stream": frozen.config.get("stream", False) and dataset == "folder"}
    train, test = load_data(dataset, data, True, limit=limit, **source), load_data(dataset, data, False, **source)
    require_same_classes(train, test, data)
    if len(train.classes) < 2:
        raise Refused(f"--data {data} has one class alone: a classifier needs two")
    if fraction < 1:
        train = take(train, stratified(train.labels, fraction, generator(fit.seed, 4)))
    y_train, y_test = train.labels.to(device), test.labels.to(device)

    start = time.perf_counter()
    r_train, r_test = (extract(frozen, d, workers=workers) for d in (train, test))
    extracted = time.perf_counter()
    augmented = (lambda epoch: extract(frozen, train, key=(fit.seed, 6, epoch), workers=workers)) if augment else None
    found = probe(r_train, y_train, len(train.classes), cells, fit, augmented)
    if fingerprint(frozen) != before:
        raise RuntimeError("the encoder changed while it was probed")
    write_classifier(folder / f"classifier{kind}.pt", dataset, frozen, found, train.classes)
    if found.held_out_top1 is None:
        say("no class has two images: nothing to choose with, so the first learning rate and weight decay are taken", err=True)
    scores = found.classifier(r_test)
    fitted = time.perf_counter()
    ece, table = reliability(scores, y_test)
    shared = vars(fit) | {"lr": found.cell[0], "augment": augment, "l2_normalize": l2_normalize, "fraction": fraction, "limit": limit}
    result = {
        "checkpoint": str(checkpoint),
        "dataset": dataset,
        "recipe": recipe,
        "top1": topk(scores, y_test, 1),
        "top5": topk(scores, y_test, 5),
        "train_top1": topk(found.classifier(r_train), y_train, 1),
        "per_class_top1": per_class(scores, y_test, test.classes),
        "worst_confusions": worst_confusions(scores, y_test, test.classes),
        "ece": ece,
        "ece_after_temperature": reliability(scores / found.temperature, y_test)[0],
        "temperature": found.temperature,
        "reliability": table,
        "knn_top1": knn_top1(r_train, y_train, r_test, y_test),
        **geometry(frozen, test, fit.seed),
        "lr": found.cell[0],
        "weight_decay": found.cell[1],
        "held_out_top1": found.held_out_top1,
        "grid": found.grid,
        "train_images": len(y_train),
        "test_images": len(y_test),
        "extract_seconds": round(extracted - start, 2),
        "fit_seconds": round(fitted - extracted, 2),
        "fit": shared,
        "torch": torch.__version__,
    }
    announce(result, frozen.config["loss"])
    write_json(folder / f"probe{kind}.json", result)
    if figure:
        say(draw_probe(checkpoint.with_name(f"probe{kind}.png"), result, confusion(scores, y_test), r_test, y_test, test.classes))
    if with_baselines:
        result |= baselines(frozen, train, test, cells, fit)
        write_json(folder / f"probe{kind}.json", result)
    return result


def complete_fit(recipe, options, given):
    """(what all cells of the grid share, the cells), with a preset's numbers where no option is given."""
    options = dict(options)
    refuse_two_rates(given)
    if recipe:
        preset = {"nesterov": False, "standardize": False, "warmup": 0.0} | PRESETS[recipe].probe
        bound = {"lr", "lr_per_256"} if {"lr", "lr_per_256"} & given else set()
        options |= {k: v for k, v in preset.items() if k not in given | bound}
        say(f"recipe {recipe}: {PRESETS[recipe].source}\n  " + " ".join(as_option(k, options[k]) for k in preset if options[k] is not None))
    if options["optimizer"] != "sgd" or not options["momentum"]:
        if options["nesterov"] and "nesterov" in given:
            raise Refused("--nesterov is SGD's, with a --momentum above 0: leave it out")
        options["nesterov"] = False
    if options["warmup"] >= options["epochs"]:
        if "warmup" in given:
            raise Refused(f"--warmup {options['warmup']} must be shorter than --epochs {options['epochs']}")
        options["warmup"] = 0.0
    lrs, decays, per_256 = (options.pop(k) for k in ("lr", "weight_decay", "lr_per_256"))
    lrs = (per_256 * options["batch"] / 256,) if per_256 else lrs
    return SimpleNamespace(**options, lr=1.0, warmup_from=0.0), [(lr, decay) for lr in lrs for decay in decays]


def announce(result, loss):
    say(f"{result['dataset']}, linear probe on {loss} features: top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  "
        f"k-NN {result['knn_top1']:.2f} %  (lr {result['lr']:g}, weight decay {result['weight_decay']:g})")  # fmt: skip
    say(f"calibration error {result['ece']:.4f}, after temperature {result['temperature']:.3f} {result['ece_after_temperature']:.4f}; "
        f"alignment {result['alignment']:.3f}, uniformity {result['uniformity']:.3f}, tolerance {result['tolerance']:.3f}")  # fmt: skip
    for true, predicted, percent in result["worst_confusions"]:
        say(f"  {percent:5.1f} % of {true} taken for {predicted}")


def write_classifier(path, dataset, frozen, found, classes):
    contents = {
        "format": FORMAT,
        "config": frozen.config,
        "dataset": dataset,
        "encoder": frozen.encoder.state_dict(),
        "mean": frozen.mean,
        "std": frozen.std,
        "weight": found.classifier.weight,
        "bias": found.classifier.bias,
        "temperature": found.temperature,
        "classes": classes,
    }
    write(path, lambda f: torch.save(contents, f))


def write_json(path, contents):
    write(path, lambda f: f.write(json.dumps(contents, indent=1).encode() + b"\n"))


def write(path, write_to):
    try:
        write_aside(path, write_to)
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
        raise Refused(f"{path.parent} cannot be written ({e}): free space, or copy what is there to a folder that can") from e


if __name__ == "__main__":
    run_command(main, lower="--limit or --fraction")
