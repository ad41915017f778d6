# SPDX-License-Identifier: MIT. Copyright (c) 2026 the authors of this file. Version 0.4.0.
"""Supervised contrastive losses and their relatives, one file that needs nothing but torch, 2.4 or newer.

    from losses import supcon_out
    z = F.normalize(projection(encoder(torch.cat([view0, view1]))))   # (2n, D): all first views, then all second
    loss = supcon_out(z, labels.repeat(2), tau=0.1)                   # a scalar: the mean over the anchors
    loss.backward()

Notation, as in the paper (Khosla et al. 2020, arXiv 2004.11362v5; "Wang" is Wang & Liu 2021, arXiv 2012.09740).
n images with V views make N = nV rows z_i of D numbers, view 0 of every image first:

    s_ij = z_i . z_j      A(i) = all rows but i      P(i) = rows of A(i) with the label of i      N(i) = the rest

L_out is a cross-entropy: between the target T_ip = 1/|P(i)| on P(i) and the softmax P_ia of s_ia/tau over A(i). So

    dL_i/dz_i = 1/tau sum_{a in A(i)} (P_ia - T_ia) z_a = 1/tau (sum_{a in A(i)} P_ia z_a - mean_{p in P(i)} z_p),

and row z_i, a contrast of every other anchor j, receives dL_j/dz_i = 1/tau (P_ji - T_ji) z_j from each of them too.
For L_in T_ip is X_ip, the softmax of s_ip/tau over P(i) alone (Khosla eq. 5).

A loss is the mean over the anchors i that have a positive; the others are left out of mean and gradient alike, and a
batch without any gives 0. The functions are the equations: they scale by no hidden factor and normalise nothing.
SupConLoss does both, as the reference does. reduction="none" returns one value per row, 0 for a row that is left out.
A negative label is a class like any other. To rows without a label, give classes of their own:
y.where(y >= 0, -1 - torch.arange(n, device=y.device).repeat(V)).

Scores are float32 or wider, without autocast and TF32; a half or bfloat16 z gets its gradient in its own type (in
float16 that underflows for large N: use a gradient scaler). tau may be a tensor and then gets its gradient; labels and
class probabilities get none. A loss that is made of scores has no second derivative: create_graph=True raises
RuntimeError. Shapes and options that cannot be meant raise ValueError; values are not looked at, so nan and inf
propagate.

Tried on torch 2.4, 2.7, 2.11, 2.14 and 2.15. torch.compile makes one graph of a loss on the last three,
several on 2.7 and for triplet's mining "all", and fails on 2.4. Beneath torch.func and torch.export all scores are one
matrix, and TF32 is left as it is set.
"""
import functools
import math
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ABSENT = torch.finfo(torch.float32).min  # a score that weighs nothing beside others; 0 times -inf would be nan
DENOMINATORS = "all", "one_positive", "negatives"  # what D_ip sums over, see supcon_out
MATRIX = 512  # up to MATRIX x MATRIX scores are held as a matrix; for more, see the end of the file

# ---------------------------------------------------------------- the supervised contrastive loss

def supcon_out(z: Tensor, y: Tensor, tau: float | Tensor = 0.1, *, denominator: str = "all",
               positives_cap: int | None = None, views: int = 2, reduction: str = "mean") -> Tensor:
    """L_out, the paper's loss (Khosla eq. 2): mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / D_ip ).

    z (N, D) features, taken as given; y (N,) labels, or (N, C > 1) class probabilities, which weigh a pair by
    their inner product; tau a positive number or tensor. D_ip is the sum of exp(s_ia/tau) over
      "all"           P(i) and N(i), that is A(i): the paper; large batches hold no N x N matrix
      "one_positive"  p and N(i)
      "negatives"     N(i); an anchor without negatives is left out
    positives_cap keeps the other views of the anchor's image and at most that many further positives (lowest batch
    index first, evenly over the `views`); the dropped ones leave the denominator too (Khosla sec. 11). Returns a
    scalar, or (N,) values.
    """
    return _reduce(*_supcon("out", z, y, tau, denominator, positives_cap, views), reduction)

def supcon_in(z: Tensor, y: Tensor, tau: float | Tensor = 0.1, *, denominator: str = "all",
              positives_cap: int | None = None, views: int = 2, reduction: str = "mean") -> Tensor:
    """L_in (Khosla eq. 3): mean_i -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / D_ip ). Arguments as supcon_out.

    It is never above L_out (Jensen), and equal where all positives of an anchor tie. Its gradient pulls mainly the
    nearest positives, and the paper measures it 11 points worse.
    """
    return _reduce(*_supcon("in", z, y, tau, denominator, positives_cap, views), reduction)

def nt_xent(z: Tensor, tau: float | Tensor = 0.5, *, views: int = 2, reduction: str = "mean") -> Tensor:
    """SimCLR's NT-Xent, L_self (Khosla eq. 1): L_out where only the other views of an image are its positives."""
    return supcon_out(z, _image_index(z, views), tau, reduction=reduction)

def _supcon(variant, z, y, tau, denominator, positives_cap, views):
    """(L_i of every row, whether it counts), each (N,)."""
    _check(z, y, soft=True)
    if positives_cap is None:
        return _from_rows(variant, z, y, tau, denominator=denominator)
    _check_word("denominator", denominator, DENOMINATORS)
    _require(y.ndim == 1, "class probabilities y (N, C) go without positives_cap")
    p, n = _positives_negatives(z, y)
    p = _cap_positives(p, _image_index(z, views), positives_cap, views)
    s = _scores(z, tau).masked_fill(~(p | n), ABSENT)
    return _from_scores(variant, s, p, denominator)

