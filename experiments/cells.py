"""What the experiments share: cells that run once, and the tables and pictures of what they found.

An experiment is a table of cells. A cell is a training and a probe, written as the words of their command lines, and it
runs once for each seed. Its result becomes a line of results/experiments/NAME-SCALE.jsonl. A cell that has its line is
not run again, and a training that was stopped goes on from its checkpoint in runs/experiments: so an experiment can be
ended and started again at any time. A training's folder is named after its words, so experiments with the same training
share it. Two processes may share the work, each with --seed of its own.
"""

import contextlib
import functools
import json
import os
import shlex
import statistics
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import patch

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.data
import linear_probe
import pretrain
from common.cli import NotFinite, Refused, say
from common.figures import COLOURS, pyplot, save
from common.metrics import topk
from common.models import build_model, load_state
from common.run_folder import is_finished, load_checkpoint, newest_checkpoint
from common.views import draw_view, make_view

# ---------------------------------------------------------------- how large


class Scale(NamedTuple):
    """What all cells of an experiment share."""

    train: str  # words of pretrain.py
    batch: int
    lr: float  # of SupCon at this batch
    epochs: float  # of two views of each image: every cell encodes as many views
    probe: str  # words of linear_probe.py
    seeds: int


FEW_CELLS = "--lr 0.1 --lr 1 --weight-decay 0 --epochs 50"
CROPS = "--augment crop --nesterov --weight-decay 5e-4"
SCALES = {
    "smoke": Scale(f"--dataset shapes --size 12 --limit 80 --device cpu {CROPS}", 20, 0.1, 1,
                   "--subset 0.02 --lr 1 --weight-decay 0 --epochs 1 --device cpu", 1),
    "cpu": Scale(f"--dataset folder --data data/cifar10-jpeg --size 16 --arch small {CROPS}", 128, 0.2, 4,
                 FEW_CELLS, 3),
    "gpu": Scale(f"--dataset cifar10 --arch resnet18 {CROPS}", 512, 0.5, 12, FEW_CELLS, 3),
    "paper": Scale("--dataset cifar10 --arch resnet50", 1024, 0.5, 1000, "", 3),
}


def training_words(scale, loss, *, views=2, lr=1, batch=1, times=1, words=""):
    """The words of a training. lr, batch and times multiply the scale's rate, batch and number of views."""
    epochs = max(1, round(2 * times * scale.epochs / views))
    size = round(batch * scale.batch)
    rate = lr * scale.lr
    return f"--loss {loss} --views {views} --epochs {epochs} --batch {size} --lr {rate:g} {words}".strip()


# ---------------------------------------------------------------- one cell


class Cell(NamedTuple):
    train: str  # words of pretrain.py: they follow the scale's and override them
    probe: str = ""
    measure: Callable = None  # of the run's folder: a dict of further results
    seeds: int = None  # instead of the scale's


def run_cell(name, cell, scale, seed, folder):
    """Trains and probes, and returns the result, a dict. folder: the run's."""
    train, probe = words_of(cell, scale, seed)
    diverged = train_run(train, folder)
    if not (diverged or is_trained(folder)):
        raise Refused(f"stopped in the cell {name}, seed {seed}: the same command goes on")
    about = json.loads((folder / "config.json").read_text())
    options = about["options"]
    probed = command(linear_probe, f"{shlex.quote(str(folder))} {probe}")
    result = {"cell": name, "seed": seed, "top1": probed["top1"], "knn": probed["knn_top1"], "ece": probed["ece"]}
    result |= {key: probed[key] for key in ("alignment", "uniformity", "tolerance", "train_top1", "held_out_top1")}
    result |= {"loss": options["loss"], "epochs": options["epochs"], "diverged": diverged}
    result |= cell.measure(folder) if cell.measure else {}
    return result | {"train": train, "probe": probe, "place": place(about)}


def words_of(cell, scale, seed):
    """The words of the training and of the probe."""
    of_probe = f"{scale.probe} {cell.probe}".strip()
    return f"{scale.train} {cell.train} --seed {seed}", f"{of_probe} --seed {seed}"


def train_run(words, folder):
    """Trains the run in the folder, or goes on with it. Returns whether it diverged: then its last good checkpoint is
    what is probed."""
    begun = any((folder / checkpoint).exists() for checkpoint in ("ckpt.pt", "ckpt-previous.pt"))
    try:
        if not begun:
            command(pretrain, f"{words} --run-dir {shlex.quote(str(folder))}")
        elif not is_trained(folder):
            command(pretrain, f"--resume {shlex.quote(str(folder))}")
    except NotFinite as e:
        say(e.message)
        return True
    return False


def is_trained(folder):
    """Whether the run in the folder has taken its last step."""
    contents, _ = newest_checkpoint(folder)
    return is_finished(contents, contents["config"]["epochs"])


