"""Labels from a CSV file: the same run as of class folders, and every mistake in the file named by its line."""

import json
import shutil

import pytest
import torch

import common.cli
import common.data
import common.labels
import pretrain
from runs import FOLDER, folder_of, log_of, probe, refusal, run_here, train

pytestmark = pytest.mark.seeds_torch


def with_table(folder, lines):
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "labels.csv")


@pytest.fixture
def pictures(tmp_path):
    """Class folders, and the lines of a table that gives the same labels."""
    folder_of(tmp_path, ["train", "test"], ["a", "b"])
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    return tmp_path, ["path,label,split", *(f"{path},{path.parts[1]},{path.parts[0]}" for path in paths)]


def test_a_table_gives_the_images_and_labels_that_folders_give(pictures):
    folder, lines = pictures
    table = with_table(folder, [lines[0], *reversed(lines[1:])])
    for is_train in (True, False):
        ours = common.data.load_data("folder", folder, is_train, size=16, table=table)
        theirs = common.data.load_data("folder", folder, is_train, size=16)
        assert ours.classes == theirs.classes == ["a", "b"] and len(ours.labels) == 8
        of = dict(zip(map(str, theirs.paths), zip(theirs.labels, theirs.images)))
        for path, label, image in zip(ours.paths, ours.labels, ours.images):
            assert label == of[path][0] and torch.equal(image, of[path][1])


def test_a_run_of_a_table_is_probed_and_corrupted_by_it(pictures, tmp_path):
    folder, lines = pictures
    (folder / "train").rename(folder / "all")  # so that no stage finds the folders
    (folder / "test").rename(folder / "others")
    lines = [line.replace("train/", "all/").replace("test/", "others/") for line in lines]
    options = [*FOLDER, "--data", folder, "--labels", with_table(folder, lines)]
    for more in ([], ["--stream", "--workers", "0"]):
        run = tmp_path / f"run{len(more)}"
        train(*options, *more, "--run-dir", run)
        assert 0 <= log_of(run)[-1]["knn_top1"] <= 100
        result = probe(run)
        assert result["test_images"] == 8 and result["tested_on"] == "the test set"
        assert run_here("robustness", run, "--limit", "4")["images"] == 4
    assert json.loads((run / "config.json").read_text())["options"]["labels"] == str(folder / "labels.csv")


def test_a_run_goes_on_with_its_own_labels_alone(pictures, monkeypatch, capsys):
    folder, lines = pictures
    run, own = folder / "run", with_table(folder, lines)
    train(*FOLDER, "--data", folder, "--labels", own, "--run-dir", run)
    other = folder / "other.csv"
    first, second = (next(k for k, line in enumerate(lines) if f",{name},train" in line) for name in "ab")
    exchanged = [*lines]
    exchanged[first], exchanged[second] = lines[first].replace(",a,", ",b,"), lines[second].replace(",b,", ",a,")
    path = lines[first].split(",")[0]
    shutil.copy(folder / path, folder / f"{path}.png")
    renamed = [line.replace(f"{path},", f"{path}.png,") for line in lines]
    for changed in exchanged, renamed:
        other.write_text("\n".join(changed))
        words = refusal(pretrain, ["--resume", run, "--labels", other, "--epochs", "2"], monkeypatch, capsys)
        assert f"--labels {other} gives the images other names or labels" in words
    train("--resume", run, "--epochs", "2")


def test_without_a_split_all_images_are_for_training_and_the_probe_holds_some_out(pictures):
    folder, lines = pictures
    table = with_table(folder, ["path,label", *(line.rsplit(",", 1)[0] for line in lines[1:])])
    train(*FOLDER, "--data", folder, "--labels", table, "--run-dir", folder / "run")
    assert probe(folder / "run")["tested_on"] == "a tenth of the training set"


def test_the_order_of_the_lines_means_nothing(pictures):
    folder, lines = pictures
    found = common.labels.find_labelled(folder, with_table(folder, lines), True)
    assert found == common.labels.find_labelled(folder, with_table(folder, [lines[0], *lines[:0:-1]]), True)
    assert len(found.files) == 8


def test_val_is_the_test_set_where_there_is_no_other(pictures):
    folder, lines = pictures
    table = with_table(folder, [line.replace(",test", ",val") for line in lines])
    assert len(common.labels.find_labelled(folder, table, False).files) == 8
    table = with_table(folder, [lines[0], lines[1].replace(",test", ",val"), *lines[2:]])
    assert len(common.labels.find_labelled(folder, table, False).files) == 7


def test_quoted_cells_spaces_and_the_mark_of_utf_8_are_read(pictures):
    folder, _ = pictures
    table = folder / "labels.csv"
    table.write_bytes('\ufeffpath, label\r\n"train/a/0.png" , "x, y"\r\n\r\n./train/a/1.png,é\r\n'.encode())
    found = common.labels.find_labelled(folder, table, True)
    assert found.classes == ["x, y", "é"] and found.labels == [0, 1]


WRONG = {
    "no head": (["train/a/0.png,a"], "begins with 'train/a/0.png,a': its first line must be path,label or"),
    "empty": ([""], "begins with '': its first line must be"),
    "a cell too few": (["path,label", "train/a/0.png"], "line 2: it must hold path, label, each of them once"),
    "a cell too many": (["path,label", "train/a/0.png,a,train"], "line 2: it must hold path, label"),
    "no label": (["path,label", "train/a/0.png,"], "line 2: it must hold path, label"),
    "another split": (["path,label,split", "train/a/0.png,a,dev"], "line 2: the split 'dev' is not train, test or val"),
    "a path twice": (["path,label", "train/a/0.png,a", "train/a/./0.png,b"], "line 3: train/a/0.png is in line 2"),
    "no file": (["path,label", "train/a/0.png,a", "x.png,b", "y.png,b"], "line 3: there is no file x.png in --data"),
    "no training": (["path,label,split", "train/a/0.png,a,test"], "has no image of the split train: add some"),
}


@pytest.mark.parametrize("lines, words", WRONG.values(), ids=WRONG)
def test_a_table_that_cannot_mean_what_it_says_is_refused_by_its_line(lines, words, pictures):
    folder, _ = pictures
    with pytest.raises(common.cli.Refused) as refused:
        common.data.load_data("folder", folder, True, size=16, table=with_table(folder, lines))
    assert words in refused.value.message and refused.value.message.startswith("--labels ")


def test_a_test_split_without_images_and_bytes_that_are_no_text_are_refused(pictures):
    folder, _ = pictures
    table = with_table(folder, ["path,label", "train/a/0.png,a"])
    with pytest.raises(common.data.Missing, match="has no image of the split test or val: add some"):
        common.data.load_data("folder", folder, False, size=16, table=table)
    (folder / "labels.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(common.cli.Refused, match="cannot be read .*: name a CSV file in UTF-8"):
        common.labels.find_labelled(folder, table, True)
