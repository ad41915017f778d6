"""Every loss with the same encoder and the same number of views (Khosla et al. 2020, tables 1 to 3).

    python experiments/losses_compared.py --scale cpu
"""

from cells import Cell, Experiment, bars, compared, main_of, spread, top1, training_words

from common.cli import run_command

SIM = "--augment sim"  # with crops only, NT-Xent could match two views of an image by their colour histograms
LOSSES = {  # name: (loss, what goes with it)
    "SupCon, L_out": ("supcon", {}),
    "cross-entropy": ("ce", {"views": 1, "lr": 0.5}),
    "SupCon, L_in": ("supcon-in", {}),
    "SupCon, one positive": ("supcon", {"words": "--denominator one_positive"}),
    "SupCon + cross-entropy": ("supcon", {"words": "--ce-weight 0.5"}),
    "NT-Xent": ("simclr", {"lr": 0.3, "words": SIM}),
    "triplet": ("triplet", {"lr": 0.5}),
    "N-pair": ("n-pair", {"views": 1, "lr": 0.1}),
    "max-margin": ("max-margin", {"lr": 0.5}),
    "cross-entropy, smoothed": ("ce", {"views": 1, "lr": 0.5, "words": "--label-smoothing 0.1"}),
    "cross-entropy, MixUp": ("ce", {"views": 1, "lr": 0.5, "words": "--mix mixup"}),
    "cross-entropy, CutMix": ("ce", {"views": 1, "lr": 0.5, "words": "--mix cutmix"}),
}


def cells(scale):
    return {name: Cell(training_words(scale, loss, **more)) for name, (loss, more) in LOSSES.items()}


def table(found):
    rows = [[name, spread(r), spread(r, "knn"), spread(r, "ece", 3), len(r)] for name, r in ranked(found)]
    return ["loss", "probe top-1 %", "k-NN top-1 %", "calibration error", "seeds"], rows


def ranked(found):
    return sorted(found.items(), key=lambda cell: -top1(cell[1]))


def draw(plt, found):
    return bars(plt, dict(ranked(found)))


def claims(found):
    return [
        *compared("SupCon is above cross-entropy", "ResNet-50, CIFAR-10: 96.0 against 95.0 %", found,
                  "SupCon, L_out", "cross-entropy"),
        *compared("L_out is above L_in", "ImageNet: 78.7 against 67.4 %", found, "SupCon, L_out", "SupCon, L_in"),
        *compared("SupCon is above NT-Xent", "ResNet-50, CIFAR-10: 96.0 against 93.6 %", found,
                  "SupCon, L_out", "NT-Xent"),
    ]


EXPERIMENT = Experiment("losses_compared", "Every loss, the same encoder, the same number of views", cells, table, draw,
                        claims)

if __name__ == "__main__":
    run_command(main_of(EXPERIMENT))