def command(stage, words):
    """Runs a stage as its command line would, and returns what its main function returns."""
    say(f"$ python {stage.__name__}.py {words}")
    return stage.main(shlex.split(words), standalone_mode=False)


@contextlib.contextmanager
def images_kept():
    """Inside, a stage that asks for the same images again gets those that it had: all cells see the same ones."""
    kept = functools.cache(common.data.load_data)
    with contextlib.ExitStack() as stack:
        for module in ("common.data", "linear_probe", "robustness"):
            stack.enter_context(patch(f"{module}.load_data", kept))
        yield


def place(about):
    """In words, from a config.json: what the numbers were made with."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['threads']} thread(s), {versions}, commit {about['commit']}"


# ---------------------------------------------------------------- what a cell measures beside, of its run's folder


def model_of(folder, trained=True):
    """(the model of a run as it was trained, or else as it began; the contents of its checkpoint)."""
    contents = load_checkpoint(folder / "ckpt.pt")
    model = build_model(SimpleNamespace(**contents["config"]), None)
    for name, part in model.named_children() if trained else ():
        load_state(part, contents[name], folder)
    return model, contents


def views_of_test_images(contents, count, augment, views):
    """(x, labels) of the first test images, view by view, as the run of the checkpoint would see them."""
    config = contents["config"]
    data = common.data.load_data(config["dataset"], config["data"], train=False, size=config["size"], limit=count,
                                 table=config.get("labels"))
    data = common.data.with_classes_of(SimpleNamespace(classes=contents["classes"]), data, config["data"])
    size = config["size"]
    crop_min = config["crop_min"]
    mean = contents["mean"]
    std = contents["std"]
    drawn = [draw_view(len(data.labels), size, augment, (config["seed"], 12, v), crop_min=crop_min)
             for v in range(views)]
    return torch.cat([make_view(data.images, view, mean, std) for view in drawn]), data.labels.repeat(views)


@torch.no_grad()
def classifier_top1(folder):
    """Top-1 on the test set of the classifier that a run has trained beside its encoder."""
    model, contents = model_of(folder)
    x, labels = views_of_test_images(contents, None, "none", 1)
    return topk(torch.cat([model.eval()(part)[1] for part in x.split(500)]), labels, 1)


# ---------------------------------------------------------------- all cells


class Experiment(NamedTuple):
    """One figure or table of a paper, measured here."""

    name: str
    title: str
    cells: Callable  # of a Scale: {name of a cell: Cell}, the most important first
    table: Callable  # of the results: (head, rows)
    draw: Callable  # of pyplot and the results: a figure
    claims: Callable  # of the results: a list of Claims


class Claim(NamedTuple):
    claim: str
    paper: str
    here: str
    held: str


@images_kept()
def run_all(experiment, scale_name, seeds, only, results, runs, more):
    """Runs the cells that have no result yet, seed by seed, and appends each one's result to the file."""
    scale = SCALES[scale_name]
    scale = scale._replace(train=f"{scale.train} {more}".strip())
    cells = experiment.cells(scale)
    wanted = [(seed, name) for seed in seeds or range(scale.seeds) for name, cell in cells.items()
              if only in name and seed < (cell.seeds or scale.seeds)]
    if not wanted:
        raise Refused(f"no cell of {experiment.name} has '{only}' in its name and a seed that --seed names: "
                      f"its cells are {', '.join(cells)}, with up to {scale.seeds} seeds from 0 on")
    path = results / f"{experiment.name}-{scale_name}.jsonl"
    results.mkdir(parents=True, exist_ok=True)
    drop_cut_off_line(path)
    refuse_other_trainings(path, cells, scale)
    apart = f"-{zlib.crc32(more.encode()):08x}" if more else ""  # further words make other trainings
    for seed, name in wanted:
        if (name, seed) not in {(result["cell"], result["seed"]) for result in read(path)}:
            folder = runs / scale_name / f"{as_file_name(cells[name].train)}{apart}-s{seed}"
            result = run_cell(name, cells[name], scale, seed, folder)
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")


def refuse_other_trainings(path, cells, scale):
    """Raises Refused where a result in the file is of a training with other words than the cell of its name has now."""
    for result in read(path):
        cell = cells.get(result["cell"])
        seed = result["seed"]
        if cell and result["train"].split() != words_of(cell, scale, seed)[0].split():
            raise Refused(f"{path} holds the cell {result['cell']}, seed {seed}, of another training "
                          f"({result['train']}): name another --results, or take its line away")


def as_file_name(words):
    return "".join(c if c.isalnum() or c in "-." else "-" for c in words.replace("--", ""))


def drop_cut_off_line(path):
    """A line that was not written to its end goes, so that the next one begins where it began."""
    if path.exists():
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole + newline))


