"""Accuracy over augmentations, optimisers and learning rates (Khosla et al. 2020, figure 4, tables 8 and 9).

    python experiments/stability.py --scale cpu

One setting is changed at a time, and every training encodes half the scale's views. A spread of accuracies at a high
mean and one at a low mean are hard to compare: a point weighs more where few errors are left. So the spread is also
divided by the mean error. If a training diverges, its last good checkpoint is probed.
"""

import statistics

from cells import COLOURS, Cell, Claim, Experiment, is_above, main_of, spread, top1, training_words, values

from common.cli import run_command

BASE = "as it is"
LARS, RMSPROP = "--optimizer lars --no-nesterov", "--optimizer rmsprop --no-nesterov"
GROUPS = {  # of settings: {name: what goes with it}; BASE is crops, SGD and the scale's rate
    "augmentation": {"colours and blur": {"words": "--augment sim"}, "no augmentation": {"words": "--augment none"}},
    "optimiser": {"LARS": {"lr": 10, "words": LARS}, "RMSProp": {"lr": 0.03, "words": RMSPROP}},
    "learning rate": {f"rate x {lr:g}": {"lr": lr} for lr in (0.1, 0.3, 3, 10)},
}
LOSSES = {"SupCon": ("supcon", 2, 1), "cross-entropy": ("ce", 1, 0.5)}  # name: (loss, views, multiple of the rate)


def cells(scale):
    settings = {BASE: {}} | {name: more for group in GROUPS.values() for name, more in group.items()}
    return {f"{name}, {setting}": Cell(with_setting(scale, *loss, **more), seeds=2)
            for setting, more in settings.items() for name, loss in LOSSES.items()}


def with_setting(scale, loss, views, rate, lr=1, words=""):
    return training_words(scale, loss, views=views, lr=rate * lr, times=0.5, words=words)


def group_of(found, loss, group):
    """{setting: results} of the base and of the group's settings."""
    names = {setting: f"{loss}, {setting}" for setting in (BASE, *GROUPS[group])}
    return {setting: found[name] for setting, name in names.items() if name in found}


def deviation(numbers):
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def relative_deviation(accuracies):
    """The standard deviation of accuracies in percent, divided by the mean error."""
    return deviation(accuracies) / max(100 - statistics.mean(accuracies), 1e-9)


def table(found):
    rows = []
    for group in GROUPS:
        for loss in LOSSES:
            means = [top1(r) for r in group_of(found, loss, group).values()]
            if means:
                rows.append([group, f"{loss}, {len(means)} settings", f"{statistics.mean(means):.1f}",
                             f"{deviation(means):.1f}", f"{relative_deviation(means):.2f}", ""])
    rows += [["", with_note(name, r), spread(r), "", "", len(r)] for name, r in found.items()]
    head = ["changed", "of", "probe top-1 %", "deviation over the settings", "the same / mean error", "seeds"]
    return head, rows


def with_note(name, results):
    diverged = sum(values(results, "diverged"))
    return f"{name} (diverged: {diverged})" if diverged else name


def draw(plt, found):
    figure, axes = plt.subplots(1, len(GROUPS), figsize=(10, 5), sharey=True, layout="constrained")
    for axis, group in zip(axes, GROUPS):
        for place, loss in enumerate(LOSSES):
            settings = group_of(found, loss, group)
            means = [top1(r) for r in settings.values()]
            axis.boxplot([means], positions=[place], widths=0.6, showfliers=False, patch_artist=True,
                         boxprops={"facecolor": COLOURS[place], "alpha": 0.4}, medianprops={"color": "black"})
            axis.plot([place] * len(means), means, "o", color=COLOURS[place])
            worst = min(settings, key=lambda setting: top1(settings[setting]), default="")
            axis.annotate(worst, (place, min(means, default=0)), (0, -14), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(LOSSES)), list(LOSSES))
        axis.set(title=group, xlim=(-0.6, len(LOSSES) - 0.4))
        axis.margins(y=0.1)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("top-1 of a linear probe, %, one dot a setting")
    figure.suptitle("one setting changed at a time; the worst is named")
    return figure


def by_seed(found, loss):
    """For each seed the deviation of the loss's accuracies over all settings, and this divided by the mean error. A
    seed of which some settings are still to be run is left out."""
    seeds = {}
    for name, results in found.items():
        for result in results if name.startswith(loss) else ():
            seeds.setdefault(result["seed"], []).append(result["top1"])
    most = max(map(len, seeds.values()), default=0)
    whole = [numbers for numbers in seeds.values() if len(numbers) == most]
    return [{"deviation": deviation(numbers), "relative": relative_deviation(numbers)} for numbers in whole]


def claims(found):
    supcon, ce = by_seed(found, "SupCon"), by_seed(found, "cross-entropy")
    if not (supcon and ce):
        return []
    words = {"deviation": "top-1, points", "relative": "top-1 / mean error"}
    return [Claim(f"SupCon depends less on its settings (deviation of {word})", "figure 4: smaller boxes",
                  f"{spread(supcon, key, 2)} against {spread(ce, key, 2)}", is_above(ce, supcon, key))
            for key, word in words.items()]


TITLE = "Accuracy over augmentations, optimisers and learning rates, with half the views"
EXPERIMENT = Experiment("stability", TITLE, cells, table, draw, claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
