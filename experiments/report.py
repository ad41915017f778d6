"""Tables and pictures of what the experiments found, and the table of the papers' claims.

    python experiments/report.py        reads results/experiments/*.jsonl, and writes *.md, *.png and claims.md there
"""

import importlib
from pathlib import Path

import click
from cells import SCALES, as_markdown, write_report

from common.cli import run_command

NAMES = ("losses_compared", "supcon_against_cross_entropy", "stability", "temperature", "batch_and_positives",
         "label_noise", "robustness_and_calibration", "few_labels", "gradient_anatomy")

WORDS = f"""`python experiments/report.py` writes this page. At `--scale cpu` all cells are

    {SCALES['cpu'].train}

and train for minutes: what holds there need not hold at the papers' scale. A claim is held, or not held, where the 95 %
interval of the difference over the seeds says so."""


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(exists=True, path_type=Path), default="results/experiments")
def main(folder):
    """Write the tables and pictures of the results in FOLDER (needs matplotlib)."""
    claims = []
    for name in NAMES:
        experiment = importlib.import_module(name).EXPERIMENT
        for scale in SCALES:
            if (folder / f"{name}-{scale}.jsonl").exists():
                claims += write_report(experiment, scale, folder)
    table = as_markdown(["claim", "paper", "here", "held?"], claims)
    (folder / "claims.md").write_text(f"# The papers' claims, rerun\n\n{WORDS}\n\n{table}\n")
    click.echo(table)


if __name__ == "__main__":
    run_command(main)