def read(path):
    """The results of a file, a list of dicts. A last line that was cut off is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def by_cell(results):
    """{name of a cell: its results, one for each seed}, in the order of the file."""
    found = {}
    for result in results:
        found.setdefault(result["cell"], []).append(result)
    return found


# ---------------------------------------------------------------- tables and pictures


def values(results, key):
    return [result[key] for result in results]


def spread(results, key="top1", digits=1):
    """Mean and sample standard deviation over the seeds, as words."""
    numbers = values(results, key)
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def top1(results):
    """The mean over the seeds, in percent."""
    return statistics.mean(values(results, "top1"))


STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # standard errors of a 95 % interval, by degrees of freedom


def standard_errors(freedom):
    """Half the width of a 95 % interval in standard errors, Student's t, interpolated; above 4 degrees of freedom as
    for 4."""
    freedom = min(max(freedom, 1.0), 4.0)
    k = min(int(freedom), 3)
    share = (1 / k - 1 / freedom) / (1 / k - 1 / (k + 1))
    return STUDENT[k] ** (1 - share) * STUDENT[k + 1] ** share


def is_above(a, b, key="top1"):
    """Whether the mean of a is above that of b: "held", "not held", or "undecided" where the 95 % interval of the
    difference (Welch's t-test) holds 0, or a or b has one seed. a, b: results by seed."""
    if min(len(a), len(b)) < 2:
        return "undecided"
    first, second = values(a, key), values(b, key)
    difference = statistics.mean(first) - statistics.mean(second)
    errors = [statistics.variance(numbers) / len(numbers) for numbers in (first, second)]
    half = 0.0
    if sum(errors) > 0:
        freedom = sum(errors) ** 2 / sum(e**2 / (len(numbers) - 1) for e, numbers in zip(errors, (first, second)))
        half = standard_errors(freedom) * sum(errors) ** 0.5
    return "held" if difference > half else "not held" if difference < -half else "undecided"


def compared(claim, paper, found, a, b, key="top1", unit=" %", digits=1):
    """The claim that the cell named a is above the one named b, or no claim where one of them has no result."""
    if not (a in found and b in found):
        return []
    here = f"{spread(found[a], key, digits)} against {spread(found[b], key, digits)}{unit}"
    return [Claim(claim, paper, here, is_above(found[a], found[b], key))]


def bars(plt, found, label="top-1 of a linear probe, %"):
    """A figure of one bar for each cell: the mean over the seeds, and every seed as a dot."""
    figure, axis = plt.subplots(figsize=(8, 1 + 0.4 * len(found)), layout="constrained")
    for row, (name, results) in enumerate(found.items()):
        axis.barh(row, top1(results), color=COLOURS[0], alpha=0.6, height=0.7)
        axis.plot(values(results, "top1"), [row] * len(results), ".", color="black")
        axis.annotate(f"{top1(results):.1f}", (max(values(results, "top1")), row), (6, 0), textcoords="offset points",
                      va="center")
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, None))
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def as_markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def write_report(experiment, scale_name, folder):
    """Writes the table and the picture of the results in `folder` beside them, and returns the claims."""
    scale = SCALES[scale_name]
    path = folder / f"{experiment.name}-{scale_name}.jsonl"
    results = read(path)
    found = by_cell(results)
    seeds = ", ".join(map(str, sorted(set(values(results, "seed")))))
    places = sorted(set(values(results, "place")))
    claims = experiment.claims(found)
    text = [
        f"# {experiment.title}",
        f"`python experiments/{experiment.name}.py --scale {scale_name}`; seeds {seeds}, mean ± standard deviation.",
        f"All trainings: `{scale.train}`, and {scale.epochs} epochs of two views unless the setting says otherwise.",
        f"All probes: `python linear_probe.py RUN {scale.probe}`.",
        as_markdown(*experiment.table(found)),
        as_markdown(["claim", "paper", "here", "held?"], claims) if claims else "No claim can be judged yet.",
        f"![{experiment.title}]({path.stem}.png)",
        "\n".join(f"- {line}" for line in places),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    save(experiment.draw(pyplot(), found), path.with_suffix(".png"))
    return claims


FOLDER = click.Path(file_okay=False, path_type=Path)


def main_of(experiment):
    """The command line of an experiment."""

    @click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
    @click.option("--scale", type=click.Choice(list(SCALES)), default="cpu", help="How large.")
    @click.option("--seed", type=int, multiple=True, help="Run only these seeds.", show_default="the scale's")
    @click.option("--only", default="", help="Run only the cells whose name contains this.")
    @click.option("--train", "more", default="", help="Words for every training, such as '--data FOLDER'.")
    @click.option("--results", type=FOLDER, default="results/experiments", help="Folder of the results.")
    @click.option("--runs", type=FOLDER, default="runs/experiments", help="Folder of the trainings.")
    def main(scale, seed, only, more, results, runs):
        run_all(experiment, scale, seed, only, results, runs, more)

    main.help = f"{experiment.title}. `python experiments/report.py` draws what it found."
    return main
