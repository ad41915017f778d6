"""Stage 3: a classifier under common corruptions (Hendrycks & Dietterich 2019; Khosla et al. 2020, table 6, figure 6).

    python robustness.py runs/cifar10-resnet50-supcon-s0/classifier.pt                          # corruptions made here
    python robustness.py runs/cifar10-resnet50-supcon-s0/classifier.pt --corrupted CIFAR-10-C   # published .npy files
    python robustness.py runs/imagenet/classifier.pt --corrupted ImageNet-C                     # published folders
    python robustness.py runs/supcon/classifier.pt --baseline runs/ce/classifier.pt --figure

It reports the error for each corruption and severity, and accuracy and calibration error for each severity. All fifteen
corruptions of ImageNet-C give the mCE and the relative mCE, which AlexNet's errors normalise. CIFAR-10-C's convention
is the plain mean. Fewer corruptions give the mean error over those, and never an mCE. The numbers are written beside
the classifier, into robustness.json. Another set, a limit or a seed is part of the name.
"""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import click
import numpy as np
import torch

from common.cli import Refused, is_first, run_command, say
from common.config import require
from common.corruptions import MADE, NAMES, corrupt
from common.data import Data, generator, load_data, resize_square, with_classes_of
from common.figures import draw_robustness, pyplot
from common.frozen import fingerprint, load_classifier, write_json
from common.images import find_images
from common.metrics import reliability
from common.ranks import choose_device
from common.run_folder import kind_of_its_own, same_place, suffix
from common.views import WorkerViews, worker_batches

SEVERITIES = range(1, 6)
ALEXNET_CLEAN = 0.43478  # top-1 error of torchvision's AlexNet
ALEXNET = {  # its errors on ImageNet-C, the mean over the severities (github.com/google-research/augmix)
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}

# ---------------------------------------------------------------- where corrupted images come from


class Made:
    """Corruptions made of the test images: those that torch and torchvision can make."""

    kind, names = "made", MADE

    def __init__(self, test, seed, as_files):
        if test.images.shape[-1] < 9:
            raise Refused(f"images of {test.images.shape[-1]} pixels are too small to blur: "
                          "probe a run of --size 9 or more")
        self.images, self.labels, self.seed, self.as_files = test.images, test.labels, seed, as_files

    def batches(self, name, severity):
        for k, rows in enumerate(torch.arange(len(self.images)).split(500)):
            g = generator("corrupt", self.seed, NAMES.index(name), severity, k)
            yield corrupt(self.images[rows], name, severity, g, self.as_files), self.labels[rows]


class Cifar10C:
    """NAME.npy, uint8 (5 n, 32, 32, 3), the severities one after the other, and labels.npy."""

    kind = "CIFAR-10-C"

    def __init__(self, folder, classifier, limit):
        self.folder, self.size, self.limit = folder, classifier.size, limit
        self.names = [name for name in NAMES if (folder / f"{name}.npy").exists()]
        self.labels = torch.from_numpy(self._read("labels", 1))
        require_labels(self.labels, len(classifier.classes), folder / "labels.npy")

    def _read(self, name, dims):
        path = self.folder / f"{name}.npy"
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile) as e:
            raise Refused(f"{path} cannot be read as a .npy file: fetch the set again") from e
        if getattr(values, "ndim", None) != dims or not len(values) or len(values) % 5:
            raise Refused(f"{path} is {getattr(values, 'shape', 'an archive')}: "
                          "it must hold five severities, one after the other")
        if not np.issubdtype(values.dtype, np.uint8 if dims == 4 else np.integer):
            wanted = "uint8 images" if dims == 4 else "whole numbers"
            raise Refused(f"{path} holds {values.dtype}: it must hold {wanted}")
        return np.array(values, dtype=np.int64) if dims == 1 else values

    def check(self, test):
        n = len(self.labels) // 5
        if n > len(test.labels) or not (self.labels.view(5, n) == test.labels[:n]).all():
            raise Refused(f"{self.folder}/labels.npy does not hold the labels of the classifier's test set: "
                          "name the corrupted copy of that set")
        for name in self.names:
            shape = self._read(name, 4).shape
            if shape[0] != len(self.labels) or shape[3] != 3:
                raise Refused(f"{self.folder}/{name}.npy is {shape}, and labels.npy has {len(self.labels)} labels: "
                              "fetch the set again")

    def batches(self, name, severity):
        values = self._read(name, 4)
        n = len(self.labels) // 5
        first = (severity - 1) * n
        for rows in torch.arange(first, first + min(n, self.limit or n)).split(500):
            images = torch.from_numpy(np.array(values[rows[0] : rows[-1] + 1])).permute(0, 3, 1, 2)
            yield resize_square(images, self.size), self.labels[rows]


