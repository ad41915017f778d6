# SPDX-License-Identifier: MIT. Copyright (c) 2026 the authors of this file. Version 0.3.0.
"""Supervised contrastive losses and their relatives, one file that needs nothing but torch (2.9 or newer).

    from losses import supcon_out
    z = F.normalize(projection(encoder(torch.cat([view0, view1]))))   # (2n, D): all first views, then all second
    loss = supcon_out(z, labels.repeat(2), tau=0.1)                   # a scalar: the mean over the anchors
    loss.backward()

Notation, as in the paper (Khosla et al. 2020, arXiv 2004.11362v5, cited as "A"; Wang & Liu 2021, arXiv
2012.09740, as "B"). n images with V views make N = nV rows z_i of D numbers, view 0 of every image first:

    s_ij = z_i . z_j      A(i) = all rows but i      P(i) = rows of A(i) with the label of i      N(i) = the rest

A loss is the mean over the anchors i that have a positive; the others are left out of mean and gradient alike,
and a batch without any gives 0. Nothing is scaled by a hidden factor and nothing is normalised: the functions
are the equations. reduction="none" returns one value per row, 0 for a row that is left out.

Scores are float32 or wider, without autocast and TF32; a half or bfloat16 z gets its gradient in its own type
(in float16 that underflows for large N: use a gradient scaler). tau may be a tensor and then gets its gradient;
labels and class probabilities get none. What is made of scores has no second derivative: create_graph=True raises.
Shapes and options that cannot be meant raise ValueError; values are not looked at, so nan and inf propagate.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ABSENT = torch.finfo(torch.float32).min  # a score that weighs nothing beside others; 0 times -inf would be nan

# ---------------------------------------------------------------- the supervised contrastive loss


def supcon_out(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """L_out, the paper's loss (A eq. 2): mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / D_ip ).

    z (N, D) features, taken as given; y (N,) labels, or (N, C > 1) class probabilities, which weigh a pair by
    their inner product; tau a positive number or tensor. D_ip is the sum of exp(s_ia/tau) over
      "all"           P(i) and N(i), that is A(i): the paper; large batches hold no N x N matrix
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
    return supcon_out(z, _image_index(z, views), tau, reduction=reduction)

