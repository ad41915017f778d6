"""Stage 2: what a frozen encoder is worth to a linear classifier (Khosla et al. 2020, section 3.1).

    python linear_probe.py runs/shapes-small-supcon-s0/ckpt.pt --baselines
    python linear_probe.py runs/cifar10-resnet50-supcon-s0/ckpt.pt --dataset cifar100     # transfer

Features of un-augmented images are extracted once; then a linear layer is fitted to them with cross-entropy. The
accuracy is that of the last epoch: choosing the best epoch would be choosing on the test set. Beside the
checkpoint it leaves probe.json and classifier.pt (probe-DATASET.json for another data set).
"""

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import nn

from images import DATASETS, Refused, load_data, require_same_classes
from pretrain import NOT_NEGATIVE, POSITIVE, bfloat16_is_fast, build_encoder, choose_device, features, run_command
from run_folder import load_checkpoint, load_state, write_aside


class Frozen(NamedTuple):
    """An encoder from a checkpoint and what it takes to feed it."""

    encoder: nn.Module
    mean: torch.Tensor
    std: torch.Tensor
    config: dict
    autocast: torch.dtype | None


def load_encoder(path, device):
    """The frozen encoder of a checkpoint of pretrain.py; every entry of the encoder must be there, and no other."""
    contents = load_checkpoint(path)
    config = contents["config"]
    encoder, _ = build_encoder(config["arch"], config["stem"])
    load_state(encoder, contents["encoder"], path)
    encoder.eval().requires_grad_(False).to(device, torch.float32, memory_format=torch.channels_last)
    autocast = torch.bfloat16 if config["precision"] in ("auto", "bfloat16") and bfloat16_is_fast(device) else None
    return Frozen(encoder, contents["mean"].to(device), contents["std"].to(device), config, autocast)


def fingerprint(module):
    """A digest of every parameter and buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, entry in module.state_dict().items():
        digest.update(name.encode())
        digest.update(entry.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fit_linear(r, labels, num_classes, *, epochs=100, batch=512, lr=0.1, momentum=0.9, weight_decay=0.0, seed=0):
    """A linear classifier r (n, width) -> class scores: cross-entropy, SGD with Nesterov's momentum, cosine to 0.

    The features are standardised for the fit, so that one learning rate serves every encoder; the result is folded
    back into one nn.Linear on r itself.
    """
    mean, std = r.mean(0), r.std(0).clamp(min=1e-6)
    x = (r - mean) / std
    linear = nn.Linear(r.shape[1], num_classes, device=r.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr, momentum, nesterov=momentum > 0, weight_decay=weight_decay)
    batch = min(batch, len(x))
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=g).to(r.device)
        for rows in order.split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            F.cross_entropy(linear(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        linear.weight /= std
        linear.bias -= linear.weight @ mean
    return linear


def topk(scores, labels, k):
    """Accuracy in percent: how often the label is among the k highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).double().mean().item()


