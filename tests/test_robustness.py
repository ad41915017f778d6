"""robustness.py: mean corruption errors, published sets, interrupted tests, what cannot be tested."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common.corruptions
import common.data
import common.frozen
import common.views
import oracles
import robustness
from runs import FOLDER, files_in, folder_of, probe, refusal, train

pytestmark = pytest.mark.seeds_torch
seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.floats(0.01, 0.4))
def test_corruption_errors_are_the_oracles(seed, clean):
    rng = np.random.default_rng(seed)
    errors = {name: list(rng.uniform(0.2, 1, 5)) for name in common.corruptions.NAMES}
    alexnet = {name: [e] * 5 for name, e in robustness.ALEXNET.items()}
    assert robustness.mean_corruption_error(errors) == pytest.approx(oracles.mean_corruption_error(errors, alexnet))
    relative = oracles.relative_mean_corruption_error(errors, clean, alexnet, robustness.ALEXNET_CLEAN)
    assert robustness.relative_mean_corruption_error(errors, clean) == pytest.approx(relative)


def test_alexnets_errors_are_the_published_ones():
    """github.com/google-research/augmix, imagenet.py; its clean error is that of torchvision's weights."""
    published = [
        0.886428,
        0.894468,
        0.922640,
        0.819880,
        0.826268,
        0.785948,
        0.798360,
        0.866816,
        0.826572,
        0.819324,
        0.564592,
        0.853204,
        0.646056,
        0.717840,
        0.606500,
    ]
    assert [
        robustness.ALEXNET[name] for name in common.corruptions.NAMES
    ] == published and robustness.ALEXNET_CLEAN == 0.43478
    errors = {name: [e] * 5 for name, e in robustness.ALEXNET.items()}
    assert robustness.mean_corruption_error(errors) == pytest.approx(100)
    assert robustness.relative_mean_corruption_error(errors, robustness.ALEXNET_CLEAN) == pytest.approx(100)


@pytest.mark.parametrize(
    "accuracy, printed",
    [
        ([65.06, 54.96, 47.64, 35.93, 25.38], 68.6),
        ([72.89, 65.28, 60.55, 52.00, 43.11], 52.4),
        ([65.39, 55.55, 48.64, 37.27, 26.92], 67.2),
        ([73.29, 66.16, 61.80, 54.01, 45.71], 50.6),
    ],
    ids=["CE R50", "CE R200", "SupCon R50", "SupCon R200"],
)
def test_table_6s_accuracies_give_the_printed_mce(accuracy, printed):
    """Its rows are means over the corruptions, so they give the ratio of means where mCE is the mean of ratios."""
    mean_error = np.mean([1 - a / 100 for a in accuracy])
    assert 100 * mean_error / np.mean(list(robustness.ALEXNET.values())) == pytest.approx(printed, abs=0.35)


def test_mce_is_named_so_for_all_of_imagenet_c_alone():
    errors = {name: [0.5] * 5 for name in common.corruptions.NAMES}
    some = {name: errors[name] for name in common.corruptions.MADE}
    assert "mce" in robustness.summary("ImageNet-C", (0.2, 0.1), errors, errors)
    for kind, found in (("ImageNet-C", some), ("made", some), ("CIFAR-10-C", errors)):
        found = robustness.summary(kind, (0.2, 0.1), found, found)
        assert not {"mce", "relative_mce"} & found.keys() and found["mean_error"] == 50


def test_a_summary_keeps_severities_and_corruptions_apart():
    errors, ece = (
        {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.3, 0.4, 0.5, 0.6, 0.9]},
        {"fog": [0, 1, 2, 3, 4], "snow": [2, 3, 4, 5, 8]},
    )
    found = robustness.summary("made", (0.05, 0.01), errors, ece)
    assert (found["clean_error"], found["clean_ece"], found["corruptions"]) == (0.05, 0.01, 2)
    assert found["accuracy_by_severity"] == pytest.approx([80, 70, 60, 50, 30]) and found["ece_by_severity"] == [
        1,
        2,
        3,
        4,
        6,
    ]
    assert found["mean_error"] == pytest.approx(42)


@pytest.fixture(scope="module")
def other(trained):
    """Another classifier of the same encoder."""
    probe(trained, "--limit", "100", "--epochs", "1")
    return trained / "classifier-first100.pt"