def _supcon(variant, z, y, tau, denominator, positives_cap, views):
    """(L_i of every row, whether it counts), each (N,)."""
    _check(z, y, soft=True)
    _check_word("denominator", denominator, ("all", "one_positive", "negatives"))
    if denominator == "all" and positives_cap is None:
        return _anchors(variant, z, y, tau)
    _require(y.ndim == 1, "class probabilities y (N, C) go with denominator='all' and no positives_cap alone")
    p, n = _positives_negatives(z, y)
    if positives_cap is not None:
        image = _image_index(z, views)
        fits = positives_cap >= 0 and positives_cap % views == 0
        _require(fits, "positives_cap must be a multiple of views = {} and not negative, got {}", views, positives_cap)
        others = (p & (image[:, None] != image)).unflatten(1, (views, -1))  # (N, V, n): each view, in batch order
        p = p & (image[:, None] == image) | (others & (others.cumsum(2) <= positives_cap // views)).flatten(1)
    return _dense(variant, _scores(z, tau).masked_fill(~(p | n), ABSENT), p, denominator)

def _dense(variant, s, w, denominator="all"):
    """(L_i of every anchor, whether it counts), each (M,), from all scores s_ij/tau (M, N): the equations as they are.

    w_ij >= 0 weighs j as a positive of i, 1 for one label and 0 for another. What A(i) does not hold is ABSENT in s.
    """
    if denominator == "all":
        log_ratio = s.log_softmax(1)
    else:
        n = (s > ABSENT) & ~w
        log_n = s.masked_fill(~n, ABSENT).logsumexp(1, keepdim=True)
        log_ratio = s - (log_n if denominator == "negatives" else torch.logaddexp(s, log_n))
        w = w & n.any(1, keepdim=True) if denominator == "negatives" else w
    labels, p, w = w.dtype == torch.bool, w.bool(), w.to(s.dtype)
    weight = w.sum(1)  # |P(i)|
    valid = weight != 0
    weight = weight.where(valid, 1)
    factor = w / -weight[:, None]  # -1/|P(i)| at the positives
    if variant == "out":
        return (factor * log_ratio).sum(1), valid
    log_e = log_ratio if labels else log_ratio + w.where(p, 1).log()
    log_X = log_e.where(p, ABSENT).log_softmax(1)  # X_ip of A eq. 5: log_e - log_X is the log of the sum, at every p
    return (factor * (log_e - log_X - weight.log()[:, None])).sum(1), valid


def supcon_against(z, y, contrast, y_contrast, tau=0.1, *, own=None, variant="out", reduction="mean"):
    """L_out (or L_in, variant "in") of anchors against a contrast set of their own, a memory of rows for example.

    z (M, D) anchors with labels y (M,); contrast (N, D) rows with y_contrast (N,); or class probabilities on both
    sides. A(i) is the contrast set; where `own` is given its row own + i is anchor i itself and left out. Both
    sides get gradients. Returns a scalar, or (M,) values.
    """
    _check_word("variant", variant, ("out", "in"))
    _check(z, y, soft=True)
    _check_contrast(z, y, contrast, y_contrast)
    last = len(contrast) - len(z)
    fits = own is None or isinstance(own, int) and 0 <= own <= last
    _require(fits, "own must be a whole number in 0 ... {}, got {}", last, own)
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
        _check_tau(1.0 if base_temperature is None else base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode, self.variant, self.normalize = contrast_mode, variant, normalize

    def forward(self, features, labels=None, mask=None):
        _require(features.ndim > 2, "features must be (B, V, ...), got {}", features)
        _require(labels is None or mask is None, "give labels or mask, not both")
        B, V = features.shape[:2]
        z = _widen(features.flatten(2).transpose(0, 1).flatten(0, 1))  # (V B, D), view by view
        z = F.normalize(z) if self.normalize else z
        M = B if self.contrast_mode == "one" else V * B  # the anchors come first in z
        if mask is not None:
            _require(mask.shape == (B, B), "mask must be ({0}, {0}), got {1}", B, mask)
            s = _scores(z, self.temperature, own=0)
            terms = _dense(self.variant, s[:M], _fill(mask.detach().to(s).repeat(V, V), 0, 0)[:M])
        else:
            y = torch.arange(B, device=z.device) if labels is None else labels.reshape(-1).to(z.device)
            _require(len(y) == B, "labels must be ({},) for features {}, got {}", B, features, y)
            y = y.repeat(V)
            terms = _anchors(self.variant, z[:M], y[:M], self.temperature, *(() if M == len(z) else (z, y)))
        factor = 1 if self.base_temperature is None else self.temperature / self.base_temperature
        return factor * _reduce(*terms, "mean")


# ---------------------------------------------------------------- the same losses in tiles, without an N x N matrix
#
#   L_out,i = lse_{a in A(i)} s_ia/tau  -  mean_{p in P(i)} s_ip/tau
#   L_in,i  = lse_{a in A(i)} s_ia/tau  -  lse_{p in P(i)} s_ip/tau  +  log |P(i)|
#
# lse, the log of the sum of exp, goes over tiles of the scores, and its backward computes each tile again. The mean
# needs no scores: it is z_i . c_i / tau, c_i the mean of the rows P(i), from the sums of the classes. Where the
# anchors are the contrast set, s_ij = s_ji: a tile above the diagonal serves its rows and, as a mirror, its columns.

TILE = 512  # rows and columns of scores in memory at a time, eight times that on an accelerator
DENSE = 512  # up to DENSE x DENSE scores take the dense form, which is faster there

def _anchors(variant, a, y_a, tau, b=None, y_b=None, own=0):
    """As _dense, for anchors a against b, or themselves without b. Row own + i of b is anchor i; own None: none is."""
    a = _over_root(a, tau)
    b, y_b = (None, y_a) if b is None else (_over_root(b, tau).to(a.dtype), y_b)
    if y_a.ndim == 2:
        y_a, y_b = y_a.detach().to(a.dtype), y_b.detach().to(a.dtype)
    if len(y_a) * len(y_b) <= DENSE**2:
        return _dense(variant, _Scores.apply(a, b, own), _fill(_weights(y_a, y_b), own, 0))
    y_a, y_b = y_a.clone(), y_b.clone()  # a memory may move on before the backward
    lse, sums, weight = _Reductions.apply(a, b, y_a, y_b, own, variant)
    valid = weight != 0
    weight = weight.where(valid, 1)
    loss = lse[0] - (a * sums).sum(1) / weight if variant == "out" else lse[0] - lse[1] + weight.log()
    return loss.where(valid, 0), valid

def _tiles(a, b, y_a, y_b, own, variant):
    """Yields (I, J, both, mild, [scores]): blocks of anchors and of the contrast set, their s_ij, -inf for j = own + i.

    For L_in the scores of P(i) follow, weighed by w_ij, -inf for the rest. both: the tile, off the diagonal of a
    mirror, stands for its transpose too. mild: |s_ij| < 40 by Cauchy and Schwarz, so exp can be added up without
    taking a maximum off, and exp of the scores is given; not for probabilities without own rows, whose w_ij may vanish.
    """
    mirror, size = b is None, TILE if a.device.type == "cpu" else 8 * TILE
    b = a if mirror else b
    longest = a.norm(dim=1).amax() * b.norm(dim=1).amax()  # a set without rows takes the dense form
    mild = (own is not None or variant == "out" or y_a.ndim == 1) and bool(longest < 40)
    for i in range(0, len(a), size):
        I = slice(i, i + size)
        a_I = a[I] / math.log(2) if mild else a[I]  # exp2(s/log 2) is exp(s), and several times as fast on a CPU
        for j in range(i if mirror else 0, len(b), size):
            J = slice(j, j + size)
            s = _fill(a_I @ b[J].T, None if own is None else own + i - j, -torch.inf)
            scores = [s.exp2_() if mild else s]
            if variant == "in":
                w = _weights(y_a[I], y_b[J])
                scores += [s * w if mild else s + w.log()]
            yield I, J, mirror and i < j, mild, scores

def _leaf(schema, fake):
    """Runs a function of tensors without autocast, TF32 and bfloat16 products, whatever the surroundings say (the last
    two for the whole process meanwhile), as one node of a compiled graph, where tiles would unroll (fake makes its
    results' shapes), and without a derivative."""

    def wrap(f):
        def exact(a, *rest):
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (a, *rest)):
                raise RuntimeError("the losses have no second derivative: differentiate them without create_graph=True")
            backend = (torch.backends.cuda if a.is_cuda else torch.backends.mkldnn).matmul
            precision = backend.fp32_precision
            if precision in ("ieee", "none") and not torch.is_autocast_enabled(a.device.type):
                return f(a, *rest)
            try:
                backend.fp32_precision = "ieee"
                with torch.autocast(a.device.type, enabled=False):
                    return f(a, *rest)
            finally:
                backend.fp32_precision = "none"  # what it inherits, which may have been its value
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision

        name = f"supcon_{__name__.replace('.', '_')}::{f.__name__}"  # another copy of this file has ops of its own
        unsafe = torch.Tag.cudagraph_unsafe  # tiles look at the size of the scores
        op = torch.library.custom_op(name, exact, mutates_args=(), schema=schema, tags=(unsafe,))
        op.register_fake(fake)
        return lambda *args: (op if torch.compiler.is_compiling() else exact)(*args)

    return wrap

@_leaf("(Tensor a, Tensor b) -> Tensor", lambda a, b: a.new_empty(len(a), b.shape[1]))
def _product(a, b):
    return a @ b

SETS = "Tensor a, Tensor? b, Tensor y_a, Tensor y_b, SymInt? own, str variant"  # anchors, contrast set, labels of both

def _shapes(a, b, y_a, y_b, own, variant):
    M, D = a.shape
    return [a.new_empty(1 + (variant == "in"), M), a.new_empty(M, D * (variant == "out")), a.new_empty(M)]

@_leaf(f"({SETS}) -> Tensor[]", _shapes)
def _reductions(a, b, y_a, y_b, own, variant):
    """What L_i is made of: log sum_j exp(s_ij) over A(i), for L_in over P(i) as well (1 or 2, M), -inf where there is
    none; sum_j w_ij b_j over P(i), for L_out (M, D); and sum_j w_ij (M,)."""
    rows = a if b is None else b
    sums, weight = _positive_sums(rows if variant == "out" else rows[:, :0], y_a, y_b, own)
    lse = a.new_full((1 + (variant == "in"), len(a)), -torch.inf)
    for I, J, both, mild, scores in _tiles(a, b, y_a, y_b, own, variant):
        for lse_k, s in zip(lse, scores):
            for K, axis in ((I, 1), (J, 0)) if both else ((I, 1),):
                lse_k[K] = torch.logaddexp(lse_k[K], s.sum(axis).log() if mild else s.logsumexp(axis))
    return [lse, sums, weight]

@_leaf(
    f"({SETS}, Tensor lse, Tensor g, Tensor g_sums, bool of_b) -> Tensor[]",
    lambda a, b, *rest: [torch.empty_like(x) for x in (a, b)[: 1 + rest[-1]]],
)
def _reductions_grad(a, b, y_a, y_b, own, variant, lse, g, g_sums, of_b):
    """The gradients in a and, if of_b, in b, from those of the lse, g, and of the sums, g_sums."""
    lse = lse.masked_fill(g == 0, torch.inf)  # -inf or far below where an anchor is left out, and 0 * inf is nan
    c = g * (-lse).exp()
    grads = [torch.zeros_like(x) for x in (a, b)[: 1 + of_b]]
    for I, J, both, mild, scores in _tiles(a, b, y_a, y_b, own, variant):
        for k, s in enumerate(scores):  # both: s_ij = s_ji, so g_i softmax_i(s)_j and g_j softmax_j(s)_i at once
            if mild:
                part = s.mul_(c[k, I, None] + c[k, J] if both else c[k, I, None])
            else:
                part = (s - lse[k, I, None]).exp_().mul_(g[k, I, None])
                part = part.addcmul_(s.sub_(lse[k, J]).exp_(), g[k, J]) if both else part
            w = part if k == 0 else w.add_(part)
        grads[0][I].addmm_(w, (a if b is None else b)[J])
        if b is None or of_b:
            grads[-1][J].addmm_(w.T, a[I])
    if variant == "out" and (b is None or of_b):
        grads[-1] += _positive_sums(g_sums, y_b, y_a, None if own is None else -own)[0]
    return grads

def _positive_sums(rows, y_a, y_b, own):
    """sum_j w_ij rows_j (M, D) and sum_j w_ij (M,) over P(i): the sums of the classes, less the pair (i, own + i)."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64  # thousands of rows are added up
    rows_1 = F.pad(rows, (0, 1), value=1).to(wide)
    if y_a.ndim == 2:
        y_a, y_b = y_a.to(wide), y_b.to(wide)
        sums = y_a @ (y_b.T @ rows_1)
    else:
        labels = torch.cat([y if y.is_floating_point() else y.long() for y in (y_a, y_b)])
        classes, index = labels.unique(return_inverse=True)
        mine, theirs = index.split([len(y_a), len(y_b)])
        sums = rows_1.new_zeros(len(classes), rows_1.shape[1]).index_add_(0, theirs, rows_1)[mine]
    if own is not None:
        first, last = max(-own, 0), min(len(y_a), len(y_b) - own)
        y_a, y_b = y_a[first:last], y_b[first + own : last + own]
        itself = (y_a * y_b if y_a.ndim == 2 else y_a[:, None] == y_b[:, None]).sum(1, keepdim=True).to(wide)
        others = sums[first:last].addcmul_(itself, rows_1[first + own : last + own], value=-1)[:, -1:]
        others.masked_fill_(others <= (1e-6 if wide == torch.float32 else 1e-12) * itself, 0)  # what rounding leaves
    return [x.to(rows.dtype, copy=True) for x in (sums[:, :-1], sums[:, -1])]

class _Reductions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.own, ctx.variant = inputs
        lse, sums, weight = _reductions(*inputs)
        ctx.save_for_backward(*tensors, lse)
        ctx.mark_non_differentiable(weight)
        return lse, sums, weight

    @staticmethod
    def backward(ctx, g, g_sums, _):
        *tensors, lse = ctx.saved_tensors
        grads = _reductions_grad(*tensors, ctx.own, ctx.variant, lse, g, g_sums, ctx.needs_input_grad[1])
        return *grads, *[None] * (6 - len(grads))


# ---------------------------------------------------------------- what came before: pairs, triplets, N-pairs


def n_pair(anchor, positive, *, reduction="mean"):
    """Sohn's N-pair loss (2016): mean_i log( 1 + sum_{j != i} exp(f_i . f_j+ - f_i . f_i+) ), raw features.

    anchor, positive (M, D): row i of both shows two images of one class, another class in each row.
    """
    _check(anchor)
    _require(positive.shape == anchor.shape, "positive must be {} like anchor, got {}", anchor, positive)
    pair = torch.arange(len(anchor), device=anchor.device)
    return _reduce(*_anchors("out", anchor, pair, 1.0, positive, pair, None), reduction)


def triplet(z, y, margin=0.2, *, mining="semihard", soft=False, reduction="mean"):
    """Triplet loss on squared distances d (FaceNet 2015): [d_ap - d_an + margin]_+, the mean over a's triplets.

    mining  "all"       every positive with every negative
            "hard"      the farthest positive with the nearest negative
            "semihard"  every positive with the nearest negative beyond it, or, if none is, the farthest one
    soft replaces the hinge [u]_+ by log(1 + e^u). An anchor needs a positive and a negative.
    """
    _check_word("mining", mining, ("all", "hard", "semihard"))
    p, n = _positives_negatives(z, y)
    P, N = p.sum(1), n.sum(1)
    d = _squared_distances(z)
    d_p, d_n = d.masked_fill(~p, -torch.inf), d.masked_fill(~n, torch.inf)  # what is absent has a hinge of 0

    def hinges(d_p, d_n):
        u = d_p - d_n + margin
        return (torch.logaddexp(u, torch.zeros_like(u)) if soft else F.relu(u)).sum(1)  # F.softplus turns linear

    if len(z) == 0:
        loss = z.sum(1)
    elif mining == "hard":
        loss = hinges(d_p.amax(1, keepdim=True), d_n.amin(1, keepdim=True))
    elif mining == "semihard":
        d_n = d_n.sort(1).values
        beyond = torch.searchsorted(d_n.detach(), d.detach().contiguous(), right=True)
        loss = hinges(d_p, d_n.gather(1, torch.minimum(beyond, N[:, None] - 1).clamp(min=0))) / P.clamp(min=1)
    else:  # one positive of every anchor at a time, the farthest first: N^2 numbers in memory, not N^3
        columns = d_p.sort(1, descending=True).values[:, : max(1, P.max())].split(1, dim=1)
        loss = sum(checkpoint(hinges, d_k, d_n, use_reentrant=False) for d_k in columns) / (P * N).clamp(min=1)
    return _reduce(loss, P * N > 0, reduction)


def max_margin(z, y, margin=1.0, *, reduction="mean"):
    """Hadsell's pair loss (2006): the mean over A(i) of D^2/2 for a positive, [margin - D]_+^2/2 for a negative.

    D is the Euclidean distance. Not the "max-margin" rows of the paper's tables: those are L-Softmax.
    """
    p, n = _positives_negatives(z, y)
    z = _widen(z)
    D = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # its gradient at D = 0 is 0
    pair = torch.where(p, D.square() / 2, 0) + torch.where(n, F.relu(margin - D).square() / 2, 0)
    loss, valid = pair.sum(1) / max(len(z) - 1, 1), p.any(1)
    return _reduce(loss.where(valid, 0), valid, reduction)


# ---------------------------------------------------------------- Wang & Liu: what the temperature does


def hard_contrastive(z, tau, k, *, views=2, reduction="mean"):
    """L_hard (B eq. 9): NT-Xent in which each anchor keeps only the k negatives nearest to it."""
    p, n = _positives_negatives(z, _image_index(z, views))
    s = _scores(z, tau)
    return _reduce(*_dense("out", s.masked_fill(~(p | _nearest_negatives(s, n, k)), ABSENT), p), reduction)


def simple_contrastive(z, lam, *, views=2, k=None, reduction="mean"):
    """L_simple (B eq. 3): -mean_{p in P(i)} s_ip + lam sum_{j in N(i)} s_ij; k keeps the k nearest negatives."""
    p, n = _positives_negatives(z, _image_index(z, views))
    s = _scores(z)
    n = n if k is None else _nearest_negatives(s, n, k)
    valid, loss = p.any(1), lam * (n * s).sum(1) - (p * s).sum(1) / p.sum(1).clamp(min=1)
    return _reduce(loss.where(valid, 0), valid, reduction)


def uniformity(z, t=2):
    """Wang & Isola 2020 (B eq. 10): log of the mean over pairs i != j of exp(-t ||z_i - z_j||^2)."""
    _check(z)
    N = len(z)
    _require(N > 1, "uniformity needs a pair of rows, got {}", N)
    return _fill(-t * _squared_distances(z), 0, -torch.inf).flatten().logsumexp(0) - math.log(N * (N - 1))


def alignment(z, *, views=2):
    """Wang & Isola 2020: the mean over images and pairs of their views of ||z_i - z_p||^2."""
    _require(views > 1, "alignment needs views >= 2, got {}", views)
    _check(z, views=views)
    v = _widen(z).unflatten(0, (views, -1))  # (V, n, D)
    first, second = torch.triu_indices(views, views, 1)
    d = (v[first] - v[second]).square().sum(2)
    return d.sum() / max(d.numel(), 1)


def tolerance(z, y):
    """B eq. 11 over the pairs of one label: the mean of s_ij over all i != j with y_i = y_j; 0 if there is none."""
    p, _ = _positives_negatives(z, y)
    return (p * _scores(z)).sum() / p.sum().clamp(min=1)


# ---------------------------------------------------------------- across ranks


def supcon_sharded(z, y, tau=0.1, *, queue=None, variant="out"):
    """L_out or L_in of the rows of all ranks. Each rank gives its own (n_r, D) rows and labels, and scores only these
    against everybody's: the value is the global one on every rank, and after DistributedDataParallel's averaging so
    is the gradient, for unequal and empty shards too.

    queue (features, labels), the same on every rank, joins the contrast set. For NT-Xent let y number the images of
    all ranks. Without a process group this is the loss of one process.
    """
    _check_word("variant", variant, ("out", "in"))
    _check(z, y, soft=True)
    if queue is None and _world_size() == 1:
        return _reduce(*_anchors(variant, z, y, tau), "mean")
    (contrast, own), (y_contrast, _) = _gather(z), _gather(y)
    if queue is not None:
        _check_contrast(z, y, *queue)
        contrast, y_contrast = torch.cat([contrast, queue[0]]), torch.cat([y_contrast, queue[1]])
    return global_mean(*_anchors(variant, z, y, tau, contrast, y_contrast, own))


def global_mean(values, valid):
    """The mean over all ranks of the values (n_r,) that are valid, on every rank; 0 if none is.

    Exact under DistributedDataParallel's averaging where shards are unequal and a mean of local means is not: what
    is added to a loss, a cross-entropy head for one, needs it as well.
    """
    fits = valid.shape == values.shape and valid.dtype == torch.bool
    _require(fits, "valid must be boolean {}, got {} {}", values, valid.dtype, valid)
    total, count = torch.where(valid, _widen(values), 0).sum(), valid.sum()
    return _AllReduce.apply(total) / _AllReduce.apply(count).clamp(min=1)


def all_gather_rows(z):
    """The rows (n_r, ...) of every rank r, features or labels, in the order of the ranks, with gradients.

    A loss of all gathered rows, computed alike on every rank, has the global value and, after DistributedDataParallel's
    averaging, the global gradient: the backward sums W equal gradients, DDP divides. Shards may be unequal or empty.
    """
    return _gather(z)[0]

def _gather(z):
    """The rows of all ranks, and how many of them come before this rank's."""
    if _world_size() == 1:
        return z, 0
    z, rank = z if z.is_floating_point() else z.long(), dist.get_rank()  # what every backend can add up
    rows = _AllReduce.apply(F.one_hot(torch.tensor(rank, device=z.device), _world_size()) * len(z)).tolist()
    before, after = sum(rows[:rank]), sum(rows[rank + 1 :])
    return _AllReduce.apply(F.pad(z, (0, 0) * (z.ndim - 1) + (before, after))), before

def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)  # all_reduce adds up memory, whatever its strides
        if _world_size() > 1:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g)


