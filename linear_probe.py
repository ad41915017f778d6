"""Stage 2: what a frozen encoder is worth to a linear classifier (Khosla et al. 2020, section 3.1).

    python linear_probe.py runs/shapes-small-supcon-s0 --baselines
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --recipe cifar10-supcon --augment    # the reference's probe
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --dataset cifar100                   # transfer
    python linear_probe.py runs/cifar10-resnet50-supcon-s0 --subset 0.1 --figure                # few labels; pictures

Features of un-augmented images are extracted once. A logistic regression is fitted to nine tenths of the training
images for each of four weight decays. The best decay on the other tenth serves for a fit to all of them, which is
tested once. The papers' probes are trained by SGD instead, as --recipe, --augment or any option of SGD
asks: the grid is then one of learning rates and weight decays, fitted together as one linear layer. Beside the
checkpoint this leaves probe.json and classifier.pt; another data set, a subset, a limit or a recipe is part of their
names, and so is the epoch of an epoch-0003.pt. docs/weights.md says how to use these files elsewhere.
"""

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
from common.cli import Refused, is_first, run_command, say
from common.config import BELOW_1, NOT_NEGATIVE, POSITIVE, SHARE, refuse_two_rates, require
from common.data import DATASETS, Data, Missing, all_but, generator, hold_out, load_data, stratified, take
from common.data import with_classes_of
from common.figures import draw_probe, pyplot
from common.frozen import Classifier, Frozen, as_linear, extract, fingerprint, load_encoder, write_classifier
from common.frozen import refuse_features_file, save_features, untrained_encoder, write_json
from common.metrics import best_temperature, confusion, knn_top1, per_class, reliability, retrieval, topk
from common.metrics import worst_confusions
from common.optim import learning_rate, logistic_regression, make_optimizer
from common.presets import PRESETS, as_option
from common.ranks import choose_device
from common.run_folder import checkpoint_of, kind_of_its_own, same_place, suffix

LRS = 0.01, 0.03, 0.1, 0.3, 1.0  # SGD's grid, on standardised features
DECAYS = 0.0, 1e-4, 1e-3, 1e-2
OF_SGD = {"recipe", "augment", "epochs", "batch", "lr", "lr_per_256", "momentum", "nesterov", "schedule", "warmup"}

# ---------------------------------------------------------------- the linear classifier


def fit_cells(features_of, labels, num_classes, cells, fit):
    """Linear classifiers of r, one for each (learning rate, weight decay) of `cells`: weights (K, C, D), biases (K, C).

    features_of(epoch) gives r (n, D); fit holds the optimizer and whatever else all cells share.
    """
    if fit.optimizer != "lbfgs":
        return train_cells(features_of, labels, num_classes, cells, fit)
    r = features_of(0)
    fitted = [logistic_regression(r, labels, num_classes, decay, fit.label_smoothing) for _, decay in cells]
    weights, biases = zip(*fitted)
    return torch.stack(weights), torch.stack(biases)


def train_cells(features_of, labels, num_classes, cells, fit):
    """As fit_cells, by SGD, LARS or RMSProp: all cells are trained together, as one layer."""
    r = features_of(0)
    K = len(cells)
    n, D = r.shape
    weights = [nn.Parameter(r.new_zeros(num_classes, D)) for _ in cells]
    biases = [nn.Parameter(r.new_zeros(num_classes)) for _ in cells]
    groups = [{"params": [w, b], "lr": lr, "weight_decay": decay} for w, b, (lr, decay) in zip(weights, biases, cells)]
    optimizer = make_optimizer(fit, groups, 1.0)
    batch = min(fit.batch, n)
    steps = n // batch
    g = torch.Generator().manual_seed(fit.seed)
    for epoch in range(fit.epochs):
        r = features_of(epoch) if epoch else r
        order = torch.randperm(n, generator=g).to(r.device)
        for step, rows in enumerate(order.split(batch)[:steps], epoch * steps):
            rate = learning_rate(fit, step, steps, milestones=(0.6, 0.75, 0.9), gamma=0.2)
            for group, (lr, _) in zip(optimizer.param_groups, cells):
                group["lr"] = lr * rate
            optimizer.zero_grad()
            weight, bias = torch.stack(weights, 1).flatten(0, 1), torch.stack(biases, 1).flatten()  # (C K, D), (C K,)
            scores = torch.addmm(bias, r.index_select(0, rows), weight.T).view(-1, num_classes, K)
            y = labels[rows, None].expand(-1, K)
            (K * F.cross_entropy(scores, y, label_smoothing=fit.label_smoothing)).backward()
            optimizer.step()
    return torch.stack(weights).detach(), torch.stack(biases).detach()


