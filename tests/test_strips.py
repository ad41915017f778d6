"""The same values, faster: the oracle's values and gradients with strips of any height, and what surrounds them.

Tests that set the strips' height do so below any batch here, so that every batch takes several strips.
"""

import contextlib
import importlib.util
import math
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import losses
import reference_numpy as oracle
import strategies as own
from test_losses import CASES, EPS, ROUNDINGS, Case, actual, check_value_and_gradient, every, expected, expected_grads
from test_losses import grad_bound, leaves, rows_of, value_bound

heights = st.integers(1, 9)
keeps = nears = st.booleans()


@contextlib.contextmanager
def strips_of(rows, kept=True, near=True):
    """Every batch goes through strips of `rows` anchors and two more columns; None stands for the matrix form. The
    strips are kept for the backward or computed again. If not near, no shift serves, and whole rows are taken."""
    before = {name: getattr(losses, name) for name in ("STRIP", "WHOLE", "KEPT", "NEAR", "MATRIX")}
    try:
        if rows:
            losses.STRIP, losses.WHOLE = (rows, rows + 2), 12 * rows
            losses.KEPT, losses.NEAR, losses.MATRIX = kept * losses.KEPT, near * losses.NEAR, 0
        else:
            losses.MATRIX = math.inf
        yield
    finally:
        for name, value in before.items():
            setattr(losses, name, value)


FORMS = {"matrix": (None,), "kept strips": (5, True), "strips": (5, False), "whole rows": (5, False, False)}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def value_and_grads(case, b, form, dtype=torch.float64):
    rows = leaves(case, b, dtype)
    with strips_of(*form):
        loss = actual(case, b, rows)
        return loss, torch.autograd.grad(loss, rows)


def overlaps(y):
    """Whether each row's probabilities overlap with others' by more than a hundredth of its own: the sums of the
    classes hold both, and lose as many digits as they differ in."""
    if y.ndim == 1:
        return True
    w = y @ y.T
    rest = w.sum(1) - w.diagonal()
    return bool(((rest == 0) | (rest > 0.01 * w.diagonal())).all())