def _from_scores(variant, s, w, denominator="all"):
    """(L_i of every anchor, whether it counts), each (M,), from all scores s_ij/tau (M, N): the equations as they are.

    w_ij >= 0 weighs j as a positive of i: 1 for one label, 0 for another. What A(i) does not hold is ABSENT in s.
    """
    if denominator == "all":
        log_P = s.log_softmax(1)  # log P_ij = s_ij/tau - log sum_{a in A(i)} exp(s_ia/tau): Khosla eqs. 1 to 3
    else:
        n = (s > ABSENT) & ~w
        log_N = s.masked_fill(~n, ABSENT).logsumexp(1, keepdim=True)  # log sum_{a in N(i)} exp(s_ia/tau)
        log_P = s - (log_N if denominator == "negatives" else torch.logaddexp(s, log_N))
        w = w & n.any(1, keepdim=True) if denominator == "negatives" else w
    labels = w.dtype == torch.bool
    w = w.to(s.dtype)
    total = w.sum(1)  # |P(i)|
    valid = total != 0
    total = total.where(valid, 1)
    if variant == "out":
        return (w * log_P).sum(1) / -total, valid  # Khosla eq. 2, and Khosla eq. 1 where |P(i)| = 1
    p = w.bool()
    log_P = log_P if labels else log_P + w.where(p, 1).log()
    log_X = log_P.where(p, ABSENT).log_softmax(1)  # X_ip of Khosla eq. 5; log P_ip - log X_ip is the same for all p
    return (w * (log_P - log_X)).sum(1) / -total + total.log(), valid  # Khosla eq. 3

