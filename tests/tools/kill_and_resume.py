"""Kills runs with SIGKILL and resumes them until they end: python tests/tools/kill_and_resume.py --kills 20

Every run must end with the bits and the log of one that was never stopped. Half of the kills fall at a random moment, from
the start of the process on; the others wait until a checkpoint is being written.
"""
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from run_folder import load_checkpoint  # noqa: E402
from runs import SMALL, TORCHRUN, log_of, same_bits, start, state_of  # noqa: E402

OFTEN = ["--epochs", "30", "--save-minutes", "0"]  # a checkpoint after every step
WAYS = {
    "one process": (["pretrain.py"], []),
    "gradient caching, a queue, workers": (["pretrain.py"], ["--micro-batch", "10", "--queue", "150", "--augment", "auto", "--workers", "1"]),
    "two ranks": ([*TORCHRUN, "pretrain.py"], []),
    "two ranks, gradient caching, a queue": ([*TORCHRUN, "pretrain.py"], ["--micro-batch", "5", "--queue", "150"]),
}


def kill(process, run):
    """SIGKILL to every process of the run: torchrun's ranks have sessions of their own."""
    for other in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (other / "cmdline").read_bytes() and int(other.name) != os.getpid():
                os.kill(int(other.name), signal.SIGKILL)
        except OSError:  # it has ended meanwhile
            pass
    process.wait()


def wait_until(happened, process):
    while process.poll() is None and not happened():
        time.sleep(0.001)


def stop_somewhere(process, run, chance):
    """Kills the process at a moment drawn from `chance`; False where it ended before."""
    log, size = run / "log.jsonl", (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
    if chance.random() < 0.15:  # before anything is written
        time.sleep(chance.uniform(0, 4))
    else:
        wait_until(lambda: log.exists() and log.stat().st_size > size, process)
        time.sleep(chance.uniform(0, 0.5))
    if chance.random() < 0.5:
        wait_until((run / "ckpt.tmp").exists, process)
    ended = process.poll() is not None
    kill(process, run)
    return not ended


def kill_and_resume(way, folder, kills, seed=0):
    """Raises AssertionError where a broken run does not end as an unbroken one; returns the steps that the kills left."""
    (command, options), chance, left = WAYS[way], random.Random(seed), []
    whole, run = folder / "whole", folder / "broken"
    assert start(*command, *SMALL, *OFTEN, *options, "--run-dir", whole).wait() == 0
    broken = 0
    while len(left) < kills:
        go_on = ["--resume", run] if (run / "log.jsonl").exists() else [*SMALL, *OFTEN, *options, "--run-dir", run]
        process = start(*command, *go_on)
        if stop_somewhere(process, run, chance):
            left.append(load_checkpoint(run / "ckpt.pt")["step"] if (run / "ckpt.pt").exists() else 0)
        else:  # it came to its end: another one, then
            assert process.returncode == 0 and same_bits(state_of(run), state_of(whole)) and log_of(run) == log_of(whole)
            broken += 1
            run = folder / f"broken-{broken}"
    if (run / "log.jsonl").exists():
        assert start(*command, "--resume", run).wait() == 0
        assert same_bits(state_of(run), state_of(whole)) and log_of(run) == log_of(whole)
    assert any(left)  # not every kill came before the first step
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
