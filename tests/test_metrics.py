"""Accuracy, calibration, temperature and nearest neighbours against the oracle and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common.metrics
import oracles

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 5, 15]), st.sampled_from([0.1, 1, 10]))
def test_calibration_error_is_the_oracles(seed, n, C, bins, scale):
    rng = np.random.default_rng(seed)
    scores, y = torch.tensor(scale * rng.normal(size=(n, C))), torch.tensor(rng.integers(0, C, n))
    error, table = common.metrics.reliability(scores, y, bins)
    assert error == pytest.approx(
        oracles.expected_calibration_error(scores.softmax(1).numpy(), y.numpy(), bins), abs=1e-12
    )
    assert sum(row[0] for row in table) == n and all(0 <= row[2] <= 1 for row in table)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], dtype=torch.double)
    y = torch.tensor([0, 1, 1, 0])  # confidences .9 (half right), .6 (right), .5 (right)
    assert common.metrics.reliability(p.log(), y, 10)[0] == pytest.approx(0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.5)
    edge = torch.tensor([[0.6, 0.4]], dtype=torch.double)  # (0.4, 0.6] of five bins holds 0.6 itself
    assert oracles.expected_calibration_error(edge.numpy(), [0], 5) == pytest.approx(0.4)


@given(seeds, st.integers(2, 30), st.integers(1, 8), st.integers(1, 40), st.sampled_from([0.01, 0.07, 1]))
def test_nearest_neighbours_are_the_oracles(seed, n, D, k, tau):
    rng = np.random.default_rng(seed)
    bank, query = rng.normal(size=(n, D)), rng.normal(size=(5, D))
    bank_y, query_y = rng.integers(0, 3, n), rng.integers(0, 3, 5)
    if (
        D == 1
        or np.isclose(
            np.diff(np.sort(bank / np.linalg.norm(bank, axis=1, keepdims=True) @ query.T, axis=0), axis=0), 0
        ).any()
    ):
        return  # ties
    ours = common.metrics.knn_top1(*map(torch.tensor, (bank, bank_y, query, query_y)), k=k, tau=tau)
    assert ours == pytest.approx(oracles.knn_top1(bank, bank_y, query, query_y, k, tau))


@given(seeds, st.sampled_from([0.2, 1.0, 5.0]))
def test_the_temperature_is_the_minimum_of_the_cross_entropy(seed, scale):
    rng = np.random.default_rng(seed)
    y = torch.tensor(rng.integers(0, 3, 200))
    scores = torch.tensor(scale * (rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[y]))
    best = common.metrics.best_temperature(scores, y)
    nll = lambda t: torch.nn.functional.cross_entropy(scores / t, y).item()
    assert nll(best) <= min(nll(best * 1.01), nll(best / 1.01), nll(1.0)) + 1e-9


def test_temperature_undoes_a_scale():
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(5000, 4, generator=g, dtype=torch.double)
    y = torch.multinomial(scores.softmax(1), 1, generator=g).squeeze(1)  # calibrated as it is
    assert common.metrics.best_temperature(7 * scores, y) == pytest.approx(7, rel=0.1)
    assert common.metrics.reliability(7 * scores, y)[0] > 0.15 > 0.03 > common.metrics.reliability(scores, y)[0]


def test_weighted_neighbours_outvote_the_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-0.1, 1.0]])
    query = torch.tensor([[1.0, 0.1], [0.0, 2.0]])  # nearest: the one row of class 1; then three rows of class 0
    assert common.metrics.knn_top1(bank, torch.tensor([1, 0, 0, 0]), query, torch.tensor([1, 0])) == 100
    assert common.metrics.knn_top1(bank, torch.tensor([1, 0, 0, 0]), query, torch.tensor([0, 0])) == 50


def test_probe_metrics_by_hand():
    scores = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 3, 2], [1, 2, 3]])
    y = torch.tensor([0, 0, 1, 1])  # row 1: 0 taken for 1; row 3: 1 taken for 2
    assert common.metrics.topk(scores, y, 1) == 50 and common.metrics.topk(scores, y, 2) == 75
    assert sorted(common.metrics.worst_confusions(scores, y, ["a", "b", "c"])) == [["a", "b", 50.0], ["b", "c", 50.0]]


def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower_one():
    """Bins are (a, b]: of four, (0, 1/4] holds 1/4, (1/4, 1/2] holds 1/2, and (3/4, 1] holds 1."""
    # softmax gives 1/4, 1/2 and 1 exactly
    quarter, half, sure = [0.0] * 4, [0.0, 0.0, -1e4, -1e4], [1e4, 0.0, 0.0, 0.0]
    between = torch.tensor([[0.6, 0.2, 0.1, 0.1]], dtype=torch.double).log()
    scores = torch.cat([torch.tensor([quarter, half, half, sure], dtype=torch.double), between])
    y = torch.tensor([0, 0, 1, 0, 0])
    error, table = common.metrics.reliability(scores, y, 4)
    assert [row[0] for row in table] == [1, 2, 1, 1]
    assert [row[1] for row in table] == pytest.approx([0.25, 0.5, 0.6, 1.0])
    assert error == pytest.approx((0.75 + 0 + 0.4 + 0) / 5)
    assert error == pytest.approx(oracles.expected_calibration_error(scores.softmax(1).numpy(), y.numpy(), 4))


def test_accuracy_of_a_class_is_the_share_of_its_own_images():
    scores = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 2])]
    y = torch.tensor([0, 0, 1, 1, 1, 1])  # class 1: two of four right; class 2 has no image
    assert common.metrics.per_class(scores, y, ["a", "b", "c"]) == {"a": 100, "b": 50}


def test_neighbours_are_200_at_a_temperature_of_7_hundredths_unless_said_otherwise():
    rng = np.random.default_rng(0)
    bank_y, query_y = rng.integers(0, 4, 400), rng.integers(0, 4, 150)
    bank, query = (rng.normal(size=(len(y), 12)) + 0.6 * np.eye(12)[y] for y in (bank_y, query_y))
    ours = common.metrics.knn_top1(*map(torch.tensor, (bank, bank_y, query, query_y)))
    assert ours == pytest.approx(oracles.knn_top1(bank, bank_y, query, query_y, k=200, tau=0.07))
    for k, tau in ((20, 0.07), (1, 0.07), (200, 0.7)):  # which would give other numbers here
        assert ours != pytest.approx(oracles.knn_top1(bank, bank_y, query, query_y, k, tau))


def test_where_there_are_no_more_classes_than_are_looked_at_every_label_is_among_them():
    scores, y = torch.tensor([[3.0, 2, 1], [1, 2, 3]]), torch.tensor([2, 0])
    assert [common.metrics.topk(scores, y, k) for k in (1, 2, 3, 5)] == [0, 0, 100, 100]


@given(seeds, st.integers(2, 40), st.integers(2, 6), st.sampled_from([1, 2, 5]))
def test_retrieval_is_the_oracles(seed, n, D, classes):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(n, D)), rng.integers(0, classes, n)
    found = common.metrics.retrieval(torch.tensor(z), torch.tensor(y))
    assert list(found) == ["recall_at_1", "r_precision", "map_at_r"]
    assert list(found.values()) == (pytest.approx(oracles.retrieval(z, y)) if len(set(y)) < n else [None] * 3)


def test_retrieval_by_hand():
    """Rows on a line by angle. Of class 0 each has R = 2 others, of class 1 one, and class 2 has one row."""
    angle = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.5])
    z, y = torch.stack([angle.cos(), angle.sin()], 1), [0, 0, 1, 0, 1, 2]
    z = z * torch.tensor([[1.0], [5], [1], [2], [1], [9]])  # the length of a row means nothing
    # row 0: right, wrong    row 1: right, wrong    row 2: wrong    row 3: wrong, right    row 4: wrong
    found = common.metrics.retrieval(z, torch.tensor(y))
    assert found["recall_at_1"] == pytest.approx(40) and found["r_precision"] == pytest.approx(30)
    assert found["map_at_r"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0 + 1 / 4 + 0) / 5)
    alone = common.metrics.retrieval(z, torch.arange(6))
    assert alone == {"recall_at_1": None, "r_precision": None, "map_at_r": None}


def test_retrieval_of_many_rows_is_that_of_its_parts(monkeypatch):
    z, y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    whole = common.metrics.retrieval(z, y)
    monkeypatch.setattr(common.metrics, "SIMILARITIES", 150)  # three queries at a time
    assert common.metrics.retrieval(z, y) == pytest.approx(whole)


def test_the_calibration_error_has_fifteen_bins():
    rng = np.random.default_rng(0)
    scores, y = torch.tensor(rng.normal(size=(300, 3))), torch.tensor(rng.integers(0, 3, 300))
    error, table = common.metrics.reliability(scores, y)
    assert len(table) == 15
    assert error == pytest.approx(oracles.expected_calibration_error(scores.softmax(1).numpy(), y.numpy(), 15))


def test_many_queries_have_the_neighbours_of_few(monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank, query, y = torch.randn(50, 4, generator=g), torch.randn(30, 4, generator=g), torch.arange(50) % 3
    whole = common.metrics.knn_top1(bank, y, query, y[:30], k=5)
    monkeypatch.setattr(common.metrics, "SIMILARITIES", 150)  # three queries at a time
    assert common.metrics.knn_top1(bank, y, query, y[:30], k=5) == whole > 0


def test_five_confusions_are_listed_where_there_are_fewer_classes():
    scores = torch.eye(3)[torch.tensor([1, 2, 0, 2, 0, 1])]
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    assert len(common.metrics.worst_confusions(scores, y, ["a", "b", "c"])) == 5