# ---------------------------------------------------------------- sets, scores and reductions

class _Scores(torch.autograd.Function):
    """a_i . b_j (M, N), ABSENT for j = own + i, in full precision both ways; no b: a_i . a_j."""

    @staticmethod
    def forward(ctx, a, b, own):
        ctx.save_for_backward(a, b)
        return _fill(_product(a, (a if b is None else b).T), own, ABSENT)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        if b is None:
            return _product(g + g.T, a), None, None
        return _product(g, b), _product(g.T, a) if ctx.needs_input_grad[1] else None, None

def _scores(z, tau=1.0, own=None):
    """s_ij/tau, (N, N), in float32 or wider."""
    return _Scores.apply(_over_root(z, tau), None, own)

def _squared_distances(z):
    """||z_i - z_j||^2, (N, N), never below zero, and zero on the diagonal."""
    z = _widen(z)
    s = _scores(z - z.mean(0))  # of rows far from the origin the products would cancel
    sq = s.diagonal()
    return (sq[:, None] + sq - 2 * s).clamp(min=0)

def _over_root(z, tau):
    """z / sqrt(tau), whose products are s_ij/tau: so a tensor tau gets its gradient."""
    _check_tau(tau)
    z = _widen(z)
    return z * (tau.to(z.dtype) if isinstance(tau, Tensor) else float(tau)) ** -0.5

