"""Which rows of a batch move an anchor: gradients against hardness (Khosla et al. 2020, section 7, equations 18 to 24).

    python experiments/gradient_anatomy.py --scale cpu

What a row contributes to an anchor's gradient has the norm sqrt(1 - s^2) / tau times |P - X| for a positive, and times
P for a negative. It is measured beside. A positive at s = 1 is easy: the anchor is there already. At s = 0 it is hard.
"""

import torch
import torch.nn.functional as F
from cells import COLOURS, Cell, Claim, Experiment, main_of, model_of, trained, values, views_of_test_images

import losses
from common.cli import run_command

LOSSES = {"L_out": "out", "L_in": "in"}
ENCODERS = {"untrained": False, "trained": True}
IMAGES = 64  # in a batch of two views
ANCHORS = 16  # that are compared with the closed form; the first one is drawn


def cells(scale):
    return {"SupCon": Cell(trained(scale, "supcon"), measure=measure, seeds=1)}


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
    """The rows that the first anchor meets, each as (s, whether it is a positive, closed form, measured); the mean
    gradients of the harder and the easier half of all anchors' positives; and how far measured and closed form part."""
    rows = [torch.stack([*closed_form(z, y, i, tau, variant), measured(z, y, i, tau, variant)], 1)
            for i in range(ANCHORS)]
    s, positive, closed, seen = torch.cat(rows).T
    harder = s <= s[positive == 1].median()
    hard, easy = (seen[(positive == 1) & half].mean().item() for half in (harder, ~harder))
    return {"anchor": [[round(v, 5) for v in row] for row in rows[0].tolist()], "hard": hard, "easy": easy,
            "deviation": (closed - seen).abs().max().item()}


def others(z, y, i):
    """(z, whether it is a positive) of the rows of A(i)."""
    kept = torch.arange(len(z)) != i
    return z[kept], y[kept] == y[i]


def closed_form(z, y, i, tau, variant):
    """(s, whether it is a positive, the norm of what it contributes) of each row of A(i)."""
    rows, p = others(z, y, i)
    s = rows @ z[i]
    P = (s / tau).softmax(0)
    X = p / p.sum() if variant == "out" else (s / tau).masked_fill(~p, -torch.inf).softmax(0)
    return s, p.to(s), (1 - s.square()).clamp(min=0).sqrt() * (P - X).abs() / tau


def measured(z, y, i, tau, variant):
    """The norms of what the rows contribute, as the loss gives them. Each row meets a copy of the anchor of its own, in
    columns of its own; the gradient in the copy is then what this row contributes."""
    rows, p = others(z, y, i)
    copies = z[i].repeat(len(rows), 1).requires_grad_()
    contrasts = torch.block_diag(*rows[:, None])  # (N, N D)
    label = torch.ones(1, dtype=torch.long)
    loss = losses.supcon_against(F.normalize(copies).reshape(1, -1), label, contrasts, p.long(), tau, variant=variant)
    return torch.autograd.grad(loss, copies)[0].norm(dim=1)


def parts(found):
    """[(name of loss and encoder, what `anatomy` found)] of the first seed."""
    return [(f"{name}, {encoder}", found["SupCon"][0][f"{name}, {encoder}"]) for name in LOSSES for encoder in ENCODERS]


def table(found):
    rows = [[name, f"{part['hard']:.3g}", f"{part['easy']:.3g}", f"{part['hard'] / max(part['easy'], 1e-12):.2f}",
             f"{part['deviation']:.0e}"] for name, part in parts(found)]
    head = ["loss, encoder", "gradient of a positive of the harder half", "of the easier half", "ratio",
            "largest deviation from the closed form"]
    return head, rows


def draw(plt, found):
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharex=True, layout="constrained")
    for axis, (name, part) in zip(axes.flat, parts(found)):
        for colour, is_positive, words in ((COLOURS[0], 1, "positive"), (COLOURS[5], 0, "negative")):
            rows = sorted(row for row in part["anchor"] if row[1] == is_positive)
            s, closed, seen = (values(rows, column) for column in (0, 2, 3))
            axis.plot(s, closed, color=colour, linewidth=1, label=f"{words}s, closed form")
            axis.plot(s, seen, "o", color=colour, alpha=0.5, markersize=5, label=f"a {words}, measured")
        axis.set_title(f"{name} encoder")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("similarity s of the row and the anchor")
    for axis in axes[:, 0]:
        axis.set_ylabel("norm of the gradient that it contributes")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def claims(found):
    words, paper = "a hard positive moves the anchor more than an easy one", "section 7: for both losses"
    return [Claim(f"{words}: {name} encoder", paper, f"{part['hard']:.2g} against {part['easy']:.2g}",
                  "held" if part["hard"] > part["easy"] else "not held")
            for name, part in parts(found) if not name.endswith("untrained")]


EXPERIMENT = Experiment("gradient_anatomy", "What each row of a batch contributes to an anchor's gradient", cells,
                        table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
