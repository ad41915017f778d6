"""Errors and calibration on corrupted images (Khosla et al. 2020, tables 6 and 7, figure 6).

    python experiments/robustness_and_calibration.py --scale cpu

What is better on clean images is mostly better on corrupted ones too. So SupCon is also compared with that one of
several shorter trainings by cross-entropy whose clean accuracy is nearest to its own.
"""

import functools
import os
import shlex
import statistics

from cells import COLOURS, Cell, Claim, Experiment, command, is_above, main_of, spread, training_words, values

import robustness
from common.cli import run_command

TESTED = 15  # batches of test images, at each of five severities of ten corruptions
TIMES = 1, 0.75, 0.5, 0.25
SUPCON, CE = "SupCon", "cross-entropy, {:g} x"


def cells(scale):
    found = {SUPCON: training_words(scale, "supcon")}
    found |= {CE.format(times): training_words(scale, "ce", views=1, lr=0.5, times=times) for times in TIMES}
    measure = functools.partial(corrupted, TESTED * scale.batch)
    return {name: Cell(words, measure=measure, seeds=2) for name, words in found.items()}


def corrupted(images, folder):
    """What robustness.py finds of the newest classifier in a run's folder, with as many test images."""
    classifier = max(folder.glob("classifier*.pt"), key=os.path.getmtime)
    found = command(robustness, f"{shlex.quote(str(classifier))} --limit {images}")
    return {
        "clean_accuracy": 100 * (1 - found["clean_error"]),
        "mean_error": found["mean_error"],
        "accuracies": [100 * (1 - found["clean_error"]), *found["accuracy_by_severity"]],
        "eces": [found["clean_ece"], *found["ece_by_severity"]],
        "mean_ece": statistics.mean(found["ece_by_severity"]),
    }


def clean(results):
    return statistics.mean(values(results, "clean_accuracy"))


def nearest_to_supcon(found):
    """The name of the cross-entropy whose clean accuracy is nearest to SupCon's, or None."""
    others = [name for name in found if name != SUPCON]
    if SUPCON in found and others:
        return min(others, key=lambda name: abs(clean(found[name]) - clean(found[SUPCON])))


def over_severities(results, key):
    """The mean over the seeds, for each severity from 0 (clean) to 5."""
    return [statistics.mean(numbers) for numbers in zip(*values(results, key))]


def table(found):
    rows = []
    for name, r in found.items():
        label = f"{name}, nearest to SupCon" if name == nearest_to_supcon(found) else name
        by_severity = " ".join(f"{ece:.3f}" for ece in over_severities(r, "eces"))
        rows.append([label, spread(r, "clean_accuracy"), spread(r, "mean_error"), by_severity, len(r)])
    return ["training", "clean top-1 %", "mean error over ten corruptions %", "calibration error, clean to 5",
            "seeds"], rows


def draw(plt, found):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    shown = [name for name in (SUPCON, CE.format(1), nearest_to_supcon(found)) if name in found]
    for colour, name in zip(COLOURS, dict.fromkeys(shown)):
        label = f"{name} (nearest on clean images)" if name == nearest_to_supcon(found) else name
        for axis, key in ((left, "accuracies"), (right, "eces")):
            axis.plot(range(6), over_severities(found[name], key), "o-", color=colour, label=label)
    for axis, words in ((left, "top-1, %"), (right, "expected calibration error")):
        axis.set(xlabel="severity of the corruption", ylabel=words)
        axis.set_xticks(range(6), ["clean", *range(1, 6)])
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def claims(found):
    papers = {"mean_error": ("error", "ImageNet-C, mCE: 67.2 against 68.6 %", " %", 1),
              "mean_ece": ("calibration error", "ImageNet-C: 0.056 against 0.056", "", 3)}
    made = []
    for rival, words in ((CE.format(1), "equal compute"), (nearest_to_supcon(found), "the nearest clean accuracy")):
        for key, (what, paper, unit, digits) in papers.items():
            if SUPCON in found and rival in found:
                ours, theirs = found[SUPCON], found[rival]
                here = f"{spread(ours, key, digits)} against {spread(theirs, key, digits)}{unit}"
                made.append(Claim(f"SupCon has a lower {what} on corrupted images, at {words}", paper, here,
                                  is_above(theirs, ours, key)))
    return made


EXPERIMENT = Experiment("robustness_and_calibration", "Corrupted images: error and calibration", cells, table, draw,
                        claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