class SupConLoss(nn.Module):
    """Drop-in for the reference PyTorch code's SupConLoss: same arguments, same value on unit rows.

    forward(features, labels=None, mask=None): features (B, V, ...), anything after V is flattened; labels (B,),
    or mask (B, B) whose entry [i, j] >= 0 weighs image j as a positive of image i (it takes an N x N matrix), or
    neither, which is NT-Xent. contrast_mode "one" takes view 0 alone as anchors. The value is multiplied by
    temperature/base_temperature, as the reference does; base_temperature=None turns that off. variant "in" is L_in.

    It differs from the reference in these points. Anchors without a positive leave the mean; the reference divides by
    them as well. Small temperatures do not underflow. Scores are float32 or wider, and there is no second derivative.
    Rows are L2-normalised here, so the gradient in rows that are unit already is its tangential part. A model that
    normalises sees no difference, and normalize=False turns that off. (The gradient of F.normalize at a zero row is
    huge.)
    """

    def __init__(self, temperature: float | Tensor = 0.07, contrast_mode: str = "all",
                 base_temperature: float | None = 0.07, *, variant: str = "out", normalize: bool = True) -> None:
        super().__init__()
        _check_word("contrast_mode", contrast_mode, ("all", "one"))
        _check_word("variant", variant, ("out", "in"))
        _check_tau("temperature", temperature)
        _check_tau("base_temperature", 1.0 if base_temperature is None else base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode, self.variant, self.normalize = contrast_mode, variant, normalize

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        _require(features.ndim > 2, "features must be (B, V, ...), got {}", features)
        _require_whole(features)
        _require(labels is None or mask is None, "give labels or mask, not both")
        B, V = features.shape[:2]
        z = _widen(features.flatten(2).transpose(0, 1).flatten(0, 1))  # (V B, D), view by view
        z = F.normalize(z) if self.normalize else z
        M = B if self.contrast_mode == "one" else V * B  # the anchors come first in z
        if mask is not None:
            _require(mask.shape == (B, B), "mask must be ({0}, {0}), got {1}", B, mask)
            w = _fill(mask.detach().to(z).repeat(V, V), 0, 0)
            loss, valid = _from_scores(self.variant, _scores(z, self.temperature, own=0)[:M], w[:M])
        else:
            labels = torch.arange(B, device=z.device) if labels is None else labels
            _require(isinstance(labels, Tensor), "labels must be a tensor, got a {}", type(labels).__name__)
            y = labels.reshape(-1).to(z.device)
            _require(len(y) == B, "labels must be ({},) for features {}, got {}", B, features, y)
            y = y.repeat(V)
            contrast = () if M == len(z) else (z, y)
            loss, valid = _from_rows(self.variant, z[:M], y[:M], self.temperature, *contrast)
        loss = _reduce(loss, valid, "mean")
        if self.base_temperature is None:
            return loss
        is_tensor = isinstance(self.temperature, Tensor)
        temperature = self.temperature.to(loss.dtype) if is_tensor else self.temperature
        return temperature / self.base_temperature * loss

def supcon_against(z: Tensor, y: Tensor, contrast: Tensor, y_contrast: Tensor, tau: float | Tensor = 0.1, *,
                   own: int | None = None, variant: str = "out", denominator: str = "all",
                   reduction: str = "mean") -> Tensor:
    """L_out (or L_in, variant "in") of anchors against a contrast set of their own, a memory of rows for example.

    z (M, D) anchors with labels y (M,); contrast (N, D) rows with y_contrast (N,); or class probabilities on both
    sides. A(i) is the contrast set. If `own` is given, row own + i of the set is anchor i itself and is left out.
    Both sides get gradients. `denominator` as in supcon_out. Returns a scalar, or (M,) values.
    """
    _check(z, y, soft=True)
    _check_contrast(z, y, contrast, y_contrast)
    last = len(contrast) - len(z)
    fits = own is None or type(own) is int and 0 <= own <= last
    _require(fits, "own must be an int in 0 ... {}, got {!r}", last, own)
    return _reduce(*_from_rows(variant, z, y, tau, contrast, y_contrast, own, denominator), reduction)

def _from_rows(variant, a, y_a, tau, b=None, y_b=None, own=0, denominator="all"):
    """As _from_scores, for anchors a against b, or themselves without b. If own is given, row own + i of b is i."""
    _check_word("variant", variant, ("out", "in"))
    _check_word("denominator", denominator, DENOMINATORS)
    _require(denominator == "all" or y_a.ndim == 1, "class probabilities y (N, C) go with denominator='all' alone")
    a = _divide_by_root_tau(a, tau)
    if b is None:
        y_b = y_a
    else:
        b = b.clone() if isinstance(tau, Tensor) else b  # as below: the gradient in tau needs b
        b = _divide_by_root_tau(b, tau).to(a.dtype)
    if y_a.ndim == 2:  # copied: a memory may move on before the backward
        y_a, y_b = (y.detach().to(a.dtype, copy=True) for y in (y_a, y_b))
    if denominator == "all" and len(y_a) * len(y_b) > MATRIX**2 and not _is_traced():
        return _from_strips(variant, a, b, y_a, y_b, own)
    return _from_scores(variant, _score_matrix(a, b, own), _fill(_weights(y_a, y_b), own, 0), denominator)

# ---------------------------------------------------------------- what came before: pairs, triplets, N-pairs

def n_pair(anchor: Tensor, positive: Tensor, *, reduction: str = "mean") -> Tensor:
    """Sohn's N-pair loss (2016): mean_i log( 1 + sum_{j != i} exp(f_i . f_j+ - f_i . f_i+) ), raw features.

    anchor, positive (M, D): row i of both shows two images of one class, another class in each row. It is L_out of
    the anchors against the positives, at tau = 1.
    """
    _check(anchor)
    _require(positive.shape == anchor.shape, "positive must be {} like anchor, got {}", anchor, positive)
    pair = torch.arange(len(anchor), device=anchor.device)
    return _reduce(*_from_rows("out", anchor, pair, 1.0, positive, pair, None), reduction)  # Sohn

def triplet(z: Tensor, y: Tensor, margin: float = 0.2, *, mining: str = "semihard", soft: bool = False,
            reduction: str = "mean") -> Tensor:
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
    if len(z) == 0:
        loss = z.sum(1)
    elif mining == "hard":
        loss = _hinges(d_p.amax(1, keepdim=True), d_n.amin(1, keepdim=True), margin, soft)
    elif mining == "semihard":
        d_n = d_n.sort(1).values
        beyond = torch.searchsorted(d_n.detach(), d.detach().contiguous(), right=True)
        d_n = d_n.gather(1, torch.minimum(beyond, N[:, None] - 1).clamp(min=0))
        loss = _hinges(d_p, d_n, margin, soft) / P.clamp(min=1)
    else:  # one positive of every anchor at a time, the farthest first: N^2 numbers in memory, not N^3
        columns = d_p.sort(1, descending=True).values[:, : max(1, P.max())].split(1, dim=1)
        hinges = sum(checkpoint(_hinges, d_k, d_n, margin, soft, use_reentrant=False) for d_k in columns)
        loss = hinges / (P * N).clamp(min=1)
    return _reduce(loss, P * N > 0, reduction)

def _hinges(d_p, d_n, margin, soft):
    """The sum over the triplets of each row."""
    u = d_p - d_n + margin
    return (torch.logaddexp(u, torch.zeros_like(u)) if soft else F.relu(u)).sum(1)  # F.softplus is linear above 20

def max_margin(z: Tensor, y: Tensor, margin: float = 1.0, *, reduction: str = "mean") -> Tensor:
    """Hadsell's pair loss (2006): the mean over A(i) of D^2/2 for a positive, [margin - D]_+^2/2 for a negative.

    D is the Euclidean distance. Not the "max-margin" rows of the paper's tables: those are L-Softmax.
    """
    p, n = _positives_negatives(z, y)
    z = _widen(z)
    distances = functools.partial(torch.cdist, x2=z, compute_mode="donot_use_mm_for_euclid_dist")  # gradient 0 at 0
    D = torch.cat([distances(rows) for rows in z.split(256)])  # CUDA's backward takes len(rows) N D numbers at a time
    pair = torch.where(p, D.square() / 2, 0) + torch.where(n, F.relu(margin - D).square() / 2, 0)
    loss = pair.sum(1) / max(len(z) - 1, 1)  # Hadsell
    valid = p.any(1)
    return _reduce(loss.where(valid, 0), valid, reduction)

# ---------------------------------------------------------------- Wang & Liu: what the temperature does

def hard_contrastive(z: Tensor, tau: float | Tensor, k: int, *, views: int = 2, reduction: str = "mean") -> Tensor:
    """L_hard (Wang eq. 9): NT-Xent in which each anchor keeps only the k negatives nearest to it."""
    p, n = _positives_negatives(z, _image_index(z, views))
    s = _scores(z, tau)
    s = s.masked_fill(~(p | _nearest_negatives(s, n, k)), ABSENT)  # Wang eq. 9
    return _reduce(*_from_scores("out", s, p), reduction)

def simple_contrastive(z: Tensor, lam: float, *, views: int = 2, k: int | None = None,
                       reduction: str = "mean") -> Tensor:
    """L_simple (Wang eq. 3): -mean_{p in P(i)} s_ip + lam sum_{j in N(i)} s_ij; k keeps the k nearest negatives."""
    p, n = _positives_negatives(z, _image_index(z, views))
    s = _scores(z)
    n = n if k is None else _nearest_negatives(s, n, k)
    loss = lam * (n * s).sum(1) - (p * s).sum(1) / p.sum(1).clamp(min=1)  # Wang eq. 3
    valid = p.any(1)
    return _reduce(loss.where(valid, 0), valid, reduction)

def uniformity(z: Tensor, t: float = 2) -> Tensor:
    """Wang & Isola 2020 (Wang eq. 10): log of the mean over pairs i != j of exp(-t ||z_i - z_j||^2)."""
    _check(z)
    _require(len(z) > 1, "uniformity needs a pair of rows, got {}", len(z))
    u = _fill(-t * _squared_distances(z), 0, -torch.inf)
    return u.flatten().logsumexp(0) - math.log(len(z) * (len(z) - 1))  # Wang eq. 10

def alignment(z: Tensor, *, views: int = 2) -> Tensor:
    """Wang & Isola 2020: the mean over images and pairs of their views of ||z_i - z_p||^2."""
    _require(views > 1, "alignment needs views >= 2, got {}", views)
    _check(z, views=views)
    v = _widen(z).unflatten(0, (views, -1))  # (V, n, D)
    first, second = torch.triu_indices(views, views, 1)
    d = (v[first] - v[second]).square().sum(2)
    return d.sum() / max(d.numel(), 1)

def tolerance(z: Tensor, y: Tensor) -> Tensor:
    """Wang eq. 11 over the pairs of one label: the mean of s_ij over all i != j with y_i = y_j; 0 if there is none."""
    p, _ = _positives_negatives(z, y)
    return (p * _scores(z)).sum() / p.sum().clamp(min=1)  # Wang eq. 11

# ---------------------------------------------------------------- across ranks

def supcon_sharded(z: Tensor, y: Tensor, tau: float | Tensor = 0.1, *, queue: tuple[Tensor, Tensor] | None = None,
                   variant: str = "out", denominator: str = "all") -> Tensor:
    """L_out or L_in of the rows of all ranks. Each rank gives its own (N_r, D) rows and labels, and scores only these
    against everybody's: the value is the global one on every rank, and after DistributedDataParallel's averaging so
    is the gradient, for unequal and empty shards too.

    queue (features, labels), the same on every rank, joins the contrast set. For NT-Xent let y number the images of
    all ranks. `denominator` as in supcon_out. Without a process group this is the loss of one process.
    """
    _check(z, y, soft=True)
    if queue is None and _world_size() == 1:
        return _reduce(*_from_rows(variant, z, y, tau, denominator=denominator), "mean")
    contrast, y_contrast, own = _gather(z, y)
    if queue is not None:
        _check_contrast(z, y, *queue)
        contrast = torch.cat([contrast, queue[0]])
        y_contrast = torch.cat([y_contrast, queue[1]])
    return global_mean(*_from_rows(variant, z, y, tau, contrast, y_contrast, own, denominator))

def global_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean over all ranks of the values (N_r,) that are valid, on every rank; 0 if none is.

    Exact under DistributedDataParallel's averaging where shards are unequal and a mean of local means is not: what
    is added to a loss, a cross-entropy head for one, needs it as well.
    """
    fits = valid.shape == values.shape and valid.dtype == torch.bool
    _require(fits, "valid must be boolean {}, got {} {}", values, valid.dtype, valid)
    total = torch.where(valid, _widen(values), 0).sum()
    return _sum_over_ranks(total) / _sum_over_ranks(valid.sum()).clamp(min=1)

def all_gather_rows(z: Tensor) -> Tensor:
    """The rows (N_r, ...) of every rank r, features or labels, in the order of the ranks, with gradients.

    A loss of all gathered rows, computed alike on every rank, has the global value and, after DistributedDataParallel's
    averaging, the global gradient: the backward sums W equal gradients, DDP divides. Shards may be unequal or empty.
    """
    return _gather(z)[0]

def _gather(*tensors):
    """The rows of all ranks, of each tensor, and how many of them come before this rank's."""
    if _world_size() == 1:
        return *tensors, 0
    rank = dist.get_rank()
    is_mine = torch.arange(_world_size(), device=tensors[0].device) == rank
    rows = _sum_over_ranks(is_mine * len(tensors[0])).tolist()  # of every rank
    before = sum(rows[:rank])
    after = sum(rows[rank + 1 :])
    return *(_amid_others(x, before, after) for x in tensors), before

def _amid_others(x, before, after):
    """The rows of all ranks, from this rank's x and how many rows come before and after them."""
    numbers = x if x.is_floating_point() else x.long()  # what every backend can add up
    return _sum_over_ranks(F.pad(numbers, (0, 0) * (x.ndim - 1) + (before, after))).to(x.dtype)

def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def _sum_over_ranks(x):
    """Its gradient is the sum of the ranks' gradients."""
    return x if _world_size() == 1 else _AllReduce.apply(x)

class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)  # all_reduce adds up memory, whatever its strides
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g)

