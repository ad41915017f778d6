"""SupCon and cross-entropy where a part of the labels is wrong.

    python experiments/label_noise.py --scale cpu

A wrong label is any other one with equal chance. The encoder alone learns from them: the probe, which judges it, reads
the true labels.
"""

from cells import COLOURS, Cell, Experiment, compared, main_of, spread, top1, training_words, values

from common.cli import run_command

PARTS = 0, 0.2, 0.4, 0.6, 0.8
LOSSES = {"SupCon": ("supcon", {}), "cross-entropy": ("ce", {"views": 1, "lr": 0.5})}


def cells(scale):
    noise = {part: f"--label-noise {part:g}" if part else "" for part in PARTS}
    return {name_of(name, part): Cell(training_words(scale, loss, words=noise[part], **more), seeds=2)
            for part in PARTS for name, (loss, more) in LOSSES.items()}


def name_of(loss, part):
    return f"{loss}, {100 * part:.0f} % wrong"


def known(found, loss):
    """[(part of wrong labels, results)] of a loss."""
    return [(part, found[name_of(loss, part)]) for part in PARTS if name_of(loss, part) in found]


def table(found):
    rows = [[loss, f"{100 * part:.0f}", spread(r), spread(r, "knn"), len(r)] for loss in LOSSES
            for part, r in known(found, loss)]
    return ["loss", "wrong labels %", "probe top-1 %", "k-NN top-1 %", "seeds"], rows


def draw(plt, found):
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for colour, loss in zip(COLOURS, LOSSES):
        cells_of_loss = known(found, loss)
        axis.plot([100 * part for part, _ in cells_of_loss], [top1(r) for _, r in cells_of_loss], color=colour,
                  label=loss)
        for part, results in cells_of_loss:
            axis.plot([100 * part] * len(results), values(results, "top1"), "o", color=colour)
    axis.set_xticks([100 * part for part in PARTS])
    axis.set(xlabel="wrong labels in the encoder's training, %", ylabel="top-1 of a linear probe, %, one dot a seed")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def claims(found):
    return [claim for part in (0.4, 0.8) for claim in
            compared(f"SupCon is above cross-entropy with {100 * part:.0f} % wrong labels", "no number", found,
                     *(name_of(loss, part) for loss in LOSSES))]


EXPERIMENT = Experiment("label_noise", "SupCon and cross-entropy with wrong labels", cells, table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
