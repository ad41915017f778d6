"""What encoders are worth with few labels, to a probe and to fine-tuning, and what cross-entropy learns of as few.

    python experiments/few_labels.py --scale cpu

Each encoder is trained once. A part of the labels then fits a linear probe of it, or fine-tunes it by cross-entropy,
for a quarter of the views of its training. NT-Xent reads no label before, the other two read all. Beside them
cross-entropy trains a whole encoder on the part alone, for as many views as theirs.
"""

import functools
import json
import shlex

import torch
from cells import COLOURS, Cell, Experiment, command, compared, main_of, model_of, spread, train_run, trained, values
from cells import views_of_test_images

import linear_probe
from common.cli import run_command
from common.metrics import topk

PARTS = 0.01, 0.1
ENCODERS = {  # name: (loss, what goes with it)
    "SupCon": ("supcon", {}),
    "NT-Xent": ("simclr", {"lr": 0.3, "words": "--augment sim"}),
    "cross-entropy": ("ce", {"views": 1, "lr": 0.5}),
}


def cells(scale):
    measure = functools.partial(with_few, scale)
    found = {name: Cell(trained(scale, loss, **more), measure=measure) for name, (loss, more) in ENCODERS.items()}
    for part in PARTS:
        few = trained(scale, "ce", views=1, batch=0.25, lr=0.125, times=1 / part, words=f"--subset {part:g}")
        found[from_scratch(part)] = Cell(few, f"--subset {part:g}", seeds=2)
    return found


def from_scratch(part):
    return f"cross-entropy of {100 * part:g} %"


def with_few(scale, folder):
    """Top-1 of further probes of a run's encoder, and of fine-tuning it, each with a part of the labels."""
    options = json.loads((folder / "config.json").read_text())["options"]
    seed, found = options["seed"], {}
    for part in PARTS:
        words = f"{shlex.quote(str(folder))} {scale.probe} --subset {part:g} --seed {seed}"
        found[key_of(part)] = command(linear_probe, words)["top1"]
    for part in (*PARTS, 1):
        tuned = folder.with_name(f"{folder.name}-tuned-{part:g}")
        data, start = shlex.quote(options["data"]), shlex.quote(str(folder))
        words = f"--data {data} --seed {seed} --subset {part:g} --init {start}"
        few = trained(scale, "ce", views=1, batch=0.25, lr=0.05, times=0.25 / part, words=words)
        train_run(f"{scale.train} {few}", tuned)
        found[tuned_key(part)] = own_top1(tuned)
    return found


@torch.no_grad()
def own_top1(folder):
    """Top-1 on the test set of the classifier that a run has trained."""
    model, contents = model_of(folder)
    x, labels = views_of_test_images(contents, None, "none", 1)
    scores = torch.cat([model.eval()(part)[1] for part in x.split(500)])
    return topk(scores, labels, 1)


def key_of(part):
    """Of a result: where it holds the top-1 of a probe with this part of the labels."""
    return "top1" if part == 1 else f"top1 with {100 * part:g} %"


def tuned_key(part):
    return f"top1 tuned with {100 * part:g} %"


def curve(found, name):
    """[(part of the labels, key of the top-1, results)] of an encoder, fine-tuned or not, or of one from scratch."""
    encoder, tuned = name.removesuffix(TUNED), name.endswith(TUNED)
    if encoder in ENCODERS:
        key = tuned_key if tuned else key_of
        return [(part, key(part), found[encoder]) for part in (*PARTS, 1) if encoder in found]
    few = [(part, "top1", found[from_scratch(part)]) for part in PARTS if from_scratch(part) in found]
    return few + [(1, "top1", found["cross-entropy"])] if "cross-entropy" in found else few


TUNED = ", fine-tuned"
FROM_SCRATCH = "cross-entropy, trained on these labels alone"
CURVES = [*(encoder + how for encoder in ENCODERS for how in ("", TUNED)), FROM_SCRATCH]


def table(found):
    rows = []
    for name in CURVES:
        at = {part: spread(results, key) for part, key, results in curve(found, name)}
        rows.append([name, *(at.get(part, "") for part in (*PARTS, 1))])
    return ["encoder", *(f"top-1 % with {100 * part:g} % of the labels" for part in (*PARTS, 1))], rows


def draw(plt, found):
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for colour, name in zip(COLOURS, CURVES):
        points = curve(found, name)
        means = [sum(values(results, key)) / len(results) for _, key, results in points]
        style = ":" if name == FROM_SCRATCH else "--" if name.endswith(TUNED) else "-"
        axis.plot([100 * part for part, _, _ in points], means, style, color=colour, label=name)
        for part, key, results in points:
            axis.plot([100 * part] * len(results), values(results, key), "o", color=colour)
    axis.set(xscale="log", xlabel="labels, %", ylabel="top-1 on the test set, %, one dot a seed")
    axis.set_xticks([100 * part for part in (*PARTS, 1)], [f"{100 * part:g}" for part in (*PARTS, 1)])
    axis.grid(alpha=0.3)
    axis.legend(title="linear probe of, or")
    return figure


def claims(found):
    made = []
    for part in (*PARTS, 1):
        for name in ENCODERS:
            ways = {way: [{"top1": r[key(part)]} for r in found.get(name, ())]
                    for way, key in (("tuned", tuned_key), ("probed", key_of))}
            made += compared(f"with {100 * part:g} % of the labels {name} fine-tuned is above its linear probe",
                             "no number", {way: results for way, results in ways.items() if results}, "tuned", "probed")
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


TITLE = "Few labels: probes, fine-tuning, and cross-entropy from scratch"
EXPERIMENT = Experiment("few_labels", TITLE, cells, table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
