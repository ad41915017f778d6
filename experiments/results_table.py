"""The tables and the picture of the results, from the folders of runs.

    python experiments/results_table.py runs/*                                              of a sweep: what differs
    python experiments/results_table.py runs/* --csv > sweep.csv
    python experiments/results_table.py --long results/*                                    for results/README.md
    python experiments/results_table.py --short results/cifar* results/fashion* --picture docs/results.png

A run's folder holds config.json and log.jsonl of pretrain.py, probe.json of linear_probe.py if it was probed and
robustness.json of robustness.py if it was tested. --long, --short and --picture leave out what was not probed.
"views, M" is what a run was allowed: the views that it encoded, which are images x views x epochs, in millions.
"""

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# ---------------------------------------------------------------- what a folder holds


class Run(NamedTuple):
    name: str
    about: dict  # config.json: versions, machine and commit
    options: dict  # of pretrain.py
    last: dict  # the log's entry of the last epoch; empty before the end of the first
    probe: dict | None  # probe.json, if there is one
    corrupted: dict | None  # robustness.json, if there is one

    @property
    def views(self):
        """Views encoded in training, in millions."""
        return self.last["step"] * self.options["batch"] * self.options["views"] / 1e6

    @property
    def data_set(self):
        name = Path(self.options["data"]).name if self.options["dataset"] == "folder" else self.options["dataset"]
        return {"cifar10-jpeg": "CIFAR-10 (JPEG copies)", "fashionmnist": "Fashion-MNIST"}.get(name, name)


def read(folder):
    about = read_json(folder / "config.json")
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
    epochs = [line for line in lines if '"mean_loss"' in line and line.endswith("}")]  # a run may be writing a line now
    last = json.loads(epochs[-1]) if epochs else {}
    probe, corrupted = read_json(folder / "probe.json"), read_json(folder / "robustness.json")
    return Run(folder.name, about, about["options"], last, probe, corrupted)


