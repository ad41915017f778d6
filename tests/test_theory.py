"""What the papers prove about the losses, and what follows from it, one claim a test.

"A" is Khosla et al. 2020 (arXiv 2004.11362v5), "B" Wang & Liu 2021 (arXiv 2012.09740). Where a paper writes "about"
or "proportional to" the test has the exact form or a bound that holds for every tau. Everything is float64.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import losses
import reference_numpy as oracle
import strategies as own

LOG2 = math.log(2)
LOSSES = pytest.mark.parametrize("loss", [losses.supcon_out, losses.supcon_in])
scores = st.floats(-1, 1).map(lambda s: round(s, 6))
temperatures = st.floats(math.log(0.01), math.log(100)).map(math.exp)


def close(actual, expected, scale=1.0):
    """Equal up to float64 rounding of numbers of size `scale`."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return bool((actual - expected).abs().max() <= 1e-12 * scale)


def tensors(batch):
    return torch.as_tensor(batch.z, dtype=torch.float64), torch.as_tensor(batch.y)


def unit(batch):
    return F.normalize(tensors(batch)[0])


def per_anchor(loss, z, y, tau):
    return loss(z, y, tau, reduction="none")


def with_scores(s):
    """Unit rows: the anchor e_0, then for the k-th score a row s e_0 + sqrt(1 - s^2) e_k."""
    s = torch.as_tensor(s, dtype=torch.float64)
    z = torch.zeros(len(s) + 1, len(s) + 1, dtype=torch.float64)
    z[0, 0] = 1
    z[1:, 0], z[1:, 1:] = s, torch.diag((1 - s.square()).sqrt())
    return z


def one_anchor(positives, negatives):
    """Rows whose first has these scores; only it and its positives share a label."""
    z = with_scores([*positives, *negatives])
    return z, torch.tensor([0] * (1 + len(positives)) + list(range(1, 1 + len(negatives))))


def score_gradients(loss, z, y, tau):
    """G_0j = dL_0/ds_0j for j >= 1, and dL_0/dz_0: row 0 enters its own value as the anchor alone."""
    anchor, others = z[:1].clone().requires_grad_(), z[1:].clone().requires_grad_()
    value = per_anchor(loss, torch.cat([anchor, others]), y, tau)[0]
    to_anchor, to_others = torch.autograd.grad(value, [anchor, others])
    return to_others @ z[0] / z[0].square().sum(), to_anchor[0]


def pulls_on_weights(loss, positives, negatives, tau):
    """Size of each contrast's own part of dL_0/dw_0, w_0 the anchor before normalisation, times tau."""
    z, y = one_anchor(positives, negatives)
    w = z[:1].clone().requires_grad_()
    value = per_anchor(loss, torch.cat([F.normalize(w), z[1:]]), y, tau)[0]
    return tau * torch.autograd.grad(value, w)[0][0, 1:].abs()


# ---------------------------------------------------------------- L_in, L_out and Jensen (A sec. 3.2.2)


def positives_of(y, i):
    return [p for p in range(len(y)) if p != i and y[p] == y[i]]


@given(own.batches())
def test_l_in_is_at_most_l_out(batch):
    """As in the last arXiv version; the proceedings print it the other way round."""
    z, y = tensors(batch)
    gap = per_anchor(losses.supcon_out, z, y, batch.tau) - per_anchor(losses.supcon_in, z, y, batch.tau)
    assert gap.min() >= -1e-12 * (1 + (z @ z.T).abs().max() / batch.tau)


@given(own.batches())
def test_gap_obeys_both_bounds(batch):
    """0 <= gap_i <= min( (max_P s - mean_P s)/tau, (max_P s - min_P s)^2/(8 tau^2) ), the second one Hoeffding's."""
    z, y = tensors(batch)
    s = z @ z.T
    gap = per_anchor(losses.supcon_out, z, y, batch.tau) - per_anchor(losses.supcon_in, z, y, batch.tau)
    for i in range(len(y)):
        if P := positives_of(y, i):
            top, mean, low = s[i, P].max(), s[i, P].mean(), s[i, P].min()
            bound = torch.minimum((top - mean) / batch.tau, (top - low) ** 2 / (8 * batch.tau**2))
            assert gap[i] <= bound + 1e-12 * (1 + s.abs().max() / batch.tau)


