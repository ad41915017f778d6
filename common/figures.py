"""Every picture that the scripts draw. This file alone needs matplotlib.

    python -m common.figures runs/*          learning curves of run folders, as curves.png in the first one
"""

import json
from pathlib import Path

import click
import torch

from common.cli import Refused, run_command


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
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as e:
        raise Refused(f"{path} cannot be written ({e.strerror}): "
                      "free space, or copy the folder to a place that can") from e
    return path


def learning_curves(runs):
    """Draws loss, k-NN top-1 and learning rate over the epochs of run folders into curves.png in the first of them."""
    logs = {run: read_log(run) for run in runs}
    plt = pyplot()
    figure, axes = plt.subplots(3, 1, figsize=(7, 8), sharex=True)
    for run, log in logs.items():
        steps, epochs = [e for e in log if "loss" in e], [e for e in log if "mean_loss" in e]
        per_epoch = max((e["step"] / e["epoch"] for e in epochs), default=1)
        axes[0].plot([e["step"] / per_epoch for e in steps], [e["loss"] for e in steps], linewidth=0.8, label=run.name)
        known = [e for e in epochs if "knn_top1" in e]
        axes[1].plot([e["epoch"] for e in known], [e["knn_top1"] for e in known], marker=".")
        axes[2].plot([e["step"] / per_epoch for e in steps], [e["lr"] for e in steps])
    for axis, name in zip(axes, ("loss", "k-NN top-1, %", "learning rate")):
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set_xlabel("epoch")
    return save(figure, runs[0] / "curves.png")


def draw_probe(path, result, confusion, r, labels, classes):
    """Draws reliability, the confusion matrix (percent of the true class) and features r (n, D) on two main axes."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5.5))
    rows = [row for row in result["reliability"] if row[0]]
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    left.bar([row[1] for row in rows], [row[2] for row in rows], width=0.8 / len(result["reliability"]), alpha=0.7)
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1),
        title=f"expected calibration error {result['ece']:.3f}")

    share = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    middle.imshow(share.cpu(), cmap="Blues", vmin=0, vmax=100)
    middle.set(xlabel="predicted", ylabel="true", title=f"top-1 {result['top1']:.2f} %")
    if len(classes) <= 20:
        middle.set_xticks(range(len(classes)), classes, rotation=90)
        middle.set_yticks(range(len(classes)), classes)

    some = torch.nn.functional.normalize(r[:2000])
    _, _, axes = torch.pca_lowrank(some, q=min(2, *some.shape))
    points = torch.nn.functional.pad((some - some.mean(0)) @ axes, (0, 2 - axes.shape[1])).cpu()
    colours = "tab10" if len(classes) <= 10 else "viridis"
    right.scatter(points[:, 0], points[:, 1], c=labels[:2000].cpu(), cmap=colours, s=6)
    right.set(title="features on their two main axes")
    return save(figure, path)


def draw_robustness(path, result):
    """Draws the error of each corruption, and accuracy and calibration error by severity (Khosla et al., figure 6)."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5.5))
    for name, errors in result["errors"].items():
        left.plot(range(6), [100 * result["clean_error"], *(100 * e for e in errors)], marker=".", label=name)
    left.legend(fontsize=7)
    left.set(xlabel="severity, 0 clean", ylabel="error, %",
        title=f"mean error over {result['corruptions']} corruptions {result['mean_error']:.1f} %")
    for name, one in {"this classifier": result, "baseline": result.get("baseline")}.items():
        if one:
            accuracies = [100 * (1 - one["clean_error"]), *one["accuracy_by_severity"]]
            middle.plot(range(6), accuracies, marker="o", label=name)
            right.plot(range(6), [one["clean_ece"], *one["ece_by_severity"]], marker="o", label=name)
    middle.set(xlabel="severity, 0 clean", ylabel="top-1, %")
    right.set(xlabel="severity, 0 clean", ylabel="expected calibration error")
    right.legend()
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
    """Draw the learning curves of RUNS, folders of pretrain.py."""
    click.echo(learning_curves(runs))


if __name__ == "__main__":
    run_command(main)
