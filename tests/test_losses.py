"""losses.py against the oracle: values, gradients, types, edge cases and errors.

Errors are measured against eps * (|L| + S), S the size of the numbers that a loss adds up, max|s|/tau for most: a
loss can be 1e-11 while its scores are 50. A gradient's scale is max||z||/tau, and its weights err by eps * S.
"""

import math
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import reference_numpy as oracle
import strategies as own

ROUNDINGS = 64
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Case(NamedTuple):
    """A loss, what follows its rows, and the batches that suit it."""

    loss: str
    args: Callable = lambda b: ()
    options: Callable = lambda b: {}
    batches: Any = own.batches()
    reduces: bool = True

    @property
    def has_tau(self):
        return self.loss in ("supcon_out", "supcon_in", "nt_xent", "hard_contrastive")


def labels_and_tau(b):
    return b.y, b.tau


def labels(b):
    return (b.y,)


def options(**fixed):
    return lambda b: fixed


def views(b):
    return {"views": b.views}


def cap_of_images(images, **fixed):
    return lambda b: {"positives_cap": images * b.views, "views": b.views, **fixed}


def nearest(k):
    return lambda b: {"k": k, "views": b.views}


mild_taus = own.taus.filter(lambda tau: tau > 0.05)
mixed = own.soft_batches()
apart = own.batches(layouts=own.distinct, widths=st.integers(2, 16))  # where rows are ranked

CASES = {
    f"supcon_{variant}{label}": Case(f"supcon_{variant}", labels_and_tau, rest, batches)
    for variant in ("out", "in")
    for label, rest, batches in [
        ("", options(), own.batches()),
        ("-lone-anchors", options(), own.lone_anchor_batches()),
        ("-one_positive", options(denominator="one_positive"), own.batches()),
        ("-negatives", options(denominator="negatives"), own.batches()),
        ("-cap-0", cap_of_images(0), own.batches()),
        ("-cap-2", cap_of_images(2), own.batches(classes=st.integers(1, 3))),
        ("-cap-1-negatives", cap_of_images(1, denominator="negatives"), own.batches(classes=st.integers(1, 3))),
        ("-probabilities", options(), mixed),
    ]
}
CASES |= {
    f"triplet-{mining}{'-soft' * soft}": Case("triplet", labels, options(mining=mining, soft=soft), apart)
    for mining in ("semihard", "hard", "all")
    for soft in (False, True)
}
CASES |= {
    "nt_xent": Case("nt_xent", lambda b: (b.tau,), views),
    "n_pair": Case("n_pair"),
    "max_margin": Case("max_margin", labels),
    "hard_contrastive": Case("hard_contrastive", lambda b: (b.tau, 2), views, apart),
    "simple_contrastive": Case("simple_contrastive", lambda b: (0.1,), views),
    "simple_contrastive-nearest": Case("simple_contrastive", lambda b: (0.1,), nearest(2), apart),
    "uniformity": Case("uniformity", batches=own.batches(min_images=2), reduces=False),
    "alignment": Case("alignment", options=views, batches=own.batches(views=own.many_views), reduces=False),
    "tolerance": Case("tolerance", labels, reduces=False),
}