class ImageNetC:
    """Folders NAME/SEVERITY/CLASS/*.JPEG, or the same below the published archives' folders (noise, blur, ...)."""

    kind = "ImageNet-C"

    def __init__(self, folder, classifier, limit, workers):
        self.classes, self.size = list(classifier.classes), classifier.size
        self.limit, self.workers = limit, workers
        found = {name: [p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_dir()] for name in NAMES}
        self.places = {name: places[0] for name, places in found.items() if places}
        self.names, self.folders = list(self.places), {}

    def check(self, test):
        for name, place in self.places.items():
            for severity in SEVERITIES:
                if not (place / str(severity)).is_dir():
                    raise Refused(f"{place} has no severity {severity}: fetch the set again, or take {name} away")
                self.folders[name, severity] = self._folder(place / str(severity))

    def _folder(self, path):
        folder = find_images(path, "--corrupted")
        if folder.classes != self.classes:
            raise Refused(f"the names of the {len(folder.classes)} classes in {path} are not those of the "
                          f"{len(self.classes)} classes that the classifier was fitted to: name the set made of these")
        sample = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return Data(sample, torch.tensor(folder.labels), folder.classes, folder.files)

    def batches(self, name, severity):
        data = self.folders[name, severity]
        parts = torch.randperm(len(data.files), generator=generator("limit"))[: self.limit].split(500)
        items = [[(row,) for row in rows.tolist()] for rows in parts]
        for images, rows in zip(worker_batches(WorkerViews(data, "none"), items, self.workers), parts):
            yield images, data.labels[rows]


def published(folder, classifier, limit, workers, test):
    """The set in a folder, its files checked."""
    if (folder / "labels.npy").exists():
        corrupted = Cifar10C(folder, classifier, limit)
    else:
        corrupted = ImageNetC(folder, classifier, limit, workers)
    if not corrupted.names:
        raise Refused(f"--corrupted {folder} holds neither NAME.npy with labels.npy (CIFAR-10-C) "
                      "nor NAME/SEVERITY/CLASS (ImageNet-C): name the folder of one")
    corrupted.check(test)
    return corrupted


def require_labels(labels, num_classes, path):
    if labels.min() < 0 or labels.max() >= num_classes:
        raise Refused(f"{path} has labels from {labels.min()} to {labels.max()}, "
                      f"out of range for the classifier's {num_classes} classes")
    if len(labels.unique()) != num_classes:
        raise Refused(f"{path} has {len(labels.unique())} classes, and the classifier {num_classes}: "
                      "name the set that it was fitted to")


# ---------------------------------------------------------------- what is measured


@torch.no_grad()
def evaluate(classifiers, batches):
    """[(scores (n, C), labels (n,))] of each classifier on the same images."""
    scores, labels = [[] for _ in classifiers], []
    for images, y in batches:
        labels.append(y)
        for classifier, parts in zip(classifiers, scores):
            parts.append(classifier(images).cpu())
    return [(torch.cat(parts), torch.cat(labels)) for parts in scores]


def error_and_calibration(scores, labels):
    """(top-1 error as a fraction, expected calibration error)."""
    return (scores.argmax(1) != labels).double().mean().item(), reliability(scores, labels)[0]


def mean_corruption_error(errors):
    """mCE in percent: the mean over the corruptions of sum_s E_s / sum_s E_s of AlexNet.

    errors {name: [E_1, ..., E_5]} holds the error at each severity.
    """
    return 100 * sum(np.mean(e) / ALEXNET[name] for name, e in errors.items()) / len(errors)


def relative_mean_corruption_error(errors, clean):
    """Relative mCE in percent: as mCE, for what the corruptions add to the error on clean images."""
    ratios = [(np.mean(e) - clean) / (ALEXNET[name] - ALEXNET_CLEAN) for name, e in errors.items()]
    return 100 * sum(ratios) / len(errors)


def summary(kind, clean, errors, ece):
    """What robustness.json holds of one classifier.

    clean: (error, calibration error) on clean images; errors and ece: {name: [severity 1, ..., 5]}.
    """
    found = {
        "clean_error": clean[0],
        "clean_ece": clean[1],
        "errors": errors,
        "accuracy_by_severity": [100 * (1 - np.mean([e[s] for e in errors.values()])) for s in range(5)],
        "ece_by_severity": [float(np.mean([e[s] for e in ece.values()])) for s in range(5)],
        "mean_error": 100 * float(np.mean(list(errors.values()))),
        "corruptions": len(errors),
    }
    if kind == "ImageNet-C" and len(errors) == len(NAMES):
        found["mce"] = mean_corruption_error(errors)
        found["relative_mce"] = relative_mean_corruption_error(errors, clean[0])
    return found


