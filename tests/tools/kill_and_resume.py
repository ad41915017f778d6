"""Kills runs with SIGKILL and resumes them until they end: python tests/tools/kill_and_resume.py --kills 20

Every run must end with the bits and the log of one that was never stopped. Half of the kills fall at a random moment,
from the start of the process on; the others wait until a checkpoint is being written.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from children import start  # noqa: E402
from common.run_folder import load_checkpoint  # noqa: E402
from runs import SMALL, log_of, same_bits, state_of  # noqa: E402

WAYS = {  # (ranks, options)
    "one process": (None, []),
    "gradient caching, a queue, workers": (
        None,
        ["--micro-batch", "10", "--queue", "150", "--augment", "auto", "--workers", "1"],
    ),
    "two ranks": (2, []),
    "two ranks, gradient caching, a queue": (2, ["--micro-batch", "5", "--queue", "150"]),
}
PATIENCE = 600  # seconds for a run that is left in peace, on a machine with other work


def wait_until(happened, launch):
    while launch.running() and not happened():
        time.sleep(0.001)


def stop_somewhere(launch, run, chance):
    """Kills the run at a moment drawn from `chance`; False where it ended before."""
    log, size = run / "log.jsonl", (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
    if chance.random() < 0.15:  # before anything is written
        time.sleep(chance.uniform(0, 0.3))
    else:
        wait_until(lambda: log.exists() and log.stat().st_size > size, launch)
        time.sleep(chance.uniform(0, 0.5))
    if chance.random() < 0.5:
        wait_until(lambda: any(run.glob("ckpt-*.tmp")), launch)
    ended = not launch.running()
    launch.kill()
    return not ended


def kill_and_resume(way, folder, kills, seed=0, epochs=30):
    """Raises AssertionError unless a broken run ends as an unbroken one. Returns the steps that the kills left."""
    (ranks, options), chance, left = WAYS[way], random.Random(seed), []
    first = [*SMALL, "--epochs", epochs, "--save-minutes", "0", *options, "--run-dir"]  # a checkpoint after every step
    whole, run = folder / "whole", folder / "broken"
    assert start("pretrain", *first, whole, ranks=ranks).wait(PATIENCE).status == 0
    broken = 0
    while len(left) < kills or not any(left):  # not every kill may come before the first step
        go_on = ["--resume", run] if (run / "log.jsonl").exists() else [*first, run]
        launch = start("pretrain", *go_on, ranks=ranks)
        if stop_somewhere(launch, run, chance):
            left.append(load_checkpoint(run / "ckpt.pt")["step"] if (run / "ckpt.pt").exists() else 0)
        else:  # it came to its end: another one, then
            assert launch.status == 0 and same_bits(state_of(run), state_of(whole)) and log_of(run) == log_of(whole)
            broken += 1
            run = folder / f"broken-{broken}"
    if (run / "log.jsonl").exists():
        assert start("pretrain", "--resume", run, ranks=ranks).wait(PATIENCE).status == 0
        assert same_bits(state_of(run), state_of(whole)) and log_of(run) == log_of(whole)
    return left


@click.command()
@click.option("--kills", default=20, help="For each way of running.")
@click.option("--seed", default=0)
def main(kills, seed):
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            left = kill_and_resume(way, Path(folder), kills, seed)
        click.echo(f"{way}: killed {len(left)} times, at steps {left}; the bits and the log of an unbroken run")


if __name__ == "__main__":
    main()
