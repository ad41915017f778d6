"""The oracle against the paper, against hand-worked cases and, for its gradients, against central differences."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import reference_numpy as ref
from strategies import batches, distinct, lone_anchor_batches, many_views, seeds, soft_batches, taus, two_views

log, exp, sqrt = np.log, np.exp, np.sqrt
several = st.integers(2, 16)  # widths: in one dimension unit rows are +-1, which ties every distance


def direction(seed, z):
    v = np.random.default_rng(seed).normal(size=z.shape)
    return v / np.linalg.norm(v)


def slope(f, z, v, step):
    return (f(z + step * v) - f(z - step * v)) / (2 * step)


def assert_slope(f, grad, z, seed, tau=1.0):
    """grad is the slope of f along one random direction, to 1e-6 of the steepest that scores over tau allow."""
    reach = min(1, sqrt(tau), tau / max(1, np.linalg.norm(z, axis=1).max()))  # a move of a row by it moves s/tau by 1
    v = direction(seed, z)
    assert grad.shape == z.shape
    assert np.sum(grad * v) == pytest.approx(slope(f, z, v, 1e-4 * reach), rel=1e-6, abs=1e-6 / reach)


def distances(z):
    return ((z[:, None] - z[None]) ** 2).sum(-1)


def clear(values, gap=1e-3):
    """No two of the values are so near that a step of a difference could swap them."""
    return np.all(np.diff(np.sort(values)) > gap)


# Gradients


@pytest.mark.parametrize("denominator", ["all", "one_positive", "negatives"])
@pytest.mark.parametrize("name", ["supcon_out", "supcon_in"])
@given(batch=batches(), seed=seeds)
def test_supcon_gradient_is_the_slope(name, denominator, batch, seed):
    z, y, tau, _ = batch
    grad = getattr(ref, name + "_grad")(z, y, tau, denominator=denominator)
    assert_slope(lambda z: getattr(ref, name)(z, y, tau, denominator=denominator), grad, z, seed, tau)


@pytest.mark.parametrize("denominator", ["all", "one_positive", "negatives"])
@pytest.mark.parametrize("variant", ["out", "in"])
@given(batch=batches(min_images=2), seed=seeds)
def test_gradients_of_anchors_against_another_set_are_the_slopes(variant, denominator, batch, seed):
    z, y, tau, _ = batch
    M, options = len(z) // 2, {"own": 0, "variant": variant, "denominator": denominator}
    of = lambda anchors, rows: ref.supcon_against(anchors, y[:M], rows, y, tau, **options)
    grad, grad_rows = ref.supcon_against_grad(z[:M], y[:M], z, y, tau, **options)
    assert_slope(lambda anchors: of(anchors, z), grad, z[:M], seed, tau)
    assert_slope(lambda rows: of(z[:M], rows), grad_rows, z, seed, tau)


@pytest.mark.parametrize("denominator", ["all", "one_positive", "negatives"])
@pytest.mark.parametrize("name", ["supcon_out", "supcon_in"])
@given(batch=batches())
def test_anchors_against_themselves_have_the_loss_of_one_set(name, denominator, batch):
    z, y, tau, _ = batch
    options = {"denominator": denominator, "reduction": "none"}
    against = ref.supcon_against(z, y, z, y, tau, own=0, variant=name.removeprefix("supcon_"), **options)
    np.testing.assert_allclose(against, getattr(ref, name)(z, y, tau, **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["supcon_out", "supcon_in"])
@given(batch=batches(views=many_views), images=st.integers(0, 3), seed=seeds)
def test_capped_gradient_is_the_slope(name, batch, images, seed):
    z, y, tau, views = batch
    options = dict(positives_cap=images * views, views=views)
    grad = getattr(ref, name + "_grad")(z, y, tau, **options)
    assert_slope(lambda z: getattr(ref, name)(z, y, tau, **options), grad, z, seed, tau)


@pytest.mark.parametrize("name", ["supcon_out", "supcon_in"])
@given(batch=soft_batches(), seed=seeds)
def test_soft_label_gradient_is_the_slope(name, batch, seed):
    z, y, tau, _ = batch
    grad = getattr(ref, name + "_grad")(z, y, tau)
    assert_slope(lambda z: getattr(ref, name)(z, y, tau), grad, z, seed, tau)


@given(batch=batches(), seed=seeds)
def test_nt_xent_gradient_is_the_slope(batch, seed):
    z, _, tau, views = batch
    grad = ref.nt_xent_grad(z, tau, views=views)
    assert_slope(lambda z: ref.nt_xent(z, tau, views=views), grad, z, seed, tau)


@given(batch=batches(views=two_views), seed=seeds)
def test_n_pair_gradients_are_the_slopes(batch, seed):
    anchor, positive = np.split(batch.z, 2)
    grad, grad_pos = ref.n_pair_grad(anchor, positive)
    assert_slope(lambda f: ref.n_pair(f, positive), grad, anchor, seed)
    assert_slope(lambda f: ref.n_pair(anchor, f), grad_pos, positive, seed)


@given(batch=batches(layouts=distinct, widths=several), k=st.integers(1, 5), seed=seeds)
def test_hard_and_simple_gradients_are_the_slopes(batch, k, seed):
    z, _, tau, views = batch
    assume(all(clear(np.delete(z @ z_i, i)) for i, z_i in enumerate(z)))
    grad = ref.hard_contrastive_grad(z, tau, k, views=views)
    assert_slope(lambda z: ref.hard_contrastive(z, tau, k, views=views), grad, z, seed, min(tau, 0.1))
    for kept in (None, k):
        grad = ref.simple_contrastive_grad(z, 0.3, views=views, k=kept)
        assert_slope(lambda z: ref.simple_contrastive(z, 0.3, views=views, k=kept), grad, z, seed, 0.1)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
@given(batch=batches(layouts=distinct, widths=several), margin=st.sampled_from([0.2, 1.0]), seed=seeds)
def test_triplet_gradient_is_the_slope(mining, soft, batch, margin, seed):
    z, y, options = batch.z, batch.y, dict(mining=mining, soft=soft)
    d = distances(z)
    assume(all(clear(np.append(d_i, d_i + margin)) for d_i in d))
    grad = ref.triplet_grad(z, y, margin, **options)
    assert_slope(lambda z: ref.triplet(z, y, margin, **options), grad, z, seed, 0.1)


@given(batch=batches(layouts=distinct, widths=several), margin=st.sampled_from([1.0, 4.0]), seed=seeds)
def test_max_margin_gradient_is_the_slope(batch, margin, seed):
    z, y = batch.z, batch.y
    D = sqrt(distances(z)[~np.eye(len(z), dtype=bool)])
    assume(np.all(D > 0.1) and np.all(abs(D - margin) > 1e-3))
    assert_slope(lambda z: ref.max_margin(z, y, margin), ref.max_margin_grad(z, y, margin), z, seed, 0.1)


@given(batch=batches(views=many_views), t=st.sampled_from([0.5, 2]), seed=seeds)
def test_gradients_of_the_measures_are_the_slopes(batch, t, seed):
    z, y, _, views = batch
    assert_slope(lambda z: ref.uniformity(z, t), ref.uniformity_grad(z, t), z, seed, 0.1)
    assert_slope(lambda z: ref.alignment(z, views=views), ref.alignment_grad(z, views=views), z, seed)
    assert_slope(lambda z: ref.tolerance(z, y), ref.tolerance_grad(z, y), z, seed)


@pytest.mark.parametrize(
    "name, arguments, options",
    [
        ("supcon_out", ([0, 0, 1, 0, 0, 1], 0.4), {}),
        ("supcon_in", ([0, 0, 1, 0, 0, 2], 0.4), {}),
        ("supcon_out", ([0, 0, 1, 0, 0, 1], 0.4), {"positives_cap": 0}),
        ("supcon_in", (np.eye(3)[[0, 1, 2, 0, 1, 1]] + 0.2, 0.4), {}),
        ("nt_xent", (0.4,), {}),
        ("hard_contrastive", (0.4, 2), {}),
        ("simple_contrastive", (0.3,), {"k": 3}),
        ("triplet", ([0, 0, 1, 0, 0, 1], 0.5), {}),
        ("max_margin", ([0, 0, 1, 0, 0, 1], 2.0), {}),
        ("uniformity", (), {}),
        ("alignment", (), {}),
        ("tolerance", ([0, 0, 1, 0, 0, 1],), {}),
    ],
)
def test_gradient_in_every_coordinate(name, arguments, options):
    z = np.random.default_rng(3).normal(size=(6, 3))
    loss, grad = getattr(ref, name), getattr(ref, name + "_grad")(z, *arguments, **options)
    for at in np.ndindex(*z.shape):
        v = np.zeros_like(z)
        v[at] = 1
        assert grad[at] == pytest.approx(slope(lambda z: loss(z, *arguments, **options), z, v, 1e-5), abs=1e-7), at


@pytest.mark.parametrize("variant", ["out", "in"])
@given(batch=batches(), seed=seeds)
def test_anchor_grad_is_the_slope_of_one_anchors_loss(variant, batch, seed):
    """L_i reads z_i as its anchor only, so moving row i moves that argument alone."""
    z, y, tau, _ = batch
    i = seed % len(z)
    only_i, loss = np.arange(len(z))[:, None] == i, getattr(ref, "supcon_" + variant)
    grad = only_i * ref.anchor_grad(i, z, y, tau, variant)
    assert_slope(lambda x: loss(np.where(only_i, x, z), y, tau, reduction="none")[i], grad, z, seed, tau)


def test_anchor_grad_weighs_a_positive_by_P_minus_X():
    # e = exp(s/tau) = 2, 4 (positives), 3 (a negative): P = 2/9, 4/9, 3/9; X = 1/2, 1/2 (out), 2/6, 4/6 (in).
    z, y = np.array([[1.0], [2 * log(2)], [2 * log(4)], [2 * log(3)]]), [0, 0, 0, 1]
    out = z[1] * (2 / 9 - 1 / 2) + z[2] * (4 / 9 - 1 / 2) + z[3] * 3 / 9
    in_ = z[1] * (2 / 9 - 2 / 6) + z[2] * (4 / 9 - 4 / 6) + z[3] * 3 / 9
    assert ref.anchor_grad(0, z, y, 2.0, "out") == pytest.approx(out / 2)
    assert ref.anchor_grad(0, z, y, 2.0, "in") == pytest.approx(in_ / 2)
    assert ref.anchor_grad(3, z, y, 2.0, "out") == 0


@given(batch=batches(), scale=st.floats(0.1, 10), seed=seeds)
def test_normalize_grad_is_the_slope_tangential_and_falls_with_the_norm(batch, scale, seed):
    w, g = batch.z, np.random.default_rng(seed).normal(size=batch.z.shape)
    grad = ref.normalize_grad(w, g)
    assert_slope(lambda w: np.sum(g * ref.normalize(w)), grad, w, seed + 1, 0.1)
    assert np.sum(w * grad, axis=1) == pytest.approx(0, abs=1e-12)
    assert ref.normalize_grad(scale * w, g) == pytest.approx(grad / scale)


# Values worked by hand. In one dimension, with z_0 = 1, anchor 0's scores are the other rows; e_a = exp(s_0a/tau).


def row_of(*e, tau=1.0):
    """Anchor 0 = 1, then rows with exp(s_0a/tau) = e."""
    return np.array([1.0, *(tau * log(e))])[:, None]


@pytest.mark.parametrize("loss", [ref.supcon_out, ref.supcon_in])
@pytest.mark.parametrize("y", [[0, 0, 1, 1], [0, 0, 0, 0]])
def test_four_equal_scores_give_log_three(loss, y):
    # every P_ip = 1/3, whatever tau
    assert loss(np.eye(4), y, 0.37) == pytest.approx(log(3))


@pytest.mark.parametrize(
    "denominator, out, in_",
    [
        # e = 2, 4 (positives), 3 (negative); D = 9: ratios 2/9 and 4/9, their product 8/81, their mean 3/9
        ("all", log(9 / sqrt(8)), log(3)),
        # D = 2 + 3 and 4 + 3: ratios 2/5 and 4/7, product 8/35, mean 17/35
        ("one_positive", log(35 / 8) / 2, log(35 / 17)),
        # D = 3: ratios 2/3 and 4/3, product 8/9, mean 1
        ("negatives", log(9 / 8) / 2, 0),
    ],
)
def test_two_positives_and_a_negative(denominator, out, in_):
    z, y = row_of(2, 4, 3, tau=2.0), [0, 0, 0, 1]
    options = dict(denominator=denominator, reduction="none")
    assert ref.supcon_out(z, y, 2.0, **options)[0] == pytest.approx(out)
    assert ref.supcon_in(z, y, 2.0, **options)[0] == pytest.approx(in_, abs=1e-15)


def test_lone_anchor_is_left_out_of_the_mean_but_stays_a_contrast():
    # rows 0 and 1: one positive among two equal scores, log 2; row 2 has no positive
    assert ref.supcon_out(np.eye(3), [0, 0, 1], reduction="none") == pytest.approx([log(2), log(2), 0])
    assert ref.supcon_out(np.eye(3), [0, 0, 1]) == pytest.approx(log(2))
    # P_02 = P_12 = 1/2, so row 2 is moved by (z_0 + z_1)/2, over 2 anchors and tau = 0.1
    assert ref.supcon_out_grad(np.eye(3), [0, 0, 1], 0.1)[2] == pytest.approx([2.5, 2.5, 0])


@given(batch=lone_anchor_batches(), name=st.sampled_from(["supcon_out", "supcon_in"]))
def test_mean_counts_the_anchors_that_have_a_positive(batch, name):
    z, y, tau, _ = batch
    values = getattr(ref, name)(z, y, tau, reduction="none")
    has_positive = np.array([list(y).count(label) > 1 for label in y])
    assert not has_positive[-1] and np.all(values[~has_positive] == 0)
    assert getattr(ref, name)(z, y, tau) == pytest.approx(values.sum() / has_positive.sum())


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("supcon_out", ([0, 1, 2, 3],)),
        ("supcon_in", ([0, 1, 2, 3],)),
        ("supcon_out", (np.eye(4),)),
        ("triplet", ([0, 1, 2, 3],)),
        ("triplet", ([0, 0, 0, 0],)),
        ("max_margin", ([0, 1, 2, 3],)),
        ("tolerance", ([0, 1, 2, 3],)),
    ],
)
def test_batch_without_anchors_that_count_gives_zero(name, arguments):
    z = np.random.default_rng(0).normal(size=(4, 3))
    assert getattr(ref, name)(z, *arguments) == 0
    assert np.array_equal(getattr(ref, name + "_grad")(z, *arguments), np.zeros((4, 3)))


@pytest.mark.parametrize(
    "name, arguments", [("nt_xent", (0.5,)), ("hard_contrastive", (0.5, 1)), ("simple_contrastive", (0.5,))]
)
def test_one_view_has_no_positive(name, arguments):
    z = np.random.default_rng(0).normal(size=(4, 3))
    assert getattr(ref, name)(z, *arguments, views=1) == 0
    assert np.array_equal(getattr(ref, name + "_grad")(z, *arguments, views=1), np.zeros((4, 3)))


def test_anchor_without_negatives_is_left_out_of_denominator_negatives():
    assert ref.supcon_out(np.eye(4), [0, 0, 0, 0], denominator="negatives") == 0


@pytest.mark.parametrize("cap, rows_left", [(0, 1 + 2), (2, 3 + 2), (4, 5 + 2), (6, 5 + 2), (None, 5 + 2)])
def test_capped_positives_leave_the_denominator(cap, rows_left):
    # 4 images, 2 views, equal scores: L_0 = log |A(0)|, own view + cap rows of images 1 and 2 + 2 negatives (image 3)
    values = ref.supcon_out(np.eye(8), [0, 0, 0, 1] * 2, positives_cap=cap, reduction="none")
    assert values[0] == pytest.approx(log(rows_left))


def test_cap_keeps_the_earliest_images_in_all_their_views():
    # images 0 1 2 3 | 0 1 2 3, image 3 negative. Anchor 0 keeps its own 4 and image 1's 2 and 5: (11/3) / (11 + 3 + 6)
    z, y = row_of(2, 100, 3, 4, 5, 100, 6), [0, 0, 0, 1] * 2
    assert ref.supcon_in(z, y, 1.0, positives_cap=2, reduction="none")[0] == pytest.approx(log(60 / 11))


@pytest.mark.parametrize("anchor, dropped_image", [(0, 2), (4, 2), (1, 2), (5, 2), (2, 1), (6, 1)])
def test_cap_skips_the_anchors_own_image(anchor, dropped_image):
    # images 0 1 2 3 | 0 1 2 3, image 3 negative: image 0 keeps 1, images 1 and 2 keep 0
    z, y = np.random.default_rng(0).normal(size=(8, 3)), [0, 0, 0, 1] * 2
    before = ref.supcon_out(z, y, 1.0, positives_cap=2, reduction="none")[anchor]
    for row in range(8):
        moved = z + np.eye(8)[:, row : row + 1]
        after = ref.supcon_out(moved, y, 1.0, positives_cap=2, reduction="none")[anchor]
        assert (after == before) == (row % 4 == dropped_image)


def test_soft_labels_weigh_the_positives():
    # e = 2, 3; overlaps of y_0 with y_1, y_2: 1, 1/2, so w = 2/3, 1/3; sum over A(0) of w e/5 = (7/3)/5
    z, y = row_of(2, 3), np.array([[1, 0], [1, 0], [0.5, 0.5]])
    assert ref.supcon_out(z, y, 1.0, reduction="none")[0] == pytest.approx(log(5) - 2 / 3 * log(2) - 1 / 3 * log(3))
    assert ref.supcon_in(z, y, 1.0, reduction="none")[0] == pytest.approx(log(15 / 7))


def test_soft_anchor_without_overlap_is_left_out():
    # row 0 shares no class; rows 1 and 2: one of two equal scores
    y = np.array([[1, 0], [0, 1], [0, 1]])
    assert ref.supcon_out(np.eye(3), y, reduction="none") == pytest.approx([0, log(2), log(2)])
    assert ref.supcon_out(np.eye(3), y) == pytest.approx(log(2))


@given(batch=batches(), name=st.sampled_from(["supcon_out", "supcon_in"]))
def test_one_hot_probabilities_are_labels(batch, name):
    z, y, tau, _ = batch
    hot = np.eye(y.max() + 1)[y]
    near = dict(rel=1e-9, abs=1e-9 / tau)
    assert getattr(ref, name)(z, hot, tau) == pytest.approx(getattr(ref, name)(z, y, tau), **near)
    grad = getattr(ref, name + "_grad")
    assert grad(z, hot, tau) == pytest.approx(grad(z, y, tau), **near)


@given(batch=batches())
def test_jensen(batch):
    """log |P(i)| <= L_in,i <= L_out,i for every anchor that counts."""
    z, y, tau, _ = batch
    in_, out = (loss(z, y, tau, reduction="none") for loss in (ref.supcon_in, ref.supcon_out))
    P = np.array([list(y).count(label) - 1 for label in y])
    slack = 1e-12 * (1 + 25 / tau)
    assert np.all(in_ >= log(np.maximum(P, 1)) - slack) and np.all(out >= in_ - slack)


SIX = row_of(1, 2, 4, 3, 5)  # images 0 1 2 | 0 1 2: anchor 0's own view has e = 4, its negatives 1, 2, 3, 5


def test_nt_xent_of_three_images():
    assert ref.nt_xent(SIX, 1.0, reduction="none")[0] == pytest.approx(log(15 / 4))


@pytest.mark.parametrize("k, kept", [(1, 5), (2, 5 + 3), (3, 5 + 3 + 2), (4, 11), (9, 11)])
def test_hard_contrastive_keeps_the_k_nearest_negatives(k, kept):
    assert ref.hard_contrastive(SIX, 1.0, k, reduction="none")[0] == pytest.approx(log((4 + kept) / 4))


@pytest.mark.parametrize("k, negatives", [(None, log(30)), (1, log(5)), (2, log(15))])
def test_simple_contrastive_is_linear_in_the_scores(k, negatives):
    assert ref.simple_contrastive(SIX, 0.5, k=k, reduction="none")[0] == pytest.approx(-log(4) + 0.5 * negatives)


def test_positives_of_three_views_share_the_weight():
    # one image in three views, e = 2, 3: no negatives
    z, options = row_of(2, 3), dict(views=3, reduction="none")
    assert ref.nt_xent(z, 1.0, **options)[0] == pytest.approx(log(5) - log(6) / 2)
    assert ref.hard_contrastive(z, 1.0, 1, **options)[0] == pytest.approx(log(5) - log(6) / 2)
    assert ref.simple_contrastive(z, 0.5, **options)[0] == pytest.approx(-log(6) / 2)


def test_n_pair_of_two_pairs():
    # exp(f_0 . f_j+) = 2 (own), 4: log(1 + 4/2);  exp(f_1 . f_j+) = 2^2, 4^2 (own): log(1 + 4/16)
    anchor, positive = np.array([[1.0], [2.0]]), np.array([[log(2)], [log(4)]])
    assert ref.n_pair(anchor, positive, reduction="none") == pytest.approx([log(3), log(5 / 4)])
    assert ref.n_pair(anchor, positive) == pytest.approx(log(15 / 4) / 2)


@pytest.mark.parametrize(
    "mining, expected",
    [
        # anchor at 0, positives at 1, 2 (d = 1, 4), negatives at 1.5, 3 (d = 2.25, 9), margin 2
        ("hard", [4 - 2.25 + 2]),
        ("semihard", [1 - 2.25 + 2, 4 - 9 + 2]),
        ("all", [1 - 2.25 + 2, 1 - 9 + 2, 4 - 2.25 + 2, 4 - 9 + 2]),
    ],
)
def test_triplet_of_each_mining(mining, expected):
    z, y = np.array([[0, 1, 2, 1.5, 3]]).T, [0, 0, 0, 1, 1]
    hinged, soft = np.maximum(expected, 0), log(1 + exp(expected))
    assert ref.triplet(z, y, 2, mining=mining, reduction="none")[0] == pytest.approx(hinged.mean())
    assert ref.triplet(z, y, 2, mining=mining, soft=True, reduction="none")[0] == pytest.approx(soft.mean())


def test_semihard_takes_the_farthest_negative_where_none_is_farther_than_the_positive():
    # positive d = 4, negatives d = 1 and 2.25: 4 - 2.25 + 2
    z, y = np.array([[0, 2, 1, 1.5]]).T, [0, 0, 1, 1]
    assert ref.triplet(z, y, 2, mining="semihard", reduction="none")[0] == pytest.approx(3.75)


def test_max_margin_averages_over_all_pairs_of_an_anchor():
    # positive at 3: 9/2; negatives at 0.4: 0.6^2/2, at 2: 0; rows 2 and 3 have no positive
    values = ref.max_margin(np.array([[0, 3, 0.4, 2]]).T, [0, 0, 1, 2], 1.0, reduction="none")
    assert values[0] == pytest.approx((4.5 + 0.18 + 0) / 3)
    assert np.all(values[2:] == 0)


def test_max_margin_gradient_is_zero_where_a_negative_lies_on_the_anchor():
    # rows 0 and 2 coincide: their pair moves nothing. L_0 and L_1 each have (z_0 - z_1)^2/2 over 2 pairs; 2 anchors
    grad = ref.max_margin_grad(np.array([[0.0], [3.0], [0.0]]), [0, 0, 1], 1.0)
    assert grad[0] == pytest.approx((-1.5 - 1.5) / 2) and grad[2] == 0


def test_uniformity_of_three_points():
    # d = 1, 1, 4
    assert ref.uniformity(np.array([[0], [1], [2]]), t=1) == pytest.approx(log((2 * exp(-1) + exp(-4)) / 3))
    assert ref.uniformity(np.array([[0], [1]])) == pytest.approx(-2)


def test_alignment_averages_over_pairs_of_views():
    assert ref.alignment(np.array([[0], [0], [1], [3]])) == pytest.approx((1 + 9) / 2)
    assert ref.alignment(np.array([[0], [1], [3]]), views=3) == pytest.approx((1 + 4 + 9) / 3)


def test_tolerance_pools_the_pairs_of_all_classes():
    # class 0: 1*2, 1*3, 2*3; class 1: 1*1
    assert ref.tolerance(np.array([[1], [2], [3], [1], [1]]), [0, 0, 0, 1, 1]) == pytest.approx((2 + 3 + 6 + 1) / 4)


@given(tau=taus, gap=st.floats(20, 30))
def test_small_loss_keeps_its_digits(tau, gap):
    # one positive, one negative: log(1 + exp(-gap)), 1e-9 to 1e-13
    z = np.array([[1.0], [1.0], [1 - gap * tau]])
    values = ref.supcon_out(z, [0, 0, 1], tau, reduction="none")
    assert values[0] == pytest.approx(np.log1p(exp(-gap)), rel=1e-9, abs=0)


# Errors

Z, Y = np.eye(4), [0, 0, 1, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ref.supcon_out(np.ones(4), Y), r"\(4,\)"),
        (lambda: ref.supcon_in(np.ones((2, 2, 2)), Y), r"\(2, 2, 2\)"),
        (lambda: ref.supcon_out(Z, [0, 0, 1]), r"\(3,\)"),
        (lambda: ref.supcon_out(Z, np.ones((3, 2))), r"\(3, 2\)"),
        (lambda: ref.triplet(Z, np.eye(4)), r"\(4, 4\)"),
        (lambda: ref.max_margin(Z, [0]), r"\(1,\)"),
        (lambda: ref.tolerance(Z, [0]), r"\(1,\)"),
        (lambda: ref.supcon_out(Z, Y, 0.0), "positive, got 0.0"),
        (lambda: ref.nt_xent(Z, -0.5), "positive, got -0.5"),
        (lambda: ref.hard_contrastive(Z, 0, 2), "tau must be positive, got 0"),
        (lambda: ref.supcon_against(Z, Y, Z, Y, -1.0), "positive, got -1.0"),
        (lambda: ref.supcon_against(Z, Y, Z, Y[:3]), r"\(3,\)"),
        (lambda: ref.supcon_out(Z, Y, denominator="some"), "'some'"),
        (lambda: ref.supcon_out(Z, Y, reduction="sum"), "'sum'"),
        (lambda: ref.triplet(Z, Y, reduction="sum"), "'sum'"),
        (lambda: ref.triplet(Z, Y, mining="easy"), "'easy'"),
        (lambda: ref.supcon_out(Z, Y, positives_cap=-2), "positives_cap -2"),
        (lambda: ref.supcon_out(Z, Y, positives_cap=3), "positives_cap 3"),
        (lambda: ref.supcon_out(Z, Y, positives_cap=3, views=3), "4 rows in 3 views"),
        (lambda: ref.supcon_out(Z, np.eye(4), denominator="negatives"), "class probabilities with negatives"),
        (lambda: ref.supcon_out(Z, np.eye(4), positives_cap=2), "class probabilities .* cap 2"),
        (lambda: ref.nt_xent(Z, views=3), "4 rows in 3 views"),
        (lambda: ref.nt_xent(Z, views=0), "0 views"),
        (lambda: ref.alignment(Z, views=1), "1 views"),
        (lambda: ref.hard_contrastive(Z, 0.5, 0), "k must be at least 1, got 0"),
        (lambda: ref.simple_contrastive(Z, 0.5, k=0), "k must be at least 1, got 0"),
        (lambda: ref.simple_contrastive(Z, 0.5, views=3), "4 rows in 3 views"),
        (lambda: ref.supcon_against(Z, Y, Z, Y, variant="mean"), "unknown variant 'mean'"),
        (lambda: ref.anchor_grad(0, Z, Y, 0.1, "mean"), "unknown variant 'mean'"),
        (lambda: ref.n_pair(Z, Z[:2]), r"\(2, 4\)"),
        (lambda: ref.uniformity(Z[:1]), r"\(1, 4\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