class Probe(NamedTuple):
    classifier: nn.Linear  # of r
    temperature: float  # the best one for the held-out images
    cell: tuple  # the learning rate and weight decay that were best for them
    held_out_top1: float | None  # of that cell; None where there were too few images to hold any out
    grid: list  # [learning rate, weight decay, top-1 on the held-out images] of every cell


def probe(r, labels, num_classes, cells, fit, augmented=None):
    """Chooses a cell and a temperature on a tenth of the training features r (n, D), then fits it to all of them.

    augmented(epoch) gives r of augmented images for the second fit. Raises Refused where a fit does not stay finite.
    """
    centre, spread = r.new_zeros(1), r.new_ones(1)
    if fit.standardize:
        centre, spread = r.mean(0), r.std(0, correction=0)
        spread = torch.where(spread > 1e-6, spread, 1)  # what never moves here may move in augmented images
    x = (r - centre).div_(spread)
    kept, held = hold_out(labels, fit.seed)
    cell = cells[0]
    temperature = 1.0
    best = None  # (top-1, minus the cross-entropy) of the best cell on the held-out images
    grid = []
    if len(held):
        x_kept = x[kept]
        fitted = fit_cells(lambda epoch: x_kept, labels[kept], num_classes, cells, fit)
        y = labels[held]
        for cell_k, weight, bias in zip(cells, *fitted):
            scores = x[held] @ weight.T + bias
            quality = topk(scores, y, 1), -F.cross_entropy(scores, y).item()
            grid.append([*cell_k, round(quality[0], 3)])
            if scores.isfinite().all() and (best is None or quality > best):
                best = quality
                cell = cell_k
                temperature = best_temperature(scores, y)

    def features_of(epoch):
        return x if augmented is None else (augmented(epoch) - centre) / spread

    weights, biases = fit_cells(features_of, labels, num_classes, [cell], fit)
    if not (weights.isfinite().all() and biases.isfinite().all()):
        raise Refused(f"the probe did not stay finite at a learning rate of {cell[0]}: lower --lr or lengthen --warmup")
    weight = weights[0] / spread
    return Probe(as_linear(weight, biases[0] - (weight * centre).sum(1)), temperature, cell, best and best[0], grid)


# ---------------------------------------------------------------- what is measured beside


def geometry(frozen, test, seed, count=2000):
    """Alignment (of two cropped views), uniformity and tolerance of the first test images' features on the sphere."""
    some = take(test, torch.arange(min(count, len(test.labels))))
    r = F.normalize(extract(frozen, some))
    views = torch.cat([F.normalize(extract(frozen, some, key=("geometry", seed, v))) for v in range(2)])
    labels = some.labels.to(r.device)
    return {
        "alignment": losses.alignment(views).item(),
        "uniformity": losses.uniformity(r).item(),
        "tolerance": losses.tolerance(r, labels).item(),
    }


def baselines(frozen, train, test, cells, fit):
    """Top-1 of the same grid on raw pixels, where they are in memory, and on an untrained encoder of the same kind."""
    found = {}
    if train.files is None:
        found["raw_pixels_top1"] = probed_top1(raw_pixels, train, test, cells, fit, frozen.mean.device)
        say(f"the same grid on raw pixels: top-1 {found['raw_pixels_top1']:.2f} %")
    untrained = untrained_encoder(frozen, fit.seed)
    r_of = lambda data: extract(untrained, data)
    found["untrained_encoder_top1"] = probed_top1(r_of, train, test, cells, fit, frozen.mean.device)
    say(f"the same grid on the untrained encoder: top-1 {found['untrained_encoder_top1']:.2f} %")
    return found