def worst_confusions(scores, labels, classes, count=5):
    """The most frequent mistakes as [true class, predicted class, percent of the true class's images]."""
    n = len(classes)
    table = torch.bincount(labels * n + scores.argmax(1), minlength=n * n).view(n, n).double()
    share = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    values, where = share.flatten().topk(min(count, n * n))
    return [[classes[i // n], classes[i % n], round(v, 2)] for v, i in zip(values.tolist(), where.tolist()) if v > 0]


def probe(r_train, y_train, r_test, y_test, num_classes, **fit):
    """(classifier, test scores, top-1 in percent) of a linear classifier fitted to the training features."""
    classifier = fit_linear(r_train, y_train, num_classes, **fit)
    with torch.no_grad():
        scores = classifier(r_test)
    return classifier, scores, topk(scores, y_test, 1)


def baselines(frozen, train, test, y_train, y_test, **fit):
    """Top-1 of the same probe on raw pixels and on an untrained encoder of the same kind."""
    device, num_classes = frozen.mean.device, len(train.classes)
    pixels = [d.images.flatten(1).to(device).float() / 255 for d in (train, test)]
    torch.manual_seed(fit["seed"])
    untrained, _ = build_encoder(frozen.config["arch"], frozen.config["stem"])
    untrained.to(device, memory_format=torch.channels_last)
    random = [features(untrained, d.images, frozen.mean, frozen.std, frozen.autocast) for d in (train, test)]
    return {
        "raw_pixels_top1": probe(pixels[0], y_train, pixels[1], y_test, num_classes, **fit | {"lr": fit["lr"] / 10})[2],
        "untrained_encoder_top1": probe(random[0], y_train, random[1], y_test, num_classes, **fit)[2],
    }


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--dataset", type=click.Choice(DATASETS), show_default="the checkpoint's", help="Transfer: another data set, resized to the checkpoint's size.")
@click.option("--data", show_default="the checkpoint's", help="Folder of the data sets.")
@click.option("--download/--no-download", default=True, help="Fetch what is missing.")
@click.option("--limit", type=click.IntRange(min=2), show_default="all", help="Fit on the first N training images.")
@click.option("--epochs", type=click.IntRange(min=1), default=100, help="Passes over the features.")
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Images in a step.")
@click.option("--lr", type=POSITIVE, default=0.1, help="Peak learning rate, on standardised features.")
@click.option("--weight-decay", type=NOT_NEGATIVE, default=0.0, help="On the classifier.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the order of the images.")
@click.option("--baselines", "with_baselines", is_flag=True, help="Also probe raw pixels and an untrained encoder.")
@click.option("--device", show_default="cuda if there is one, else cpu", help="torch device.")
def main(checkpoint, dataset, data, download, limit, with_baselines, device, **fit):
    """Fit a linear classifier to the frozen features of CHECKPOINT (a ckpt.pt of pretrain.py, or its folder) and test it."""
    device = choose_device(device)
    checkpoint = checkpoint / "ckpt.pt" if checkpoint.is_dir() else checkpoint
    frozen = load_encoder(checkpoint, device)
    own = frozen.config["dataset"]
    dataset, data, before = dataset or own, data or frozen.config["data"], fingerprint(frozen.encoder)
    source = {"size": frozen.config["size"], "download": download}
    train, test = load_data(dataset, data, True, limit=limit, **source), load_data(dataset, data, False, **source)
    require_same_classes(train, test, data)
    if len(train.classes) < 2:
        raise Refused(f"--data {data} has one class alone: a classifier needs two")
    y_train, y_test = train.labels.to(device), test.labels.to(device)

    start = time.perf_counter()
    r_train, r_test = (features(frozen.encoder, d.images, frozen.mean, frozen.std, frozen.autocast) for d in (train, test))
    extracted = time.perf_counter()
    classifier, scores, top1 = probe(r_train, y_train, r_test, y_test, len(train.classes), **fit)
    result = {
        "checkpoint": str(checkpoint),
        "dataset": dataset,
        "top1": top1,
        "top5": topk(scores, y_test, 5),
        "train_top1": topk(classifier(r_train), y_train, 1),
        "worst_confusions": worst_confusions(scores, y_test, test.classes),
        "train_images": len(y_train),
        "test_images": len(y_test),
        "extract_seconds": round(extracted - start, 2),
        "fit_seconds": round(time.perf_counter() - extracted, 2),
        "fit": fit,
        "torch": torch.__version__,
    }
    click.echo(f"{dataset}, linear probe on {frozen.config['loss']} features: top-1 {top1:.2f} %  top-5 {result['top5']:.2f} %")
    for true, predicted, percent in result["worst_confusions"]:
        click.echo(f"  {percent:5.1f} % of {true} taken for {predicted}")
    if with_baselines:
        result |= baselines(frozen, train, test, y_train, y_test, **fit)
        click.echo(f"the same probe on raw pixels: top-1 {result['raw_pixels_top1']:.2f} %")
        click.echo(f"the same probe on the untrained encoder: top-1 {result['untrained_encoder_top1']:.2f} %")
    if fingerprint(frozen.encoder) != before:
        raise RuntimeError("the encoder changed while it was probed")

    suffix = "" if dataset == own else f"-{dataset}"
    contents = {"format": "supcon-probe-1", "classes": train.classes, **classifier.state_dict()}
    try:
        write_aside(checkpoint.with_name(f"classifier{suffix}.pt"), lambda f: torch.save(contents, f))
        write_aside(checkpoint.with_name(f"probe{suffix}.json"), lambda f: f.write(json.dumps(result, indent=1).encode() + b"\n"))
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
        raise Refused(f"{checkpoint.parent} cannot be written ({e}): free space, or copy the checkpoint to a folder that can") from e
    return result


if __name__ == "__main__":
    run_command(main, lower="--limit")
