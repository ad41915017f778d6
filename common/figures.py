"""Pictures of runs, probes and corruptions. This file alone imports matplotlib.

    python -m common.figures runs/*          learning curves of run folders, as curves.png in the first one
"""

import itertools
import json
from pathlib import Path

import click
import torch

from common.cli import Refused, printable, run_command


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise Refused("pictures need the package matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path):
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except OSError as e:
        raise Refused(f"{path} cannot be written ({e.strerror}): "
                      "free space, or copy the folder to a place that can") from e
    return path


COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"  # Okabe and Ito's
STYLES = [(style, colour) for style in ("-", "--", ":") for colour in COLOURS]  # of lines that share an axis


def learning_curves(runs):
    """Draws loss, k-NN top-1 and learning rate over the epochs of run folders into curves.png in the first of them.

    Losses of different scale share an axis, on which 0 is the floor of a loss and 1 is its value when all features are
    alike. A loss without these is drawn as its share of the first value.
    """
    logs = {run: read_log(run) for run in runs}
    plt = pyplot()
    figure, axes = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    for (style, colour), (run, log) in zip(itertools.cycle(STYLES), logs.items()):
        steps, epochs = [e for e in log if "loss" in e], [e for e in log if "mean_loss" in e]
        per_epoch = max((e["step"] / e["epoch"] for e in epochs), default=1)
        floor, collapse = floor_and_collapse(run, steps)
        at = [e["step"] / per_epoch for e in steps]
        line = {"linestyle": style, "color": colour}
        axes[0].plot(at, [(e["loss"] - floor) / (collapse - floor) for e in steps], **line, linewidth=0.8)
        known = [e for e in epochs if "knn_top1" in e]
        axes[1].plot([e["epoch"] for e in known], [e["knn_top1"] for e in known], **line, marker=".")
        axes[2].plot(at, [e["lr"] for e in steps], **line, label=printable(run.name))
    axes[0].set_ylabel("loss: 0 at its floor, 1 at collapse")
    axes[1].set_ylabel("k-NN top-1, %")
    axes[2].set(ylabel="learning rate", xlabel="epoch")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    return save(figure, runs[0] / "curves.png")


def floor_and_collapse(run, steps):
    """The loss at its floor and at collapse, as config.json has them; or else 0 and the first one of the log."""
    try:
        about = json.loads((run / "config.json").read_text())
        if about["collapse"]:
            return about["floor"], about["collapse"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0.0, abs(steps[0]["loss"]) or 1.0


def draw_probe(path, result, confusion, r, labels, classes):
    """Draws reliability, features r (n, D) on two main axes, and the confusion matrix (percent of the true class)."""
    plt = pyplot()
    classes = list(map(printable, classes))
    figure, axes = plt.subplot_mosaic([["reliability", "features"], ["confusion", "confusion"]], figsize=(9, 11),
                                      height_ratios=[2, 3], layout="constrained")
    draw_reliability(axes["reliability"], result)
    draw_features(plt, axes["features"], r[:2000], labels[:2000].cpu().numpy(), classes)
    axis = axes["confusion"]
    share = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(share.cpu().numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label="% of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", title=f"top-1 {result['top1']:.2f} %")
    if len(classes) <= 20:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    return save(figure, path)


def draw_reliability(axis, result):
    """Draws the accuracy of each bin of confidences, and its gap to the mean confidence (Guo et al. 2017)."""
    table = result["reliability"]
    width = 100 / len(table)
    rows = [(width * (k + 0.5), 100 * confidence, 100 * accuracy)
            for k, (images, confidence, accuracy) in enumerate(table) if images]
    centres, confidences, accuracies = zip(*rows)
    gaps = [confidence - accuracy for confidence, accuracy in zip(confidences, accuracies)]
    axis.bar(centres, accuracies, 0.9 * width, color=COLOURS[0], label="accuracy")
    axis.bar(centres, gaps, 0.9 * width, accuracies, color="none", edgecolor=COLOURS[5], hatch="///",
             label="gap to the confidence")
    axis.plot([0, 100], [0, 100], color="0.5", linewidth=1)
    axis.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100),
             title=f"calibration error {100 * result['ece']:.1f} %")
    axis.legend(loc="upper left", fontsize=8)


def draw_features(plt, axis, r, labels, classes):
    """Draws features r (n, D) on the sphere, projected on their two main axes, one colour for each class."""
    some = torch.nn.functional.normalize(r)
    _, _, main = torch.pca_lowrank(some, q=min(2, *some.shape))
    points = torch.nn.functional.pad((some - some.mean(0)) @ main, (0, 2 - main.shape[1])).cpu().numpy()
    colours = COLOURS
    if len(classes) > len(COLOURS):
        colours = plt.colormaps["viridis"].resampled(len(classes)).colors
    for k, name in enumerate(classes):
        axis.scatter(*points[labels == k].T, color=colours[k], s=5, label=name)
    axis.set(xlabel="first main axis", ylabel="second main axis", title="features of test images")
    if len(classes) <= 10:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=3)


def draw_robustness(path, result):
    """Draws the error of each corruption, and accuracy and calibration error by severity (Khosla et al., figure 6)."""
    plt = pyplot()
    figure, axes = plt.subplot_mosaic([["errors", "errors"], ["accuracy", "ece"]], figsize=(9, 9), layout="constrained")
    for (style, colour), (name, errors) in zip(itertools.cycle(STYLES), result["errors"].items()):
        percents = [100 * error for error in (result["clean_error"], *errors)]
        axes["errors"].plot(range(6), percents, style, color=colour, marker=".", label=name.replace("_", " "))
    axes["errors"].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes["errors"].set(ylabel="error, %",
                       title=f"mean error over {result['corruptions']} corruptions {result['mean_error']:.1f} %")
    both = {"this classifier": result, "baseline": result.get("baseline")}
    for colour, (name, one) in zip(COLOURS, both.items()):
        if one:
            accuracies = [100 * (1 - one["clean_error"]), *one["accuracy_by_severity"]]
            eces = [100 * ece for ece in (one["clean_ece"], *one["ece_by_severity"])]
            axes["accuracy"].plot(range(6), accuracies, color=colour, marker="o", label=name)
            axes["ece"].plot(range(6), eces, color=colour, marker="o", label=name)
    axes["accuracy"].set(ylabel="top-1, %")
    axes["ece"].set(ylabel="calibration error, %")
    for axis in axes.values():
        axis.set_xlabel("severity (0: clean)")
        axis.grid(alpha=0.3)
    axes["accuracy"].legend()
    return save(figure, path)


def read_log(run):
    try:
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
        log = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as e:
        raise Refused(f"{run} has no readable log.jsonl: name the folder of a run") from e
    if not any("loss" in entry for entry in log):
        raise Refused(f"{run}/log.jsonl has no step yet: wait for the first one")
    return log


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(runs):
    """Draw the learning curves of RUNS, folders of pretrain.py. Others among them are passed over."""
    begun = [run for run in runs if (run / "log.jsonl").exists() or not run.exists()]
    click.echo(learning_curves(begun or runs))


if __name__ == "__main__":
    run_command(main)
