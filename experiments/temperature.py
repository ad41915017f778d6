"""What the temperature does to contrastive losses without labels (Wang & Liu 2021, table 1 and figures 2 to 5).

    python experiments/temperature.py --scale cpu

The ordinary loss weighs an anchor's negatives by exp(s/tau): a low temperature looks at the nearest alone, a high one
at all alike. The hard loss leaves the far ones out at every temperature. The simple loss weighs all negatives alike.
"""

import math
import statistics
from types import SimpleNamespace

import torch
from cells import COLOURS, Cell, Experiment, compared, main_of, model_of, spread, training_words, values
from cells import views_of_test_images

import losses
from common.cli import run_command
from common.config import negatives_of_an_image

TAUS = 0.07, 0.3, 0.7, 1
SCALE = "--loss-scale 14.3"  # 1/0.07, as of the others: then a positive pulls as strongly in the simple losses
KEEPING = 0.0819  # of the negatives, as in the paper


def cells(scale):
    kept = math.ceil(KEEPING * 2 * (scale.batch - 1))
    found = {f"NT-Xent, tau {tau:g}": cell(scale, "simclr", f"--tau {tau:g}") for tau in TAUS}
    found |= {f"hard, tau {tau:g}": cell(scale, "hard-contrastive", f"--tau {tau:g} --nearest {kept}") for tau in TAUS}
    found["simple"] = cell(scale, "simple-contrastive", SCALE)
    found["hard simple"] = cell(scale, "simple-contrastive", f"{SCALE} --nearest {kept}")
    return found


def cell(scale, loss, words):
    return Cell(training_words(scale, loss, lr=0.3, words=f"--augment sim {words}"), measure=measure, seeds=2)


@torch.no_grad()
def measure(folder):
    """Uniformity and tolerance of the projected test images, and the entropy of the weights of their negatives."""
    model, contents = model_of(folder)
    x, y = views_of_test_images(contents, 1000, "none", 1)
    z = model.eval()(x)[0]
    options = SimpleNamespace(**contents["config"])
    part = (options.nearest or math.inf) / negatives_of_an_image(options)
    return {
        "minus_uniformity": -losses.uniformity(z).item(),
        "z_tolerance": losses.tolerance(z, y).item(),
        "entropy": entropy_of_weights(z, options.tau, part),
    }


def entropy_of_weights(z, tau, part=1):
    """The mean entropy of r_i(s_ij) = exp(s_ij/tau) / sum over i's negatives (B eq. 5), as a part of log |N(i)|. N(i)
    is all other rows of z, one for each image; the nearest `part` of them have weights, equal ones without a tau."""
    negatives = len(z) - 1
    s = (z @ z.T).fill_diagonal_(-torch.inf).topk(max(1, round(min(part, 1) * negatives)), 1).values
    log_r = (s / (tau or math.inf)).log_softmax(1)
    return -(log_r.exp() * log_r).sum(1).mean().item() / math.log(negatives)


COLUMNS = {  # key of a result: (what it is, digits)
    "top1": ("probe top-1 %", 1),
    "minus_uniformity": ("minus uniformity of z", 2),
    "z_tolerance": ("tolerance of z", 3),
    "entropy": ("entropy of the weights / log n", 3),
}


def table(found):
    rows = [[name, *(spread(r, key, digits) for key, (_, digits) in COLUMNS.items()), len(r)]
            for name, r in found.items()]
    return ["loss", *(words for words, _ in COLUMNS.values()), "seeds"], rows


def draw(plt, found):
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, layout="constrained")
    for axis, (key, (words, _)) in zip(axes.flat, COLUMNS.items()):
        for colour, loss in zip(COLOURS, ("NT-Xent", "hard")):
            known = [(tau, found[f"{loss}, tau {tau:g}"]) for tau in TAUS if f"{loss}, tau {tau:g}" in found]
            axis.plot([tau for tau, _ in known], [statistics.mean(values(r, key)) for _, r in known], color=colour,
                      label=loss)
            for tau, results in known:
                axis.plot([tau] * len(results), values(results, key), ".", color=colour)
        for colour, loss in zip(COLOURS[2:], ("simple", "hard simple")):
            if loss in found:
                axis.axhline(statistics.mean(values(found[loss], key)), color=colour, linestyle="--", label=loss)
        axis.set(xscale="log", title=words)
        axis.set_xticks(TAUS, [f"{tau:g}" for tau in TAUS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("temperature tau")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def claims(found):
    less_uniform = {"key": "minus_uniformity", "unit": "", "digits": 2}
    return [
        *compared("tau 0.3 is above 0.07", "CIFAR-10: 83.3 against 79.8 %", found, "NT-Xent, tau 0.3",
                  "NT-Xent, tau 0.07"),
        *compared("tau 0.3 is above 1", "CIFAR-10: 83.3 against 82.2 %", found, "NT-Xent, tau 0.3", "NT-Xent, tau 1"),
        *compared("a low tau is more uniform than a high one", "CIFAR-10: 3.86 against 2.96", found,
                  "NT-Xent, tau 0.07", "NT-Xent, tau 1", **less_uniform),
        *compared("at tau 1 the hard loss is above NT-Xent", "CIFAR-10: 84.2 against 82.2 %", found, "hard, tau 1",
                  "NT-Xent, tau 1"),
        *compared("NT-Xent is above the simple loss", "CIFAR-10: 83.3 against 74.8 %", found, "NT-Xent, tau 0.3",
                  "simple"),
        *compared("the hard simple loss is above the simple one", "CIFAR-10: 84.8 against 74.8 %", found,
                  "hard simple", "simple"),
    ]


EXPERIMENT = Experiment("temperature", "The temperature of contrastive losses without labels", cells, table, draw,
                        claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