def probed_top1(features_of, train, test, cells, fit, device):
    """Top-1 on the test set of a probe of features_of(training set)."""
    y_train, y_test = train.labels.to(device), test.labels.to(device)
    classifier = probe(features_of(train).to(device), y_train, len(train.classes), cells, fit).classifier
    return topk(classifier(features_of(test).to(device)), y_test, 1)


def raw_pixels(data):
    return data.images.flatten(1).float() / 255


# ---------------------------------------------------------------- prepare, measure, report


class Job(NamedTuple):
    """What is probed, and on what."""

    checkpoint: Path
    kind: str  # what tells its files from those of other probes of the checkpoint
    frozen: Frozen
    dataset: str
    place: str | None  # the folder of the data, where it is not the run's own
    train: Data
    test: Data
    tested_on: str  # in words


class Features(NamedTuple):
    """r (n, width) and labels (n,) of both sets, and the seconds that they took."""

    r_train: torch.Tensor
    y_train: torch.Tensor
    r_test: torch.Tensor
    y_test: torch.Tensor
    seconds: float


def prepare(checkpoint, dataset, data, download, limit, subset, validate, recipe, l2_normalize, seed, device):
    """The Job that the options describe. Raises Refused for what cannot be probed."""
    checkpoint = checkpoint_of(checkpoint)
    frozen = load_encoder(checkpoint, device, l2_normalize)
    if not os.access(checkpoint.parent, os.W_OK):
        raise Refused(f"{checkpoint.parent} cannot be written: copy the checkpoint to a folder that can")
    own_dataset, own_data = frozen.config["dataset"], frozen.config["data"]
    dataset, data = dataset or own_dataset, data or own_data
    elsewhere = not same_place(data, own_data) and dataset in (own_dataset, "folder")
    if validate and (elsewhere or limit or dataset != own_dataset):
        raise Refused("--validate takes the run's own images: leave --dataset, --data and --limit out "
                      "(if they have moved, pretrain.py --resume RUN --data DIR notes their new place)")
    kind = suffix(
        checkpoint.stem.startswith("epoch-") and checkpoint.stem,
        dataset != own_dataset and dataset,
        elsewhere and Path(data).resolve().name,
        subset < 1 and f"{subset:g}",
        limit and f"first{limit}",
        validate and "validation",
        recipe,
    )
    table = None if elsewhere or dataset != own_dataset else frozen.config.get("labels")
    frozen.config = frozen.config | {"data": data, "labels": table, "normalize_encoder": frozen.unit}
    stream = dataset == "folder" and frozen.config.get("stream", False)
    source = {"size": frozen.size, "download": download, "stream": stream, "table": table}
    if validate:
        train, test, tested_on = seen_and_left_out(frozen.config, source)
    else:
        train, test, tested_on = load_both(dataset, data, limit, source, seed)
    if subset < 1:
        train = take(train, stratified(train.labels, subset, generator("subset", seed)))
    place = str(Path(data).resolve()) if elsewhere else None  # a run's own data may be moved, and stay its own
    if elsewhere:
        kind = kind_of_its_own(kind, lambda kind: checkpoint.with_name(f"probe{kind}.json"), {"data": place})
    return Job(checkpoint, kind, frozen, dataset, place, train, test, tested_on)


def load_both(dataset, data, limit, source, seed):
    """(training set, test set, what the latter is). Without a test set a tenth of the training images is held out."""
    train = load_data(dataset, data, train=True, limit=limit, **source)
    require_two_classes(train, data)
    try:
        test = load_data(dataset, data, train=False, **source)
        return train, with_classes_of(train, test, data), "the test set"
    except Missing:
        kept, held = hold_out(train.labels, seed)
        if not len(held):
            raise
    say(f"no test set in {data}: the probe is tested on a tenth of the training images, which it does not see; "
        "the encoder may have been trained on them")
    return take(train, kept), take(train, held), "a tenth of the training set"