IN_STRIPS = {
    name: CASES[name]
    for name in [
        "supcon_out",
        "supcon_out-lone-anchors",
        "supcon_out-probabilities",
        "supcon_in",
        "supcon_in-lone-anchors",
        "supcon_in-probabilities",
        "nt_xent",
        "n_pair",
    ]
}
every_strip = pytest.mark.parametrize("case", IN_STRIPS.values(), ids=IN_STRIPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_strip
@settings(max_examples=40)
@given(data=st.data())
def test_value_and_gradient_are_the_oracles_at_every_height(case, dtype, data):
    b = data.draw(case.batches)
    b = b._replace(z=torch.tensor(b.z).to(dtype).double().numpy())
    assume(overlaps(b.y))
    value = expected(case, b)
    loss, grads = value_and_grads(case, b, (data.draw(heights), data.draw(keeps), data.draw(nears)), dtype)
    assert loss.dtype == dtype
    assert abs(loss.item() - value) <= value_bound(value, case, b, EPS[dtype])
    for grad, exact in zip(grads, expected_grads(case, b), strict=True):
        assert np.abs(grad.double().numpy() - exact).max() <= grad_bound(case, b, EPS[dtype])


@every_strip
@settings(max_examples=20)
@given(data=st.data())
def test_strips_and_the_matrix_agree_row_by_row(case, data):
    b, height = data.draw(case.batches), data.draw(heights)
    assume(overlaps(b.y))
    with strips_of(height):
        strips = actual(case, b, leaves(case, b), reduction="none").detach().numpy()
    with strips_of(None):
        matrix = actual(case, b, leaves(case, b), reduction="none").detach().numpy()
    assert (np.abs(strips - matrix) <= value_bound(matrix, case, b, EPS[torch.float64])).all()


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("variant", ["out", "in"])
@settings(max_examples=60)
@given(data=st.data())
def test_anchors_against_another_set_are_the_oracles_with_gradients_on_the_sides_that_want_them(variant, soft, data):
    b = data.draw(own.soft_batches() if soft else own.batches())
    assume(overlaps(b.y))
    N = len(b.z)
    first = data.draw(st.integers(0, N - 1))
    M = data.draw(st.integers(1, N - first))
    place = data.draw(st.sampled_from([first, None]))
    shift = data.draw(st.sampled_from([0, 1]))  # the two sides may name a row otherwise
    z, y = b.z[first : first + M], np.roll(b.y, shift, axis=0)[first : first + M]
    options = {"own": place, "variant": variant}
    options["denominator"] = "all" if soft else data.draw(st.sampled_from(losses.DENOMINATORS))
    exact = oracle.supcon_against(z, y, b.z, b.y, b.tau, **options)
    exact_grads = oracle.supcon_against_grad(z, y, b.z, b.y, b.tau, **options)
    case = Case("supcon_out")
    wanted = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    rows = [torch.tensor(x.copy(), requires_grad=side) for x, side in zip((z, b.z), wanted)]
    with strips_of(data.draw(st.none() | heights), data.draw(keeps), data.draw(nears)):
        loss = losses.supcon_against(rows[0], torch.tensor(y), rows[1], torch.tensor(b.y), b.tau, **options)
        loss.backward()
    assert abs(loss.item() - exact) <= value_bound(exact, case, b, EPS[torch.float64])
    for x, side, exact in zip(rows, wanted, exact_grads):
        assert not side or np.abs(x.grad.numpy() - exact).max() <= grad_bound(case, b, EPS[torch.float64])


@pytest.mark.parametrize("height", [None, 2], ids=["matrix", "strips"])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_an_anchor_whose_label_the_contrast_set_lacks_is_left_out(variant, height):
    z, contrast = rows_of(7, 1, 4), rows_of(5, 1, 4, seed=1)
    y, y_contrast = torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([1, 3, 3, 5, 5])
    with strips_of(height):
        values = losses.supcon_against(z, y, contrast, y_contrast, variant=variant, reduction="none").numpy()
        mean = losses.supcon_against(z, y, contrast, y_contrast, variant=variant).item()
    exact = oracle.supcon_against(
        z.numpy(), y.numpy(), contrast.numpy(), y_contrast.numpy(), variant=variant, reduction="none"
    )
    assert (values[::2] == 0).all() and values[1::2].all()
    np.testing.assert_allclose(values, exact, rtol=1e-12)
    assert mean == pytest.approx(exact[1::2].mean(), rel=1e-12)


def test_a_batch_is_itself_as_the_contrast_set():
    b = own.Batch(rows_of(20, 2, 5).numpy(), np.arange(40) % 20 % 3, 0.1, 2)
    z, y = torch.tensor(b.z), torch.tensor(b.y)
    for variant in ("out", "in"):
        own_set = losses.supcon_against(z, y, z, y, b.tau, own=0, variant=variant)
        torch.testing.assert_close(own_set, getattr(losses, f"supcon_{variant}")(z, y, b.tau))
    torch.testing.assert_close(losses.supcon_sharded(z, y, b.tau), losses.supcon_out(z, y, b.tau))


@pytest.mark.parametrize("variant", ["out", "in"])
@settings(max_examples=20)
@given(b=own.batches(units=own.always), height=heights)
def test_the_module_goes_through_the_strips(variant, b, height):
    x, y = torch.tensor(b.z).unflatten(0, (b.views, -1)).transpose(0, 1), torch.tensor(b.y[: len(b.y) // b.views])
    for mode in ("all", "one"):
        module = losses.SupConLoss(b.tau, mode, variant=variant, base_temperature=None)
        with strips_of(height):
            strips = module(x, y)
        with strips_of(None):
            matrix = module(x, y)
        assert abs(strips - matrix) <= value_bound(matrix.item(), Case("supcon_out"), b, EPS[torch.float64])


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("rows", ["clustered", "collapsed", "random"])
@pytest.mark.parametrize("tau", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_thousands_of_rows_in_float32_are_as_good_as_float32_can_be(variant, tau, rows, kept, monkeypatch):
    """Strips of their own height, against float64; 3001 rows of 3 classes, so that sums run over a thousand rows."""
    monkeypatch.setattr(losses, "KEPT", kept * losses.KEPT)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3001) % 3
    centre = {"clustered": torch.eye(3, 8)[y], "collapsed": torch.eye(1, 8).expand(3001, 8), "random": 0}[rows]
    z = nn.functional.normalize(centre + (1.0 if rows == "random" else 1e-3) * torch.randn(3001, 8, generator=g))
    values, grads = [], []
    for x in (z.double().requires_grad_(), z.clone().requires_grad_()):
        loss = getattr(losses, f"supcon_{variant}")(x, y, tau)
        values.append(loss.item())
        grads.append(torch.autograd.grad(loss, x)[0].double())
    assert abs(values[1] - values[0]) <= ROUNDINGS * EPS[torch.float32] * (abs(values[0]) + 1 / tau)
    assert (grads[1] - grads[0]).abs().max() <= ROUNDINGS * EPS[torch.float32] * (1 + 1 / tau) / tau / 3001 * 4


@every_strip
@settings(max_examples=10)
@given(data=st.data())
def test_a_row_of_nan_is_not_hidden_by_strips(case, data):
    b = data.draw(case.batches)
    assume(expected(case, b) != 0)
    z = b.z.copy()
    z[:] = np.nan
    with strips_of(3):
        assert actual(case, b._replace(z=z), leaves(case, b._replace(z=z))).isnan()


@forms
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", [1, 77])
def test_no_number_that_is_not_finite_is_hidden(form, variant, number, label):
    """Neither in an anchor with or without a positive, nor in a contrast that is the positive of some or of none."""
    g = torch.Generator().manual_seed(0)
    z, y = F.normalize(torch.rand(12, 4, generator=g)), torch.arange(12) % 3
    bad, labels = z.clone(), y.clone()
    bad[5, 0], labels[5] = number, label
    against = losses.supcon_out if variant == "out" else losses.supcon_in
    with strips_of(*form):
        assert not against(bad, labels).isfinite()
        assert not losses.supcon_against(bad, labels, z, y, variant=variant).isfinite()
        assert not losses.supcon_against(z, y, bad, labels, variant=variant).isfinite()


@forms
def test_a_row_much_longer_than_its_positives_keeps_its_digits(form):
    z, y = rows_of(20, 2, 8).float(), torch.arange(40) % 20
    z[3] *= 1e6
    found = []
    for rows in (z, z.double()):
        rows = rows.clone().requires_grad_()
        with strips_of(*form):
            loss = losses.supcon_out(rows, y, 0.1, reduction="none")[3]
            found.append((loss.detach().double(), torch.autograd.grad(loss, rows)[0][3].double()))
    (loss, grad), (exact, exact_grad) = found
    assert (loss - exact).abs() < 1e-5 * exact.abs()
    assert (grad - exact_grad).norm() < 1e-5 * exact_grad.norm()


# ---------------------------------------------------------------- what is left without the strips


def load(name, text, folder):
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """losses.py without what follows its banner, and with the line that the banner gives in place of its like."""
    above, below = (
        Path(losses.__file__)
        .read_text()
        .split("# ================================================================ The same values, faster\n")
    )
    line = re.search(r"write (MATRIX = \S+) above", below)[1]
    above, count = re.subn(r"^MATRIX = \S+", line, above, flags=re.MULTILINE)
    assert count == 1 and "def _from_strips" in below
    return load("cut_losses", above, tmp_path_factory.mktemp("cut"))


@every()
@settings(max_examples=15)
@given(data=st.data())
def test_above_the_banner_all_is_right(cut, case, data):
    check_value_and_gradient(case, data.draw(case.batches), cut)


@settings(max_examples=15)
@given(b=own.batches(), variant=st.sampled_from(["out", "in"]))
def test_above_the_banner_other_contrast_sets_are_right(cut, b, variant):
    M = (len(b.z) + 1) // 2
    arguments = b.z[:M], b.y[:M], b.z, b.y
    value = oracle.supcon_against(*arguments, b.tau, own=0, variant=variant)
    loss = cut.supcon_against(*map(torch.tensor, arguments), b.tau, own=0, variant=variant)
    assert abs(loss.item() - value) <= value_bound(value, Case("supcon_out"), b, EPS[torch.float64])


@pytest.mark.parametrize("variant", ["out", "in"])
def test_above_the_banner_large_batches_are_right(cut, variant):
    z, y = rows_of(300, 2, 16).requires_grad_(), torch.arange(300).repeat(2) % 7
    assert len(z) > losses.MATRIX
    values = [getattr(module, f"supcon_{variant}")(z, y, 0.05) for module in (losses, cut)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in values), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- precision, compilation, second derivatives


class Products(TorchDispatchMode):
    """Notes under which precision and autocast each matrix product runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.matmul):
            backend = torch.backends.cuda if args[0].is_cuda else torch.backends.mkldnn
            self.seen.append((backend.matmul.fp32_precision, torch.is_autocast_enabled(args[0].device.type)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def lowered_precision(word):
    """As a user's program may have it. The older switch moves the newer ones with it, and does not put them back."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, newer = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(word)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, newer):
            backend.fp32_precision = precision


without_driver = pytest.mark.skipif(torch.__version__ < "2.10", reason="tensors without numbers need a driver there")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=without_driver)])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: losses.supcon_out(z, y),
        lambda z, y: losses.supcon_in(z, y),
        lambda z, y: losses.triplet(z, y),
        lambda z, y: losses.supcon_out(z, y, denominator="negatives"),
        lambda z, y: losses.hard_contrastive(z, 0.1, 2),
    ],
    ids=["supcon_out", "supcon_in", "triplet", "negatives", "hard_contrastive"],
)
def test_products_are_exact_whatever_the_surroundings_and_the_surroundings_stay(loss, device):
    """On "cuda" the tensors have shapes and no numbers. That needs no GPU; only the forward runs, without autocast."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with lowered_precision("medium"):
        lowered = [b.fp32_precision for b in backends]
        without_numbers = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
        with without_numbers, Products() as products, torch.autocast("cpu", torch.bfloat16):
            z = torch.linspace(-1, 1, 64, device=device).view(16, 4).requires_grad_(device == "cpu")
            value = loss(z, torch.arange(16, device=device) % 8 % 3)
            if device == "cpu":
                value.backward()
            assert [b.fp32_precision for b in backends] == lowered and torch.is_autocast_enabled("cpu")
        assert len(products.seen) >= (2 if device == "cpu" else 1) and set(products.seen) == {("ieee", False)}


def test_strips_restore_the_precision_they_found():
    z, y = rows_of(8, 2, 4).float().requires_grad_(), torch.arange(16) % 8 % 3
    with lowered_precision("high"):
        with strips_of(3):
            losses.supcon_out(z, y).backward()
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.seeds_torch
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trains_under_autocast_and_a_gradient_scaler(dtype, form):
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 4), torch.randn(24, 8), torch.arange(24) % 3
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    values = []
    for _ in range(20):
        with torch.autocast("cpu", dtype), strips_of(*form):
            z = nn.functional.normalize(model(x), eps=1e-6)
            loss = losses.supcon_out(z, y, 0.2)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        with strips_of(*form):
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.05


COMPILED = {
    "supcon_out": lambda z, y, tau: losses.supcon_out(z, y, tau),
    "supcon_in": lambda z, y, tau: losses.supcon_in(z, y, tau),
    "nt_xent": lambda z, y, tau: losses.nt_xent(z, tau),
    "n_pair": lambda z, y, tau: losses.n_pair(z / tau, z.flip(0)),
    "probabilities": lambda z, y, tau: losses.supcon_out(z, torch.eye(3, dtype=z.dtype)[y] * 0.8 + 0.1, tau),
    "cap": lambda z, y, tau: losses.supcon_out(z, y, tau, positives_cap=2),
    "one_positive": lambda z, y, tau: losses.supcon_out(z, y, tau, denominator="one_positive"),
    "hard_contrastive": lambda z, y, tau: losses.hard_contrastive(z, tau, 3),
    "against": lambda z, y, tau: losses.supcon_against(z[2:7], y[2:7], z, y, tau, own=2),
    "memory": lambda z, y, tau: losses.supcon_against(z[2:7], y[2:7], z.detach(), y, tau.detach()) + tau,
    "module": lambda z, y, tau: losses.SupConLoss(0.1, "one")(z.unflatten(0, (2, -1)).transpose(0, 1) / tau, y[:8]),
}


@forms
@pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED)
def test_compiles_into_one_graph_with_the_same_value_and_gradients(loss, form):
    def run(f):
        z, tau = rows_of(8, 2, 16).requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        value = f(z, torch.arange(8).repeat(2) % 3, tau)
        return value, *torch.autograd.grad(value, [z, tau])

    torch._dynamo.reset()
    with strips_of(*form):
        torch.testing.assert_close(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss))


@forms
@pytest.mark.parametrize("loss", ["supcon_out", "supcon_in", "nt_xent"])
def test_there_is_no_second_derivative_even_beside_a_first(loss, form):
    z = rows_of(8, 2, 4).requires_grad_()
    with strips_of(*form), pytest.raises(RuntimeError, match="second derivative"):
        value = getattr(losses, loss)(z, *([] if loss == "nt_xent" else [torch.arange(16) % 8 % 3]))
        penalty = torch.autograd.grad(value, z, create_graph=True)[0].square().sum()
        (value + penalty).backward()


@every_strip
@settings(max_examples=10)
@given(data=st.data())
def test_a_tensor_tau_learns_through_strips(case, data):
    if case.loss == "n_pair":
        return
    b = data.draw(case.batches)
    b = b._replace(tau=max(b.tau, 0.1), z=b.z / own.MAX_NORM)
    tau, h = torch.tensor(b.tau, dtype=torch.float64, requires_grad=True), 1e-5 * b.tau
    with strips_of(data.draw(heights), data.draw(keeps), data.draw(nears)):
        grad = torch.autograd.grad(actual(case, b._replace(tau=tau), leaves(case, b)), tau)[0].item()
    ahead, behind = (expected(case, b._replace(tau=b.tau + step)) for step in (h, -h))
    assert grad == pytest.approx((ahead - behind) / (2 * h), abs=1e-6 / b.tau)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("tau", [0.5, 0.001], ids=["mild", "large scores"])
def test_a_second_backward_of_kept_strips_gives_the_same(variant, tau):
    z, y = rows_of(12, 2, 4).requires_grad_(), torch.arange(24) % 12 % 3
    with strips_of(5):
        loss = getattr(losses, f"supcon_{variant}")(z, y, tau)
        grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_no_matrix_of_all_scores_is_kept_for_the_backward():
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    z, y = rows_of(200, 2, 8).requires_grad_(), torch.arange(400) % 200 % 3
    for variant in ("out", "in"):
        kept.clear()
        with strips_of(64, kept=False), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            getattr(losses, f"supcon_{variant}")(z, y).backward()
        assert 0 < sum(kept.values()) <= 10 * z.numel() * 8  # N x N would be 50


@pytest.mark.parametrize("norm", [1, 1.3, 1.6, 2, 8])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_gradients_hold_whether_log_sums_are_near_or_far(variant, norm, monkeypatch):
    """At tau 0.01 one shift serves all unit rows; it does not serve rows of norm 1 and of norm 8 at once."""
    z = rows_of(30, 2, 16).double().clone()
    z[::2] *= norm
    y = torch.arange(20).repeat(3) % 7
    y[-1] = 9  # an anchor without a positive is a contrast of the others
    values, grads, ways = [], [], []
    score_rows = losses._score_rows
    monkeypatch.setattr(losses, "_score_rows", lambda *rows: ways.append("whole rows") or score_rows(*rows))
    for dtype, height in ((torch.double, None), (torch.float, 8)):
        rows = z.to(dtype).requires_grad_()
        with strips_of(height):
            loss = getattr(losses, f"supcon_{variant}")(rows, y, 0.01)
            values.append(loss.double())
            grads.append(torch.autograd.grad(loss, rows)[0].double())
    if norm in (1, 8):
        assert ways == {1: [], 8: ["whole rows", "whole rows"]}[norm]  # one of them in the backward
    scale = 100 * norm**2
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("own_set", [True, False], ids=["own rows", "another set"])
@pytest.mark.parametrize("size", [10, 100, 1e4])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_gradients_in_float32_hold_at_scores_of_any_size(variant, size, own_set):
    """A log sum of 1e8 is rounded to a multiple of 8: its softmax must not be taken from it."""
    z = (size * rows_of(41, 1, 5)).float()
    z[-1] /= 10
    y, grads = torch.arange(41) % 9, []
    y[-1] = 9  # has no positive
    for dtype, height in ((torch.double, None), (torch.float, 8)):
        rows = z.to(dtype).requires_grad_()
        with strips_of(height):
            if own_set:
                loss = getattr(losses, f"supcon_{variant}")(rows, y, 1.0)
            else:
                loss = losses.supcon_against(rows, y, rows.flip(0), y.flip(0), 1.0, variant=variant)
            grads.append(torch.autograd.grad(loss, rows)[0].double())
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


@forms
@pytest.mark.parametrize("variant", ["out", "in"])
def test_losses_may_be_checkpointed(variant, form):
    z, y = rows_of(12, 2, 4).requires_grad_(), torch.arange(24) % 12 % 3
    loss = getattr(losses, f"supcon_{variant}")
    with strips_of(*form):
        plain = torch.autograd.grad(loss(z, y), z)[0]
        again = torch.autograd.grad(checkpoint(loss, z, y, use_reentrant=False), z)[0]
    torch.testing.assert_close(again, plain)


def test_probabilities_with_tiny_overlaps_count_in_strips_too():
    """Overlaps of 1e-9 beside an own product of 1: exact arithmetic has them all count."""
    N, e = 40, 1e-9
    z, y = rows_of(N, 1, 8), (1 - e) * torch.eye(N, dtype=torch.double) + e / N
    values = []
    for height in (None, 7):
        with strips_of(height):
            values.append(losses.supcon_out(z, y).item())
    assert values[0] > 1 and values[1] == pytest.approx(values[0], rel=1e-5)
    apart = torch.eye(N, dtype=torch.double)
    with strips_of(7):
        assert losses.supcon_out(z, apart).item() == 0
        peaked = torch.tensor([[1e-10, 1 - 1e-10]], dtype=torch.double).expand(N, 2)
        alone = torch.tensor([[1.0, 0.0]], dtype=torch.double).expand(N, 2)
        assert losses.supcon_against(z, alone, z, peaked).item() > 1


def test_rows_of_probabilities_apart_have_no_positive_whatever_rounding_leaves_of_the_sums():
    y = torch.block_diag(*torch.rand(20, 1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double))
    for dtype in (torch.float64, torch.float32):
        with strips_of(7):
            for loss in (losses.supcon_out, losses.supcon_in):
                assert not loss(rows_of(20, 1, 4).to(dtype), y.to(dtype), reduction="none").any()


@forms
@pytest.mark.parametrize("loss", [losses.supcon_out, losses.supcon_in])
def test_a_probability_that_is_not_a_number_is_not_hidden(loss, form):
    y = torch.full((12, 3), 1 / 3, dtype=torch.double)
    y[5] = torch.nan
    with strips_of(*form):
        assert loss(rows_of(12, 1, 4), y).isnan()


@forms
@pytest.mark.parametrize("learns", [False, True])
def test_a_memory_may_move_on_before_the_backward(form, learns):
    z, y = rows_of(8, 2, 4), torch.arange(16) % 3
    tau = torch.tensor(0.1, requires_grad=True) if learns else 0.1
    grads = []
    for moves in (False, True):
        anchors, memory, labels = z.clone().requires_grad_(), z.clone(), y.clone()
        with strips_of(*form):
            loss = losses.supcon_against(anchors, y, memory, labels, tau)
            loss = loss + losses.supcon_sharded(anchors, y, tau, queue=(memory, labels))
            if moves:
                memory[:4] = 0
                labels[:4] = 5
            grads.append(torch.autograd.grad(loss, [anchors, tau] if learns else [anchors]))
    assert all(map(torch.equal, *grads))


def test_probabilities_that_barely_overlap_give_a_finite_gradient():
    """The first two rows overlap by 1e-24, far below what float32 class sums can tell from nothing."""
    z = 1.9 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 1]])
    y = torch.tensor([[1, 0, 0], [1e-24, 1, 0], [0, 0, 1], [0, 0, 1]])
    for loss in (losses.supcon_out, losses.supcon_in):
        x = z.clone().requires_grad_()
        with strips_of(3):
            assert torch.autograd.grad(loss(x, y), x)[0].isfinite().all()


@pytest.mark.parametrize("overlap", [1e-15, 1e-30])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_the_smallest_overlap_counts_where_no_row_is_an_anchors_own(variant, overlap):
    z, a, b = rows_of(12, 1, 4), torch.tensor([[1.0, 0.0]]), torch.tensor([[overlap, 1 - overlap]])
    a, b = (y.double().expand(12, 2) for y in (a, b))
    exact = oracle.supcon_against(z.numpy(), a.numpy(), z.numpy(), b.numpy(), variant=variant)
    for height in (None, 3):
        with strips_of(height):
            assert losses.supcon_against(z, a, z, b, variant=variant).item() == pytest.approx(exact, rel=1e-9)


@forms
def test_class_probabilities_get_no_gradient(form):
    z, y = rows_of(8, 1, 4).requires_grad_(), torch.full((8, 3), 1 / 3, dtype=torch.double, requires_grad=True)
    with strips_of(*form):
        for loss in (losses.supcon_out, losses.supcon_in):
            assert torch.autograd.grad(loss(z, y), [z, y], allow_unused=True)[1] is None
            torch._dynamo.reset()
            torch.compile(loss, fullgraph=True, backend="aot_eager")(z, y).backward()
    mask = torch.eye(8, requires_grad=True)
    assert not torch.autograd.grad(
        losses.SupConLoss()(z.unflatten(0, (8, 1)).expand(8, 2, 4), mask=mask), mask, allow_unused=True
    )[0]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.half, torch.float32], ids=str
)
def test_labels_of_any_type_in_both_forms(dtype):
    z, y = rows_of(12, 1, 4), torch.arange(12) % 2
    for height in (None, 3):
        with strips_of(height):
            for loss in (losses.supcon_out, losses.supcon_in):
                assert loss(z, y.to(dtype)).item() == loss(z, y).item()


def test_a_label_that_is_not_a_number_has_no_positives():
    z, y = rows_of(10, 1, 4), torch.arange(10.0) % 3
    y[3] = math.nan
    values = []
    for height in (None, 3):
        with strips_of(height):
            values.append(losses.supcon_out(z, y, reduction="none"))
    assert values[0][3] == values[1][3] == 0
    torch.testing.assert_close(*values)


@pytest.fixture
def lowered():
    """The backend of CPU products, at a precision that a user has set."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    yield backend
    backend.fp32_precision = before