@given(own.batches(), st.integers(0, 2**32 - 1))
def test_gap_depends_on_the_positives_only(batch, seed):
    z, y = tensors(batch)
    other = z.clone()
    other[y != y[0]] = torch.as_tensor(np.random.default_rng(seed).normal(size=z[y != y[0]].shape))
    gaps = [
        per_anchor(losses.supcon_out, x, y, batch.tau)[0] - per_anchor(losses.supcon_in, x, y, batch.tau)[0]
        for x in (z, other)
    ]
    size = max((x @ x.T).abs().max() for x in (z, other))
    assert close(*gaps, 1 + size / batch.tau)


@given(scores, st.integers(1, 4), st.lists(scores, max_size=4), temperatures)
def test_l_in_equals_l_out_where_all_positives_tie(s_p, count, negatives, tau):
    """A eq. 6."""
    z, y = one_anchor([s_p] * count, negatives)
    values = [per_anchor(loss, z, y, tau)[0] for loss in (losses.supcon_out, losses.supcon_in)]
    assert close(*values, 1 + 1 / tau)


@given(own.batches())
def test_range_of_the_losses_on_unit_rows(batch):
    """log|P| <= L_in <= L_out <= log|A| + 2/tau: with several positives a loss does not reach 0."""
    z, y = unit(batch), tensors(batch)[1]
    out, inside = (per_anchor(loss, z, y, batch.tau) for loss in (losses.supcon_out, losses.supcon_in))
    for i in range(len(y)):
        if P := positives_of(y, i):
            slack = 1e-12 * (1 + 1 / batch.tau)
            assert math.log(len(P)) - slack <= inside[i]
            assert out[i] <= math.log(len(y) - 1) + 2 / batch.tau + slack


@given(own.batches())
def test_v1_of_the_paper_states_the_same_loss(batch):
    """v1's eq. 4: the coefficient is -1/(2 N_y - 1), N_y the IMAGES of the class, which is |P(i)| for two views."""
    n = len(batch.z) // batch.views
    z, y = np.concatenate([batch.z[:n], -batch.z[:n] / 2]), np.concatenate([batch.y[:n]] * 2)
    s, total = z @ z.T / batch.tau, 0.0
    for i in range(2 * n):
        log_sum = np.logaddexp.reduce(np.delete(s[i], i))
        total += sum(s[i, p] - log_sum for p in positives_of(y, i)) * -1 / (2 * np.sum(y[:n] == y[i]) - 1)
    value = losses.supcon_out(torch.as_tensor(z), torch.as_tensor(y), batch.tau)
    assert close(value, total / (2 * n), 1 + np.abs(s).max())


# ---------------------------------------------------------------- gradients (A sec. 3.2.2, 7 and eqs. 4, 5, 16-24)


@LOSSES
@given(batch=own.batches())
def test_anchor_gradient_is_eq_4_and_5(loss, batch):
    z, y = tensors(batch)
    _, actual = score_gradients(loss, z, y, batch.tau)
    expected = oracle.anchor_grad(0, batch.z, batch.y, batch.tau, loss.__name__.removeprefix("supcon_"))
    assert close(actual, expected, (1 + (z @ z.T).abs().max() / batch.tau) * z.norm(dim=1).max() / batch.tau)


@LOSSES
@given(batch=own.batches())
def test_pulls_and_pushes_of_an_anchor_cancel(loss, batch):
    """sum_j G_ij = 0."""
    z, y = tensors(batch)
    G, _ = score_gradients(loss, z, y, batch.tau)
    assert close(G.sum(), 0, (1 + (z @ z.T).abs().max() / batch.tau) / batch.tau)