def test_a_baseline_is_tested_on_the_same_images(probed, other):
    arguments = lambda *paths: [*map(str, paths), "--limit", "40"]
    alone = robustness.main(arguments(other), standalone_mode=False)
    result = robustness.main(arguments(probed, "--baseline", other), standalone_mode=False)
    assert (
        result["baseline"] == {k: alone[k] for k in result["baseline"]}
        and result["baseline"]["clean_ece"] != result["clean_ece"]
    )
    ratios = [sum(result["errors"][name]) / sum(alone["errors"][name]) for name in alone["errors"]]
    assert result["ratio_to_baseline"] == pytest.approx(np.mean(ratios)) and result["ratio_to_baseline"] != 1


def test_an_interrupted_test_goes_on_where_it_was(probed, tmp_path, monkeypatch, capsys):
    for name in ("classifier-first400.pt", "ckpt.pt"):
        (tmp_path / name).write_bytes(probed.with_name(name).read_bytes())
    arguments = [str(tmp_path / probed.name), "--limit", "30"]
    whole = robustness.main(arguments, standalone_mode=False)
    corrupt, calls = robustness.corrupt, []

    def counted(images, name, severity, g, as_files):
        calls.append(name)
        if len(calls) == 24:  # of severity 4 of the fifth corruption
            raise MemoryError
        return corrupt(images, name, severity, g, as_files)

    monkeypatch.setattr(robustness, "corrupt", counted)
    with pytest.raises(MemoryError):
        robustness.main(arguments, standalone_mode=False)
    assert whole | {"seconds": 0} == robustness.main(arguments, standalone_mode=False) | {"seconds": 0}
    assert len(calls) == 24 + 50 - 20 and not list(tmp_path.glob("*.part"))


def test_only_the_same_test_is_taken_up(tmp_path):
    part, about = tmp_path / "robustness.part", {"clean": [[0.1, 0.01]], "data": "a"}
    part.write_text(json.dumps(about | {"errors": [{"fog": [0.5] * 5}], "ece": [{"fog": [0.1] * 5}]}))
    assert robustness.taken_up(part, about) == ([{"fog": [0.5] * 5}], [{"fog": [0.1] * 5}])
    assert (
        robustness.taken_up(part, about | {"data": "b"}) is None
        and robustness.taken_up(part, about | {"clean": [[0.2, 0.01]]}) is None
    )
    for damaged in ("", "[]", "{"):
        part.write_text(damaged)
        assert robustness.taken_up(part, about) is None
    assert robustness.taken_up(tmp_path / "none", about) is None


def test_corruptions_made_here_are_reported_as_such(probed, capsys):
    result = robustness.main([str(probed), "--limit", "40", "--baseline", str(probed)], standalone_mode=False)
    out = capsys.readouterr().out
    assert result["corruptions"] == 10 and "mean error over 10 corruptions" in out and "mCE" not in out
    assert result["ratio_to_baseline"] == 1 and set(result["errors"]) == set(common.corruptions.MADE)
    assert result["mean_error"] == pytest.approx(100 - np.mean(result["accuracy_by_severity"]))
    assert json.loads((probed.parent / "robustness-first400-first40.json").read_text())["errors"] == result["errors"]


def cifar10_c(folder, test, names=common.corruptions.NAMES, n=60):
    """Severity s is the clean images with their first 12 s images exchanged for black."""
    folder.mkdir()
    clean = test.images[:n].permute(0, 2, 3, 1).numpy()
    severities = np.concatenate([np.where((np.arange(n) < 12 * s)[:, None, None, None], 0, clean) for s in range(1, 6)])
    for name in names:
        np.save(folder / f"{name}.npy", severities.astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(test.labels[:n].numpy(), 5))
    return severities


def test_cifar_10_c_files_are_read_severity_by_severity(probed, tmp_path, capsys):
    test = common.data.load_data("shapes", None, False, size=16)
    severities = cifar10_c(tmp_path / "c", test)
    result = robustness.main([str(probed), "--corrupted", str(tmp_path / "c")], standalone_mode=False)
    classifier = common.frozen.load_classifier(probed)
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(severities.astype(np.uint8)).permute(0, 3, 1, 2)).argmax(1)
    expected = (predicted != test.labels[:60].repeat(5)).double().view(5, 60).mean(1).tolist()
    assert (
        all(errors == pytest.approx(expected) for errors in result["errors"].values()) and result["corruptions"] == 15
    )
    assert (
        "mean corruption error" in capsys.readouterr().out
        and "mce" not in result
        and (probed.parent / "robustness-first400-c.json").exists()
    )