def require_two_classes(train, data):
    require(train.classes, f"--data {data} has images without class folders: a classifier wants train/CLASS/*.jpg")
    require(len(train.classes) > 1, f"--data {data} has one class alone: a classifier needs two")


def seen_and_left_out(config, source):
    """The training images that the run took, those that its --subset left out, and what the latter are."""
    if config.get("subset", 1.0) == 1:
        raise Refused("--validate tests on the images that pretrain.py --subset left out: this run took all of them")
    if config.get("streams") is None:
        raise Refused("--validate cannot tell which images a run of an earlier version left out: train it again")
    data = load_data(config["dataset"], config["data"], train=True, limit=config["limit"], **source)
    require_two_classes(data, config["data"])
    seen = stratified(data.labels, config["subset"], generator("subset", config["seed"]))
    return take(data, seen), take(data, all_but(seen, len(data.labels))), "what --subset left out"


def extract_both(job, workers):
    start = time.perf_counter()
    device = job.frozen.mean.device
    r_train, r_test = (extract(job.frozen, data, workers=workers) for data in (job.train, job.test))
    y_train, y_test = job.train.labels.to(device), job.test.labels.to(device)
    return Features(r_train, y_train, r_test, y_test, time.perf_counter() - start)


def fit_classifier(job, features, cells, fit, augment, workers):
    """The Probe of the training features."""
    augmented = None
    if augment:
        augmented = lambda epoch: extract(job.frozen, job.train, key=("probe", fit.seed, epoch), workers=workers)
    return probe(features.r_train, features.y_train, len(job.train.classes), cells, fit, augmented)


def measure(job, fitted, features, seed):
    """What probe.json holds of the classifier and of the features."""
    r_train, y_train, r_test, y_test, _ = features
    scores = fitted.classifier(r_test)
    ece, table = reliability(scores, y_test)
    return {
        "top1": topk(scores, y_test, 1),
        "top5": topk(scores, y_test, 5),
        "train_top1": topk(fitted.classifier(r_train), y_train, 1),
        "per_class_top1": per_class(scores, y_test, job.test.classes),
        "worst_confusions": worst_confusions(scores, y_test, job.test.classes),
        "ece": ece,
        "ece_after_temperature": reliability(scores / fitted.temperature, y_test)[0],
        "temperature": fitted.temperature,
        "reliability": table,
        "knn_top1": knn_top1(r_train, y_train, r_test, y_test),
        **retrieval(r_test, y_test),
        **geometry(job.frozen, job.test, seed),
        "lr": fitted.cell[0],
        "weight_decay": fitted.cell[1],
        "held_out_top1": fitted.held_out_top1,
        "grid": fitted.grid,
        "train_images": len(y_train),
        "test_images": len(y_test),
    }


def report(result, loss):
    """Prints the main numbers of probe.json."""
    rate = "" if result["lr"] is None else f"lr {result['lr']:g}, "
    say(f"{result['dataset']}, linear probe on {loss} features: top-1 {result['top1']:.2f} %  "
        f"top-5 {result['top5']:.2f} %  k-NN {result['knn_top1']:.2f} %  "
        f"({rate}weight decay {result['weight_decay']:g})")
    if result["held_out_top1"] is None:
        say("no class has two images: nothing to choose with, so the first cell of the grid is taken", err=True)
    say(f"calibration error {result['ece']:.4f}, after temperature {result['temperature']:.3f} "
        f"{result['ece_after_temperature']:.4f}; alignment {result['alignment']:.3f}, "
        f"uniformity {result['uniformity']:.3f}, tolerance {result['tolerance']:.3f}")
    for true, predicted, percent in result["worst_confusions"]:
        say(f"  {percent:5.1f} % of {true} taken for {predicted}")