@LOSSES
@given(batch=own.batches(), shift=st.integers(0, 2**32 - 1))
def test_a_vector_added_to_all_contrasts_changes_nothing(loss, batch, shift):
    """sum_j G_ij = 0 once more, for finite steps: all scores of the anchor move alike."""
    z, y = tensors(batch)
    moved = z + torch.as_tensor(np.random.default_rng(shift).normal(size=z.shape[1]))
    moved[0] = z[0]
    values = [per_anchor(loss, x, y, batch.tau)[0] for x in (z, moved)]
    assert close(*values, 1 + max((x @ x.T).abs().max() for x in (z, moved)) / batch.tau)


@given(st.lists(scores, min_size=1, max_size=5), st.lists(scores, max_size=5), temperatures)
def test_l_in_never_pushes_a_positive_away(positives, negatives, tau):
    """P_ip <= X_ip for L_in."""
    G, _ = score_gradients(losses.supcon_in, *one_anchor(positives, negatives), tau)
    assert (G[: len(positives)] <= 1e-12 * (1 + 1 / tau) / tau).all()


@LOSSES
@given(st.lists(scores, min_size=1, max_size=4), st.lists(scores, min_size=1, max_size=6), temperatures)
def test_weight_of_a_hard_positive(loss, easier, negatives, tau):
    """A eqs. 21-24 with their denominators: S_n/(S_p (S_p + S_n)) for L_in, |1/|P| - 1/(S_p + S_n)| for L_out."""
    tau = max(tau, 0.05)
    positives = [0.0, *easier]
    S_p, S_n = (sum(math.exp(s / tau) for s in side) for side in (positives, negatives))
    exact = S_n / (S_p * (S_p + S_n)) if loss is losses.supcon_in else abs(1 / len(positives) - 1 / (S_p + S_n))
    assert close(pulls_on_weights(loss, positives, negatives, tau)[0], exact, 1 + 1 / tau)


@LOSSES
@given(st.lists(scores, min_size=1, max_size=4), st.lists(scores, min_size=1, max_size=6), temperatures)
def test_normalisation_scales_each_pull_by_the_sine(loss, positives, negatives, tau):
    """A eqs. 19-20: every contrast acts on w_i with weight |G_ij| sqrt(1 - s_ij^2)."""
    G, _ = score_gradients(loss, *one_anchor(positives, negatives), tau)
    sine = (1 - torch.tensor(positives + negatives, dtype=torch.float64).square()).sqrt()
    assert close(pulls_on_weights(loss, positives, negatives, tau), tau * G.abs() * sine, 1 + 1 / tau)


@pytest.mark.parametrize("loss, hard_weight", [(losses.supcon_in, 8.42e-5), (losses.supcon_out, 0.4997)])
def test_only_l_out_pulls_a_hard_positive_beside_an_easy_one(loss, hard_weight):
    """One positive at s = .8, one at s = 0, 1000 negatives at s = 0, tau = .1: 1000/(2982 * 3982), 1/2 - 1/3982."""
    z, y = one_anchor([0.8, 0.0], [0.0])
    z, y = torch.cat([z, z[-1:].expand(999, -1)]), torch.cat([y, y[-1:].expand(999)])
    G, _ = score_gradients(loss, z, y, 0.1)
    assert -0.1 * G[1] == pytest.approx(hard_weight, rel=2e-3)


@pytest.mark.parametrize("count, weight", [(1, 0.999), (2, 0.500), (4, 0.250), (8, 0.125)])
def test_weight_of_a_hard_positive_falls_with_their_number(count, weight):
    """1/|P| - 1/(|P| + 1000): the paper's "larger with more positives" does not hold among many negatives."""
    z, y = one_anchor([0.0] * count, [0.0])
    z, y = torch.cat([z, z[-1:].expand(999, -1)]), torch.cat([y, y[-1:].expand(999)])
    G, _ = score_gradients(losses.supcon_out, z, y, 0.1)
    assert -0.1 * G[0] == pytest.approx(weight, abs=1e-3)