def every(condition=lambda case: True):
    chosen = {name: case for name, case in CASES.items() if condition(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def with_labels(case, z, labels, views):
    labels = np.asarray(labels, dtype=int)
    return own.Batch(z, np.eye(8)[labels] if case.batches is mixed else labels, 0.1, views)


def inputs(case, b):
    """The arrays of rows, each of which gets a gradient."""
    return [b.z, b.z[::-1] / 2] if case.loss == "n_pair" else [b.z]


def expected(case, b, **reduction):
    return getattr(oracle, case.loss)(*inputs(case, b), *case.args(b), **case.options(b), **reduction)


def expected_grads(case, b):
    grads = getattr(oracle, case.loss + "_grad")(*inputs(case, b), *case.args(b), **case.options(b))
    return grads if case.loss == "n_pair" else [grads]


def leaves(case, b, dtype=torch.float64):
    return [torch.tensor(x.copy(), dtype=dtype, requires_grad=True) for x in inputs(case, b)]


def actual(case, b, rows, module=losses, **reduction):
    args = [torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in case.args(b)]
    return getattr(module, case.loss)(*rows, *args, **case.options(b), **reduction)


def size(case, b):
    if case.has_tau:
        return np.square(b.z).sum(1).max() / b.tau
    return 4 + 4 * np.square(b.z).sum(1).max()  # squared distances, margins, the logarithm of a count


def value_bound(value, case, b, eps):
    return ROUNDINGS * eps * (np.abs(value) + size(case, b))


def grad_bound(case, b, eps):
    return ROUNDINGS * eps * (1 + size(case, b)) * np.linalg.norm(b.z, axis=1).max() / (b.tau if case.has_tau else 1)


def rounding(x, dtype):
    return EPS[dtype] * (np.abs(x) + torch.finfo(dtype).smallest_normal)


def away_from_ties(case, b, eps):
    """No choice of rows and no kink of a hinge hangs on rounding."""
    slack = ROUNDINGS * eps * (1 + np.square(b.z).sum(1).max())
    N, n = len(b.z), len(b.z) // b.views
    for i in range(N):
        d = np.square(b.z - b.z[i]).sum(1)
        p, others = b.y == b.y[i], np.arange(N) != i
        if case.loss == "triplet":
            gaps = [d[p & others][:, None] + 0.2 - d[~p]]
            if case.options(b)["mining"] != "all":
                gaps.append(np.diff(np.sort(d[others])))
        elif case.options(b).get("k") or case.loss == "hard_contrastive":
            gaps = [np.diff(np.sort((b.z @ b.z[i])[np.arange(N) % n != i % n])[-3:][:2])]
        else:
            return True
        if any(np.abs(gap).min(initial=np.inf) <= slack for gap in gaps):
            return False
    return True


# ---------------------------------------------------------------- values and gradients


@every()
@settings(max_examples=25)
@given(data=st.data())
def test_value_and_gradient_are_the_oracles(case, data):
    check_value_and_gradient(case, data.draw(case.batches), losses)


def check_value_and_gradient(case, b, module):
    assume(away_from_ties(case, b, EPS[torch.float64]))
    rows, value = leaves(case, b), expected(case, b)
    loss = actual(case, b, rows, module)
    assert loss.shape == () and loss.dtype == torch.float64
    assert abs(loss.item() - value) <= value_bound(value, case, b, EPS[torch.float64])
    for grad, exact in zip(torch.autograd.grad(loss, rows), expected_grads(case, b), strict=True):
        assert np.abs(grad.numpy() - exact).max() <= grad_bound(case, b, EPS[torch.float64])


@every(lambda case: case.reduces)
@settings(max_examples=15)
@given(data=st.data())
def test_value_of_every_anchor_is_the_oracles(case, data):
    b = data.draw(case.batches)
    assume(away_from_ties(case, b, EPS[torch.float64]))
    values = expected(case, b, reduction="none")
    per_row = actual(case, b, leaves(case, b), reduction="none").detach().numpy()
    assert per_row.shape == values.shape
    assert (np.abs(per_row - values) <= value_bound(values, case, b, EPS[torch.float64])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every()
@settings(max_examples=6)
@given(data=st.data())
def test_narrow_rows_lose_only_what_rounding_them_takes(case, dtype, data):
    b = data.draw(case.batches)
    b = b._replace(z=torch.tensor(b.z).to(dtype).double().numpy())
    assume(away_from_ties(case, b, EPS[torch.float32]))
    rows, value = leaves(case, b, dtype), expected(case, b)
    loss = actual(case, b, rows)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - value) <= value_bound(value, case, b, EPS[torch.float32])
    for grad, exact in zip(torch.autograd.grad(loss, rows), expected_grads(case, b), strict=True):
        assert grad.dtype == dtype
        slack = grad_bound(case, b, EPS[torch.float32]) + rounding(exact, dtype)
        assert (np.abs(grad.double().numpy() - exact) <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every()
@settings(max_examples=3)
@given(data=st.data())
def test_autocast_changes_no_bit(case, dtype, data):
    b = data.draw(case.batches)
    outside, inside = leaves(case, b, dtype), leaves(case, b, dtype)
    loss = actual(case, b, outside)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = actual(case, b, inside)
    assert torch.equal(loss, under_autocast)
    for grad, other in zip(torch.autograd.grad(loss, outside), torch.autograd.grad(under_autocast, inside)):
        assert torch.equal(grad, other)


@every(lambda case: case.has_tau)
@settings(max_examples=10)
@given(data=st.data())
def test_a_tensor_tau_gets_its_gradient_and_gives_the_same_value(case, data):
    b = data.draw(case.batches)
    b = b._replace(tau=max(b.tau, 0.1), z=b.z / own.MAX_NORM)
    assume(away_from_ties(case, b, EPS[torch.float64]))
    tau, rows = torch.tensor(b.tau, dtype=torch.float64, requires_grad=True), leaves(case, b)
    loss = actual(case, b._replace(tau=tau), rows)
    plain = actual(case, b, rows).item()
    assert abs(loss.item() - plain) <= value_bound(plain, case, b, EPS[torch.float64])
    h = 1e-5 * b.tau
    ahead, behind = (expected(case, b._replace(tau=b.tau + step)) for step in (h, -h))
    assert torch.autograd.grad(loss, tau)[0].item() == pytest.approx((ahead - behind) / (2 * h), abs=1e-6 / b.tau)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="older torch makes several graphs")
@pytest.mark.parametrize("loss", ["supcon_out", "supcon_in", "nt_xent"])
def test_compiles_into_one_graph_with_the_same_value(loss):
    def run(f):
        z, tau = rows_of(8, 2, 16).requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        value = f(z, tau=tau) if loss == "nt_xent" else f(z, torch.arange(8).repeat(2) % 3, tau)
        return value, *torch.autograd.grad(value, [z, tau])

    torch._dynamo.reset()
    compiled = torch.compile(getattr(losses, loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(getattr(losses, loss)))


def test_semihard_negatives_lie_strictly_beyond_the_positive():
    """Around 0: a positive and a negative at distance 1, a negative at 4, so that u = 1 - 4 + margin; not 1 - 1."""
    z, y = torch.tensor([[0.0], [1.0], [-1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    assert losses.triplet(z, y, 3.5, reduction="none")[0] == 0.5


class LargestStorage(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *held, 0)
        return out


def test_all_triplets_are_never_held_at_once():
    N, saved = 96, {}
    z, y = rows_of(N, 1, 8).requires_grad_(), torch.arange(N) % 3

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with LargestStorage() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses.triplet(z, y, mining="all").backward()
    assert largest.bytes <= 8 * N * N
    assert sum(x.untyped_storage().nbytes() for x in saved.values()) <= 8 * 8 * N * N  # 31 positives: 31 N^2 and more


# ---------------------------------------------------------------- SupConLoss


def rows_of(images, views, width, seed=0):
    return torch.tensor(own.unit(np.random.default_rng(seed).normal(size=(images * views, width))))


def features(b):
    """(B, V, D), where z stacks the views."""
    return torch.tensor(b.z).unflatten(0, (b.views, -1)).transpose(0, 1)


def image_labels(b):
    return torch.tensor(b.y[: len(b.y) // b.views])


def near(value, other, b):
    scale = abs(value.item()) + np.square(b.z).sum(1).max() / b.tau
    return abs(value.item() - float(other)) <= ROUNDINGS * EPS[torch.float64] * scale


def module_by_loops(b, mask, mode="all", variant="out"):
    """Values of the anchors, None without a positive. Weights mask[i, j] of images i and j, over all views but self."""
    n = len(mask)
    values = []
    for i in range(n if mode == "one" else n * b.views):
        s = {a: b.z[i] @ b.z[a] / b.tau for a in range(n * b.views) if a != i}
        w = {a: mask[i % n, a % n] for a in s if mask[i % n, a % n] > 0}
        log_sum, total = np.logaddexp.reduce(list(s.values())) if s else 0, sum(w.values())
        if not w:
            values.append(None)
        elif variant == "out":
            values.append(-sum(w[a] / total * (s[a] - log_sum) for a in w))
        else:
            values.append(-np.logaddexp.reduce([np.log(w[a] / total) + s[a] - log_sum for a in w]))
    return values


def mean_of_valid(values):
    valid = [v for v in values if v is not None]
    return sum(valid) / max(len(valid), 1)


@pytest.mark.parametrize("variant", ["out", "in"])
@given(b=own.batches())
def test_module_is_the_function_of_the_stacked_views(variant, b):
    module = losses.SupConLoss(b.tau, base_temperature=None, variant=variant, normalize=False)
    value = getattr(losses, f"supcon_{variant}")(torch.tensor(b.z), torch.tensor(b.y), b.tau)
    assert near(module(features(b), image_labels(b)), value, b)
    assert near(module(features(b), image_labels(b)[:, None]), value, b)


@given(b=own.batches(taus=mild_taus), base=mild_taus)
def test_module_multiplies_by_tau_over_base_temperature(b, base):
    plain, scaled = (losses.SupConLoss(b.tau, base_temperature=t)(features(b), image_labels(b)) for t in (None, base))
    assert float(scaled) == pytest.approx(b.tau / base * float(plain), rel=1e-12)
    assert losses.SupConLoss().base_temperature == losses.SupConLoss().temperature == 0.07


@given(b=own.batches())
def test_module_takes_the_mask_of_the_labels_for_the_labels(b):
    y, module = image_labels(b), losses.SupConLoss(b.tau)
    assert near(module(features(b), y), module(features(b), mask=(y[:, None] == y).int()), b)


@given(b=own.batches())
def test_module_without_labels_is_nt_xent(b):
    module = losses.SupConLoss(b.tau, base_temperature=None, normalize=False)
    assert near(module(features(b)), losses.nt_xent(torch.tensor(b.z), b.tau, views=b.views), b)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("mode", ["all", "one"])
@settings(max_examples=30)
@given(b=own.batches(), seed=own.seeds)
def test_module_with_an_asymmetric_mask_of_weights(mode, variant, b, seed):
    n = len(b.z) // b.views
    mask = np.maximum(np.random.default_rng(seed).uniform(-1, 1, size=(n, n)), 0)
    module = losses.SupConLoss(b.tau, mode, base_temperature=None, variant=variant, normalize=False)
    value = mean_of_valid(module_by_loops(b, mask, mode, variant))
    assert near(module(features(b), mask=torch.tensor(mask)), value, b)


@pytest.mark.parametrize("mode", ["all", "one"])
@settings(max_examples=30)
@given(b=own.batches(views=own.many_views, units=own.always))
def test_module_is_the_reference_implementation_on_unit_rows(mode, b):
    """HobbitLong/SupContrast, losses.py: tau/base times the mean over ALL anchors; two views give each a positive."""
    y = b.y[: len(b.y) // b.views]
    values = module_by_loops(b, np.equal.outer(y, y), mode)
    value = losses.SupConLoss(b.tau, mode)(features(b), torch.tensor(y))
    assert near(0.07 / b.tau * value, sum(values) / len(values), b)


@pytest.mark.parametrize("variant", ["out", "in"])
@settings(max_examples=30)
@given(b=own.batches())
def test_module_normalises_and_its_gradient_is_tangential(variant, b):
    """A eqs. 16-20."""
    x = features(b).requires_grad_()
    loss = losses.SupConLoss(b.tau, base_temperature=None, variant=variant)(x, image_labels(b))
    unit = b._replace(z=oracle.normalize(b.z))
    assert near(loss, getattr(oracle, f"supcon_{variant}")(unit.z, b.y, b.tau), unit)
    exact = oracle.normalize_grad(b.z, getattr(oracle, f"supcon_{variant}_grad")(unit.z, b.y, b.tau))
    slack = ROUNDINGS * EPS[torch.float64] * (1 + 1 / b.tau) / b.tau / np.linalg.norm(b.z, axis=1).min()
    assert np.abs(torch.autograd.grad(loss, x)[0].transpose(0, 1).flatten(0, 1).numpy() - exact).max() <= slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit_of_the_module(dtype):
    x = rows_of(8, 2, 16).unflatten(0, (8, 2)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.SupConLoss()(x, torch.arange(8) % 3)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, losses.SupConLoss()(x, torch.arange(8) % 3))


def test_module_flattens_what_follows_the_views():
    x = torch.randn(4, 2, 3, 5, 2, generator=torch.Generator().manual_seed(0)).transpose(3, 4)
    y = torch.tensor([0, 1, 0, 2])
    assert torch.equal(losses.SupConLoss()(x, y), losses.SupConLoss()(x.reshape(4, 2, 30), y))


# ---------------------------------------------------------------- edges: where other implementations are wrong or nan


class Edge(NamedTuple):
    labels: list
    views: int = 2
    tau: float = 0.1
    dtype: torch.dtype = torch.float32
    rows: Callable = own.unit


FOUR_CLASSES = [0, 1, 2, 3, 0, 1, 2, 3]


def with_zero_row(w):
    return np.concatenate([np.zeros_like(w[:1]), own.unit(w[1:])])


EDGES = {
    "float32": Edge(FOUR_CLASSES),
    "float16, tau .07": Edge(FOUR_CLASSES, tau=0.07, dtype=torch.float16),
    "float16, tau .05": Edge(FOUR_CLASSES, tau=0.05, dtype=torch.float16),
    "bfloat16": Edge(FOUR_CLASSES, dtype=torch.bfloat16),
    "tau .01": Edge(FOUR_CLASSES, tau=0.01),
    "tau .001": Edge(FOUR_CLASSES, tau=0.001),
    "orthogonal rows, tau .01": Edge(FOUR_CLASSES, tau=0.01, rows=lambda w: np.eye(*w.shape)),
    "raw rows": Edge(FOUR_CLASSES, rows=lambda w: w),
    "raw rows of norm 3": Edge(FOUR_CLASSES, rows=lambda w: 0.3 * w),
    "one class": Edge([0] * 8),
    "one view, no positives": Edge([0, 1, 2, 3], views=1),
    "one view, 2 of 4 with positives": Edge([0, 0, 1, 2], views=1),
    "one image, two views": Edge([0]),
    "one image, one view": Edge([0], views=1),
    "a zero row": Edge(FOUR_CLASSES, rows=with_zero_row),
    "a collapsed batch": Edge(FOUR_CLASSES, tau=0.01, rows=lambda w: np.ones_like(w) / math.sqrt(w.shape[1])),
}


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_edge_cases_are_finite_and_right(edge, variant):
    """The rows of peers.md 4a: eight images of 128 numbers in four classes, two views, unless it says otherwise."""
    w = np.random.default_rng(0).normal(size=(len(edge.labels) * edge.views, 128))
    z, y = torch.tensor(edge.rows(w)).to(edge.dtype), torch.tensor(edge.labels)
    b = own.Batch(z.double().numpy(), np.tile(edge.labels, edge.views), edge.tau, edge.views)
    case = Case(f"supcon_{variant}", labels_and_tau)
    z.requires_grad_()
    loss, value = actual(case, b, [z]), expected(case, b)
    assert abs(loss.item() - value) <= value_bound(value, case, b, EPS[torch.float32])
    exact, grad = expected_grads(case, b)[0], torch.autograd.grad(loss, z)[0].double().numpy()
    assert (np.abs(grad - exact) <= grad_bound(case, b, EPS[torch.float32]) + rounding(exact, edge.dtype)).all()

    x = features(b).to(edge.dtype).requires_grad_()
    norms = np.linalg.norm(b.z, axis=1, keepdims=True)
    unit = b._replace(z=b.z / np.where(norms > 0, norms, 1))
    module = losses.SupConLoss(edge.tau, base_temperature=None, variant=variant)
    loss, value = module(x, y), expected(case, unit)
    assert abs(loss.item() - value) <= value_bound(value, case, unit, EPS[torch.float32])
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@every(lambda case: case.loss not in ("n_pair", "uniformity", "alignment"))
def test_a_batch_without_positives_gives_zero_with_a_zero_gradient(case):
    b = with_labels(case, np.random.default_rng(0).normal(size=(4, 3)), range(4), 1)
    for dtype in EPS:
        rows = leaves(case, b, dtype)
        loss = actual(case, b, rows)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, rows)[0].any()


@pytest.mark.parametrize("count", [0, 1])
@every(lambda case: case.loss not in ("uniformity", "alignment"))
def test_no_row_and_a_single_row_give_zero_with_a_zero_gradient(case, count):
    b = with_labels(case, np.ones((count, 3)), [0] * count, 1)
    rows = leaves(case, b)
    loss = actual(case, b, rows)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, rows)[0].any()


@every()
def test_a_nan_feature_is_not_hidden(case):
    z = np.random.default_rng(0).normal(size=(4, 3))
    z[1, 1] = np.nan
    b = with_labels(case, z, [0, 1, 0, 1], 2)
    assert actual(case, b, leaves(case, b)).isnan()


@every(lambda case: case.loss == "triplet")
def test_a_nan_in_the_only_positive_is_not_hidden(case):
    z = np.random.default_rng(0).normal(size=(3, 3))
    z[1, 1] = np.nan
    b = with_labels(case, z, [0, 0, 1], 1)
    assert actual(case, b, leaves(case, b)).isnan()


# ---------------------------------------------------------------- errors


Z, Y, P = torch.ones(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(4, 2) / 2
FLAT = torch.ones(7)
X = torch.ones(4, 2, 3)

BAD = {
    "supcon_out: z of one axis": (lambda: losses.supcon_out(FLAT, Y), r"\(7,\)"),
    "supcon_in: z of three axes": (lambda: losses.supcon_in(X, Y), r"\(4, 2, 3\)"),
    "nt_xent: z of one axis": (lambda: losses.nt_xent(FLAT, views=1), r"\(7,\)"),
    "n_pair: anchor of one axis": (lambda: losses.n_pair(FLAT, FLAT), r"\(7,\)"),
    "triplet: z of one axis": (lambda: losses.triplet(FLAT, Y), r"\(7,\)"),
    "max_margin: z of one axis": (lambda: losses.max_margin(FLAT, Y), r"\(7,\)"),
    "hard_contrastive: z of one axis": (lambda: losses.hard_contrastive(FLAT, 0.1, 1), r"\(7,\)"),
    "simple_contrastive: z of one axis": (lambda: losses.simple_contrastive(FLAT, 0.1), r"\(7,\)"),
    "uniformity: z of one axis": (lambda: losses.uniformity(FLAT), r"\(7,\)"),
    "uniformity: one row": (lambda: losses.uniformity(Z[:1]), r"\b1\b"),
    "alignment: z of one axis": (lambda: losses.alignment(FLAT), r"\(7,\)"),
    "tolerance: z of one axis": (lambda: losses.tolerance(FLAT, Y), r"\(7,\)"),
    "supcon_out: labels too few": (lambda: losses.supcon_out(Z, Y[:3]), r"\(3,\)"),
    "supcon_in: probabilities too few": (lambda: losses.supcon_in(Z, P[:3]), r"\(3, 2\)"),
    "supcon_out: labels of three axes": (lambda: losses.supcon_out(Z, torch.ones(4, 1, 1)), r"\(4, 1, 1\)"),
    "triplet: labels too few": (lambda: losses.triplet(Z, Y[:3]), r"\(3,\)"),
    "triplet: probabilities": (lambda: losses.triplet(Z, P), r"\(4, 2\)"),
    "max_margin: labels too few": (lambda: losses.max_margin(Z, Y[:3]), r"\(3,\)"),
    "tolerance: labels too few": (lambda: losses.tolerance(Z, Y[:3]), r"\(3,\)"),
    "n_pair: shapes that differ": (lambda: losses.n_pair(Z, Z[:3]), r"\(3, 3\)"),
    "supcon_out: tau of zero": (lambda: losses.supcon_out(Z, Y, 0), r"\b0\b"),
    "supcon_in: negative tau": (lambda: losses.supcon_in(Z, Y, -0.5), r"-0\.5"),
    "supcon_out: tau not a number": (lambda: losses.supcon_out(Z, Y, math.nan), r"nan"),
    "nt_xent: negative tau": (lambda: losses.nt_xent(Z, -0.5), r"-0\.5"),
    "hard_contrastive: negative tau": (lambda: losses.hard_contrastive(Z, -0.5, 1), r"-0\.5"),
    "nt_xent: odd rows": (lambda: losses.nt_xent(Z, views=3), r"\b4\b.*\b3\b"),
    "nt_xent: no views": (lambda: losses.nt_xent(Z, views=0), r"\b0\b"),
    "hard_contrastive: odd rows": (lambda: losses.hard_contrastive(Z, 0.1, 1, views=3), r"\b4\b.*\b3\b"),
    "simple_contrastive: odd rows": (lambda: losses.simple_contrastive(Z, 0.1, views=3), r"\b4\b.*\b3\b"),
    "alignment: odd rows": (lambda: losses.alignment(Z, views=3), r"\b4\b.*\b3\b"),
    "alignment: one view": (lambda: losses.alignment(Z, views=1), r"\b1\b"),
    "supcon_out: cap and odd rows": (lambda: losses.supcon_out(Z, Y, positives_cap=3, views=3), r"\b4\b.*\b3\b"),
    "supcon_out: negative cap": (lambda: losses.supcon_out(Z, Y, positives_cap=-2), r"-2"),
    "supcon_in: cap no multiple of views": (lambda: losses.supcon_in(Z, Y, positives_cap=3), r"\b3\b"),
    "supcon_out: probabilities with a cap": (lambda: losses.supcon_out(Z, P, positives_cap=2), r"positives_cap"),
    "supcon_in: probabilities": (lambda: losses.supcon_in(Z, P, denominator="negatives"), r"denominator"),
    "supcon_out: denominator": (lambda: losses.supcon_out(Z, Y, denominator="most"), r"most"),
    "triplet: mining": (lambda: losses.triplet(Z, Y, mining="gold"), r"gold"),
    "supcon_out: reduction": (lambda: losses.supcon_out(Z, Y, reduction="sum"), r"sum"),
    "n_pair: reduction": (lambda: losses.n_pair(Z, Z, reduction="sum"), r"sum"),
    "hard_contrastive: no negatives": (lambda: losses.hard_contrastive(Z, 0.1, 0), r"\b0\b"),
    "simple_contrastive: no negatives": (lambda: losses.simple_contrastive(Z, 0.1, k=0), r"\b0\b"),
    "supcon_against: own": (lambda: losses.supcon_against(Z, Y, Z, Y, own=1), r"0 \.\.\. 0, got 1"),
    "supcon_against: own is a truth value": (lambda: losses.supcon_against(Z, Y, Z, Y, own=False), r"got False"),
    "SupConLoss: temperature": (lambda: losses.SupConLoss(-0.5), r"-0\.5"),
    "SupConLoss: base_temperature": (lambda: losses.SupConLoss(base_temperature=0), r"\b0\b"),
    "SupConLoss: contrast_mode": (lambda: losses.SupConLoss(contrast_mode="some"), r"some"),
    "SupConLoss: variant": (lambda: losses.SupConLoss(variant="up"), r"up"),
    "SupConLoss: features of two axes": (lambda: losses.SupConLoss()(Z), r"\(4, 3\)"),
    "SupConLoss: labels and mask": (lambda: losses.SupConLoss()(X, Y, torch.eye(4)), r"both"),
    "SupConLoss: labels too few": (lambda: losses.SupConLoss()(X, Y[:3]), r"\b3\b"),
    "SupConLoss: mask of another size": (lambda: losses.SupConLoss()(X, mask=torch.eye(3)), r"\(3, 3\)"),
}


@pytest.mark.parametrize("call, offender", BAD.values(), ids=BAD)
def test_bad_arguments_raise_and_are_named(call, offender):
    with pytest.raises(ValueError, match=offender):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_temperature_of_another_type_scales_the_module_by_its_value(dtype):
    temperature = torch.tensor(0.1, dtype=dtype)
    loss = losses.SupConLoss(temperature)(X, Y)
    assert loss.dtype == X.dtype and loss.item() == pytest.approx(losses.SupConLoss(temperature.item())(X, Y).item())


def test_gathering_without_a_process_group_gives_the_rows_back():
    assert torch.equal(losses.all_gather_rows(Z), Z)


def test_rows_without_a_label_are_classes_of_their_own():
    """With -1 as a class, they would be each other's positives."""
    y = torch.tensor([0, 0, 1, 1, -1, -1, -1, -1])
    z = F.normalize(torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double))
    for views in (1, 2):
        rows, labels = z[: 8 * views], y.repeat(views)
        lone = labels.where(labels >= 0, -1 - torch.arange(8).repeat(views))
        values = losses.supcon_out(rows, lone, 0.1, reduction="none")
        expected = oracle.supcon_out(rows.numpy(), lone.numpy(), 0.1, reduction="none")
        assert torch.allclose(values, torch.tensor(expected))
        without = labels < 0
        if views == 1:
            assert not values[without].any() and values[~without].all()
        else:  # as in NT-Xent
            assert torch.allclose(values[without], losses.nt_xent(rows, 0.1, reduction="none")[without])
        assert not torch.isclose(losses.supcon_out(rows, lone, 0.1), losses.supcon_out(rows, labels, 0.1))


@pytest.mark.parametrize("labels", [[0, 0, 1], np.array([0, 0, 1])])
def test_labels_that_are_no_tensor_are_refused_by_every_loss(labels):
    z = torch.eye(3)
    for loss in (losses.supcon_out, losses.supcon_in, losses.triplet, losses.max_margin, losses.tolerance):
        with pytest.raises(ValueError, match="y must be a tensor, got a"):
            loss(z, labels)
    with pytest.raises(ValueError, match="labels must be a tensor, got a"):
        losses.SupConLoss()(z[:, None], labels)


def test_two_columns_of_whole_numbers_are_no_probabilities():
    for loss in (losses.supcon_out, losses.supcon_in, losses.supcon_sharded):
        with pytest.raises(ValueError, match="floating point, got torch.int64"):
            loss(torch.eye(3), torch.tensor([[0, 1], [1, 0], [0, 1]]))


def test_a_mask_gets_no_gradient():
    mask = torch.eye(4).requires_grad_()
    features = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses.SupConLoss()(features, mask=mask).backward()
    assert mask.grad is None and features.grad.any()