# ---------------------------------------------------------------- the command line


def complete_fit(recipe, options, given):
    """(what all cells of the grid share, the cells), with a preset's numbers where no option is given."""
    options = dict(options)
    refuse_two_rates(given)
    of_sgd = sorted("--" + name.replace("_", "-") for name in given & OF_SGD)
    if options["optimizer"] is None:
        options["optimizer"] = "sgd" if of_sgd else "lbfgs"
    elif options["optimizer"] == "lbfgs" and of_sgd:
        raise Refused(f"--optimizer lbfgs has no {of_sgd[0]}: leave one out")
    if recipe:
        options = with_recipe(recipe, options, given)
    if options["optimizer"] != "sgd" or not options["momentum"]:
        if options["nesterov"] and "nesterov" in given:
            raise Refused("--nesterov is SGD's, with a --momentum above 0: leave it out")
        options["nesterov"] = False
    if options["warmup"] >= options["epochs"]:
        if "warmup" in given:
            raise Refused(f"--warmup {options['warmup']} must be shorter than --epochs {options['epochs']}")
        options["warmup"] = 0.0
    lrs, decays, per_256 = (options.pop(k) for k in ("lr", "weight_decay", "lr_per_256"))
    lrs = (None,) if options["optimizer"] == "lbfgs" else lrs
    lrs = (per_256 * options["batch"] / 256,) if per_256 else lrs
    return SimpleNamespace(**options, lr=1.0, warmup_from=0.0), [(lr, decay) for lr in lrs for decay in decays]


def with_recipe(recipe, options, given):
    """The options, with the numbers of a preset's probe in place of those that are not given."""
    preset = {"nesterov": False, "standardize": False, "warmup": 0.0} | PRESETS[recipe].probe
    bound = {"lr", "lr_per_256"} if {"lr", "lr_per_256"} & given else set()
    options = options | {k: v for k, v in preset.items() if k not in given | bound}
    numbers = " ".join(as_option(k, options[k]) for k in preset if options[k] is not None)
    say(f"recipe {recipe}: {PRESETS[recipe].source}\n  {numbers}")
    return options


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Choice([name for name, preset in PRESETS.items() if preset.probe]),
              help="The probe of a published setting; other options override it. Add --augment for its views.")
@click.option("--dataset", type=click.Choice(DATASETS), show_default="the checkpoint's",
              help="Transfer: another data set, resized to the checkpoint's size.")
@click.option("--data", show_default="the checkpoint's", help="Folder of the data sets.")
@click.option("--download/--no-download", default=True, help="Fetch what is missing.")
@click.option("--limit", type=click.IntRange(min=2), show_default="all", help="Fit to the first N training images.")
@click.option("--subset", type=SHARE, default=1.0, help="Fit to this part of every class.")
@click.option("--validate", is_flag=True,
              help="Test on the training images that the run's --subset left out, for choosing its settings.")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read a streamed folder.")
@click.option("--augment", is_flag=True, help="Fit to crops and flips, encoded anew in every epoch, as the papers do.")
@click.option("--standardize/--no-standardize", default=True, help="Bring every feature to mean 0 and deviation 1.")
@click.option("--l2-normalize", is_flag=True, help="Bring r to norm 1 first.")
@click.option("--epochs", type=click.IntRange(min=1), default=100, help="SGD's passes over the features.")
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Images in a step.")
@click.option("--lr", type=POSITIVE, multiple=True, default=LRS, help="Peak learning rate; several make a grid.")
@click.option("--lr-per-256", type=POSITIVE, help="Peak learning rate per 256 images of the batch, instead of --lr.")
@click.option("--weight-decay", type=NOT_NEGATIVE, multiple=True, default=DECAYS,
              help="On the classifier; several make a grid.")
@click.option("--optimizer", type=click.Choice(["lbfgs", "sgd", "lars", "rmsprop"]),
              show_default="lbfgs; sgd with --augment, --recipe or an option of SGD",
              help="lbfgs is logistic regression, fitted to its end, without --lr, --epochs and so on.")