@pytest.fixture(scope="module")
def folder_classifier(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    folder_of(root, ["train", "test"], ["a", "b"])
    train(*FOLDER, "--data", root, "--run-dir", root / "run")
    probe(root / "run", "--epochs", "5")
    return root / "run" / "classifier.pt"


def imagenet_c(root, names=common.corruptions.NAMES, classes=("a", "b"), severities=range(1, 6)):
    for k, name in enumerate(names):
        for s in severities:
            folder_of(root / ("noise" if k < 3 else ".") / name, [str(s)], classes, count=2)
    return root


def test_imagenet_c_folders_give_mce_only_if_all_are_there(folder_classifier, tmp_path, monkeypatch, capsys):
    read = common.views.worker_batches  # by processes below, and here for speed
    monkeypatch.setattr(robustness, "worker_batches", lambda folder, batches, workers: read(folder, batches, 0))
    result = robustness.main(
        [str(folder_classifier), "--corrupted", str(imagenet_c(tmp_path / "all"))], standalone_mode=False
    )
    assert (
        result["mce"] == pytest.approx(robustness.mean_corruption_error(result["errors"]))
        and "mCE" in capsys.readouterr().out
    )
    monkeypatch.undo()
    some = imagenet_c(tmp_path / "some", common.corruptions.NAMES[:2])
    result = robustness.main([str(folder_classifier), "--corrupted", str(some)], standalone_mode=False)
    out = capsys.readouterr().out
    assert "mce" not in result and "mean error over 2 corruptions" in out and "mCE" not in out


def missing_severity(here, probed, folder):
    return (
        folder,
        ["--corrupted", imagenet_c(here / "c", common.corruptions.NAMES[:2], severities=(1, 2, 4, 5))],
        "has no severity 3",
    )


def other_classes(here, probed, folder):
    return (
        folder,
        ["--corrupted", imagenet_c(here / "c", common.corruptions.NAMES[:2], classes=("a", "b", "c"))],
        "the names of the 3 classes in",
    )


def an_empty_severity(here, probed, folder):
    root = imagenet_c(here / "c", common.corruptions.NAMES[3:5])
    for file in (root / "noise" / "defocus_blur" / "2").rglob("*.png"):
        file.unlink()
    return folder, ["--corrupted", root], "has no images"


def cifar10_c_with(here, **files):
    """A sound CIFAR-10-C but for these files."""
    cifar10_c(here / "c", common.data.load_data("shapes", None, False, size=16))
    for name, values in files.items():
        np.save(here / "c" / f"{name}.npy", values)
    return here / "c"


def labels_out_of_range(here, probed, folder):
    return (
        probed,
        ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 11)],
        "out of range for the classifier's 10 classes",
    )


def fewer_classes(here, probed, folder):
    return (
        probed,
        ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 7)],
        "has 7 classes, and the classifier 10",
    )


def too_few_labels(here, probed, folder):
    labels = common.data.load_data("shapes", None, False, size=16).labels[:50].numpy()
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.tile(labels, 5))], "labels.npy has 250 labels"


def more_labels_than_test_images(here, probed, folder):
    return (
        probed,
        ["--corrupted", cifar10_c_with(here, labels=np.arange(50_000) % 10)],
        "does not hold the labels of the classifier's test set",
    )


def labels_of_another_test_set(here, probed, folder):
    return (
        probed,
        ["--corrupted", cifar10_c_with(here, labels=np.arange(300) % 10)],
        "does not hold the labels of the classifier's test set",
    )


def labels_that_are_words(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.array(["cat"] * 300))], "must hold whole numbers"


def no_labels(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, labels=np.zeros(0, dtype=int))], "must hold five severities"


def images_that_are_floats(here, probed, folder):
    return probed, ["--corrupted", cifar10_c_with(here, fog=np.zeros((300, 16, 16, 3)))], "must hold uint8 images"


