"""What encoders are worth with few labels, to a probe and to fine-tuning, and what cross-entropy learns from these.

    python experiments/few_labels.py --scale cpu

Each encoder is trained once. A part of the labels then fits a linear probe of it, or fine-tunes it by cross-entropy,
for a quarter of the views of its training. NT-Xent reads no label before, the other two read all. Beside them
cross-entropy trains a whole encoder on the part alone, for as many views as theirs.
"""

import functools
import json
import shlex

from cells import COLOURS, Cell, Experiment, classifier_top1, command, compared, main_of, spread, top1, train_run
from cells import training_words, values

import linear_probe
from common.cli import run_command

PARTS = 0.01, 0.1
ALL = *PARTS, 1
TUNED, FROM_SCRATCH = ", fine-tuned", "cross-entropy, trained on these labels alone"
ENCODERS = {  # name: (loss, what goes with it)
    "SupCon": ("supcon", {}),
    "NT-Xent": ("simclr", {"lr": 0.3, "words": "--augment sim"}),
    "cross-entropy": ("ce", {"views": 1, "lr": 0.5}),
}


def cells(scale):
    measure = functools.partial(with_few, scale)
    found = {name: Cell(training_words(scale, loss, **more), measure=measure)
             for name, (loss, more) in ENCODERS.items()}
    for part in PARTS:
        few = training_words(scale, "ce", views=1, batch=0.25, lr=0.125, times=1 / part, words=f"--subset {part:g}")
        found[from_scratch(part)] = Cell(few, f"--subset {part:g}", seeds=2)
    return found


def from_scratch(part):
    return f"cross-entropy of {100 * part:g} %"


def with_few(scale, folder):
    """Top-1 of further probes of a run's encoder, and of fine-tuning it, each with a part of the labels."""
    options = json.loads((folder / "config.json").read_text())["options"]
    seed = options["seed"]
    found = {}
    for part in PARTS:
        words = f"{shlex.quote(str(folder))} {scale.probe} --subset {part:g} --seed {seed}"
        found[probed_key(part)] = command(linear_probe, words)["top1"]
    for part in ALL:
        tuned = folder.with_name(f"{folder.name}-tuned-{part:g}")
        data = shlex.quote(options["data"])
        start = shlex.quote(str(folder))
        words = f"--data {data} --seed {seed} --subset {part:g} --init {start}"
        few = training_words(scale, "ce", views=1, batch=0.25, lr=0.05, times=0.25 / part, words=words)
        train_run(f"{scale.train} {few}", tuned)
        found[tuned_key(part)] = classifier_top1(tuned)
    return found


def probed_key(part):
    return "top1" if part == 1 else f"top1 with {100 * part:g} %"


def tuned_key(part):
    return f"top1 tuned with {100 * part:g} %"


def curves(found):
    """{encoder: {part of the labels: [{"top1": of a seed}, ...]}}: probed, fine-tuned, and trained from scratch."""
    made = {}
    for name in filter(found.get, ENCODERS):
        for encoder, key in ((name, probed_key), (name + TUNED, tuned_key)):
            made[encoder] = {part: [{"top1": r[key(part)]} for r in found[name]] for part in ALL}
    cells_from_scratch = {part: from_scratch(part) for part in PARTS} | {1: "cross-entropy"}
    made[FROM_SCRATCH] = {part: found[cell] for part, cell in cells_from_scratch.items() if cell in found}
    return made


def table(found):
    rows = [[encoder, *(spread(curve[part]) if part in curve else "" for part in ALL)]
            for encoder, curve in curves(found).items()]
    return ["encoder", *(f"top-1 % with {100 * part:g} % of the labels" for part in ALL)], rows


def draw(plt, found):
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for colour, (encoder, curve) in zip(COLOURS, curves(found).items()):
        style = ":" if encoder == FROM_SCRATCH else "--" if encoder.endswith(TUNED) else "-"
        axis.plot([100 * part for part in curve], list(map(top1, curve.values())), style, color=colour, label=encoder)
        for part, results in curve.items():
            axis.plot([100 * part] * len(results), values(results, "top1"), "o", color=colour)
    axis.set(xscale="log", xlabel="labels, %", ylabel="top-1 on the test set, %, one dot a seed")
    axis.set_xticks([100 * part for part in ALL], [f"{100 * part:g}" for part in ALL])
    axis.grid(alpha=0.3)
    axis.legend(title="linear probe of, or", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def claims(found):
    made = []
    for part in ALL:
        at = {encoder: curve[part] for encoder, curve in curves(found).items() if part in curve}
        few = f"with {100 * part:g} % of the labels"
        pairs = [(f"{few} {name} fine-tuned is above its linear probe", name + TUNED, name) for name in ENCODERS]
        if part < 1:
            pairs += [(f"a probe of SupCon {few} is above one of cross-entropy", "SupCon", "cross-entropy")]
            pairs += [(f"{few} a probe of NT-Xent is above cross-entropy from scratch", "NT-Xent", FROM_SCRATCH)]
        made += [claim for words, a, b in pairs for claim in compared(words, "no number", at, a, b)]
    return made


EXPERIMENT = Experiment("few_labels", "Few labels: probes, fine-tuning, and cross-entropy from scratch", cells, table,
                        draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