@click.option("--momentum", type=BELOW_1, default=0.9, help="Momentum of the optimiser.")
@click.option("--nesterov/--no-nesterov", default=True, help="Nesterov's momentum (SGD only).")
@click.option("--schedule", type=click.Choice(["cosine", "step", "exponential", "constant"]), default="cosine",
              help="cosine to lr/1000; step: x0.2 at 60, 75, 90 %; exponential: x0.97 every half epoch.")
@click.option("--warmup", type=NOT_NEGATIVE, default=0.0, help="Epochs of linear warm-up from 0.")
@click.option("--label-smoothing", type=BELOW_1, default=0.0, help="Label smoothing of cross-entropy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0,
              help="Seed of the order, the subset, the held-out tenth and the views.")
@click.option("--baselines", "with_baselines", is_flag=True, help="Also probe raw pixels and an untrained encoder.")
@click.option("--figure", is_flag=True,
              help="Draw reliability, confusions and a 2-D projection as PNG (needs matplotlib).")
@click.option("--save-features", "save_features_to", type=click.Path(path_type=Path), metavar="FILE.npz",
              help="Also write features, z, labels, class names and paths of both sets.")
@click.option("--device", show_default="cuda if there is one, else cpu", help="torch device.")
@click.pass_context
def main(context, checkpoint, recipe, dataset, data, download, limit, subset, validate, workers, augment, l2_normalize,
         with_baselines, figure, save_features_to, device, **options):
    """Fit a linear classifier to the frozen features of CHECKPOINT, a ckpt.pt or its folder, and test it."""
    if not is_first():
        return  # of the ranks that torchrun starts only the first one works
    given = {k for k in context.params if context.get_parameter_source(k) is not ParameterSource.DEFAULT}
    fit, cells = complete_fit(recipe, options, given)
    if figure:
        pyplot()  # said now, not after the fit
    refuse_features_file(save_features_to, l2_normalize)
    device = choose_device(device)
    job = prepare(checkpoint, dataset, data, download, limit, subset, validate, recipe, l2_normalize, fit.seed, device)
    folder = job.checkpoint.parent
    before = fingerprint(job.frozen)
    features = extract_both(job, workers)
    start = time.perf_counter()
    if save_features_to:
        save_features(save_features_to, job.checkpoint, job.train, job.test, features.r_train, features.r_test)
    fitted = fit_classifier(job, features, cells, fit, augment, workers)
    if fingerprint(job.frozen) != before:
        raise RuntimeError("the encoder changed while it was probed")
    seconds = {"extract_seconds": round(features.seconds, 2), "fit_seconds": round(time.perf_counter() - start, 2)}
    classifier = Classifier(job.frozen, fitted.classifier, job.train.classes, fitted.temperature, job.dataset)
    write_classifier(folder / f"classifier{job.kind}.pt", classifier)
    more = {"lr": fitted.cell[0], "augment": augment, "l2_normalize": l2_normalize, "subset": subset, "limit": limit}
    result = {"checkpoint": str(job.checkpoint), "step": job.frozen.step, "dataset": job.dataset, "data": job.place}
    result |= {"tested_on": job.tested_on, "recipe": recipe} | measure(job, fitted, features, fit.seed) | seconds
    result |= {"fit": vars(fit) | more, "torch": torch.__version__}
    write_json(folder / f"probe{job.kind}.json", result)
    report(result, job.frozen.config["loss"])
    if figure:
        r, y = features.r_test, features.y_test
        table = confusion(fitted.classifier(r), y)
        say(draw_probe(folder / f"probe{job.kind}.png", result, table, r, y, job.test.classes))
    if with_baselines:
        result |= baselines(job.frozen, job.train, job.test, cells, fit)
        write_json(folder / f"probe{job.kind}.json", result)
    return result


if __name__ == "__main__":
    run_command(main, lower="--limit or --subset")