def half_a_classifier(here, probed, folder):
    torch.save({"format": common.frozen.FORMAT, "weight": torch.zeros(3)}, here / "classifier.pt")
    return here / "classifier.pt", [], "is not a classifier of linear_probe.py"


def a_cut_file(here, probed, folder):
    (cifar10_c_with(here) / "fog.npy").write_bytes(b"\x93NUMPY")
    return probed, ["--corrupted", here / "c"], "fog.npy cannot be read"


def nothing_there(here, probed, folder):
    return probed, ["--corrupted", here], "holds neither"


def a_checkpoint_of_pretrain(here, probed, folder):
    return probed.with_name("ckpt.pt"), [], "is not a classifier of linear_probe.py"


def no_classifier(here, probed, folder):
    return here / "classifier.pt", [], "there is no classifier"


def a_baseline_of_another_data_set(here, probed, folder):
    return probed, ["--baseline", folder], "was fitted to other classes"


def a_name_too_long(here, probed, folder):
    return here / ("c" * 300), [], "is too long a name"


def another_test_set(here, probed, folder):
    folder_of(here, ["test"], ["x", "y", "z"])
    return folder, ["--data", here], "has a class x, and the training set has none of that name"


@pytest.mark.parametrize(
    "situation",
    [
        missing_severity,
        other_classes,
        an_empty_severity,
        labels_out_of_range,
        fewer_classes,
        too_few_labels,
        more_labels_than_test_images,
        labels_of_another_test_set,
        labels_that_are_words,
        no_labels,
        images_that_are_floats,
        half_a_classifier,
        a_cut_file,
        nothing_there,
        a_checkpoint_of_pretrain,
        no_classifier,
        a_baseline_of_another_data_set,
        a_name_too_long,
        another_test_set,
    ],
    ids=lambda situation: situation.__name__,
)
def test_what_cannot_be_tested_gives_one_line_and_status_2(
    situation, probed, folder_classifier, tmp_path, monkeypatch, capsys
):
    path, options, words = situation(tmp_path, probed, folder_classifier)
    before = files_in(tmp_path)
    assert words in refusal(robustness, [path, *options], monkeypatch, capsys)
    assert files_in(tmp_path) == before


def test_published_images_are_limited_and_brought_to_the_classifiers_size(tmp_path):
    test = common.data.load_data("shapes", None, False, size=16)
    every = cifar10_c(tmp_path / "c", test, ["fog"]).astype(np.uint8)
    severity_2 = torch.from_numpy(every[60:120]).permute(0, 3, 1, 2)
    classifier = SimpleNamespace(size=16, classes=test.classes)
    ((images, labels),) = robustness.Cifar10C(tmp_path / "c", classifier, 30).batches("fog", 2)
    assert torch.equal(images, severity_2[:30]) and torch.equal(labels, test.labels[:30])
    classifier.size = 12
    ((images, _),) = robustness.Cifar10C(tmp_path / "c", classifier, None).batches("fog", 2)
    assert torch.equal(images, common.data.resize_square(severity_2, 12))


def test_published_folders_are_limited(tmp_path):
    for severity in robustness.SEVERITIES:
        folder_of(tmp_path / "fog", [str(severity)], ["a", "b"])
    source = robustness.ImageNetC(tmp_path, SimpleNamespace(size=16, classes=["a", "b"]), 5, 0)
    source.check(None)
    assert [len(labels) for _, labels in source.batches("fog", 1)] == [5]


def prepared(path, **options):
    plain = {"corrupted": None, "baseline": None, "data": None, "download": False, "limit": 40, "workers": 0,
             "seed": 0, "as_files": True, "device": "cpu"}
    return robustness.prepare(path, **plain | options)


def test_clean_images_are_limited_as_published_ones(probed, tmp_path):
    cifar10_c(tmp_path / "c", common.data.load_data("shapes", None, False, size=16), ["fog"])
    job = prepared(probed, corrupted=tmp_path / "c", limit=7)
    assert len(job.test.labels) == len(job.test.images) == 7


def test_tests_that_differ_are_never_taken_for_one_another(probed):
    job = prepared(probed)
    for other in ({"as_files": False}, {"seed": 3}, {"limit": 30}):
        assert prepared(probed, **other).about != job.about
    assert len({prepared(probed, **other).report for other in ({}, {"seed": 3}, {"limit": 30})}) == 3
