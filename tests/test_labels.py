"""What is done to labels and batches: mixing, noise, subsets, balance, pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common.data
import common.images
import common.objectives
import common.views
import pretrain
import reference_numpy as ref
from runs import SMALL, folder_of, log_of, options_of, train

pytestmark = pytest.mark.seeds_torch


@given(st.integers(0, 2**32 - 1), st.sampled_from(["mixup", "cutmix"]), st.sampled_from([0.2, 1.0]))
def test_mixed_images_and_labels_have_the_same_shares(seed, how, alpha):
    labels = torch.arange(4)
    x = labels.double().view(4, 1, 1, 1).expand(4, 3, 8, 8)  # an image is its label, everywhere
    made, y = common.views.mixed(x, labels, 4, how, alpha, common.data.generator(seed))
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    neighbour = labels.roll(1)
    share = y[labels, labels].double()
    torch.testing.assert_close(y[labels, neighbour].double(), 1 - share)
    torch.testing.assert_close(made.mean((1, 2, 3)), share * labels + (1 - share) * neighbour, rtol=1e-5, atol=1e-5)
    again, _ = common.views.mixed(x, labels, 4, how, alpha, common.data.generator(seed))
    assert torch.equal(made, again)


@pytest.mark.parametrize(
    "options",
    [
        ["--mix", "mixup"],
        ["--mix", "cutmix", "--loss", "supcon-in"],
        ["--mix", "mixup", "--loss", "ce", "--label-smoothing", "0.1"],
        ["--mix", "cutmix", "--ce-weight", "0.5", "--micro-batch", "10"],
        ["--label-noise", "0.4"],
        ["--augment", "auto", "--workers", "0", "--crop-min", "0.5"],
    ],
    ids=" ".join,
)
def test_mixed_noisy_balanced_and_smaller_sets_train(options, tmp_path):
    train(*SMALL, "--epochs", "2", *options, "--run-dir", tmp_path / "run")
    assert log_of(tmp_path / "run")[-1]["epoch"] == 2


def test_balanced_and_smaller_sets_are_what_the_loss_sees(tmp_path, monkeypatch):
    seen, total_loss = [], common.objectives.total_loss
    monkeypatch.setattr(pretrain, "total_loss", lambda *a: seen.append(a[3]) or total_loss(*a))
    train(*SMALL, "--epochs", "1", "--balanced", "--run-dir", tmp_path / "balanced")
    assert len(seen) == 4 and all(torch.bincount(y, minlength=10).tolist() == [10] * 10 for y in seen)
    seen.clear()
    train(*SMALL, "--epochs", "1", "--subset", "0.5", "--run-dir", tmp_path / "smaller")
    whole = torch.bincount(common.data.load_data("shapes", None, True, size=16, limit=200).labels).tolist()
    assert len(seen) == 2 and sum(torch.bincount(y, minlength=10) for y in seen).tolist() == pytest.approx(
        [n for n in whole], abs=4
    )


def test_a_part_of_a_streamed_folder_keeps_images_and_labels_together(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b", "c"], count=8)
    whole = common.data.load_data("folder", tmp_path, True, size=16)
    stream = common.data.load_data("folder", tmp_path, True, size=16, stream=True)._replace(
        images=whole.images[:10]
    )  # a sample of ten
    part = common.data.take(stream, common.data.stratified(stream.labels, 0.5, common.data.generator(0)))
    assert len(part.labels) == len(part.files) == 12 and 0 < len(part.images) < 10
    for image, file, label in zip(part.images, part.files, part.labels):
        assert (
            torch.equal(image, common.images.resize_and_crop(common.images.read_image(file), 16))
            and f"/{'abc'[label]}/" in file
        )


def test_soft_labels_in_a_run_are_what_the_loss_sees(tmp_path, monkeypatch):
    seen, total_loss = [], common.objectives.total_loss
    monkeypatch.setattr(
        pretrain, "total_loss", lambda *a: seen.append((a[1].detach().clone(), a[3], loss := total_loss(*a))) or loss
    )
    train(*SMALL, "--epochs", "1", "--mix", "mixup", "--precision", "float64", "--run-dir", tmp_path / "run")
    z, y, loss = seen[1]
    assert y.shape == (100, 10) and ((y > 0) & (y < 1)).any()
    assert loss.item() * 0.7 == pytest.approx(ref.supcon_out(z.numpy(), y.double().numpy(), 0.1), rel=1e-6)


def test_balanced_batches_hold_every_class_equally():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    order = common.views.shuffled_balanced(labels, common.data.generator(0))
    assert len(order) == len(labels)
    for start in range(0, 60, 3):
        assert sorted(labels[order[start : start + 3]].tolist()) == [0, 1, 2]
    assert set(order[labels[order] == 2].tolist()) == {60, 61, 62}
    assert not torch.equal(order, common.views.shuffled_balanced(labels, common.data.generator(1)))


def test_subsets_are_stratified_and_noise_is_symmetric():
    labels = torch.arange(4).repeat_interleave(torch.tensor([1000, 200, 10, 1]))
    rows = common.data.stratified(labels, 0.1, common.data.generator(0))
    assert torch.bincount(labels[rows]).tolist() == [100, 20, 1, 1] and len(set(rows.tolist())) == len(rows)
    y = torch.arange(5).repeat(4000)
    noisy = common.data.with_label_noise(y, 0.4, 5, common.data.generator(0))
    assert (noisy != y).double().mean().item() == pytest.approx(0.4, abs=0.02)
    wrong = noisy[(noisy != y) & (y == 2)]
    assert torch.bincount(wrong, minlength=5)[[0, 1, 3, 4]].double().div(len(wrong)).tolist() == pytest.approx(
        [0.25] * 4, abs=0.05
    )
    assert torch.equal(common.data.with_label_noise(y, 0.0, 5, common.data.generator(0)), y)


def test_noisy_labels_are_counted_in_the_run(tmp_path):
    train(*SMALL, "--epochs", "1", "--label-noise", "1", "--run-dir", tmp_path / "run")
    assert options_of(tmp_path / "run")["noisy_labels"] == 200


SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.integers(2, 6), st.integers(0, 5))
def test_pairs_show_two_images_of_a_class_and_any_row_of_c_pairs_shows_c_classes(seed, classes, start):
    labels = torch.cat([torch.arange(classes).repeat(7), torch.tensor([0, 0, 0])])
    order = common.views.shuffled_pairs(labels, common.data.generator(seed))
    assert len(order) == len(labels)
    a, b = order[: len(order) // 2 * 2].view(-1, 2).T
    assert (labels[a] == labels[b]).all() and (a != b).all()
    for group in labels[a][start:].split(classes)[:-1]:
        assert len(group.unique()) == classes