@pytest.mark.parametrize("tau, peak", [(0.1, 0.951), (1.0, 0.618)])
def test_hardest_negative_is_not_the_nearest(tau, peak):
    """e^{s/tau} sqrt(1 - s^2) peaks at s* = (sqrt(tau^2 + 4) - tau)/2."""
    grid = [k / 200 for k in range(-200, 201)]
    pulls = pulls_on_weights(losses.supcon_out, [0.5], grid, tau)[1:]
    assert grid[int(pulls.argmax())] == pytest.approx((math.sqrt(tau**2 + 4) - tau) / 2, abs=0.005)
    assert grid[int(pulls.argmax())] == pytest.approx(peak, abs=0.006)


@LOSSES
@given(batch=own.batches(), c=st.floats(0.1, 10))
def test_gradient_through_normalisation_is_tangential_and_falls_with_the_norm(loss, batch, c):
    """w . dL/dw = 0; c w gives 1/c of the gradient."""
    w, y = tensors(batch)
    grads = []
    for scale in (1, c):
        leaf = (scale * w).requires_grad_()
        grads.append(torch.autograd.grad(loss(F.normalize(leaf), y, batch.tau), leaf)[0])
    scale = (1 + 1 / batch.tau) / batch.tau / w.norm(dim=1).min()
    assert close((w * grads[0]).sum(1), 0, scale * w.norm(dim=1).max())
    assert close(c * grads[1], grads[0], scale)


# ---------------------------------------------------------------- invariances

ROW_LOSSES = {
    "supcon_out": losses.supcon_out,
    "supcon_in": losses.supcon_in,
    "triplet hard": lambda z, y, _: losses.triplet(z, y, mining="hard"),
    "triplet all": lambda z, y, _: losses.triplet(z, y, mining="all", soft=True),
    "max_margin": lambda z, y, _: losses.max_margin(z, y),
    "tolerance": lambda z, y, _: losses.tolerance(z, y),
    "uniformity": lambda z, y, _: losses.uniformity(z),
}
ANY_LOSS = pytest.mark.parametrize("loss", ROW_LOSSES.values(), ids=ROW_LOSSES)


@ANY_LOSS
@given(batch=own.batches(min_images=2), seed=st.integers(0, 2**32 - 1))
def test_order_of_rows_does_not_matter(loss, batch, seed):
    z, y = tensors(batch)
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(y)))
    assert close(loss(z[order], y[order], batch.tau), loss(z, y, batch.tau), size_of(z, batch.tau))


@ANY_LOSS
@given(batch=own.batches(min_images=2))
def test_names_of_classes_do_not_matter(loss, batch):
    z, y = tensors(batch)
    assert close(loss(z, 1000 - 7 * y, batch.tau), loss(z, y, batch.tau), size_of(z, batch.tau))


@ANY_LOSS
@given(batch=own.batches(min_images=2), seed=st.integers(0, 2**32 - 1))
def test_rotation_does_not_matter(loss, batch, seed):
    z, y = tensors(batch)
    Q, _ = torch.linalg.qr(torch.as_tensor(np.random.default_rng(seed).normal(size=(z.shape[1],) * 2)))
    assert close(loss(z @ Q, y, batch.tau), loss(z, y, batch.tau), size_of(z, batch.tau))


@LOSSES
@given(batch=own.batches(min_images=2), c=st.floats(0.1, 10))
def test_only_scores_over_tau_matter(loss, batch, c):
    """c z with c^2 tau is the same problem."""
    z, y = tensors(batch)
    assert close(loss(c * z, y, c**2 * batch.tau), loss(z, y, batch.tau), size_of(z, batch.tau))


def size_of(z, tau):
    return 1 + z.square().sum(1).max() * (4 + 1 / tau)


# ---------------------------------------------------------------- triplet loss (A sec. 8)


