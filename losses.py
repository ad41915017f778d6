# SPDX-License-Identifier: MIT. Copyright (c) 2026 the authors of this file. Version 0.2.0.
"""Supervised contrastive losses and their relatives, one file that needs nothing but torch (2.9 or newer).

    from losses import supcon_out
    z = F.normalize(projection(encoder(torch.cat([view0, view1]))))   # (2n, D): all first views, then all second
    loss = supcon_out(z, labels.repeat(2), tau=0.1)                   # a scalar: the mean over the anchors
    loss.backward()

Notation, as in the paper (Khosla et al. 2020, arXiv 2004.11362v5, cited as "A"; Wang & Liu 2021, arXiv
2012.09740, as "B"). n images with V views make N = nV rows z_i of D numbers, view 0 of every image first:

    s_ij = z_i . z_j      A(i) = all rows but i      P(i) = rows of A(i) with the label of i      N(i) = the rest
    P_ip = exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau)

A loss is the mean over the anchors i that have a positive; the others are left out of mean and gradient alike,
and a batch without any gives 0. Nothing is scaled by a hidden factor and nothing is normalised: the functions
are the equations. reduction="none" returns one value per row, 0 for a row that is left out.

Scores are float32 or wider, without autocast and TF32; a half or bfloat16 z gets its gradient in its own type
(in float16 that underflows for large N: use a gradient scaler). tau may be a tensor and then gets its gradient;
labels and class probabilities get none. Second derivatives of what is made of scores raise. Shapes and options that
cannot be meant raise ValueError; values are not looked at, so nan and inf propagate.
"""

import contextlib
import math
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- the supervised contrastive loss