# ---------------------------------------------------------------- sets, checks, means

def _positives_negatives(z, y):
    """P(i) and N(i) as the rows of two boolean (N, N), for labels y (N,) that fit z."""
    _check(z, y)
    return _fill(y[:, None] == y, 0, False), y[:, None] != y

def _cap_positives(p, image, cap, views):
    """P(i) cut to the other views of i's image and, of the first other images in the batch, at most `cap` rows."""
    fits = cap >= 0 and cap % views == 0
    _require(fits, "positives_cap must be a multiple of views = {} and not negative, got {}", views, cap)
    same = image[:, None] == image
    others = (p & ~same).unflatten(1, (views, -1))  # (N, V, n): each view, in batch order
    return p & same | (others & (others.cumsum(2) <= cap // views)).flatten(1)

def _nearest_negatives(s, n, k):
    """N(i) cut to the k rows of the largest s."""
    _require(k > 0, "k must be at least 1, got {}", k)
    top = s.detach().masked_fill(~n, -torch.inf).topk(min(k, len(s)), dim=1).indices
    return n & torch.zeros_like(n).scatter(1, top, True)

def _image_index(z, views):
    _check(z, views=views)
    return torch.arange(len(z) // views, device=z.device).repeat(views)

def _weights(y, y_b):
    """w_ij (M, N): whether the labels are one, or the inner product of the class probabilities."""
    return y[:, None] == y_b if y.ndim == 1 else _product(y, y_b.T)

def _fill(s, own, value):
    """s (M, N), now with `value` where j = own + i; nowhere if own is None."""
    if own is not None:
        s.diagonal(own).fill_(value)
    return s

def _reduce(loss, valid, reduction):
    """The mean over the valid rows, 0 if there is none; or every row's value. The loss of the others is 0 already."""
    _check_word("reduction", reduction, ("mean", "none"))
    return loss if reduction == "none" else loss.sum() / valid.count_nonzero().clamp(min=1)

def _check(z, y=None, views=1, soft=False):
    _require(z.ndim == 2, "z must be (N, D), got {}", z)
    _require_whole(z)
    if y is not None:
        _require(isinstance(y, Tensor), "y must be a tensor, got a {}", type(y).__name__)
        fits = y.ndim in (1, 1 + soft) and len(y) == len(z) and y.shape[1:] != (1,)
        _require(fits, "y must be (N,) labels, or (N, C > 1) class probabilities where allowed, got {} for z {}",
                 y, z)
        _require(y.ndim == 1 or y.is_floating_point(), "class probabilities y must be floating point, got {}", y.dtype)
    _require(views > 0 and len(z) % views == 0, "the rows of z {} must be a multiple of views >= 1, got {}", z, views)

def _require_whole(z):
    is_whole = not hasattr(z, "device_mesh")
    _require(is_whole, "z is a DTensor {}: give its full_tensor(), or the rank's own rows to supcon_sharded", z)

def _check_contrast(z, y, contrast, y_contrast):
    _check(contrast, y_contrast, soft=True)
    fits = contrast.shape[1] == z.shape[1] and y_contrast.shape[1:] == y.shape[1:]
    fits = fits and y.is_floating_point() == y_contrast.is_floating_point()
    labels = y_contrast.dtype, y_contrast, y.dtype, y
    _require(fits, "contrast {} does not go with z {}, or labels {} {} with {} {}", contrast, z, *labels)

def _check_tau(name, tau):
    fits = tau.ndim == 0 if isinstance(tau, Tensor) else tau > 0  # reading a tensor's value would break compilation
    _require(fits, "{} must be a positive number, or a tensor without an axis, got {}", name, tau)

def _check_word(name, word, words):
    _require(word in words, "{} must be one of {}, got {!r}", name, words, word)

def _require(condition, message, *values):
    """Raises ValueError with the message, in which a tensor stands as its shape."""
    if not condition:
        raise ValueError(message.format(*(tuple(v.shape) if isinstance(v, Tensor) else v for v in values)))

# ---------------------------------------------------------------- scores in full precision

def _scores(z, tau=1.0, own=None):
    """s_ij/tau, (N, N), in float32 or wider."""
    return _score_matrix(_divide_by_root_tau(z, tau), None, own)

def _squared_distances(z):
    """||z_i - z_j||^2, (N, N), never below zero, and zero on the diagonal."""
    z = _widen(z)
    s = _scores(z - z.mean(0))  # of rows far from the origin the products would cancel
    sq = s.diagonal()
    return (sq[:, None] + sq - 2 * s).clamp(min=0)

def _divide_by_root_tau(z, tau):
    """z / sqrt(tau), whose products are s_ij/tau: so a tensor tau gets its gradient."""
    _check_tau("tau", tau)
    z = _widen(z)
    return z * (tau.to(z.dtype) if isinstance(tau, Tensor) else float(tau)) ** -0.5

def _widen(z):
    return z if z.dtype in (torch.float32, torch.float64) else z.float()

class _Ieee:
    """While a thread is inside, a backend's float32 products are exact, without TF32 and bfloat16. That is one switch
    for the whole process: the first thread in turns it, the last one out turns it back."""

    def __init__(self, backend):
        self.backend, self.lock = backend, threading.Lock()
        self.inside, self.before = 0, None  # how many threads, and the user's precision

    def __enter__(self):
        with self.lock:
            found = self.backend.fp32_precision
            self.before = self.before if self.inside else found
            self.inside += 1
            if found not in ("ieee", "none"):
                self.backend.fp32_precision = "ieee"

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside and self.before not in ("ieee", "none"):
                self.backend.fp32_precision = "none"  # inherits the global setting, which may be the user's already
                if self.backend.fp32_precision != self.before:
                    self.backend.fp32_precision = self.before

class _OneSwitch:
    """Before torch 2.9 one switch served all backends. Here it has the name and the words of the newer ones."""
    fp32_precision = property(
        lambda self: torch.get_float32_matmul_precision().replace("highest", "none"),
        lambda self, word: torch.set_float32_matmul_precision({"ieee": "highest", "none": "highest"}.get(word, word)))

IEEE = dict.fromkeys([True, False], _Ieee(_OneSwitch()))
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    IEEE = {True: _Ieee(torch.backends.cuda.matmul), False: _Ieee(torch.backends.mkldnn.matmul)}  # on a GPU, elsewhere

def _exact_op(fake):
    """Runs a function of tensors in full precision, without autocast, whatever the surroundings say, and without a
    derivative. In a compiled graph, where a loop would unroll, it is one node whose results' shapes `fake` makes."""

    def wrap(f):
        def exact(*args):
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                raise RuntimeError("the losses have no second derivative: differentiate them without create_graph=True")
            device = args[0].device.type
            with IEEE[device == "cuda"]:
                if not torch.is_autocast_enabled(device):
                    return f(*args)
                with torch.autocast(device, enabled=False):
                    return f(*args)

        if not hasattr(torch.Tag, "cudagraph_unsafe"):  # as in torch 2.7: torch.compile then breaks the graph here
            return exact
        name = f"supcon_{__name__.replace('.', '_')}::{f.__name__}"  # another copy of this file has ops of its own
        unsafe = (torch.Tag.cudagraph_unsafe,)  # strips look at the size of the scores
        schema = torch.library.infer_schema(f, mutates_args=())
        op = torch.library.custom_op(name, exact, mutates_args=(), schema=schema, tags=unsafe)
        op.register_fake(fake)
        return lambda *args: (op if torch.compiler.is_compiling() else exact)(*args)

    return wrap

@_exact_op(lambda a, b: a.new_empty(len(a), b.shape[1]))
def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b

def _score_matrix(a, b, own):
    """As _Scores, into which torch.func and torch.export cannot look."""
    if not _is_traced():
        return _Scores.apply(a, b, own)
    with torch.autocast(a.device.type, enabled=False):
        return _fill(a @ (a if b is None else b).T, own, ABSENT)

def _is_traced():
    """Whether torch.func is at work, or torch.export, in torch 2.6 and newer."""
    return torch._C._are_functorch_transforms_active() or getattr(torch.compiler, "is_exporting", bool)()

class _Scores(torch.autograd.Function):
    """a_i . b_j (M, N), ABSENT for j = own + i, in full precision both ways; without b, a_i . a_j."""

    @staticmethod
    def forward(ctx, a, b, own):
        ctx.save_for_backward(a, b)
        return _fill(_product(a, (a if b is None else b).T), own, ABSENT)

    @staticmethod
    def backward(ctx, G):  # G_ij = dL/ds_ij
        a, b = ctx.saved_tensors
        if b is None:
            return _product(G + G.T, a), None, None  # a row is an anchor, and a contrast of the others
        return _product(G, b), _product(G.T, a) if ctx.needs_input_grad[1] else None, None

# ================================================================ The same values, faster
#
# Delete from here on, write MATRIX = math.inf above, and what is left is right.
#
#   L_out,i = lse_{a in A(i)} s_ia/tau  -  mean_{p in P(i)} s_ip/tau
#   L_in,i  = lse_{a in A(i)} s_ia/tau  -  lse_{p in P(i)} s_ip/tau  +  log |P(i)|
#
# lse is the log of the sum of exp. The mean needs no scores: it is z_i . c_i / tau, where c_i is the mean of the rows
# P(i), which comes from the sums of the classes. The sums of exp go over strips. A strip is a block of anchors against
# some columns of the contrast set. Where the anchors are the contrast set, s_ij = s_ji: the strips of a block begin at
# the block's own rows, and a score to the right of these counts for both of its anchors, i and j.
#
# From here on s_ij is z_i . z_j / (tau log 2), so that 2^s_ij is exp(z_i . z_j / tau): exp2 is three times as fast on
# some CPUs. An anchor's log sum is log2 of its sum of 2^s_ij. A strip holds the powers 2^(s_ij - c), with one shift c
# for all. If every log sum lies within NEAR of c, as it nearly always does, no power that counts has overflowed or
# vanished. If not, the log sums are taken again from whole rows of scores, less each row's own maximum.

STRIP = 512, 512  # anchors, and columns of the contrast set: on a CPU the powers of a strip stay in a core's cache
STRIP_ON_GPU = 2048, 8192
WHOLE = 2**21  # at most so many scores, and 256 rows, are in a block of whole rows
KEPT = 2**24  # about so many powers are kept for the backward; where there are more, it computes the strips again
NEAR = 80  # of a sum in 2^-80 ... 2^80, float32 loses only powers below 2^-126, and these are below 2^-46 of the sum

def _from_strips(variant, a, b, y_a, y_b, own):
    """As _from_scores, from rows whose products are the scores."""
    a = a * math.log(2) ** -0.5
    b = None if b is None else b * math.log(2) ** -0.5
    contrast = a if b is None else b
    rows = contrast if variant == "out" else contrast[:, :0]  # L_in needs only the weights: no columns to add up
    if y_a.ndim == 1:
        y_a, y_b = _number_classes(torch.cat([y_a, y_b])).split([len(y_a), len(y_b)])
    sums, weight = _sums_over_positives(rows, y_a, y_b, own)
    valid = weight != 0
    weight = weight.where(valid, 1)
    if variant == "out":
        log_sum = _LogSumExp.apply(a, b, None, None, None, own)
        of_positives = (a * sums).sum(1) / weight
    else:
        log_sum = _LogSumExp.apply(a, b, y_a, y_b, valid, own)
        of_positives = log_sum[1] - weight.log2()
    loss = math.log(2) * (log_sum[0] - of_positives).where(valid, 0)
    not_finite = 0 * (a.detach().sum(1) + contrast.detach().sum())  # nan, where else some would not show; or 0
    return loss + not_finite, valid

def _number_classes(y):
    """Labels (N,) as numbers 0, 1, ... below N; each nan is a class of its own."""
    y, order = (y if y.is_floating_point() else y.long()).sort()
    numbers = F.pad((y[1:] != y[:-1]).cumsum(0), (1, 0))
    return torch.empty_like(order).scatter(0, order, numbers).int()

def _sums_over_positives(rows, y_a, y_b, own):
    """sum_j w_ij rows_j (M, D) and sum_j w_ij (M,) over P(i): the sums over all rows, less the pair (i, own + i).

    All is in the wide type, because what is left may be a small difference of large numbers."""
    dtype = rows.dtype
    rows = rows.to(_wide(rows))
    if y_a.ndim == 2:
        y_a, y_b = y_a.to(rows.dtype), y_b.to(rows.dtype)
    sums = _sums(rows, y_a, y_b)
    weight = _sums(rows.new_ones(len(rows), 1), y_a, y_b).squeeze(1)
    if own is not None:
        mine = slice(own, own + len(y_a))
        itself = (y_a == y_b[mine] if y_a.ndim == 1 else (y_a * y_b[mine]).sum(1)).to(rows.dtype)
        weight = weight - itself
        alone = weight <= (1e-6 if rows.dtype == torch.float32 else 1e-12) * itself  # what is left is rounding
        weight = weight.masked_fill(alone, 0)
        sums = (sums - itself[:, None] * rows[mine]).masked_fill(alone[:, None], 0)
    return sums.to(dtype), weight.to(dtype)

def _sums(rows, y_a, y_b):
    """sum_j w_ij rows_j, (M, D): of equal labels, or of the inner products of class probabilities."""
    if y_a.ndim == 2:
        return _Scores.apply(y_a, _Scores.apply(rows.T, y_b.T, None), None)
    known = not torch.compiler.is_compiling() and rows.device.type == "cpu"
    count = 1 + int(torch.maximum(y_a.max(), y_b.max())) if known else len(y_a) + len(y_b)  # reading it stalls a GPU
    return rows.new_zeros(count, rows.shape[1]).index_add(0, y_b, rows).index_select(0, y_a)

def _wide(rows):
    """The type in which thousands of rows are added up."""
    return torch.float32 if rows.device.type == "mps" else torch.float64

class _LogSumExp(torch.autograd.Function):
    """log2 of sum_j 2^s_ij over A(i) and, given y, of sum_j w_ij 2^s_ij over P(i): (1 or 2, M), -inf or ABSENT for no
    sum. valid (M,) tells, given y, which anchors have a positive."""

    @staticmethod
    def forward(ctx, a, b, y_a, y_b, valid, own):
        few = len(a) * (len(a) // 2 if b is None else len(b)) <= KEPT
        keep = few and any(ctx.needs_input_grad) and not torch.compiler.is_compiling()
        log_sum, *saved = _log_sums(a, b, y_a, y_b, valid, own, keep)
        ctx.save_for_backward(a, b, y_a, y_b, *saved)
        ctx.own = own
        return log_sum

    @staticmethod
    def backward(ctx, slope):
        a, b, y_a, y_b, sums, shift, near, *kept = ctx.saved_tensors  # read once: checkpointing forbids a second time
        of_b = ctx.needs_input_grad[1]
        grads = _log_sums_grad(a, b, y_a, y_b, ctx.own, slope, sums, shift, near, kept, of_b)
        return *grads, *[None] * (6 - len(grads))

def _like_log_sums(a, b, y_a, *rest):
    log_sum = a.new_empty(1 if y_a is None else 2, len(a))
    return [log_sum, torch.empty_like(log_sum), a.new_empty(()), torch.empty((), dtype=torch.bool)]

@_exact_op(_like_log_sums)
def _log_sums(a: Tensor, b: Tensor | None, y_a: Tensor | None, y_b: Tensor | None, valid: Tensor | None,
              own: int | None, keep: bool) -> list[Tensor]:
    """[log_sum, the sums of powers, their shift, whether it served, and the strips if the backward is to have them]"""
    shift = _guess_shift(a, b, own)
    sums, kept = _sums_of_strips(a, b, y_a, y_b, own, shift, keep)
    log_sum = sums.log2() + shift
    near = _are_near(log_sum, shift, valid)
    if not near:
        log_sum = _log_sums_of_rows(a, b, y_a, y_b, own)
        kept = []
    return [log_sum, sums, shift, torch.tensor(near), *kept]

def _sums_of_strips(a, b, y_a, y_b, own, shift, keep):
    """(sum_j 2^(s_ij - shift) and, given y, sum_j w_ij 2^(s_ij - shift), (1 or 2, M); the strips if they are kept)"""
    sums = a.new_zeros(1 if y_a is None else 2, len(a))
    kept = []
    room = a.new_empty(0)
    for I, J, later, powers in _strips(a, b, own, shift, keep):
        parts = [powers]
        if y_a is not None:
            parts.append(torch.mul(powers, _weights(y_a[I], y_b[J]), out=room.resize_(powers.shape)))
        for total, part in zip(sums, parts):
            total[I] += part.sum(1)
            if b is None:
                total[later] += part[:, later.start - J.start :].sum(0)
        if keep:
            kept.append(powers)
    return sums, kept

def _log_sums_of_rows(a, b, y_a, y_b, own):
    log_sum = a.new_empty(1 if y_a is None else 2, len(a))
    for I, parts in _score_rows(a, b, y_a, y_b, own):
        for k, s in enumerate(parts):
            top = s.amax(1, keepdim=True)
            log_sum[k, I] = (s - top).exp2_().sum(1).log2() + top.squeeze(1)
    return log_sum

def _guess_shift(a, b, own):
    """A shift near the log sums: the median of the largest scores of the first 64 anchors."""
    contrast = a if b is None else b
    return _fill(a[:64] @ contrast.T, own, -torch.inf).amax(1).median()

def _are_near(log_sum, shift, valid):
    """Whether the shift served: every log sum is within NEAR of it, but those of anchors without a positive."""
    near = (log_sum - shift).abs() < NEAR
    if valid is not None:
        near[1] |= ~valid
    return bool(near.all())

@_exact_op(lambda a, b, *rest: [torch.empty_like(x) for x in (a, b)[: 1 + rest[-1]]])
def _log_sums_grad(a: Tensor, b: Tensor | None, y_a: Tensor | None, y_b: Tensor | None, own: int | None,
                   slope: Tensor, sums: Tensor, shift: Tensor, near: Tensor, kept: list[Tensor],
                   of_b: bool) -> list[Tensor]:
    """[the gradient in a, and in b if of_b], from slope, that in log_sum: dL/ds_ij = slope_i 2^(s_ij - log_sum_i)."""
    grads = [torch.zeros_like(x) for x in (a, b)[: 1 + of_b]]
    if near:
        _add_grad_of_strips(grads, a, b, y_a, y_b, own, slope, sums, shift, kept)
    else:
        _add_grad_of_rows(grads, a, b, y_a, y_b, own, slope)
    return grads

def _add_grad_of_strips(grads, a, b, y_a, y_b, own, slope, sums, shift, kept):
    contrast = a if b is None else b
    f = slope / sums.where(slope != 0, 1)  # times a power it is slope_i 2^(s_ij - log_sum_i)
    f_columns = f if b is None else f.new_zeros(len(f), len(b))  # 0 where the columns are no anchors
    room_of_G, room = a.new_empty(0), a.new_empty(0)
    for I, J, later, powers in _strips(a, b, own, shift, kept=kept):
        G = torch.add(f[0][I, None], f_columns[0][J], out=room_of_G.resize_(powers.shape))
        if y_a is not None:
            f_w = torch.add(f[1][I, None], f_columns[1][J], out=room.resize_(powers.shape))
            G.add_(f_w.mul_(_weights(y_a[I], y_b[J])))
        G.mul_(powers)  # dL/ds_ij, and dL/ds_ji as well where s_ij stands for both
        grads[0][I].addmm_(G, contrast[J])
        if b is None:
            grads[0][later].addmm_(G[:, later.start - J.start :].T, a[I])
        elif len(grads) > 1:
            grads[1][J].addmm_(G.T, a[I])

def _add_grad_of_rows(grads, a, b, y_a, y_b, own, slope):
    for I, parts in _score_rows(a, b, y_a, y_b, own):
        # The row's softmax, and not 2^(s - log_sum): where scores are large, log_sum is rounded by more than 1.
        G = sum(slope[k][I, None] * (s * math.log(2)).softmax(1) for k, s in enumerate(parts))
        grads[0][I].addmm_(G, a if b is None else b)
        if b is None or len(grads) > 1:
            grads[-1].addmm_(G.T, a[I])

def _strips(a, b, own, shift, keep=False, kept=()):
    """Yields (I, J, later, powers): anchors; some of their columns; those of J that come after I; 2^(s_ij - shift)
    between I and J, 0 for j = own + i. Unless keep, each strip overwrites the one before. If kept is not empty, the
    strips are taken from it."""
    contrast = a if b is None else b
    rows, columns = STRIP if a.device.type == "cpu" else STRIP_ON_GPU
    room = a.new_empty(0)
    kept = iter(kept)
    for i in range(0, len(a), rows):
        I = slice(i, min(i + rows, len(a)))
        for j in range(i if b is None else 0, len(contrast), columns):
            J = slice(j, min(j + columns, len(contrast)))
            later = slice(max(I.stop, j), max(I.stop, J.stop))
            powers = next(kept, None)
            if powers is None:
                s = torch.mm(a[I], contrast[J].T, out=None if keep else room.resize_(I.stop - i, J.stop - j))
                powers = _fill(s.sub_(shift).exp2_(), None if own is None else own + i - j, 0)
            yield I, J, later, powers

def _score_rows(a, b, y_a, y_b, own):
    """Yields (I, [s_ij, and given y s_ij + log2 w_ij]): anchors and the whole contrast set, ABSENT where no pair."""
    contrast = a if b is None else b
    rows = max(1, min(256, WHOLE // len(contrast)))
    for i in range(0, len(a), rows):
        I = slice(i, i + rows)
        s = _fill(a[I] @ contrast.T, None if own is None else own + i, -torch.inf)
        parts = [s] if y_a is None else [s, s + _weights(y_a[I], y_b).to(s.dtype).log2()]
        yield I, [part.clamp(min=ABSENT) for part in parts]  # the softmax of a row of -inf would be nan
