"""What encoders are worth to a probe that sees few labels, and what cross-entropy learns of as few.

    python experiments/few_labels.py --scale cpu

Each encoder is trained once and probed with a part of the labels. NT-Xent reads no label, the other two read all.
Beside them cross-entropy trains a whole encoder on the part alone, for as many views.
"""

import functools
import shlex

from cells import COLOURS, Cell, Experiment, command, compared, main_of, spread, trained, values

import linear_probe
from common.cli import run_command

PARTS = 0.01, 0.1
ENCODERS = {  # name: (loss, what goes with it)
    "SupCon": ("supcon", {}),
    "NT-Xent": ("simclr", {"lr": 0.3, "words": "--augment sim"}),
    "cross-entropy": ("ce", {"views": 1, "lr": 0.5}),
}


def cells(scale):
    measure = functools.partial(probed_with_few, scale.probe)
    found = {name: Cell(trained(scale, loss, **more), measure=measure, seeds=2)
             for name, (loss, more) in ENCODERS.items()}
    for part in PARTS:
        few = trained(scale, "ce", views=1, batch=0.25, lr=0.125, times=1 / part, words=f"--subset {part:g}")
        found[from_scratch(part)] = Cell(few, f"--subset {part:g}", seeds=2)
    return found


def from_scratch(part):
    return f"cross-entropy of {100 * part:g} %"


def probed_with_few(words, folder):
    """Top-1 of further probes of a run's encoder, each with a part of the labels."""
    return {key_of(part): command(linear_probe, f"{shlex.quote(str(folder))} {words} --subset {part:g}")["top1"]
            for part in PARTS}


def key_of(part):
    """Of a result: where it holds the top-1 with this part of the labels."""
    return "top1" if part == 1 else f"top1 with {100 * part:g} %"


def curve(found, name):
    """[(part of the labels, key of the top-1, results)] of an encoder, or of cross-entropy from scratch."""
    if name in ENCODERS:
        return [(part, key_of(part), found[name]) for part in (*PARTS, 1) if name in found]
    few = [(part, "top1", found[from_scratch(part)]) for part in PARTS if from_scratch(part) in found]
    return few + [(1, "top1", found["cross-entropy"])] if "cross-entropy" in found else few


FROM_SCRATCH = "cross-entropy, trained on these labels alone"


def table(found):
    rows = []
    for name in (*ENCODERS, FROM_SCRATCH):
        at = {part: spread(results, key) for part, key, results in curve(found, name)}
        rows.append([name, *(at.get(part, "") for part in (*PARTS, 1))])
    return ["encoder", *(f"top-1 % with {100 * part:g} % of the labels" for part in (*PARTS, 1))], rows


def draw(plt, found):
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for colour, name in zip(COLOURS, (*ENCODERS, FROM_SCRATCH)):
        points = curve(found, name)
        means = [sum(values(results, key)) / len(results) for _, key, results in points]
        axis.plot([100 * part for part, _, _ in points], means, "--" if name == FROM_SCRATCH else "-", color=colour,
                  label=name)
        for part, key, results in points:
            axis.plot([100 * part] * len(results), values(results, key), "o", color=colour)
    axis.set(xscale="log", xlabel="labels, %", ylabel="top-1 on the test set, %, one dot a seed")
    axis.set_xticks([100 * part for part in (*PARTS, 1)], [f"{100 * part:g}" for part in (*PARTS, 1)])
    axis.grid(alpha=0.3)
    axis.legend(title="linear probe of")
    return figure


def claims(found):
    made = []
    for part in PARTS:
        with_few = {name: [{"top1": r[key]} for r in results] for name in ENCODERS
                    for at, key, results in curve(found, name) if at == part}
        words = f"{100 * part:g} % of the labels"
        made += compared(f"a probe of SupCon with {words} is above one of cross-entropy", "no number", with_few,
                         "SupCon", "cross-entropy")
        both = found | {"NT-Xent, few": with_few["NT-Xent"]} if "NT-Xent" in with_few else found
        made += compared(f"with {words} a probe of NT-Xent is above cross-entropy from scratch", "no number", both,
                         "NT-Xent, few", from_scratch(part))
    return made


EXPERIMENT = Experiment("few_labels", "Few labels: probes, and cross-entropy from scratch", cells, table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
