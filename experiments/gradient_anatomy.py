"""Which rows of a batch move an anchor: gradients against hardness (Khosla et al. 2020, section 7, equations 18 to 24).

    python experiments/gradient_anatomy.py --scale cpu

What a row contributes to an anchor's gradient has the norm sqrt(1 - s^2) / tau times |P - X| for a positive, and times
P for a negative. The picture shows the measured norms beside this formula. A positive at s = 1 is easy: the anchor is
there already. At s = 0 it is hard.
"""

import torch
import torch.nn.functional as F
from cells import COLOURS, Cell, Claim, Experiment, main_of, model_of, training_words, views_of_test_images

import losses
from common.cli import run_command

LOSSES = {"L_out": "out", "L_in": "in"}
ENCODERS = {"untrained": False, "trained": True}
IMAGES, ANCHORS = 64, 16  # in a batch of two views; of its anchors the first one is drawn


def cells(scale):
    return {"SupCon": Cell(training_words(scale, "supcon"), measure=measure, seeds=1)}


def measure(folder):
    """{"L_out, trained": what anatomy finds of this loss and encoder, ...}."""
    found = {}
    for encoder, is_trained in ENCODERS.items():
        model, contents = model_of(folder, is_trained)
        x, y = views_of_test_images(contents, IMAGES, "crop", 2)
        with torch.no_grad():
            z = model.train()(x)[0].double()  # batch norm sees the batch, as in training
        for name, variant in LOSSES.items():
            found[f"{name}, {encoder}"] = anatomy(z, y, contents["config"]["tau"], variant)
    return found


def anatomy(z, y, tau, variant):
    """The rows that the first anchor meets, each as (s, whether it is a positive, norm), and its sums; mean norms of
    the harder and the easier half of all anchors' positives; how far all norms part from the closed form."""
    anchors = [(*rows_of(z, y, i), measured(z, y, i, tau, variant)) for i in range(ANCHORS)]
    closed = torch.cat([closed_form(s, p, sums_of(s, p, tau), tau, variant) for s, p, _ in anchors])
    s, p, seen = map(torch.cat, zip(*anchors))
    harder = s <= s[p].median()
    drawn = torch.stack([column.double() for column in anchors[0]], 1).tolist()
    return {"tau": tau, "variant": variant, "anchor": drawn, "sums": sums_of(*anchors[0][:2], tau),
            "hard": seen[p & harder].mean().item(), "easy": seen[p & ~harder].mean().item(),
            "deviation": (closed - seen).abs().max().item()}


def rows_of(z, y, i):
    """(s, whether it is a positive) of the rows of A(i)."""
    others = torch.arange(len(z)) != i
    return (z @ z[i])[others], y[others] == y[i]


def sums_of(s, p, tau):
    """|P(i)|, and the logarithms of the sums of exp(s/tau) over A(i) and over P(i)."""
    return [p.sum().item(), (s / tau).logsumexp(0).item(), (s[p] / tau).logsumexp(0).item()]


def closed_form(s, p, sums, tau, variant):
    """The norms of what rows at s contribute, to an anchor with these sums. p: whether they are positives."""
    count, log_all, log_positives = sums
    P = (s / tau - log_all).exp()
    X = 1 / count if variant == "out" else (s / tau - log_positives).exp()
    return (1 - s.square()).clamp(min=0).sqrt() * (P - p * X).abs() / tau


def measured(z, y, i, tau, variant):
    """The norms of what the rows contribute, as the loss gives them. Each row meets a copy of the anchor of its own, in
    columns of its own; the gradient in the copy is then what this row contributes."""
    others = torch.arange(len(z)) != i
    copies = z[i].repeat(len(z) - 1, 1).requires_grad_()
    anchor = F.normalize(copies).reshape(1, -1)
    contrasts = torch.block_diag(*z[others, None])  # (N, N D)
    loss = losses.supcon_against(anchor, y[i : i + 1], contrasts, y[others], tau, variant=variant)
    return torch.autograd.grad(loss, copies)[0].norm(dim=1)


def parts(found):
    """[(name of loss and encoder, what `anatomy` found)] of the first seed."""
    return [(f"{name}, {encoder}", found["SupCon"][0][f"{name}, {encoder}"]) for name in LOSSES for encoder in ENCODERS]


def table(found):
    rows = [[name, f"{part['hard']:.3g}", f"{part['easy']:.3g}", f"{part['deviation']:.0e}"]
            for name, part in parts(found)]
    return ["loss, encoder", "norm of a positive of the harder half", "of the easier half", "largest deviation"], rows


def draw(plt, found):
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharex=True, layout="constrained")
    for axis, (name, part) in zip(axes.flat, parts(found)):
        for colour, is_positive, words in ((COLOURS[0], 1, "positive"), (COLOURS[5], 0, "negative")):
            s, seen = zip(*[(s, norm) for s, p, norm in part["anchor"] if p == is_positive])
            between = torch.linspace(min(s), max(s), 200)
            form = closed_form(between, is_positive, part["sums"], part["tau"], part["variant"])
            axis.plot(between.tolist(), form.tolist(), color=colour, linewidth=1, label=f"{words}s, closed form")
            axis.plot(s, seen, "o", color=colour, alpha=0.5, markersize=5, label=f"a {words}, measured")
        axis.set_title(f"{name} encoder")
        axis.grid(alpha=0.3)
    figure.supxlabel("similarity s of a row and the anchor")
    figure.supylabel("norm of the gradient that the row contributes")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def claims(found):
    words = "a hard positive moves the anchor more than an easy one"
    paper = "section 7: for both losses"
    return [Claim(f"{words}: {name} encoder", paper, f"{part['hard']:.2g} against {part['easy']:.2g}",
                  "held (one seed)" if part["hard"] > part["easy"] else "not held (one seed)")
            for name, part in parts(found) if not name.endswith("untrained")]


EXPERIMENT = Experiment("gradient_anatomy", "What each row of a batch contributes to an anchor's gradient", cells,
                        table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