# ---------------------------------------------------------------- prepare, measure, report


class Job(NamedTuple):
    """Which classifiers are tested on which images."""

    paths: list  # of the classifier, and of the baseline if there is one
    classifiers: list
    source: object  # Made, Cifar10C or ImageNetC
    test: Data  # the clean images
    report: Path  # where the numbers go
    named: dict  # the folders that were named on the command line
    about: dict  # what tells this test from another one


def prepare(path, corrupted, baseline, data, download, limit, workers, seed, as_files, device):
    """The Job that the options describe. Raises Refused for what cannot be tested."""
    paths = [p / "classifier.pt" if p.is_dir() else p for p in (path, baseline) if p]
    classifiers = [load_classifier(p, device) for p in paths]
    ours, other = classifiers[0], classifiers[-1]
    require(other.classes == ours.classes and other.size == ours.size,
            f"--baseline {baseline} was fitted to other classes or another image size than {path}: "
            "name one of the same data set")
    own = ours.frozen.config["data"]
    data = data or own
    elsewhere = not same_place(data, own) and Path(data).resolve().name
    kind = suffix(elsewhere, corrupted and corrupted.resolve().name, limit and f"first{limit}", seed and f"s{seed}")
    named = {"data": elsewhere and data, "corrupted": corrupted}
    named = {name: str(Path(place).resolve()) for name, place in named.items() if place}
    stem = paths[0].stem.replace("classifier", "robustness", 1)
    report_of = lambda kind: paths[0].with_name(f"{stem}{kind}.json")
    report = report_of(kind_of_its_own(kind, report_of, named))
    require(os.access(report.parent, os.W_OK),
            f"{report.parent} cannot be written: copy the classifier to a folder that can")
    all_labels = corrupted and (corrupted / "labels.npy").exists()  # CIFAR-10-C's are compared with the test set's
    options = {"download": download, "table": None if elsewhere else ours.frozen.config.get("labels")}
    test = load_data(ours.dataset, data, train=False, size=ours.size, limit=None if all_labels else limit, **options)
    test = with_classes_of(ours, test, data)
    corruptions = published(corrupted, ours, limit, workers, test) if corrupted else None
    test = test._replace(images=test.images[:limit], labels=test.labels[:limit])
    about = {
        "classifiers": [fingerprint(c) for c in classifiers],
        "data": str(Path(data).resolve()),
        "seed": seed,
        "as_files": as_files,
        "limit": limit,
        "torch": torch.__version__,
        "corrupted": corrupted and [[str(p.resolve()), p.lstat().st_mtime] for p in sorted(corrupted.iterdir())],
    }
    return Job(paths, classifiers, corruptions or Made(test, seed, as_files), test, report, named, about)


def measure_clean(job):
    """[error, calibration error] of each classifier on clean images."""
    batches = zip(job.test.images.split(500), job.test.labels.split(500))
    clean = [list(error_and_calibration(*found)) for found in evaluate(job.classifiers, batches)]
    say(f"clean: error {100 * clean[0][0]:.2f} %, calibration error {clean[0][1]:.4f}; "
        f"{len(job.test.labels)} images, {job.source.kind} corruptions")
    return clean


def measure_corrupted(job, clean):
    """(errors, ece): for each classifier {name: [severity 1, ..., 5]}. An interrupted test goes on where it was."""
    names = list(job.source.names)
    missing = [name for name in NAMES if name not in names]
    if missing:
        say(f"{len(names)} of the benchmark's 15 corruptions; not here: {', '.join(missing)}")
    part = partial_file(job)
    about = job.about | {"kind": job.source.kind, "names": names, "clean": clean}
    errors, ece = taken_up(part, about) or ([{} for _ in job.classifiers], [{} for _ in job.classifiers])
    left_out = [name for name in names if name not in errors[0]]
    start = time.perf_counter()
    for done, name in enumerate(left_out, 1):
        for severity in SEVERITIES:
            for c, found in enumerate(evaluate(job.classifiers, job.source.batches(name, severity))):
                error, calibration = error_and_calibration(*found)
                errors[c].setdefault(name, []).append(error)
                ece[c].setdefault(name, []).append(calibration)
        write_json(part, about | {"errors": errors, "ece": ece})
        minutes = (time.perf_counter() - start) / done * (len(left_out) - done) / 60
        row = " ".join(f"{100 * e:5.1f}" for e in errors[0][name])
        say(f"{name:18} error {row} %   {len(errors[0])}/{len(names)}, {minutes:.1f} min left")
    return errors, ece