def one_triplet(s_p, s_n, tau, loss=losses.supcon_out):
    return float(per_anchor(loss, *one_anchor([s_p], [s_n]), tau)[0])


@given(scores, scores, temperatures)
def test_t1_one_positive_and_one_negative_give_a_softplus(s_p, s_n, tau):
    """L = log(1 + e^x), x = (s_n - s_p)/tau, L_in = L_out; on the sphere d_p^2 - d_n^2 = 2 tau x."""
    x = (s_n - s_p) / tau
    for loss in (losses.supcon_out, losses.supcon_in):
        assert close(one_triplet(s_p, s_n, tau, loss), np.logaddexp(0, x), 1 + 1 / tau)
    z, _ = one_anchor([s_p], [s_n])
    d_p, d_n = (z[1:] - z[0]).square().sum(1)
    assert close(d_p - d_n, 2 * tau * x)


@given(scores, scores, temperatures)
def test_t1_is_the_soft_triplet_loss_of_scaled_rows(s_p, s_n, tau):
    """losses.triplet(soft=True, margin=0) of z / sqrt(2 tau) has u = x."""
    z, y = one_anchor([s_p], [s_n])
    soft = losses.triplet(z / math.sqrt(2 * tau), y, 0.0, mining="all", soft=True, reduction="none")[0]
    assert close(soft, one_triplet(s_p, s_n, tau), 1 + 1 / tau)


@given(scores, scores, temperatures)
def test_t3_small_tau_gives_the_hinge_without_margin(s_p, s_n, tau):
    """0 <= tau L - [s_n - s_p]_+ <= tau log 2 for every tau, the upper end at s_n = s_p."""
    rest = tau * one_triplet(s_p, s_n, tau) - max(0, s_n - s_p)
    assert -1e-12 * (1 + tau) <= rest <= tau * LOG2 + 1e-12 * (1 + tau)
    assert one_triplet(s_p, s_p, tau) == pytest.approx(LOG2, rel=1e-12)


@given(scores, scores, temperatures)
def test_t3_the_papers_margin_of_two_tau_is_no_nearer(s_p, s_n, tau):
    """-2 tau < 2 tau L - [d_p^2 - d_n^2 + 2 tau]_+ <= 2 tau log(1 + 1/e)."""
    rest = 2 * tau * one_triplet(s_p, s_n, tau) - max(0, 2 * (s_n - s_p) + 2 * tau)
    slack = 1e-12 * (1 + tau)
    assert -2 * tau - slack < rest <= 2 * tau * math.log1p(math.exp(-1)) + slack


@given(scores, scores, temperatures)
def test_t4_large_tau_gives_a_triplet_of_margin_four_log2_tau(s_p, s_n, tau):
    """0 <= L - log 2 - y/(2 tau) <= y^2/(8 tau^2), y = s_n - s_p: 4 tau L ~ d_p^2 - d_n^2 + 4 tau log 2."""
    x = (s_n - s_p) / tau
    rest = one_triplet(s_p, s_n, tau) - LOG2 - x / 2
    slack = 1e-12 * (1 + 1 / tau)
    assert -slack <= rest <= x**2 / 8 + slack


@given(scores, scores, st.floats(2, 100))
def test_t4_series_in_one_over_tau(s_p, s_n, tau):
    """L = log 2 + x/2 + x^2/8 - x^4/192 + x^6/2880 - ..., alternating for |x| <= 1."""
    x = (s_n - s_p) / tau
    rest = one_triplet(s_p, s_n, tau) - (LOG2 + x / 2 + x**2 / 8 - x**4 / 192)
    assert -1e-14 <= rest <= x**6 / 2880 + 1e-14


@given(scores, st.lists(scores, min_size=1, max_size=8), temperatures)
def test_t5_with_several_negatives_the_nearest_one_counts(s_p, negatives, tau):
    """0 <= tau L - [max_n s_n - s_p]_+ <= tau log(1 + K)."""
    value = per_anchor(losses.supcon_out, *one_anchor([s_p], negatives), tau)[0]
    rest = tau * value - max(0, max(negatives) - s_p)
    assert -1e-12 * (1 + tau) <= rest <= tau * math.log1p(len(negatives)) + 1e-12 * (1 + tau)


