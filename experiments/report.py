"""Tables and pictures of what the experiments found, and the table of the papers' claims.

    python experiments/report.py        reads results/experiments/*.jsonl, and writes *.md, *.png and claims.md there
"""

import importlib
from pathlib import Path

import click
from cells import SCALES, as_markdown, read, write_report

from common.cli import run_command

NAMES = ("losses_compared", "supcon_against_cross_entropy", "stability", "temperature", "batch_and_positives",
         "label_noise", "robustness_and_calibration", "few_labels", "gradient_anatomy")

WORDS = """`python experiments/report.py` writes this page. A claim is held, or not held, where the 95 % interval of the
difference over the seeds says so. At `--scale cpu` a training takes minutes: what holds there need not hold at the
papers' scale."""


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(exists=True, path_type=Path), default="results/experiments")
def main(folder):
    """Write the tables and pictures of the results in FOLDER (needs matplotlib)."""
    pages = [f"# The papers' claims, rerun\n\n{WORDS}"]
    for scale in SCALES:
        known = [name for name in NAMES if read(folder / f"{name}-{scale}.jsonl")]
        experiments = [importlib.import_module(name).EXPERIMENT for name in known]
        claims = [claim for experiment in experiments for claim in write_report(experiment, scale, folder)]
        if claims:
            table = as_markdown(["claim", "paper", "here", "held?"], claims)
            pages.append(f"## At `--scale {scale}`\n\nAll trainings begin with\n\n    {SCALES[scale].train}\n\n{table}")
    (folder / "claims.md").write_text("\n\n".join(pages) + "\n")
    click.echo("\n\n".join(pages[1:]))


if __name__ == "__main__":
    run_command(main)