def supcon_out(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """L_out, the paper's loss (A eq. 2): mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / D_ip ).

    z (N, D) features, taken as given; y (N,) labels, or (N, C > 1) class probabilities, which weigh a pair by
    their inner product; tau a positive number or tensor. D_ip is the sum of exp(s_ia/tau) over
      "all"           P(i) and N(i), that is A(i): the paper; the one that holds no N x N matrix
      "one_positive"  p and N(i)
      "negatives"     N(i); an anchor without negatives is left out
    positives_cap keeps, beside the anchor's own other `views`, at most that many positives (lowest batch index
    first, evenly over the views); the dropped ones leave the denominator too (A sec. 11).
    Returns a scalar, or (N,) values. Raises ValueError for shapes and options that do not fit.
    """
    return _reduce(*_supcon("out", z, y, tau, denominator, positives_cap, views), reduction)


def supcon_in(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """L_in (A eq. 3): mean_i -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / D_ip ). Arguments as supcon_out.

    Never above L_out (Jensen), equal where all positives of an anchor tie; its gradient pulls the nearest
    positives alone, and the paper measures it 11 points worse.
    """
    return _reduce(*_supcon("in", z, y, tau, denominator, positives_cap, views), reduction)


def nt_xent(z, tau=0.5, *, views=2, reduction="mean"):
    """SimCLR's NT-Xent, L_self (A eq. 1): L_out where only the other views of an image are its positives."""
    _check(z, views=views)
    return supcon_out(z, _image_index(z, views), tau, reduction=reduction)


def _supcon(variant, z, y, tau, denominator, positives_cap, views):
    """(L_i of every row, whether it counts), each (N,)."""
    _check(z, y, tau=tau, views=1 if positives_cap is None else views, probabilities=True)
    _check_word("denominator", denominator, ("all", "one_positive", "negatives"))
    if denominator == "all" and positives_cap is None:
        return _anchors(variant, z, y, tau)
    if y.ndim == 2:
        raise ValueError("class probabilities y (N, C) go with denominator='all' and no positives_cap alone")
    p, n = _positives_negatives(y)
    if positives_cap is not None:
        p = _cap_positives(p, positives_cap, views)
    if denominator == "all":
        z, scale = _rows_and_scale(z, tau)
        return _Dense.apply(variant, z, None, p, ~(p | n), scale)
    s = _scores(z) / tau
    log_n = s.masked_fill(~n, -torch.inf).logsumexp(1, keepdim=True)
    if denominator == "negatives":
        p = p & n.any(1, keepdim=True)
        log_ratio = torch.where(p, s - log_n, 0)
    else:
        log_ratio = torch.where(p, s - torch.logaddexp(s, log_n), 0)
    loss, _ = _equation(variant, _rows_to_one(p, s.dtype), log_ratio)
    return torch.where(p.any(1), loss, 0), p.any(1)


def _equation(variant, w, log_ratio):
    """L_i (A eq. 2 and 3) and X_ip (A eq. 5) of every row, from w_ip = 1/|P(i)|, 0 for no positive, and the log ratios."""
    if variant == "out":
        return -(w * log_ratio).sum(1), w
    weighed = _log(w) + log_ratio
    return -weighed.logsumexp(1), weighed.softmax(1)


def _cap_positives(p, cap, views):
    """P(i) cut to the anchor's own views and the first cap / views other images of its class."""
    if cap < 0 or cap % views:
        raise ValueError(f"positives_cap must be a multiple of views = {views} and not negative, got {cap}")
    image = torch.arange(len(p), device=p.device) % (len(p) // views)
    own = image[:, None] == image
    others = (p & ~own).unflatten(1, (views, -1))  # (N, V, n): each view of the other images, in batch order
    first = others & (others.cumsum(2) <= cap // views)
    return (p & own) | first.flatten(1)


class _Dense(torch.autograd.Function):
    """(L_i of every anchor, whether it counts), from the whole matrix of scores.

    a (M, D) and b (N, D) are anchors and contrast set, b None for the anchors themselves; their products times scale
    are the scores. w (M, N) >= 0 weighs the positives, each row is brought to a sum of one; excluded, as _fill takes
    it, marks what is not in an anchor's denominator.
    The gradient is dL_i/ds_ij = P_ij - X_ij (A eq. 4 and 5).
    """

    @staticmethod
    def forward(ctx, variant, a, b, w, excluded, scale):
        s = _product(a, (a if b is None else b).T).mul_(scale)
        log_p = _fill(s, excluded, -torch.inf).log_softmax(1)  # log P_ij
        w = _rows_to_one(w, s.dtype)
        alone = w.sum(1, keepdim=True) == 0
        P = log_p.exp()
        loss, X = _equation(variant, w, _fill(log_p, excluded, 0))
        ctx.save_for_backward(a, b, P.sub_(X).masked_fill_(alone, 0))
        ctx.scale = scale
        alone = alone.squeeze(1)
        valid = ~alone
        return loss.masked_fill_(alone, 0), valid

    @staticmethod
    def backward(ctx, g, _):
        _first_derivative_only()
        a, b, P_minus_X = ctx.saved_tensors
        G = (g * ctx.scale)[:, None] * P_minus_X
        if b is None:
            return None, _product(G + G.T, a), *[None] * 4
        return None, _product(G, b), _product(G.T, a), *[None] * 3


def supcon_against(z, y, contrast, y_contrast, tau=0.1, *, own=None, variant="out", reduction="mean"):
    """L_out (or L_in, variant "in") of anchors against a contrast set of their own, a memory of rows for example.

    z (M, D) anchors with labels y (M,); contrast (N, D) rows with y_contrast (N,); or class probabilities on both
    sides. A(i) is the contrast set; where `own` is given its row own + i is anchor i itself and left out. Both
    sides get gradients. Returns a scalar, or (M,) values.
    """
    _check_word("variant", variant, ("out", "in"))
    _check(z, y, tau=tau, probabilities=True)
    _check_contrast(z, y, contrast, y_contrast)
    if own is not None and not (isinstance(own, int) and 0 <= own <= len(contrast) - len(z)):
        raise ValueError(f"own must be a whole number in 0 ... {len(contrast) - len(z)}, got {own}")
    contrast, y_contrast = contrast.clone(), y_contrast.clone()  # a memory may move on before the backward
    return _reduce(*_anchors(variant, z, y, tau, contrast, y_contrast, own), reduction)


class SupConLoss(nn.Module):
    """Drop-in for the reference PyTorch code's SupConLoss: same arguments, same value on unit rows.

    forward(features, labels=None, mask=None): features (B, V, ...), anything after V is flattened; labels (B,),
    or mask (B, B) whose entry [i, j] >= 0 weighs image j as a positive of image i (it takes an N x N matrix), or
    neither, which is NT-Xent. contrast_mode "one" takes view 0 alone as anchors. The value is multiplied by
    temperature/base_temperature, as the reference does; base_temperature=None turns that off. variant "in" is L_in.

    It parts from the reference where that is wrong or nan: anchors without a positive leave the mean (the
    reference divides by them as well), small temperatures are exact (it underflows), and rows are L2-normalised
    here (normalize=False turns that off), so the gradient with respect to unit leaf rows is the tangential part;
    parameters of a model that normalises already see no difference. (Of a zero row, F.normalize's gradient is huge.)
    """

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07, *, variant="out", normalize=True):
        super().__init__()
        _check_word("contrast_mode", contrast_mode, ("all", "one"))
        _check_word("variant", variant, ("out", "in"))
        _check_tau(temperature)
        if base_temperature is not None:
            _check_tau(base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode, self.variant, self.normalize = contrast_mode, variant, normalize

    def forward(self, features, labels=None, mask=None):
        if features.ndim < 3:
            raise ValueError(f"features must be (B, V, ...), got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("give labels or mask, not both")
        B, V = features.shape[:2]
        z = _widen(features.flatten(2).transpose(0, 1).flatten(0, 1))  # (V B, D), view by view
        if self.normalize:
            z = F.normalize(z)
        M = B if self.contrast_mode == "one" else V * B  # the anchors come first in z
        if mask is not None:
            if mask.shape != (B, B):
                raise ValueError(f"mask must be ({B}, {B}), got {tuple(mask.shape)}")
            z, scale = _rows_and_scale(z, self.temperature)
            w = _fill(mask.to(z.device, z.dtype).repeat(V, V)[:M], 0, 0)
            terms = _Dense.apply(self.variant, z[:M], z if M < V * B else None, w, 0, scale)
        else:
            y = torch.arange(B, device=z.device) if labels is None else labels.reshape(-1).to(z.device)
            if len(y) != B:
                raise ValueError(f"labels must be ({B},) for features {tuple(features.shape)}, got {len(y)}")
            y = y.repeat(V)
            terms = _anchors(self.variant, z[:M], y[:M], self.temperature, *(() if M == len(z) else (z, y)))
        factor = 1 if self.base_temperature is None else self.temperature / self.base_temperature
        return factor * _reduce(*terms, "mean")


# ---------------------------------------------------------------- the same losses in tiles, without an N x N matrix
#
#   L_out,i = lse_{a in A(i)} s_ia/tau  -  mean_{p in P(i)} s_ip/tau
#   L_in,i  = lse_{a in A(i)} s_ia/tau  -  lse_{p in P(i)} s_ip/tau  +  log |P(i)|
#
# lse, the log of the sum of exp, goes over tiles of the scores, and the backward computes each tile again. The mean
# needs no scores: it is z_i . c_i / tau, c_i the mean of the rows P(i), from the sums of the classes. Where the
# anchors are the contrast set, b is None: s_ij = s_ji, and a tile above the diagonal serves its rows and its columns.

TILE = 1024  # rows and columns of scores in memory at a time
DENSE = 512  # a batch that is no larger takes the dense form, which is faster there


def _anchors(variant, a, y_a, tau, b=None, y_b=None, own=0):
    """(L_i of every anchor, whether it counts), each (M,); anchor i is row own + i of the contrast set, if of any."""
    a, scale = _rows_and_scale(a, tau)
    b = None if b is None else _rows_and_scale(b, tau)[0].to(a.dtype)
    if y_a.ndim == 2:
        y_a, y_b = y_a.to(a.dtype), None if b is None else y_b.to(a.dtype)
    if len(a) * len(a if b is None else b) > DENSE**2:
        root = math.sqrt(scale)
        return _Tiled.apply(variant, a * root, y_a, None if b is None else b * root, y_b, own)
    y_b = y_a if b is None else y_b
    w = _product(y_a, y_b.T) if y_a.ndim == 2 else y_a[:, None] == y_b
    return _Dense.apply(variant, a, b, _fill(w, own, 0), own, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, variant, a, y_a, b, y_b, own):
        mirror = b is None
        b, y_b = (a, y_a) if mirror else (b, y_b)
        summed = b if variant == "out" else b[:, :0]  # L_in asks for |P(i)| alone
        sums = _positive_sums(F.pad(summed, (0, 1), value=1.0), y_b, y_a, own)
        weight = sums[:, -1]  # |P(i)|, or the sum of the products of class probabilities
        rounding = 1e-6 if a.device.type == "mps" else 1e-12  # of sums that an anchor itself was taken from
        alone = weight <= (0 if y_a.ndim == 1 or own is None else rounding * y_a.square().sum(1))
        weight = weight.masked_fill(alone, 1)
        mean = sums[:, :-1] / weight[:, None]  # c_i
        labels = (y_a, y_b) if variant == "in" else (None, None)
        lse = _lse(a, b, *labels, own, mirror)
        loss = lse[0] - (a * mean).sum(1) if variant == "out" else lse[0] - lse[1] + weight.log()
        ctx.save_for_backward(a, b, y_a.clone(), y_b.clone(), lse, mean, weight, alone)
        ctx.variant, ctx.own, ctx.mirror = variant, own, mirror
        valid = ~alone
        return loss.masked_fill_(alone, 0), valid

    @staticmethod
    def backward(ctx, g, _):
        _first_derivative_only()
        a, b, y_a, y_b, lse, mean, weight, alone = ctx.saved_tensors
        g = g.masked_fill(alone, 0)
        if ctx.variant == "out":
            grad_a, grad_b = _lse_grad(a, b, None, None, ctx.own, ctx.mirror, lse, g[None])
            grad_a -= g[:, None] * mean
            grad_b -= _positive_sums(a * (g / weight)[:, None], y_a, y_b, ctx.own)
        else:
            grad_a, grad_b = _lse_grad(a, b, y_a, y_b, ctx.own, ctx.mirror, lse, torch.stack([g, -g]))
        if ctx.mirror:
            grad_a, grad_b = grad_a + grad_b, None
        return None, grad_a, None, grad_b, None, None


def _tiles(a, b, y_a, y_b, own, mirror, mild):
    """Yields (I, J, scores): a block of anchors, one of the contrast set, and their scores, -inf for j = own + i.

    With labels a second matrix of scores follows, those of P(i), -inf for the rest; with class probabilities, all
    of them weighed by the probabilities' product. If mild, it is exp of each. A mirror shows the tiles above the
    diagonal alone.
    """
    for i in range(0, len(a), TILE):
        for j in range(i if mirror else 0, len(b), TILE):
            I, J = slice(i, i + TILE), slice(j, j + TILE)
            s = _fill(a[I] @ b[J].T, None if own is None else own + i - j, -torch.inf)
            s = s.exp_() if mild else s
            if y_a is None:
                yield I, J, [s]
            else:
                w = y_a[I] @ y_b[J].T if y_a.ndim == 2 else (y_a[I, None] == y_b[J]).to(s.dtype)
                yield I, J, [s, s * w if mild else s + _log(w)]


def _mild(a, b):
    """Whether |s_ij| < 40 by Cauchy and Schwarz: exp(s_ij) can then be added up without taking a maximum off."""
    return min(len(a), len(b)) > 0 and bool(a.square().sum(1).amax() * b.square().sum(1).amax() < 40**2)


def _leaf(shape):
    """Makes a function of tensors one node of a compiled graph, where tiles would unroll. `shape` makes its results."""

    def wrap(f):
        op = torch.library.custom_op(f"supcon::{f.__name__}", f, mutates_args=())
        op.register_fake(shape)
        return lambda *args: (op if torch.compiler.is_compiling() else f)(*args)

    return wrap


@_leaf(lambda a, b, y_a, *rest: a.new_empty(1 if y_a is None else 2, len(a)))
def _lse(a: Tensor, b: Tensor, y_a: Optional[Tensor], y_b: Optional[Tensor], own: Optional[int], mirror: bool) -> Tensor:
    """log sum_j exp(s_ij) over A(i), and with labels over P(i) as well: (1 or 2, M); -inf where there is none."""
    mild = _mild(a, b)
    add = torch.add if mild else torch.logaddexp
    total = a.new_full((1 if y_a is None else 2, len(a)), 0 if mild else -torch.inf)
    with _full_precision(a.device):
        for I, J, scores in _tiles(a, b, y_a, y_b, own, mirror, mild):
            for lse, s in zip(total, scores):
                fold = s.sum if mild else s.logsumexp
                lse[I] = add(lse[I], fold(1))
                if mirror and I != J:
                    lse[J] = add(lse[J], fold(0))
    return total.log_() if mild else total


@_leaf(lambda a, b, *rest: (torch.empty_like(a), torch.empty_like(b)))
def _lse_grad(
    a: Tensor, b: Tensor, y_a: Optional[Tensor], y_b: Optional[Tensor], own: Optional[int], mirror: bool, lse: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients in a and in b of sum_ki g_ki lse_ki; for a mirror, their sum is that in a."""
    mild = _mild(a, b)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # no member, no weight
    c = g * (-lse).exp() if mild else None
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    with _full_precision(a.device):
        for I, J, scores in _tiles(a, b, y_a, y_b, own, mirror, mild):
            twice = mirror and I != J  # s_ij = s_ji: g_i softmax_i(s)_j and g_j softmax_j(s)_i at once
            for k, s in enumerate(scores):
                if mild:
                    part = s.mul_(c[k, I, None] + c[k, J] if twice else c[k, I, None])
                else:
                    part = (s - lse[k, I, None]).exp_().mul_(g[k, I, None])
                    part = part.addcmul_(s.sub_(lse[k, J]).exp_(), g[k, J]) if twice else part
                w = part if k == 0 else w.add_(part)
            grad_a[I].addmm_(w, b[J])
            grad_b[J].addmm_(w.T, a[I])
    return grad_a, grad_b


@_leaf(lambda x, y_x, y, own: x.new_empty(len(y), x.shape[1]))
def _positive_sums(x: Tensor, y_x: Tensor, y: Tensor, own: Optional[int]) -> Tensor:
    """Row i: the sum of w_ij x_j over all rows but its own; w_ij is 1 for one label, or the probabilities' product.

    Of x and y the shorter one belongs to the anchors: its row k is row own + k of the longer.
    """
    wide = x if x.device.type == "mps" else x.double()  # thousands of rows are added up
    if y.ndim == 2:
        sums = y.to(wide.dtype) @ (y_x.to(wide.dtype).T @ wide)
    else:
        labels, index = torch.cat([y_x, y]).unique(return_inverse=True)
        sums = wide.new_zeros(len(labels), x.shape[1]).index_add_(0, index[: len(x)], wide)[index[len(x) :]]
    if own is not None:
        mine, y_mine = (wide[own : own + len(y)], y) if len(y) < len(x) else (wide, y_x)
        if y.ndim == 2:
            mine = mine * y_mine.to(wide.dtype).square().sum(1, keepdim=True)
        (sums if len(y) < len(x) else sums[own : own + len(x)]).sub_(mine)
    return sums.to(x.dtype)


@_leaf(lambda a, b: a.new_empty(len(a), b.shape[1]))
def _product(a: Tensor, b: Tensor) -> Tensor:
    with _full_precision(a.device):
        return a @ b


def _full_precision(device):
    """A context without autocast, TF32 and bfloat16 products on a CPU, whatever the surroundings say."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    lowered = [(backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in ("ieee", "none")]
    if lowered or torch.is_autocast_enabled(device.type):
        return _raised_precision(device, lowered)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _raised_precision(device, lowered):
    try:
        for backend, _ in lowered:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


def _first_derivative_only():
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the losses have no second derivative: differentiate them without create_graph=True")


# ---------------------------------------------------------------- what came before: pairs, triplets, N-pairs


def n_pair(anchor, positive, *, reduction="mean"):
    """Sohn's N-pair loss (2016): mean_i log( 1 + sum_{j != i} exp(f_i . f_j+ - f_i . f_i+) ), raw features.

    anchor, positive (M, D): row i of both shows two images of one class, another class in each row.
    """
    _check(anchor)
    if positive.shape != anchor.shape:
        raise ValueError(f"positive must be {tuple(anchor.shape)} like anchor, got {tuple(positive.shape)}")
    pair = torch.arange(len(anchor), device=anchor.device)
    return _reduce(*_anchors("out", anchor, pair, 1.0, positive, pair.clone(), None), reduction)


def triplet(z, y, margin=0.2, *, mining="semihard", soft=False, reduction="mean"):
    """Triplet loss on squared distances d (FaceNet 2015): [d_ap - d_an + margin]_+, the mean over a's triplets.

    mining  "all"       every positive with every negative
            "hard"      the farthest positive with the nearest negative
            "semihard"  every positive with the nearest negative beyond it, or, if none is, the farthest one
    soft replaces the hinge [u]_+ by log(1 + e^u). An anchor needs a positive and a negative.
    """
    _check(z, y)
    _check_word("mining", mining, ("all", "hard", "semihard"))
    if len(z) == 0:
        return _reduce(z.sum(1), y > 0, reduction)
    p, n = _positives_negatives(y)
    valid = p.any(1) & n.any(1)
    d = _squared_distances(z)
    hinge = _softplus if soft else F.relu
    if mining == "hard":
        farthest = d.masked_fill(~p, -torch.inf).amax(1)
        nearest = d.masked_fill(~n, torch.inf).amin(1)
        loss = hinge(torch.where(valid, farthest - nearest, 0) + margin)
    elif mining == "semihard":
        d_n = _semihard_negatives(d, n)
        loss = (hinge(d - d_n + margin) * _rows_to_one(p, d.dtype)).sum(1)
    else:
        loss = _mean_over_triplets(d, p, n, margin, hinge)
    return _reduce(torch.where(valid, loss, 0), valid, reduction)


def _semihard_negatives(d, n):
    """(N, N): for the pair (a, p) the distance of the nearest negative beyond p, else of the farthest negative."""
    d_n, order = d.masked_fill(~n, torch.inf).sort(1)  # the negatives of each row, nearest first
    last = n.sum(1, keepdim=True) - 1
    beyond = torch.searchsorted(d_n.detach(), d.detach().contiguous(), right=True)
    return d.gather(1, order.gather(1, torch.minimum(beyond, last).clamp(min=0)))


def _mean_over_triplets(d, p, n, margin, hinge):
    """Mean over P(i) x N(i), one positive of every anchor at a time: N^2 numbers in memory, not N^3."""
    count = p.sum(1)
    d_p = d.gather(1, p.int().argsort(dim=1, descending=True, stable=True))  # the positives of each row first
    w = _rows_to_one(n, d.dtype)

    def kth_positive(k, d_p, d):
        return torch.where(k < count, (hinge(d_p[:, k, None] - d + margin) * w).sum(1), 0)

    total = kth_positive(0, d_p, d)
    for k in range(1, max(count.tolist())):
        total = total + checkpoint(kth_positive, k, d_p, d, use_reentrant=False)
    return total / count.clamp(min=1)


def _softplus(u):
    """log(1 + e^u), exact where torch's own turns linear."""
    return torch.logaddexp(u, torch.zeros_like(u))


def max_margin(z, y, margin=1.0, *, reduction="mean"):
    """Hadsell's pair loss (2006): the mean over A(i) of D^2/2 for a positive, [margin - D]_+^2/2 for a negative.

    D is the Euclidean distance. Not the "max-margin" rows of the paper's tables: those are L-Softmax.
    """
    _check(z, y)
    p, n = _positives_negatives(y)
    z = _widen(z)
    D = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # its gradient at D = 0 is 0
    pair = torch.where(p, D.square() / 2, 0) + torch.where(n, F.relu(margin - D).square() / 2, 0)
    loss = pair.sum(1) / max(len(z) - 1, 1)
    return _reduce(torch.where(p.any(1), loss, 0), p.any(1), reduction)


# ---------------------------------------------------------------- Wang & Liu: what the temperature does


def hard_contrastive(z, tau, k, *, views=2, reduction="mean"):
    """L_hard (B eq. 9): NT-Xent in which each anchor keeps only the k negatives nearest to it."""
    _check(z, tau=tau, views=views)
    p, n = _positives_negatives(_image_index(z, views))
    n = _nearest_negatives(_scores(z.detach()), n, k)
    z, scale = _rows_and_scale(z, tau)
    return _reduce(*_Dense.apply("out", z, None, p, ~(p | n), scale), reduction)


def simple_contrastive(z, lam, *, views=2, k=None, reduction="mean"):
    """L_simple (B eq. 3): -mean_{p in P(i)} s_ip + lam sum_{j in N(i)} s_ij; k keeps the k nearest negatives."""
    _check(z, views=views)
    p, n = _positives_negatives(_image_index(z, views))
    s = _scores(z)
    if k is not None:
        n = _nearest_negatives(s, n, k)
    loss = -(_rows_to_one(p, s.dtype) * s).sum(1) + lam * (n * s).sum(1)
    return _reduce(torch.where(p.any(1), loss, 0), p.any(1), reduction)


def uniformity(z, t=2):
    """Wang & Isola 2020 (B eq. 10): log of the mean over pairs i != j of exp(-t ||z_i - z_j||^2)."""
    _check(z)
    N = len(z)
    if N < 2:
        raise ValueError(f"uniformity needs a pair of rows, got {N}")
    d = (-t * _squared_distances(z)).masked_fill(~_others(z), -torch.inf)
    return d.flatten().logsumexp(0) - math.log(N * (N - 1))


def alignment(z, *, views=2):
    """Wang & Isola 2020: the mean over images and pairs of their views of ||z_i - z_p||^2."""
    if views < 2:
        raise ValueError(f"alignment needs views >= 2, got {views}")
    _check(z, views=views)
    v = _widen(z).unflatten(0, (views, -1))  # (V, n, D)
    first, second = torch.triu_indices(views, views, 1)
    d = (v[first] - v[second]).square().sum(2)
    return d.sum() / max(d.numel(), 1)


def tolerance(z, y):
    """B eq. 11 given the class: the mean of s_ij over all pairs i != j of one label; 0 if there is none."""
    _check(z, y)
    p, _ = _positives_negatives(y)
    return (p * _scores(z)).sum() / p.sum().clamp(min=1)


# ---------------------------------------------------------------- across ranks


def supcon_sharded(z, y, tau=0.1, *, queue=None, variant="out"):
    """L_out or L_in of the rows of all ranks. Each rank gives its own (n_r, D) rows and labels, and scores them alone
    against everybody's: the value is the global one on every rank, and after DistributedDataParallel's averaging so
    is the gradient, for unequal and empty shards too.

    queue (features, labels), the same on every rank, joins the contrast set. For NT-Xent let y number the images of
    all ranks. Without a process group this is the loss of one process.
    """
    _check_word("variant", variant, ("out", "in"))
    _check(z, y, tau=tau, probabilities=True)
    if queue is not None:
        _check_contrast(z, y, *queue)
    if not y.is_floating_point():
        y = y.long()  # what every backend can gather
    contrast = ()  # one process: its rows are their own contrast set
    if queue is not None or _world_size() > 1:
        start, N = _place(z)
        contrast, y_contrast = _gather(z, start, N), _gather(y, start, N)
        if queue is not None:
            contrast, y_contrast = torch.cat([contrast, queue[0]]), torch.cat([y_contrast, queue[1]])
        contrast = contrast, y_contrast, start
    return global_mean(*_anchors(variant, z, y, tau, *contrast))


def global_mean(values, valid):
    """The mean over all ranks of the values (n_r,) that are valid, on every rank; 0 if none is.

    Exact under DistributedDataParallel's averaging where shards are unequal and a mean of local means is not: what
    is added to a loss, a cross-entropy head for one, needs it as well.
    """
    if valid.shape != values.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid must be boolean {tuple(values.shape)}, got {valid.dtype} {tuple(valid.shape)}")
    total, count = torch.where(valid, _widen(values), 0).sum(), valid.sum()
    return _AllReduce.apply(total) / _AllReduce.apply(count).clamp(min=1)


def all_gather_rows(z):
    """The rows (n_r, ...) of every rank r, features or labels, in the order of the ranks, with gradients.

    A loss of all gathered rows, computed alike on every rank, then has the global value everywhere, and the
    global gradient after DistributedDataParallel's averaging: the backward sums W equal gradients, DDP divides.
    Shards may be unequal or empty. Without a process group the rows are z's.
    """
    return _gather(z, *_place(z))


def _gather(z, start, N):
    return _AllReduce.apply(torch.cat([z.new_zeros(start, *z.shape[1:]), z, z.new_zeros(N - start - len(z), *z.shape[1:])]))


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _place(z):
    """(the place of this rank's first row among the rows of all ranks, their number)."""
    if _world_size() == 1:
        return 0, len(z)
    rows = torch.zeros(_world_size(), dtype=torch.long, device=z.device)
    rows[dist.get_rank()] = len(z)
    rows = _AllReduce.apply(rows).tolist()
    return sum(rows[: dist.get_rank()]), sum(rows)


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        if _world_size() > 1:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g)


# ---------------------------------------------------------------- sets, scores and reductions


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return _product(z, z.T)

    @staticmethod
    def backward(ctx, g):
        _first_derivative_only()
        return _product(g + g.T, *ctx.saved_tensors)


def _scores(z):
    """s_ij = z_i . z_j, (N, N), in float32 or wider."""
    return _Scores.apply(_widen(z))


def _squared_distances(z):
    """||z_i - z_j||^2, (N, N), never below zero, and zero on the diagonal."""
    s = _scores(z)
    sq = s.diagonal()
    return (sq[:, None] + sq - 2 * s).clamp(min=0)


def _widen(z):
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def _rows_and_scale(z, tau):
    """(rows, scale) with s_ij/tau = scale * (row i . row j); a tensor tau goes into the rows, for its gradient."""
    z = _widen(z)
    return (z / tau.to(z.dtype).sqrt(), 1.0) if isinstance(tau, Tensor) else (z, 1 / tau)


def _fill(s, excluded, value):
    """s (M, N) with `value` in the excluded places: True in a matrix, or j = own + i, or none if own is None."""
    if isinstance(excluded, Tensor):
        return s.masked_fill_(excluded, value)
    if excluded is not None:
        s.diagonal(excluded).fill_(value)
    return s


def _others(z):
    """A(i) as row i of a boolean (N, N)."""
    return ~torch.eye(len(z), dtype=torch.bool, device=z.device)


def _positives_negatives(y):
    """P(i) and N(i) as the rows of two boolean (N, N)."""
    same = y[:, None] == y
    return same & _others(y), ~same


def _image_index(z, views):
    return torch.arange(len(z) // views, device=z.device).repeat(views)


def _nearest_negatives(s, n, k):
    """N(i) cut to the k rows of the largest s."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    top = s.detach().masked_fill(~n, -torch.inf).topk(min(k, len(s)), dim=1).indices
    return n & torch.zeros_like(n).scatter(1, top, True)


def _log(w):
    """log w, -inf for 0 (which log itself is slow at)."""
    return w.clamp(min=torch.finfo(w.dtype).tiny).log().masked_fill(w == 0, -torch.inf)


def _rows_to_one(w, dtype):
    """Weights, or a boolean choice, of each row divided by their sum; a row of zeros stays zero."""
    return w / w.sum(1, keepdim=True, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)


def _reduce(loss, valid, reduction):
    _check_word("reduction", reduction, ("mean", "none"))
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp_(min=1)


def _check(z, y=None, *, tau=1.0, views=1, probabilities=False):
    if z.ndim != 2:
        raise ValueError(f"z must be (N, D), got {tuple(z.shape)}")
    if y is not None and not isinstance(y, Tensor):
        raise ValueError(f"y must be a tensor, got {type(y).__name__}")
    if y is not None and (y.ndim not in (1, 1 + probabilities) or len(y) != len(z) or y.shape[1:] == (1,)):
        raise ValueError(f"y must have one label for each row of z {tuple(z.shape)}, got {tuple(y.shape)}")
    if views < 1 or len(z) % views:
        raise ValueError(f"the rows of z must be a multiple of views >= 1, got {len(z)} rows and views = {views}")
    _check_tau(tau)


def _check_contrast(z, y, contrast, y_contrast):
    _check(contrast, y_contrast, probabilities=True)
    kinds = y.is_floating_point(), y_contrast.is_floating_point()
    if contrast.shape[1] != z.shape[1] or y_contrast.shape[1:] != y.shape[1:] or kinds[0] != kinds[1]:
        shapes = [f"{x.dtype} {tuple(x.shape)}" for x in (contrast, y_contrast, z, y)]
        raise ValueError("contrast {}, its labels {} do not go with z {}, y {}".format(*shapes))


def _check_tau(tau):
    if isinstance(tau, Tensor):  # its value is not read: that would break compilation
        if tau.ndim:
            raise ValueError(f"a tensor tau must have no axis, got {tuple(tau.shape)}")
    elif not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")


def _check_word(name, word, words):
    if word not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")
