"""The README's results table, from the logs of runs: python experiments/results_table.py results/*

Each run folder holds config.json and log.jsonl of pretrain.py and probe.json of linear_probe.py; a run that has not been
probed yet is left out. "views, M" is the training budget in views encoded: images x views x epochs, in millions. A second table,
of the runs that robustness.py has tested, says what else their representations are worth.
"""

import json
from pathlib import Path

import click

HEAD = ["run", "loss", "tau", "augment", "batch", "queue", "epochs", "views, M", "training, min", "probe top-1 %", "k-NN of a part, %", "seed"]


def row(run):
    """One line of the table from the folder of one run."""
    options = json.loads((run / "config.json").read_text())["options"]
    last = [entry for entry in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "mean_loss" in entry][-1]
    views = last["step"] * options["batch"] * options["views"] / 1e6
    return [
        run.name, options["loss"], f"{options['tau']:g}" if options["tau"] else "", options["augment"], options["batch"], options.get("queue") or "",
        last["epoch"], f"{views:.2f}", f"{last['seconds'] / 60:.1f}", f"{probe_of(run)['top1']:.2f}", f"{last['knn_top1']:.1f}", options["seed"],
    ]


WORTH = ["run", "top-1 %", "k-NN top-1 %", "ECE", "ECE after temperature", "mean error over 10 corruptions %", "alignment", "uniformity", "tolerance"]


def worth(run):
    """One line of the second table."""
    probe, corrupted = probe_of(run), json.loads((run / "robustness.json").read_text())
    return [
        run.name, f"{probe['top1']:.2f}", f"{probe['knn_top1']:.2f}", f"{probe['ece']:.3f}", f"{probe['ece_after_temperature']:.3f}",
        f"{corrupted['mean_error']:.2f}", *(f"{probe[name]:.2f}" for name in ("alignment", "uniformity", "tolerance")),
    ]


def probe_of(run):
    return json.loads((run / "probe.json").read_text())


def print_table(head, rows):
    for cells in (head, ["---"] * len(head), *rows):
        click.echo("| " + " | ".join(map(str, cells)) + " |")
    click.echo()


def notes(run):
    """What the run ran on, and what the same probe gives without training."""
    about, probe = json.loads((run / "config.json").read_text()), probe_of(run)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"{run.name}: {about['device']}, {about['threads']} thread(s), {versions}, commit {about['commit']}"
    if "raw_pixels_top1" in probe:
        yield f"{run.name}: the same probe on raw pixels {probe['raw_pixels_top1']:.2f} %, on the untrained encoder {probe['untrained_encoder_top1']:.2f} %"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(runs):
    """Print RUNS as a Markdown table, and below it what they ran on."""
    runs = sorted(run for run in runs if (run / "probe.json").exists())
    print_table(HEAD, map(row, runs))
    print_table(WORTH, (worth(run) for run in runs if (run / "robustness.json").exists()))  # of corruptions made, not a published set
    for run in runs:
        for line in notes(run):
            click.echo(f"- {line}")


if __name__ == "__main__":
    main()