def read_json(path):
    """What a JSON file holds; None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------- tables


def print_table(head, rows):
    for cells in (head, ["---"] * len(head), *rows):
        click.echo("| " + " | ".join(map(str, cells)) + " |")


NO_CHOICE = {"run", "streams", "num_classes", "noisy_labels"}  # entries of the options that nobody varies


def compared(runs):
    """(head, rows) of all runs, whether probed or not, with the options that differ among them."""
    names = list(dict.fromkeys(name for run in runs for name in run.options if name not in NO_CHOICE))
    varied = [name for name in names if len({str(run.options.get(name)) for run in runs}) > 1]
    head = ["run", *varied, "epoch", "last loss", "k-NN %", "probe top-1 %"]
    return head, [[run.name, *(cell(run.options.get(name)) for name in varied), *worth(run)] for run in runs]


def worth(run):
    """How far a run has come and what it reached, as far as that is known."""
    last = run.last
    probe = run.probe or {}
    return [
        f"{last.get('epoch', 0)} of {run.options['epochs']}",
        cell(last.get("mean_loss")),
        cell(last.get("knn_top1")),
        cell(probe.get("top1")),
    ]


def cell(value):
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


TRAINED = [
    "run",
    "loss",
    "tau",
    "augment",
    "batch",
    "queue",
    "epochs",
    "views, M",
    "training, min",
    "probe top-1 %",
    "k-NN on a part of the test set %",
    "seed",
]


def trained(run):
    """A row of the table of how the runs were trained: a list of cells."""
    o = run.options
    last = run.last
    tau = f"{o['tau']:g}" if o["tau"] else ""
    return [
        run.name,
        o["loss"],
        tau,
        o["augment"],
        o["batch"],
        o.get("queue") or "",
        last["epoch"],
        f"{run.views:.2f}",
        f"{last['seconds'] / 60:.1f}",
        f"{run.probe['top1']:.2f}",
        f"{last['knn_top1']:.1f}" if "knn_top1" in last else "",
        o["seed"],
    ]


MEASURED = [
    "run",
    "probe top-1 %",
    "k-NN top-1 %",
    "ECE",
    "ECE after temperature",
    "mean error over 10 corruptions %",
    "alignment",
    "uniformity",
    "tolerance",
]


def measured(run):
    """A row of the table of what else the representations are worth."""
    p = run.probe
    return [
        run.name,
        f"{p['top1']:.2f}",
        f"{p['knn_top1']:.2f}",
        f"{p['ece']:.3f}",
        f"{p['ece_after_temperature']:.3f}",
        f"{run.corrupted['mean_error']:.2f}",
        *(f"{p[name]:.2f}" for name in ("alignment", "uniformity", "tolerance")),
    ]


SHORT = ["data set", "loss", "views, M", "probe top-1 %", "k-NN top-1 %"]


def short(data_set, label, run):
    return [data_set, label, f"{run.views:.2f}", f"{run.probe['top1']:.2f}", f"{run.probe['knn_top1']:.2f}"]


def notes(run):
    """What the run ran on, and what the same probe gives without training."""
    about, probe = run.about, run.probe
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"{run.name}: {about['device']}, {about['threads']} thread(s), {versions}, commit {about['commit']}"
    if "raw_pixels_top1" in probe:
        yield (
            f"{run.name}: the same probe reaches {probe['raw_pixels_top1']:.2f} % on raw pixels and "
            f"{probe['untrained_encoder_top1']:.2f} % on the untrained encoder"
        )


# ---------------------------------------------------------------- the picture


def by_data_set(runs):
    """{data set: [(label, run)]}, the best run of each first. A label names the loss, what else sets the run apart, and
    the run itself where that is not enough."""
    groups = {}
    for run in runs:
        groups.setdefault(run.data_set, []).append(run)
    for data_set, group in groups.items():
        usual = statistics.mode(run.options["batch"] for run in group)
        group.sort(key=lambda run: -run.probe["top1"])
        labels = [label(run.options, usual) for run in group]
        groups[data_set] = [(f"{name}, {run.name}" if labels.count(name) > 1 else name, run)
                            for name, run in zip(labels, group)]
    return groups


def label(options, usual_batch):
    queue = f", queue {options['queue']}" if options.get("queue") else ""
    batch = f", batch {options['batch']}" if options["batch"] != usual_batch else ""
    return options["loss"] + queue + batch


COLOURS = {"ce": "#999999", "supcon": "#0072B2", "supcon-in": "#56B4E9", "simclr": "#E69F00"}  # Okabe and Ito's


def draw(groups, path):
    """Draws the probes' top-1 as bars, a panel for each data set."""
    from common.figures import pyplot, save  # here, as the tables need neither torch nor matplotlib

    plt = pyplot()
    sizes = [len(group) for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8, 1.2 + 0.4 * sum(sizes)),
        sharex=True,
        squeeze=False,
        layout="constrained",
        height_ratios=sizes,
    )
    for axis, (data_set, group) in zip(axes[:, 0], groups.items()):
        values = [run.probe["top1"] for _, run in group]
        colours = [COLOURS.get(run.options["loss"], "#CC79A7") for _, run in group]
        bars = axis.barh([name for name, _ in group], values, color=colours, height=0.7)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.invert_yaxis()  # the best run on top
        axis.set_title(data_set, loc="left", fontweight="bold")
        axis.set(xlim=(0, 100), ylabel="loss")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlabel("top-1 of a linear probe on the test set, %")
    figure.align_ylabels()
    return save(figure, path)


# ---------------------------------------------------------------- the command line


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--csv", "as_csv", is_flag=True, help="Print the same table as comma-separated values.")
@click.option("--long", "is_long", is_flag=True, help="Print how probed runs were trained and all that was measured.")
@click.option("--short", "is_short", is_flag=True, help="Print five columns of probed runs.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw the probes' top-1 into this PNG file (needs matplotlib).",
)
def main(runs, as_csv, is_long, is_short, picture):
    """Print the folders RUNS as a Markdown table: the options that differ, and what each run reached."""
    runs = [read(folder) for folder in sorted(runs) if (folder / "config.json").exists()]
    if not runs:
        raise click.UsageError("none of RUNS holds a config.json: name folders that pretrain.py has written")
    if not (is_long or is_short or picture):
        head, rows = compared(runs)
        return csv.writer(sys.stdout).writerows([head, *rows]) if as_csv else print_table(head, rows)
    runs = [run for run in runs if run.probe and run.last]
    if not runs:
        raise click.UsageError("none of RUNS holds a probe.json: run linear_probe.py on one first")
    show_probed(runs, is_short, picture)


def show_probed(runs, is_short, picture):
    groups = by_data_set(runs)
    if picture:
        draw(groups, picture)
    if is_short:
        print_table(SHORT, [short(data_set, name, run) for data_set, group in groups.items() for name, run in group])
    else:
        print_table(TRAINED, map(trained, runs))
        click.echo()
        print_table(MEASURED, [measured(run) for run in runs if run.corrupted])
        click.echo()
        for line in (line for run in runs for line in notes(run)):
            click.echo(f"- {line}")


if __name__ == "__main__":
    main()