several = st.lists(scores, min_size=1, max_size=6)


@given(several, several, temperatures)
def test_t6_small_tau_in_general(positives, negatives, tau):
    """0 <= tau L_out - (max_A s - mean_P s) <= tau log|A|;

    0 <= tau L_in - [max_N s - max_P s]_+ <= tau (log|A| + log|P|)."""
    z, y = one_anchor(positives, negatives)
    out, inside = (tau * per_anchor(loss, z, y, tau)[0] for loss in (losses.supcon_out, losses.supcon_in))
    slack, log_A = 1e-12 * (1 + tau), math.log(len(positives + negatives))
    assert -slack <= out - (max(positives + negatives) - np.mean(positives)) <= tau * log_A + slack
    rest = inside - max(0, max(negatives) - max(positives))
    assert -slack <= rest <= tau * (log_A + math.log(len(positives))) + slack


# |log mean e^x - mean x - Var x / 2| <= R^3/(36 sqrt 3) for x in a range of R: a third of the third cumulant's largest
# value R^3/(6 sqrt 3), twice. Scores have R = 2/tau.
THIRD_ORDER = 8 / (36 * math.sqrt(3))


@given(several, several, temperatures)
def test_t6_large_tau_in_general(positives, negatives, tau):
    """L_out = log|A| + (mean_A s - mean_P s)/tau + Var_A/(2 tau^2) + O(tau^-3); L_in has Var_A - Var_P."""
    z, y = one_anchor(positives, negatives)
    A = positives + negatives
    linear = math.log(len(A)) + (np.mean(A) - np.mean(positives)) / tau
    slack = 1e-12 * (1 + 1 / tau)
    out, inside = (float(per_anchor(loss, z, y, tau)[0]) for loss in (losses.supcon_out, losses.supcon_in))
    assert abs(out - linear - np.var(A) / (2 * tau**2)) <= THIRD_ORDER / tau**3 + slack
    assert abs(inside - linear - (np.var(A) - np.var(positives)) / (2 * tau**2)) <= 2 * THIRD_ORDER / tau**3 + slack


# ---------------------------------------------------------------- N-pair and NT-Xent (A sec. 9)