def test_the_precision_lasts_while_a_thread_needs_it_and_then_is_the_users_again(lowered):
    """The first thread in is the first one out. It must neither lower the second's products nor be outlived by it."""
    places = {name: threading.Event() for name in ("first in", "second in", "first out")}
    seen, a = {}, torch.ones(2, 2)

    @losses._exact_op(torch.empty_like)
    def first(a: torch.Tensor) -> torch.Tensor:
        places["first in"].set()
        assert places["second in"].wait(10)
        return a

    @losses._exact_op(torch.empty_like)
    def second(a: torch.Tensor) -> torch.Tensor:
        places["second in"].set()
        assert places["first out"].wait(10)
        seen["while the second is inside"] = lowered.fp32_precision
        return a

    threads = [threading.Thread(target=first, args=(a,)), threading.Thread(target=second, args=(a,))]
    threads[0].start()
    assert places["first in"].wait(10)
    threads[1].start()
    threads[0].join(10)
    places["first out"].set()
    threads[1].join(10)
    assert seen == {"while the second is inside": "ieee"}
    assert lowered.fp32_precision == "tf32"


def test_threads_that_overlap_anyhow_lose_no_setting():
    class Slow:
        """A backend in whose every access another thread may step in."""

        def __init__(self):
            self.value = "tf32"

        @property
        def fp32_precision(self):
            value = self.value
            time.sleep(1e-5)
            return value

        @fp32_precision.setter
        def fp32_precision(self, value):
            time.sleep(1e-5)
            self.value = value

    backend = Slow()
    ieee, seen = losses._Ieee(backend), []

    def work():
        for _ in range(100):
            with ieee:
                time.sleep(1e-5)
                seen.append(backend.value)
            time.sleep(1e-5 * len(seen) % 4e-5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 400 and set(seen) == {"ieee"} and backend.value == "tf32"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_one_switch_of_older_torch_is_exact_inside_and_the_users_again_outside(precision, monkeypatch):
    switch = [precision]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: switch[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", switch.append)
    with losses._Ieee(losses._OneSwitch()):
        assert switch[-1] == "highest"
    assert switch[-1] == precision and set(switch) <= {"highest", "high", "medium"}


def test_an_inherited_precision_stays_inherited():
    z, y = rows_of(8, 2, 4).float(), torch.arange(16) % 3
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [b.fp32_precision for b in backends]
    try:
        for b, precision in zip(backends, ("tf32", "none", "none")):
            b.fp32_precision = precision
        losses.supcon_out(z, y)
        assert [b.fp32_precision for b in backends] == ["tf32"] * 3
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        for b, precision in zip(backends, before):
            b.fp32_precision = precision


def test_two_copies_in_one_process_keep_apart_when_compiled():
    z, y, copies = rows_of(8, 1, 4), torch.arange(8) % 3, []
    for name in ("copy_a", "copy_b"):
        spec = importlib.util.spec_from_file_location(name, losses.__file__)
        copies.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(copies[-1])
        copies[-1].MATRIX = 0
    copies[1]._strips = None
    torch._dynamo.reset()
    value = torch.compile(copies[0].supcon_out, fullgraph=True, backend="aot_eager")(z, y)
    torch.testing.assert_close(value, losses.supcon_out(z, y))


def test_distances_of_rows_far_from_the_origin_are_those_near_it():
    near, y = 0.05 * rows_of(12, 1, 16), torch.arange(12) % 3
    far = 100 + near
    near = far - 100  # what rounding has left of it
    assert losses.uniformity(far.float()).item() == pytest.approx(losses.uniformity(near).item(), abs=1e-4)
    value = losses.triplet(near, y, 0.01).item()
    assert value > 0 and losses.triplet(far, y, 0.01).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_narrow_tensor_tau_is_its_own_value(dtype):
    z, y, tau = rows_of(8, 2, 4), torch.arange(16) % 8 % 3, torch.tensor(0.07, dtype=dtype)
    assert losses.supcon_out(z, y, tau).item() == pytest.approx(losses.supcon_out(z, y, tau.item()).item(), rel=1e-12)


def test_the_global_mean_of_half_values_does_not_overflow_and_small_label_types_gather():
    assert losses.global_mean(torch.full((20000,), 7.0, dtype=torch.half), torch.ones(20000, dtype=torch.bool)) == 7
    z, y = rows_of(8, 2, 4), torch.arange(16) % 8 % 3
    for dtype in (torch.int16, torch.uint8):
        assert torch.equal(losses.supcon_sharded(z, y.to(dtype)), losses.supcon_sharded(z, y))


BAD = {
    "another width": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 4), torch.zeros(5)), {}, r"\(5, 4\)"),
    "labels too few": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(4)), {}, r"\(4,\)"),
    "labels and probabilities": (
        (torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5, 2)),
        {},
        r"\(5, 2\)",
    ),
    "labels of another kind": (
        (torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5).long()),
        {},
        r"int64 \(5,\)",
    ),
    "labels in a column": ((torch.ones(3, 2), torch.zeros(3, 1), torch.ones(5, 2), torch.zeros(5, 1)), {}, r"\(3, 1\)"),
    "labels in a list": ((torch.ones(3, 2), [0, 0, 0], torch.ones(5, 2), torch.zeros(5)), {}, "list"),
    "tau with an axis": (
        (torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5), torch.ones(3)),
        {},
        r"\(3,\)",
    ),
    "own no number": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5)), {"own": 1.0}, r"1\.0"),
    "own too far": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5)), {"own": 3}, r"\b3\b"),
    "variant": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5)), {"variant": "up"}, "up"),
    "denominator": ((torch.ones(3, 2), torch.zeros(3), torch.ones(5, 2), torch.zeros(5)), {"denominator": "X"}, "'X'"),
    "denominator of probabilities": (
        (torch.ones(3, 2), torch.zeros(3, 2), torch.ones(5, 2), torch.zeros(5, 2)),
        {"denominator": "negatives"},
        "go with denominator='all' alone",
    ),
}


@pytest.mark.parametrize("arguments, options, offender", BAD.values(), ids=BAD)
def test_bad_arguments_of_supcon_against_raise_and_are_named(arguments, options, offender):
    with pytest.raises(ValueError, match=offender):
        losses.supcon_against(*arguments, **options)


def test_bad_arguments_of_what_joins_ranks_raise_and_are_named():
    z, y = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        losses.supcon_sharded(z, y, queue=(torch.ones(4, 2), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        losses.supcon_sharded(z, y, queue=(torch.ones(4, 5), torch.zeros(4)))
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        losses.global_mean(y, torch.ones(3, 1, dtype=torch.bool))
