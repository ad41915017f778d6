# SPDX-License-Identifier: MIT. Copyright (c) 2026 the authors of this file. Version 0.1.0.
"""Supervised contrastive losses and their relatives, one file that needs nothing but torch.

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

Scores are float32 or wider, outside autocast; a half or bfloat16 z gets its gradient back in its own type
(in float16 that underflows for large N: use a gradient scaler). tau may be a tensor and then gets its gradient.
Shapes and options that cannot be meant raise ValueError; values are not looked at, so nan and inf propagate.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- the supervised contrastive loss


def supcon_out(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """L_out, the paper's loss (A eq. 2): mean_i -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / D_ip ).

    z (N, D) features, taken as given; y (N,) labels, or (N, C) class probabilities, which weigh a pair by
    their inner product; tau a positive number or tensor. D_ip is the sum of exp(s_ia/tau) over
      "all"           P(i) and N(i), that is A(i): the paper
      "one_positive"  p and N(i)
      "negatives"     N(i); an anchor without negatives is left out
    positives_cap keeps, beside the anchor's own other `views`, at most that many positives (lowest batch index
    first, evenly over the views); the dropped ones leave the denominator too (A sec. 11).
    Returns a scalar, or (N,) values. Raises ValueError for shapes and options that do not fit.
    """
    w, log_ratio = _supcon_terms(z, y, tau, denominator, positives_cap, views)
    loss = -(w * log_ratio).sum(1)
    return _reduce(loss, w.sum(1) > 0, reduction)


def supcon_in(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """L_in (A eq. 3): mean_i -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / D_ip ). Arguments as supcon_out.

    Never above L_out (Jensen), equal where all positives of an anchor tie; its gradient pulls the nearest
    positives alone, and the paper measures it 11 points worse.
    """
    w, log_ratio = _supcon_terms(z, y, tau, denominator, positives_cap, views)
    loss = -_log_mean_exp(log_ratio, w)
    return _reduce(loss, w.sum(1) > 0, reduction)


def nt_xent(z, tau=0.5, *, views=2, reduction="mean"):
    """SimCLR's NT-Xent, L_self (A eq. 1): L_out where only the other views of an image are its positives."""
    _check(z, views=views)
    return supcon_out(z, _image_index(z, views), tau, reduction=reduction)


def _supcon_terms(z, y, tau, denominator, positives_cap, views):
    """The weight w_ip of every positive (1/|P(i)|, zero elsewhere) and its log ratio log(exp(s_ip/tau) / D_ip)."""
    _check(z, y, tau=tau, views=1 if positives_cap is None else views, probabilities=True)
    _check_word("denominator", denominator, ("all", "one_positive", "negatives"))
    s = _scores(z) / tau  # (N, N)
    if y.ndim == 2:
        if denominator != "all" or positives_cap is not None:
            raise ValueError("class probabilities y (N, C) go with denominator='all' and no positives_cap alone")
        a = _others(z)
        w = _rows_to_one(_scores(y.to(s.dtype)) * a)
        return w, torch.where(a, s - _log_sum_exp(s, a), 0)
    p, n = _positives_negatives(y)
    if positives_cap is not None:
        p = _cap_positives(p, positives_cap, views)
    if denominator == "all":
        log_d = _log_sum_exp(s, p | n)
    elif denominator == "one_positive":
        log_d = torch.logaddexp(s, _log_sum_exp(s, n))
    else:
        log_d = _log_sum_exp(s, n)
        p = p & n.any(1, keepdim=True)
    w = _rows_to_one(p.to(s.dtype))
    return w, torch.where(p, s - log_d, 0)