def _widen(z):
    return z if z.dtype in (torch.float32, torch.float64) else z.float()

def _fill(s, own, value):
    """s (M, N) with `value` where j = own + i; nowhere if own is None."""
    if own is not None:
        s.diagonal(own).fill_(value)
    return s

def _positives_negatives(z, y):
    """P(i) and N(i) as the rows of two boolean (N, N), for labels y (N,) that fit z."""
    _check(z, y)
    return _fill(y[:, None] == y, 0, False), y[:, None] != y

def _weights(y, y_b):
    """w_ij (M, N): whether the labels are one, or the inner product of the class probabilities."""
    return y[:, None] == y_b if y.ndim == 1 else _product(y, y_b.T)

def _image_index(z, views):
    _check(z, views=views)
    return torch.arange(len(z) // views, device=z.device).repeat(views)

def _nearest_negatives(s, n, k):
    """N(i) cut to the k rows of the largest s."""
    _require(k > 0, "k must be at least 1, got {}", k)
    top = s.detach().masked_fill(~n, -torch.inf).topk(min(k, len(s)), dim=1).indices
    return n & torch.zeros_like(n).scatter(1, top, True)

def _reduce(loss, valid, reduction):
    """The mean over the valid rows, 0 if there is none; or every row's value. The loss of the others is 0 already."""
    _check_word("reduction", reduction, ("mean", "none"))
    return loss if reduction == "none" else loss.sum() / valid.count_nonzero().clamp(min=1)

def _check(z, y=None, views=1, soft=False):
    _require(z.ndim == 2, "z must be (N, D), got {}", z)
    if y is not None:
        fits = isinstance(y, Tensor) and y.ndim in (1, 1 + soft) and len(y) == len(z) and y.shape[1:] != (1,)
        got = y if isinstance(y, Tensor) else type(y).__name__
        _require(fits, "y must be a tensor with one label for each row of z {}, got {}", z, got)
    _require(views > 0 and len(z) % views == 0, "the rows of z {} must be a multiple of views >= 1, got {}", z, views)

def _check_contrast(z, y, contrast, y_contrast):
    _check(contrast, y_contrast, soft=True)
    kinds = y.is_floating_point(), y_contrast.is_floating_point()
    fits = contrast.shape[1] == z.shape[1] and y_contrast.shape[1:] == y.shape[1:] and kinds[0] == kinds[1]
    labels = y_contrast.dtype, y_contrast, y.dtype, y
    _require(fits, "contrast {} does not go with z {}, or labels {} {} with {} {}", contrast, z, *labels)

def _check_tau(tau):
    fits = tau.ndim == 0 if isinstance(tau, Tensor) else tau > 0  # reading a tensor's value would break compilation
    _require(fits, "tau must be a positive number, or a tensor without an axis, got {}", tau)

def _check_word(name, word, words):
    _require(word in words, "{} must be one of {}, got {!r}", name, words, word)

def _require(condition, message, *values):
    """Raises ValueError with the message, in which a tensor stands as its shape."""
    if not condition:
        raise ValueError(message.format(*(tuple(v.shape) if isinstance(v, Tensor) else v for v in values)))
