"""The README's results table, from the logs of runs: python experiments/results_table.py results/*

Each run folder holds config.json and log.jsonl of pretrain.py and probe.json of linear_probe.py.
"""

import json
from pathlib import Path

import click


def row(run):
    """One line of the table from the folder of one run."""
    about = json.loads((run / "config.json").read_text())
    epochs = [entry for entry in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "mean_loss" in entry]
    probe = json.loads((run / "probe.json").read_text())
    o = about["options"]
    minutes = epochs[-1]["seconds"] / 60
    beside = [f"{probe[k]:.2f}" if k in probe else "" for k in ("raw_pixels_top1", "untrained_encoder_top1")]
    return [
        run.name, o["loss"], f"{o['tau']:g}" if o["tau"] else "", o["augment"], o["batch"], epochs[-1]["epoch"], f"{minutes:.1f}",
        f"{probe['top1']:.2f}", f"{epochs[-1].get('knn_top1', float('nan')):.1f}", *beside, o["seed"],
    ]


def environment(run):
    about = json.loads((run / "config.json").read_text())
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return f"{about['device']}, {about['threads']} threads, {versions}, commit {about['commit']}"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(runs):
    """Print RUNS as a Markdown table, and below it what they ran on."""
    head = ["run", "loss", "tau", "views by", "batch", "epochs", "training, min", "probe top-1 %", "k-NN %", "raw pixels %", "untrained %", "seed"]
    for cells in (head, ["---"] * len(head), *map(row, runs)):
        click.echo("| " + " | ".join(map(str, cells)) + " |")
    click.echo()
    for line in sorted({environment(run) for run in runs}):
        click.echo(line)


if __name__ == "__main__":
    main()
