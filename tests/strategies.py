"""Batches for property tests. Rows come from an integer seed, so that drawing is fast and a failure shrinks to a small
batch rather than to odd floats.

    @given(batches())                      any batch: 1 to 3 views, unit or raw rows, repeated rows, lone anchors, ...
    @given(batches(units=always))          unit rows only; so for every part of a batch
    @given(lone_anchor_batches())          one view, at least one row alone in its class and two rows together
    @given(soft_batches())                 y is class probabilities
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

MAX_ROWS = 24
MAX_NORM = 5.0


class Batch(NamedTuple):
    z: np.ndarray  # (N, D) float64, the views stacked: view 0 of every image, then view 1, ...
    y: np.ndarray  # (N,) int64 labels, or (N, C) class probabilities in soft_batches
    tau: float
    views: int


seeds = st.integers(0, 2**32 - 1)
taus = st.sampled_from([float(10**e) for e in sorted(np.linspace(-3, 1, 81), key=abs)])  # log-uniform, shrinks to 1
widths = st.sampled_from(range(1, 17))
one_view = st.just(1)
two_views = st.just(2)
many_views = st.sampled_from([2, 3])
view_counts = st.sampled_from([1, 2, 3])
one_class = st.just(1)
class_counts = st.sampled_from([1, 2, 3, 5, 8])  # one class: no negatives; many classes in one view: lone anchors
always = st.just(True)
never = st.just(False)
distinct = st.just("distinct")
layouts = st.sampled_from(["distinct", "repeated", "equal"])


def unit(w):
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def rows(seed, count, width, units, layout):
    """ "distinct" rows, "repeated" ones (each may stand there several times), or "equal": every pair has one score, and
    unit rows then have `count` columns."""
    rng = np.random.default_rng(seed)
    directions = unit(rng.normal(size=(count, width)))
    if layout == "repeated":
        directions = directions[rng.integers(0, count, size=count)]
    if layout == "equal":
        return np.eye(count) if units else np.full((count, width), 0.5)
    return directions if units else directions * rng.uniform(0.1, MAX_NORM, size=(count, 1))


@st.composite
def batches(
    draw,
    views=view_counts,
    taus=taus,
    widths=widths,
    classes=class_counts,
    units=st.booleans(),
    layouts=layouts,
    min_images=1,
):
    v = draw(views)
    n = draw(st.sampled_from(range(min_images, MAX_ROWS // v + 1)))
    seed = draw(seeds)
    z = rows(seed, n * v, draw(widths), draw(units), draw(layouts))
    labels = np.random.default_rng([seed, 1]).integers(0, draw(classes), size=n)
    return Batch(z, np.tile(labels, v), draw(taus), v)


@st.composite
def lone_anchor_batches(draw, **parts):
    """One view; the last row is the only one of its class, the first two share one."""
    z, y, tau, views = draw(batches(views=one_view, min_images=3, **parts))
    y[1] = y[0]
    y[-1] = y.max() + 1
    return Batch(z, y, tau, views)


@st.composite
def soft_batches(draw, **parts):
    """MixUp's labels: every image shares its class with another image's; some rows are left unmixed."""
    z, y, tau, views = draw(batches(**parts))
    n = len(y) // views
    rng = np.random.default_rng(draw(seeds))
    hard = np.eye(max(y.max() + 1, 2))[y[:n]]
    share = np.maximum(rng.uniform(-0.5, 1, size=(n, 1)), 0)
    mixed = (1 - share) * hard + share * hard[rng.permutation(n)]
    return Batch(z, np.tile(mixed, (views, 1)), tau, views)
