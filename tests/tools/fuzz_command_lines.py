"""Random command lines for the three scripts: python tests/tools/fuzz_command_lines.py --minutes 5

Whatever the options, a script ends well (0) or says in one line what to change (2), never with a traceback.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import click
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

import common.cli
import linear_probe  # noqa: E402
import pretrain  # noqa: E402
import robustness  # noqa: E402
from runs import SMALL, folder_of  # noqa: E402

ODD = st.sampled_from(["", "x", "-", "--", "0x10", "ä", "1e400", "nan", "inf", "-inf", "None", "1,5", " 3"]) | st.text(
    "abz019.-_ /", max_size=6
)
WHOLE = st.sampled_from(["1", "2", "3", "5", "8", "20"]) | st.sampled_from(["0", "-1", "2.0", "99999999999999999999"])
REAL = st.sampled_from(["0.001", "0.01", "0.1", "0.5", "1"]) | st.sampled_from(
    ["0", "1e-300", "1e-8", "3", "1e8", "1e300", "-0.1", "nan", "inf"]
)
SHORT = {  # what a legal value may cost must stay small: seconds, megabytes
    "freeze_epochs": st.sampled_from(["0", "1", "2", "-1", "x"]),
    "epochs": st.sampled_from(["1", "2", "2", "1", "0", "x", "1.5"]),
    "size": st.sampled_from(["8", "16", "17", "8", "7", "x"]),
    "limit": st.sampled_from(["2", "20", "60", "40", "1", "0", "x"]),
    "views": st.sampled_from(["1", "2", "3", "0", "x"]),
    "batch": st.sampled_from(["2", "3", "8", "20", "4", "1", "99999999999999999999", "x"]),
    "projection": st.sampled_from(["8", "r-8", "16-8", "r-r-8", "0", "8-r", "-8", "x"]),
    "workers": st.sampled_from(["0", "1", "-1", "x"]),
    "arch": st.sampled_from(["small", "resnet18", "squeezenet1_0", "vgg"]),
    "dataset": st.sampled_from(["shapes", "folder", "fashionmnist", "svhn", "mnist"]),
    "device": st.sampled_from(["cpu", "cuda", "meta", "cpu:0", "cpu:7", "toaster", ""]),
    "compile": st.nothing(),  # minutes of compiling
}


def values(option, here):
    if option.name in ("data", "run", "resume", "corrupted", "baseline", "init", "labels"):
        return (
            st.sampled_from(
                [
                    str(here / name)
                    for name in ("data", "run", "other", "text", "nowhere", "run/ckpt.pt", "run/classifier.pt")
                ]
            )
            | ODD
        )
    if option.name == "save_features_to":
        return st.sampled_from([str(here / name) for name in ("r.npz", "r.csv", "nowhere/r.npz", "data")]) | ODD
    if option.name in SHORT:
        return SHORT[option.name]
    if isinstance(option.type, click.Choice):
        plain = st.sampled_from([*option.type.choices])
    else:
        plain = WHOLE if "int" in option.type.name else REAL
    return st.integers(0, 9).flatmap(lambda k: ODD if k == 0 else plain)


def command_line(command, here):
    """Some of a command's options, each with some value; now and then twice, or without a value."""
    options = [p for p in command.params if isinstance(p, click.Option) and SHORT.get(p.name) != st.nothing()]

    def given_as(option):
        names = st.sampled_from([*option.opts, *option.secondary_opts])
        return st.tuples(names) if option.is_flag else st.tuples(names, values(option, here))

    some = st.lists(st.sampled_from(options).flatmap(given_as), max_size=4)
    return some.map(lambda parts: [word for part in parts for word in part])


def run(script, words, here):
    """Runs a script with these words in the folder `here`. Raises AssertionError unless it ends well or refuses."""
    sys.argv = [script.__name__ + ".py", *words]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.cli.run_command(script.main)
        except SystemExit as end:
            status = end.code
    assert status in (0, 2), (status, words)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error")]
    assert len(lines) == (status == 2) and "Traceback" not in err.getvalue(), (words, lines)
    return status


def fuzz(here, examples):
    """Runs so many command lines in the folder `here`; returns how many ended with 0."""
    folder_of(here / "data", ["train", "test"], ["a", "b"], count=6)
    (here / "text").write_text("text")
    assert run(pretrain, [*SMALL, "--epochs", "1", "--run-dir", "run"], here) == 0
    assert run(linear_probe, ["run", "--limit", "60", "--epochs", "1"], here) == 0

    ends = []

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def any_command_line(data):
        script = data.draw(st.sampled_from([pretrain, pretrain, linear_probe, linear_probe, robustness]))
        if script is robustness:
            classifier = data.draw(st.sampled_from(["run/classifier.pt", "run", "run/ckpt.pt", "nowhere"]))
            ends.append(
                run(robustness, [classifier, "--limit", "5", *data.draw(command_line(robustness.main, here))], here)
            )
        elif script is pretrain:
            words = [
                *SMALL,
                "--epochs",
                "1",
                "--limit",
                "60",
                "--batch",
                "20",
                *data.draw(command_line(pretrain.main, here)),
            ]
            if "--resume" in words:  # which refuses most other options
                words = words[len(SMALL) + 6 :]
            ends.append(run(pretrain, words, here))
        else:
            checkpoint = data.draw(st.sampled_from(["run/ckpt.pt", "run", "text", "nowhere"]))
            ends.append(
                run(
                    linear_probe,
                    [checkpoint, "--limit", "60", "--epochs", "1", *data.draw(command_line(linear_probe.main, here))],
                    here,
                )
            )

    any_command_line()
    return ends.count(0)


@click.command()
@click.option("--minutes", default=5.0)
def main(minutes):
    end, rounds, well = time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as here:
            well += fuzz(Path(here), examples=50)
        rounds += 1
        click.echo(f"{50 * rounds} command lines: {well} ended with 0, the others with 2")


if __name__ == "__main__":
    main()