def partial_file(job):
    """Where a test keeps what it has measured until it is through."""
    return job.report.with_suffix(".part")


def taken_up(part, about):
    """(errors, ece) that an interrupted test has left in the file `part`, if it was the same test; else None."""
    try:
        found = json.loads(part.read_text())
        if found | about == found:
            return found["errors"], found["ece"]
    except (OSError, ValueError, TypeError, KeyError):
        pass


def report(result):
    say("severity      clean     1     2     3     4     5")
    say("accuracy, %  " + " ".join(f"{v:5.1f}" for v in (100 * (1 - result["clean_error"]),
        *result["accuracy_by_severity"])))
    say("calibration  " + " ".join(f"{v:5.3f}" for v in (result["clean_ece"], *result["ece_by_severity"])))
    if "mce" in result:
        say(f"mCE {result['mce']:.1f} %, relative mCE {result['relative_mce']:.1f} % (normalised by AlexNet)")
    elif result["kind"] == "CIFAR-10-C" and result["corruptions"] == len(NAMES):
        say(f"mean corruption error {result['mean_error']:.2f} % (CIFAR-10-C's convention, not normalised)")
    else:
        say(f"mean error over {result['corruptions']} corruptions: {result['mean_error']:.2f} %")
    if "ratio_to_baseline" in result:
        say(f"ratio to {result['baseline']['classifier']}: {result['ratio_to_baseline']:.3f} "
            f"(its mean error {result['baseline']['mean_error']:.2f} %)")


# ---------------------------------------------------------------- the command line


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("path", metavar="CLASSIFIER", type=click.Path(path_type=Path))
@click.option("--corrupted", type=click.Path(path_type=Path),
              help="Folder of CIFAR-10-C or ImageNet-C; without it ten corruptions are made here.")
@click.option("--baseline", type=click.Path(path_type=Path), help="Another classifier.pt, to compare with.")
@click.option("--data", show_default="the classifier's", help="Folder of the clean test set.")
@click.option("--download/--no-download", default=True, help="Fetch what is missing.")
@click.option("--limit", type=click.IntRange(min=1), show_default="all",
              help="N images of every set: the first ones, or of a folder some that a fixed seed chooses.")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read ImageNet-C.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the corruptions made here.")
@click.option("--as-files/--not-as-files", default=True,
              help="Send what is made of images above 64 pixels through JPEG files, as ImageNet-C's are.")
@click.option("--figure", is_flag=True, help="Draw error and calibration as PNG (needs matplotlib).")
@click.option("--device", show_default="cuda if there is one, else cpu", help="torch device.")
def main(path, corrupted, baseline, data, download, limit, workers, seed, as_files, figure, device):
    """Test CLASSIFIER (a classifier.pt of linear_probe.py) on corrupted images."""
    if not is_first():
        return  # of the ranks that torchrun starts only the first one works
    if figure:
        pyplot()  # said now, not after minutes
    job = prepare(path, corrupted, baseline, data, download, limit, workers, seed, as_files, choose_device(device))
    clean = measure_clean(job)
    start = time.perf_counter()
    errors, ece = measure_corrupted(job, clean)
    kind = job.source.kind
    result = {"classifier": str(job.paths[0]), "kind": kind, "images": len(job.test.labels), "seed": seed,
              "as_files": as_files, "torch": torch.__version__, "seconds": round(time.perf_counter() - start, 1)}
    result |= job.named | summary(kind, clean[0], errors[0], ece[0])
    if baseline:
        result["baseline"] = {"classifier": str(job.paths[1])} | summary(kind, clean[1], errors[1], ece[1])
        erring = [name for name in job.source.names if np.any(errors[1][name])]
        if erring:  # no error is a multiple of none
            ratios = [np.sum(errors[0][name]) / np.sum(errors[1][name]) for name in erring]
            result["ratio_to_baseline"] = float(np.mean(ratios))
    report(result)
    write_json(job.report, result)
    partial_file(job).unlink(missing_ok=True)
    if figure:
        say(draw_robustness(job.report.with_suffix(".png"), result))
    return result


if __name__ == "__main__":
    run_command(main, lower="--limit")