@given(own.batches())
def test_one_positive_of_another_image_gives_eq_26(batch):
    """|P(i)| = 1, tau = 1: L_i = log(1 + sum_N exp(s_in - s_ip))."""
    z = tensors(batch)[0][: len(batch.z) // 2 * 2]
    y = torch.arange(len(z)) // 2
    s = (z @ z.T).numpy()
    values = per_anchor(losses.supcon_out, z, y, 1.0)
    for i in range(len(z)):
        others = [n for n in range(len(z)) if y[n] != y[i]]
        assert close(values[i], np.logaddexp.reduce([0.0, *(s[i, others] - s[i, i ^ 1])]), 1 + np.abs(s).max())


@given(own.batches())
def test_sohns_loss_is_the_cross_entropy_of_the_score_matrix(batch):
    z = tensors(batch)[0]
    f, f_pos = z, z.roll(1, 0) / 2
    assert close(losses.n_pair(f, f_pos), F.cross_entropy(f @ f_pos.T, torch.arange(len(f))), 1 + (z @ z.T).abs().max())


@given(own.batches())
def test_supcon_is_at_least_sohns_loss(batch):
    """Same batch, tau = 1: the anchors' own side adds negatives."""
    z = tensors(batch)[0]
    f, f_pos = z, z.roll(1, 0) / 2
    supcon = per_anchor(losses.supcon_out, torch.cat([f, f_pos]), torch.arange(len(f)).repeat(2), 1.0)[: len(f)]
    assert (supcon - losses.n_pair(f, f_pos, reduction="none")).min() >= -1e-12 * (1 + (z @ z.T).abs().max())


@LOSSES
@given(batch=own.batches())
def test_distinct_labels_with_two_views_give_nt_xent(loss, batch):
    """|P(i)| = 1, so L_out = L_in = L_self (A eq. 1), whose mean is SimCLR's NT-Xent."""
    z = torch.cat([tensors(batch)[0], tensors(batch)[0].roll(1, 0) / 2])
    y = torch.arange(len(z) // 2).repeat(2)
    s = (z @ z.T / batch.tau).fill_diagonal_(-torch.inf)
    simclr = F.cross_entropy(s, torch.arange(len(z)).roll(len(z) // 2), reduction="none")
    for values in (per_anchor(loss, z, y, batch.tau), losses.nt_xent(z, batch.tau, reduction="none")):
        assert close(values, simclr, 1 + (z @ z.T).abs().max() / batch.tau)


def test_a_collapsed_batch_gives_log_of_the_number_of_contrasts():
    """log(2N - 1) = 4.8442 for 64 images: what users of the reference see as 6.920 = 4.844 * .1/.07."""
    value = losses.supcon_out(torch.ones(128, 3).double(), torch.arange(4).repeat(32), 0.1)
    assert close(value, math.log(127), 100)
    assert 0.1 / 0.07 * value == pytest.approx(6.920, abs=1e-3)


# ---------------------------------------------------------------- what the temperature does (B)


def two_views(s_pos, negatives):
    """Rows for nt_xent whose row 0 has one positive, its other view, and an even number of negatives."""
    half = len(negatives) // 2
    return with_scores([*negatives[:half], s_pos, *negatives[half:]]), half


def nt_xent_score_gradients(s_pos, negatives, tau):
    z, half = two_views(s_pos, negatives)
    y = torch.arange(half + 1).repeat(2)
    G, _ = score_gradients(lambda z, y, tau, reduction: losses.nt_xent(z, tau, reduction=reduction), z, y, tau)
    return G[half], torch.cat([G[:half], G[half + 1 :]])


even_negatives = st.lists(st.tuples(scores, scores), min_size=1, max_size=4).map(
    lambda pairs: sum(map(list, pairs), [])
)


@given(scores, even_negatives, temperatures)
def test_b_eq_4_pull_of_the_positive_is_the_sum_of_all_pushes(s_pos, negatives, tau):
    """dL/ds_ii = -1/tau sum_k P_ik; dL/ds_ij = P_ij/tau."""
    pull, pushes = nt_xent_score_gradients(s_pos, negatives, tau)
    x = np.array([s_pos, *negatives]) / tau
    P = np.exp(x - np.logaddexp.reduce(x))
    scale = (1 + 1 / tau) / tau
    assert close(pushes, P[1:] / tau, scale)
    assert close(-pull, pushes.sum(), scale)


@given(scores, scores, even_negatives, st.floats(0.2, 100))
def test_b_eq_5_relative_penalties_are_boltzmann_over_the_negatives_alone(s_pos, other_s_pos, negatives, tau):
    """r_i(s_ij) = e^{s_ij/tau} / sum_{k != i} e^{s_ik/tau}, whatever s_ii is."""
    x = np.array(negatives) / tau
    for s in (s_pos, other_s_pos):
        pull, pushes = nt_xent_score_gradients(s, negatives, tau)
        assert close(pushes / -pull, np.exp(x - np.logaddexp.reduce(x)), 1e4)


@given(even_negatives, st.floats(0.2, 100), st.floats(1.01, 10))
def test_entropy_of_the_relative_penalties_rises_with_tau(negatives, tau, factor):
    def entropy(tau):
        pull, pushes = nt_xent_score_gradients(0.0, negatives, tau)
        r = pushes / -pull
        return -torch.xlogy(r, r).sum()

    assert entropy(factor * tau) - entropy(tau) >= -1e-8


def nt_xent_of_first(s_pos, negatives, tau):
    return float(losses.nt_xent(two_views(s_pos, negatives)[0], tau, reduction="none")[0])


@given(scores, even_negatives, temperatures)
def test_b_eq_6_small_tau_leaves_the_nearest_negative(s_pos, negatives, tau):
    """0 <= tau L - [s_max - s_ii]_+ <= tau log N, N all terms."""
    rest = tau * nt_xent_of_first(s_pos, negatives, tau) - max(0, max(negatives) - s_pos)
    assert -1e-12 * (1 + tau) <= rest <= tau * math.log1p(len(negatives)) + 1e-12 * (1 + tau)


@given(scores, even_negatives, temperatures)
def test_b_eq_7_large_tau_gives_the_simple_loss(s_pos, negatives, tau):
    """L = log N + (N - 1)/(N tau) L_simple + Var(s)/(2 tau^2) + O(tau^-3), lam = 1/(N - 1)."""
    N = 1 + len(negatives)
    simple = float(losses.simple_contrastive(two_views(s_pos, negatives)[0], 1 / (N - 1), reduction="none")[0])
    rest = nt_xent_of_first(s_pos, negatives, tau) - math.log(N) - (N - 1) / (N * tau) * simple
    second = np.var([s_pos, *negatives]) / (2 * tau**2)
    assert abs(rest - second) <= THIRD_ORDER / tau**3 + 1e-12 * (1 + 1 / tau)


@given(scores, even_negatives, temperatures)
def test_b_eq_9_what_dropping_easy_negatives_takes_away(s_pos, negatives, tau):
    """L - L_hard = log(1 + S_easy/(S_hard + S_pos)) >= 0, less and less as k grows."""
    z, _ = two_views(s_pos, negatives)
    x = np.sort(negatives)[::-1] / tau
    full, previous, slack = nt_xent_of_first(s_pos, negatives, tau), -math.inf, 1e-12 * (1 + 1 / tau)
    for k in range(1, len(x) + 1):
        hard = float(losses.hard_contrastive(z, tau, k, reduction="none")[0])
        kept = np.logaddexp.reduce([s_pos / tau, *x[:k]])
        assert close(full - hard, np.logaddexp.reduce([0.0, *(x[k:] - kept)]), 1 + 1 / tau)
        assert previous - slack <= hard <= full + slack
        previous = hard


def test_uniformity_of_the_uniform_sphere():
    """-L = 2t - log 0F1(; d/2; t^2) = 3.9375 for d = 128, t = 2; the largest values in B's tables are 3.89 to 3.93."""
    z = F.normalize(torch.as_tensor(np.random.default_rng(0).normal(size=(1500, 128))))
    terms = [4.0**k / (math.factorial(k) * math.prod(64 + j for j in range(k))) for k in range(20)]
    exact = 4 - math.log(sum(terms))
    assert exact == pytest.approx(3.9375, abs=1e-4)
    assert float(-losses.uniformity(z)) == pytest.approx(exact, abs=2e-3)


# ---------------------------------------------------------------- fewer positives (A sec. 11)


@LOSSES
@given(own.batches(views=own.many_views, classes=st.integers(1, 3)), st.integers(0, 3))
def test_what_the_cap_drops_has_no_effect(loss, batch, images):
    z, y = tensors(batch)
    n = len(y) // batch.views
    kept = [b for b in range(1, n) if y[b] == y[0]][:images]
    dropped = torch.tensor([y[r] == y[0] and r % n not in (0, *kept) for r in range(len(y))])
    cap = dict(positives_cap=images * batch.views, views=batch.views, reduction="none")
    moved = torch.where(dropped[:, None], z.flip(1) + 1, z)
    values = [loss(x, y, batch.tau, **cap)[0] for x in (z, moved)]
    assert close(*values, size_of(z, batch.tau))
    alone = [loss(x[~dropped], y[~dropped], batch.tau, reduction="none")[0] for x in (z, moved)]
    assert close(values[0], alone[0], size_of(z, batch.tau))