def _cap_positives(p, cap, views):
    """P(i) cut to the anchor's own views and the first cap / views other images of its class."""
    if cap < 0 or cap % views:
        raise ValueError(f"positives_cap must be a multiple of views = {views} and not negative, got {cap}")
    image = torch.arange(len(p), device=p.device) % (len(p) // views)
    own = image[:, None] == image
    others = (p & ~own).unflatten(1, (views, -1))  # (N, V, n): each view of the other images, in batch order
    first = others & (others.cumsum(2) <= cap // views)
    return (p & own) | first.flatten(1)


class SupConLoss(nn.Module):
    """Drop-in for the reference PyTorch code's SupConLoss: same arguments, same value on unit rows.

    forward(features, labels=None, mask=None): features (B, V, ...), anything after V is flattened; labels (B,),
    or mask (B, B) whose entry [i, j] >= 0 weighs image j as a positive of image i, or neither, which is NT-Xent.
    contrast_mode "one" takes view 0 alone as anchors. The value is multiplied by temperature/base_temperature,
    as the reference does; base_temperature=None turns that off. variant "in" gives L_in.

    It parts from the reference where that is wrong or nan: anchors without a positive leave the mean (the
    reference divides by them as well), small temperatures are exact (it underflows), and rows are L2-normalised
    here (normalize=False turns that off), so the gradient with respect to unit leaf rows is the tangential part;
    parameters of a model that normalises already see no difference.
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
        if labels is not None:
            labels = labels.reshape(-1)
            if len(labels) != B:
                raise ValueError(f"labels must be ({B},) for features {tuple(features.shape)}, got {len(labels)}")
            mask = labels[:, None] == labels
        elif mask is None:
            mask = torch.eye(B, device=z.device)
        elif mask.shape != (B, B):
            raise ValueError(f"mask must be ({B}, {B}), got {tuple(mask.shape)}")
        rows = B if self.contrast_mode == "one" else V * B  # the anchors come first in z
        a = _others(z)[:rows]
        s = _scores(z)[:rows] / self.temperature
        w = _rows_to_one(mask.to(device=z.device, dtype=s.dtype).repeat(V, V)[:rows] * a)
        log_p = torch.where(a, s - _log_sum_exp(s, a), 0)  # log P_ip
        loss = -(w * log_p).sum(1) if self.variant == "out" else -_log_mean_exp(log_p, w)
        scale = 1 if self.base_temperature is None else self.temperature / self.base_temperature
        return scale * _reduce(loss, w.sum(1) > 0, "mean")


# ---------------------------------------------------------------- what came before: pairs, triplets, N-pairs


def n_pair(anchor, positive, *, reduction="mean"):
    """Sohn's N-pair loss (2016): mean_i log( 1 + sum_{j != i} exp(f_i . f_j+ - f_i . f_i+) ), raw features.

    anchor, positive (M, D): row i of both shows two images of one class, another class in each row.
    """
    _check(anchor)
    if positive.shape != anchor.shape:
        raise ValueError(f"positive must be {tuple(anchor.shape)} like anchor, got {tuple(positive.shape)}")
    s = _scores(anchor, positive)
    loss = s.logsumexp(1) - s.diagonal()
    return _reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


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
        loss = (hinge(d - d_n + margin) * _rows_to_one(p.to(d.dtype))).sum(1)
    else:
        loss = _mean_over_triplets(d, p, n, margin, hinge)
    return _reduce(loss, valid, reduction)


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
    w = _rows_to_one(n.to(d.dtype))

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
    return _reduce(pair.sum(1) / max(len(z) - 1, 1), p.any(1), reduction)


# ---------------------------------------------------------------- Wang & Liu: what the temperature does


def hard_contrastive(z, tau, k, *, views=2, reduction="mean"):
    """L_hard (B eq. 9): NT-Xent in which each anchor keeps only the k negatives nearest to it."""
    _check(z, tau=tau, views=views)
    p, n = _positives_negatives(_image_index(z, views))
    s = _scores(z) / tau
    log_ratio = s - _log_sum_exp(s, p | _nearest_negatives(s, n, k))
    w = _rows_to_one(p.to(s.dtype))
    return _reduce(-(w * log_ratio).sum(1), p.any(1), reduction)


def simple_contrastive(z, lam, *, views=2, k=None, reduction="mean"):
    """L_simple (B eq. 3): -mean_{p in P(i)} s_ip + lam sum_{j in N(i)} s_ij; k keeps the k nearest negatives."""
    _check(z, views=views)
    p, n = _positives_negatives(_image_index(z, views))
    s = _scores(z)
    if k is not None:
        n = _nearest_negatives(s, n, k)
    loss = -(_rows_to_one(p.to(s.dtype)) * s).sum(1) + lam * (n * s).sum(1)
    return _reduce(loss, p.any(1), reduction)


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
    return (v[first] - v[second]).square().sum(2).mean()


def tolerance(z, y):
    """B eq. 11 given the class: the mean of s_ij over all pairs i != j of one label; 0 if there is none."""
    _check(z, y)
    p, _ = _positives_negatives(y)
    return (p * _scores(z)).sum() / p.sum().clamp(min=1)


# ---------------------------------------------------------------- across ranks


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, rows):
        ctx.rows, ctx.rank = rows, dist.get_rank()
        padded = z.new_zeros(max(rows), *z.shape[1:])  # gloo refuses unequal shards
        padded[: len(z)] = z
        shards = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(shards, padded)
        return torch.cat([shard[:r] for shard, r in zip(shards, rows)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # every rank's loss depends on our rows
        start = sum(ctx.rows[: ctx.rank])
        return grad[start : start + ctx.rows[ctx.rank]], None


def all_gather_rows(z):
    """The rows (n_r, ...) of every rank r, features or labels, in the order of the ranks, with gradients.

    A loss of all gathered rows, computed alike on every rank, then has the global value everywhere, and the
    global gradient after DistributedDataParallel's averaging: the backward sums W equal gradients, DDP divides.
    Shards may be unequal or empty. Without a process group z comes back as it is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return z
    rows = torch.zeros(dist.get_world_size(), dtype=torch.long, device=z.device)
    rows[dist.get_rank()] = len(z)
    dist.all_reduce(rows)
    return _AllGather.apply(z, rows.tolist())


# ---------------------------------------------------------------- sets, scores and reductions


def _scores(z, other=None):
    """s_ij = z_i . z_j, (N, N), in float32 or wider whatever the autocast around it."""
    with torch.autocast(z.device.type, enabled=False):
        z = _widen(z)
        return z @ (z if other is None else _widen(other)).T


def _squared_distances(z):
    """||z_i - z_j||^2, (N, N), never below zero, and zero on the diagonal."""
    s = _scores(z)
    sq = s.diagonal()
    return (sq[:, None] + sq - 2 * s).clamp(min=0)


def _widen(z):
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


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


def _log_sum_exp(s, members):
    """log sum of exp(s_ij) over the members j of row i, (N, 1); -inf with a zero gradient for an empty row.

    What is no member is -inf before any maximum is taken: a self score of 1/tau would drown all others.
    """
    some = members.any(1, keepdim=True)
    return s.masked_fill(~members & some, -torch.inf).logsumexp(1, keepdim=True).masked_fill(~some, -torch.inf)


def _log_mean_exp(log_ratio, w):
    """log sum_p w_ip exp(log_ratio_ip), (N,): the logarithm of the mean over P(i)."""
    return _log_sum_exp(log_ratio + torch.where(w > 0, w, 1).log(), w > 0).squeeze(1)


def _rows_to_one(w):
    """Weights of each row divided by their sum; a row of zeros stays zero."""
    total = w.sum(1, keepdim=True)
    return w / torch.where(total > 0, total, 1)


def _reduce(loss, valid, reduction):
    _check_word("reduction", reduction, ("mean", "none"))
    loss = torch.where(valid, loss, 0)
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp(min=1)


def _check(z, y=None, *, tau=1.0, views=1, probabilities=False):
    if z.ndim != 2:
        raise ValueError(f"z must be (N, D), got {tuple(z.shape)}")
    if y is not None and (y.ndim not in (1, 1 + probabilities) or len(y) != len(z)):
        raise ValueError(f"y must have one label for each row of z {tuple(z.shape)}, got {tuple(y.shape)}")
    if views < 1 or len(z) % views:
        raise ValueError(f"the rows of z must be a multiple of views >= 1, got {len(z)} rows and views = {views}")
    _check_tau(tau)


def _check_tau(tau):
    if not isinstance(tau, torch.Tensor) and not tau > 0:  # a tensor's value is not read: that would break compilation
        raise ValueError(f"tau must be positive, got {tau}")


def _check_word(name, word, words):
    if word not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")
