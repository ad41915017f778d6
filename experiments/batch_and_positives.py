"""Batch size, views encoded, positives of an anchor, contrasts (Khosla et al. 2020, table 5, figure 4).

    python experiments/batch_and_positives.py --scale cpu

Every cell is SupCon, one setting changed at a time. The learning rate grows with the batch. A cap of 0 leaves an anchor
the other view of its own image. A batch in parts has the gradients of the whole one, but for batch norm, which sees a
part at a time.
"""

from cells import COLOURS, Cell, Experiment, compared, main_of, spread, top1, training_words, values

from common.cli import run_command

BASE = "as it is"
CAPS = 0, 2, 4, 8
PANELS = {  # what is changed: the names of its cells, in the order of the picture
    "images in a batch": ["batch x 0.25", "batch x 0.5", BASE, "batch x 2", "batch x 4"],
    "views encoded": ["views x 0.5", BASE, "views x 2"],
    "positives kept": [*(f"cap {cap}" for cap in CAPS), BASE],
    "contrasts": [BASE, "a queue", "in parts"],
}


def cells(scale):
    found = {BASE: training_words(scale, "supcon")}
    found |= {f"batch x {k:g}": training_words(scale, "supcon", batch=k, lr=k) for k in (0.25, 0.5, 2, 4)}
    found |= {f"views x {k:g}": training_words(scale, "supcon", times=k) for k in (0.5, 2)}
    found |= {f"cap {cap}": training_words(scale, "supcon", words=f"--positives-cap {cap}") for cap in CAPS}
    found["a queue"] = training_words(scale, "supcon", words=f"--queue {32 * scale.batch}")
    found["in parts"] = training_words(scale, "supcon", words=f"--micro-batch {scale.batch // 4}")
    return {name: Cell(words, seeds=2) for name, words in found.items()}


def table(found):
    rows = [[changed, name, spread(found[name]), spread(found[name], "knn"), len(found[name])]
            for changed, names in PANELS.items() for name in names if name in found]
    return ["changed", "setting", "probe top-1 %", "k-NN top-1 %", "seeds"], rows


def draw(plt, found):
    widths = [len(names) for names in PANELS.values()]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.5), sharey=True, layout="constrained",
                                width_ratios=widths)
    for colour, axis, (changed, names) in zip(COLOURS, axes, PANELS.items()):
        known = [(place, found[name]) for place, name in enumerate(names) if name in found]
        axis.plot([place for place, _ in known], [top1(results) for _, results in known], color=colour)
        for place, results in known:
            axis.plot([place] * len(results), values(results, "top1"), "o", color=colour)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_title(changed)
        axis.margins(x=0.15)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("top-1 of a linear probe, %, one dot a seed")
    return figure


def claims(found):
    return [
        *compared("a larger batch is better", "figure 4: it grows, and 2048 images suffice", found, "batch x 4",
                  "batch x 0.25"),
        *compared("more views encoded are better", "figure 4: it grows, and 200 epochs suffice", found, "views x 2",
                  "views x 0.5"),
        *compared("all positives are above the own image's alone", "ImageNet: 78.5 against 69.3 % (SimCLR)", found,
                  BASE, "cap 0"),
        *compared("a queue is above none", "ImageNet: 79.1 against 78.7 %", found, "a queue", BASE),
    ]


EXPERIMENT = Experiment("batch_and_positives", "SupCon over batch size, views, positives and contrasts", cells, table,
                        draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
