"""Does SupCon reach cross-entropy at equal compute, and what does it take?

    python experiments/supcon_against_cross_entropy.py --scale cpu

Settings are searched one at a time, on a tenth of the training images that was left out. The two best ones of each loss
are trained again with all of them, for a quarter of the search's epochs, as many and four times as many, and tested
once. The best one of each is also trained for sixteen times as many, with one seed.
"""

from cells import COLOURS, Cell, Experiment, compared, main_of, spread, top1, training_words, values

from common.cli import run_command

SEARCHED = {  # of SupCon, one setting changed at a time
    "as it is": {},
    "1 view": {"views": 1},
    "3 views": {"views": 3},
    "lr x 0.5": {"lr": 0.5},
    "lr x 2": {"lr": 2},
    "lr x 4": {"lr": 4},
    "tau 0.05": {"words": "--tau 0.05"},
    "tau 0.2": {"words": "--tau 0.2"},
    "tau 0.5": {"words": "--tau 0.5"},
    "batch x 0.5, lr x 0.5": {"batch": 0.5, "lr": 0.5},
    "batch x 2, lr x 2": {"batch": 2, "lr": 2},
    "head 128": {"words": "--projection 128"},
    "no warm-up": {"words": "--warmup 0"},
    "queue 4096": {"words": "--queue 4096"},
    "one positive": {"words": "--denominator one_positive"},
}
RATES = 0.25, 0.5, 1, 2  # of cross-entropy, as multiples of SupCon's
BEST = {  # the two best of each loss in the search with seed 0, the best one first
    "SupCon, queue": ("supcon", {"words": "--queue 4096"}),
    "SupCon, 1 view": ("supcon", {"views": 1}),
    "cross-entropy, lr x 1": ("ce", {"views": 1}),
    "cross-entropy, lr x 2": ("ce", {"views": 1, "lr": 2}),
}
TIMES = 0.25, 1, 4  # epochs, in units of the search
LONGEST = 16  # for one seed of the best setting of each loss
ALL_TIMES = *TIMES, LONGEST


def cells(scale):
    search = {f"SupCon, {name}": training_words(scale, "supcon", **more) for name, more in SEARCHED.items()}
    search |= {f"cross-entropy, lr x {lr:g}": training_words(scale, "ce", views=1, lr=lr) for lr in RATES}
    found = {f"search: {name}": Cell(f"{words} --subset 0.9", "--validate", seeds=1) for name, words in search.items()}
    for times in TIMES:
        for name, (loss, more) in BEST.items():
            found[at(name, times)] = Cell(training_words(scale, loss, times=times, **more))
    for name in ("SupCon, queue", "cross-entropy, lr x 1"):
        loss, more = BEST[name]
        found[at(name, LONGEST)] = Cell(training_words(scale, loss, times=LONGEST, **more), seeds=1)
    return found


def at(name, times):
    return f"{name}, {times:g} x"


def searched(found):
    return {name.removeprefix("search: "): r for name, r in found.items() if name.startswith("search")}


def tested(found):
    names = [at(name, times) for name in BEST for times in ALL_TIMES]
    return {name: found[name] for name in names if name in found}


def table(found):
    rows = [[name, "test set", spread(r), spread(r, "knn"), len(r)] for name, r in tested(found).items()]
    best_first = sorted(searched(found).items(), key=lambda cell: -top1(cell[1]))
    rows += [[name, "left-out tenth", spread(r), spread(r, "knn"), len(r)] for name, r in best_first]
    return ["setting", "tested on", "probe top-1 %", "k-NN top-1 %", "seeds"], rows


def draw(plt, found):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", width_ratios=(3, 2))
    found_by_search = sorted(searched(found).items(), key=lambda cell: top1(cell[1]))
    for row, (name, results) in enumerate(found_by_search):
        left.plot(values(results, "top1"), [row] * len(results), "o", color=COLOURS["cross" in name])
    left.set_yticks(range(len(found_by_search)), [name for name, _ in found_by_search])
    left.set(xlabel="top-1 on the left-out tenth, %", title="one setting changed at a time")
    left.grid(axis="x", alpha=0.3)
    for k, name in enumerate(BEST):
        points = [(times, found[at(name, times)]) for times in ALL_TIMES if at(name, times) in found]
        right.plot([times for times, _ in points], [top1(r) for _, r in points], color=COLOURS[k], label=name)
        for times, results in points:
            right.plot([times] * len(results), values(results, "top1"), "o", color=COLOURS[k])
    right.set_xscale("log", base=2)
    right.set_xticks(ALL_TIMES, [f"{times:g} x" for times in ALL_TIMES])
    right.set(xlabel="views encoded, in units of the search", ylabel="top-1 on the test set, %", title="all images")
    right.legend(loc="lower right")
    return figure


def claims(found):
    paper = "ResNet-50, CIFAR-10: 96.0 against 95.0 %"
    rival = "cross-entropy, lr x 1"
    return [claim for times in ALL_TIMES for name in ("SupCon, queue", "SupCon, 1 view") for claim in
            compared(f"{name}, is above {rival} at {times:g} x the views", paper, found,
                     at(name, times), at(rival, times))]


EXPERIMENT = Experiment("supcon_against_cross_entropy", "SupCon against cross-entropy at equal compute", cells, table,
                        draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
