"""The oracle: the losses of Supervised Contrastive Learning and their gradients, in float64, one anchor at a time.

Made to be read beside the paper (Khosla et al. 2020, arXiv 2004.11362v5; bare equation numbers are its own). Sets are
lists of indices and sums are loops over them, so it shares no mask and no strip with a fast implementation.

    n images with V views make N = nV rows; row i is view i // n of image i % n
    z_i    row i of z (N, D), taken as given; y_i its label, or its class probabilities where y is (N, C)
    A(i)   all rows but i; P(i) those of i's label, its positives; N(i) the others, its negatives
    s_ij = z_i . z_j      d_ij = ||z_i - z_j||^2      P_ia = exp(s_ia/tau) / sum_{a' in A(i)} exp(s_ia'/tau)

The paper sums L_i over the anchors; here a loss is the mean over those that count, and reduction="none" gives a value
per row, 0 for a row that does not. An anchor without a positive never counts; if none does, loss and gradient are 0.
`<name>_grad` is the gradient of the mean in z, both roles of a row included: as an anchor and as others' contrast.

ValueError is raised if z is not (N, D), if y does not hold one label per row, if tau <= 0 or k < 1, if an option has an
unknown value, and, where views are read, if views < 1 or N is no multiple of them. The values in z are not looked at:
nan in, nan out.
"""
import numpy as np


def supcon_out(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """Eq. 2:  L_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / D_ip )

    D_ip = sum_{a in A(i)} exp(s_ia/tau)                      "all", the paper's
           exp(s_ip/tau) + sum_{n in N(i)} exp(s_in/tau)      "one_positive"
           sum_{n in N(i)} exp(s_in/tau)                      "negatives"; an anchor without negatives does not count
    positives_cap (table 5): P(i) keeps i's other views and all views of the first positives_cap / views other images of
    its class in batch order; the positives it drops leave D_ip too.
    y (N, C):  L_i = -sum_{a in A(i)} w_ia log P_ia,  w_ia = y_i . y_a / sum_{a' in A(i)} y_i . y_a'
    Raised: a cap below 0 or no multiple of views; class probabilities with a cap or a denominator other than "all".
    Left out: the factor tau/0.07 of the authors' PyTorch code."""
    return _reduce(z, _supcon("out", z, y, tau, denominator, positives_cap, views), reduction)


def supcon_in(z, y, tau=0.1, *, denominator="all", positives_cap=None, views=2, reduction="mean"):
    """Eq. 3:  L_i = -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / D_ip );  options and errors as in supcon_out

    y (N, C):  L_i = -log sum_{a in A(i)} w_ia P_ia"""
    return _reduce(z, _supcon("in", z, y, tau, denominator, positives_cap, views), reduction)


def anchor_grad(i, z, y, tau, variant):
    """Eqs. 4, 5, the partial of L_i in its ANCHOR argument alone; labels, denominator "all"; 0 if P(i) is empty.

    dL_i/dz_i = 1/tau { sum_{p in P(i)} z_p (P_ip - X_ip) + sum_{n in N(i)} z_n P_in }
    X_ip = 1/|P(i)| (out) or exp(s_ip/tau) / sum_{p' in P(i)} exp(s_ip'/tau) (in)"""
    _require(variant in ("out", "in"), f"unknown variant {variant!r}")
    z = _rows(z, y)
    P, N = _positives(i, y), _negatives(i, y)
    x = z @ z[i] / tau
    total = np.zeros_like(z[i])
    for p in P:
        X_ip = 1 / len(P) if variant == "out" else np.exp(x[p] - _lse(x[P]))
        total += z[p] * (np.exp(x[p] - _lse(x[P + N])) - X_ip)
    for n in N if P else []:
        total += z[n] * np.exp(x[n] - _lse(x[P + N]))
    return total / tau


def nt_xent(z, tau=0.5, *, views=2, reduction="mean"):
    """Eq. 1: supcon_out with the image as the label; views=1 leaves no positive."""
    return _reduce(z, _supcon("out", z, _images(z, views), tau), reduction)


def hard_contrastive(z, tau, k, *, views=2, reduction="mean"):
    """Wang & Liu 2021, eq. 9: nt_xent with N(i) cut to the k negatives of largest s_in, or all if they are fewer."""
    _require(k >= 1, f"k must be at least 1, got {k}")
    return _reduce(z, _supcon("out", z, _images(z, views), tau, k=k), reduction)


def simple_contrastive(z, lam, *, views=2, k=None, reduction="mean"):
    """Wang & Liu 2021, eq. 3:  L_i = -1/|P(i)| sum_{p in P(i)} s_ip + lam sum_{n in N(i)} s_in;  k as in eq. 9"""
    _require(k is None or k >= 1, f"k must be at least 1, got {k}")
    return _reduce(z, _simple_contrastive(_rows(z), lam, _images(z, views), k), reduction)


def supcon_against(z, y, contrast, y_contrast, tau=0.1, *, own=None, variant="out", denominator="all",
                   reduction="mean"):
    """supcon_out or supcon_in (variant "in") of anchors z against another set of rows.

    A(i) is all rows of contrast. If own is given, row own + i is anchor i itself and is left out. P(i) is those of A(i)
    with i's label, and N(i) the others. denominator and class probabilities, (., C) on both sides, as above."""
    z = _rows(z, y, (1, 2))
    contrast = _rows(contrast)
    return _reduce(z, _against(variant, z, y, contrast, y_contrast, tau, own, denominator), reduction)


def n_pair(anchor, positive, *, reduction="mean"):
    """Sohn 2016, less its penalty on norms:  L_i = log( 1 + sum_{j != i} exp(f_i . f_j+ - f_i . f_i+) )"""
    return _reduce(anchor, _n_pair(_rows(anchor), _rows(positive)), reduction)


def triplet(z, y, margin=0.2, *, mining="semihard", soft=False, reduction="mean"):
    """L_i = mean over i's triplets (p, n) of [u]_+, or log(1 + e^u) if soft;  u = d_ip - d_in + margin

    "all" of P(i) x N(i); "hard": the farthest p, the nearest n; "semihard" (FaceNet): each p with the nearest n that
    has d_in > d_ip, or the farthest n if none has. An anchor without negatives does not count."""
    return _reduce(z, _triplet(z, y, margin, mining, soft), reduction, _distance_slope)


def max_margin(z, y, margin=1.0, *, reduction="mean"):
    """Hadsell 2006:  L_i = mean over A(i) of d_ip/2 for p in P(i) and max(0, margin - sqrt d_in)^2 / 2 for n in N(i)"""
    return _reduce(z, _max_margin(z, y, margin), reduction, _distance_slope)


def uniformity(z, t=2):
    """Wang & Isola 2020:  log mean_{i != j} exp(-t d_ij);  raised: fewer than two rows"""
    d = _distances(z)
    return float(_lse([-t * d_ij for d_ij in d.values()]) - np.log(len(d)))


def uniformity_grad(z, t=2):
    """dL/dd_ij = -t exp(-t d_ij) / sum_{i' != j'} exp(-t d_i'j')"""
    d = _distances(z)
    log_sum = _lse([-t * d_ij for d_ij in d.values()])
    return _gradient(z, [(i, j, -t * np.exp(-t * d[i, j] - log_sum)) for i, j in d], _distance_slope)


def alignment(z, *, views=2):
    """Wang & Isola 2020:  mean of d_ip over the pairs of different views of an image;  raised: views < 2"""
    z = _rows(z)
    return float(sum(share * (z[i] - z[p]) @ (z[i] - z[p]) for i, p, share in _pairs(z, _images(z, views, least=2))))


def tolerance(z, y):
    """Wang & Liu 2021, eq. 11 as in their tables:  mean of s_ip over all i and p in P(i), 0 if there is no pair

    Left out: the printed form, whose mean counts pairs of different labels as 0."""
    z = _rows(z)
    return float(sum(share * z[i] @ z[p] for i, p, share in _pairs(z, y)))


def normalize(w):
    """z_i = w_i / ||w_i||; a zero row has no direction and gives nan."""
    return _rows(w) / np.linalg.norm(w, axis=1, keepdims=True)


def normalize_grad(w, g):
    """Eqs. 16-20, with g_i = dL/dz_i:  dL/dw_i = 1/||w_i|| (I - z_i z_i^T) g_i"""
    return np.array([(g_i - (z_i @ g_i) * z_i) / np.linalg.norm(w_i) for w_i, z_i, g_i in zip(w, normalize(w), g)])


# The gradients of the means, from the dL_i/ds_ia or dL_i/dd_ia that stand beside L_i below.
def supcon_out_grad(*args, **options): return supcon_out(*args, **options, reduction="gradient")
def supcon_in_grad(*args, **options): return supcon_in(*args, **options, reduction="gradient")
def nt_xent_grad(*args, **options): return nt_xent(*args, **options, reduction="gradient")
def hard_contrastive_grad(*args, **options): return hard_contrastive(*args, **options, reduction="gradient")
def simple_contrastive_grad(*args, **options): return simple_contrastive(*args, **options, reduction="gradient")
def triplet_grad(*args, **options): return triplet(*args, **options, reduction="gradient")
def max_margin_grad(*args, **options): return max_margin(*args, **options, reduction="gradient")
def n_pair_grad(f, f_pos): return _two_gradients(f, f_pos, _n_pair(_rows(f), _rows(f_pos)))
def supcon_against_grad(z, y, contrast, y_contrast, tau=0.1, *, own=None, variant="out", denominator="all"):
    return _two_gradients(z, contrast,
                          _against(variant, _rows(z), y, _rows(contrast), y_contrast, tau, own, denominator))
def alignment_grad(z, *, views=2): return _gradient(z, _pairs(z, _images(z, views, least=2)), _distance_slope)
def tolerance_grad(z, y): return _gradient(z, _pairs(z, y), _score_slope)


# Each yields (i, L_i, {a: dL_i/ds_ia}) for every anchor that counts, {a: dL_i/dd_ia} in a loss of distances.
def _supcon(variant, z, y, tau, denominator="all", cap=None, views=2, k=None):
    z = _rows(z, y, dims=(1, 2))
    y = np.asarray(y)
    _require(tau > 0, f"tau must be positive, got {tau}")
    _require(denominator in ("all", "one_positive", "negatives"), f"unknown denominator {denominator!r}")
    _require(y.ndim == 1 or (denominator, cap) == ("all", None), f"class probabilities with {denominator}, cap {cap}")
    n = None if cap is None else len(set(_images(z, views)))
    _require(cap is None or (cap >= 0 and cap % views == 0), f"positives_cap {cap} is no multiple of {views} views")
    if y.ndim == 2:
        yield from _against(variant, z, y, z, y, tau, own=0)
        return
    for i in range(len(z)):
        s = z @ z[i]
        P, N = _positives(i, y), sorted(_negatives(i, y), key=s.item, reverse=True)[:k]
        if cap is not None:
            others = [[p for p in P if p // n == view and p % n != i % n] for view in range(views)]
            P = [p for p in P if p % n == i % n] + [p for rows in others for p in rows[:cap // views]]
        D = {p: {"all": P + N, "one_positive": [p] + N, "negatives": N}[denominator] for p in P}
        if P and all(D.values()):
            yield i, *_contrast(variant, s / tau, {p: 1 / len(P) for p in P}, D, tau)

def _contrast(variant, x, w, D, tau):
    """(L_i, {a: dL_i/ds_ia}) from x_a = s_ia/tau, the weight w_p of every positive and the rows D_p of its denominator.

    ratio_p = exp(x_p) / sum_{a in D_p} exp(x_a);    out: L_i = -sum_p w_p log ratio_p,  X_p = w_p
    in: L_i = -log sum_p w_p ratio_p,  X_p = w_p ratio_p / sum_p' w_p' ratio_p'
    dL_i/dx_a = sum_p X_p ( softmax_{D_p}(x)_a - [a = p] ),  which is P_ia - X_ia if D_p = A(i) for every p"""
    log_ratio = {p: -_lse(x[D[p]] - x[p]) for p in w}
    log_mean = _lse([np.log(w[p]) + log_ratio[p] for p in w])
    L_i = -sum(w[p] * log_ratio[p] for p in w) if variant == "out" else -log_mean
    g = dict.fromkeys(range(len(x)), 0.0)
    for p in w:
        X_p = w[p] if variant == "out" else w[p] * np.exp(log_ratio[p] - log_mean)
        g[p] -= X_p / tau
        for a, softmax_a in zip(D[p], np.exp(x[D[p]] - x[p] + log_ratio[p])):
            g[a] += X_p * softmax_a / tau
    return L_i, g

def _simple_contrastive(z, lam, images, k):
    for i, z_i in enumerate(z):
        s = z @ z_i
        P = _positives(i, images)
        N = sorted(_negatives(i, images), key=s.item, reverse=True)[:k]
        g = {p: -1 / len(P) for p in P} | {n: lam for n in N}
        if P:
            yield i, sum(g[a] * s[a] for a in g), g

def _against(variant, z, y, contrast, y_contrast, tau, own, denominator="all"):
    contrast = _rows(contrast, y_contrast, (1, 2))
    _require(variant in ("out", "in"), f"unknown variant {variant!r}")
    _require(tau > 0, f"tau must be positive, got {tau}")
    _require(denominator in ("all", "one_positive", "negatives"), f"unknown denominator {denominator!r}")
    _require(np.ndim(y) == 1 or denominator == "all", f"class probabilities with {denominator}")
    for i in range(len(z)):
        A = [a for a in range(len(contrast)) if own is None or a != own + i]
        overlap = {a: y[i] @ y_contrast[a] if np.ndim(y) == 2 else float(y[i] == y_contrast[a]) for a in A}
        w = {p: overlap[p] / sum(overlap.values()) for p in A if overlap[p] > 0}
        N = [a for a in A if a not in w]
        D = {p: {"all": A, "one_positive": [p] + N, "negatives": N}[denominator] for p in w}
        if w and all(D.values()):
            yield i, *_contrast(variant, contrast @ z[i] / tau, w, D, tau)

def _n_pair(f, f_pos):
    _require(f.shape == f_pos.shape, f"anchor {f.shape} and positive {f_pos.shape} differ in shape")
    return _against("out", f, range(len(f)), f_pos, range(len(f)), 1, None)

def _triplet(z, y, margin, mining, soft):
    z = _rows(z, y)
    _require(mining in ("semihard", "hard", "all"), f"unknown mining {mining!r}")
    for i in range(len(z)):
        d = ((z - z[i]) ** 2).sum(1)
        P, N = sorted(_positives(i, y), key=d.item), sorted(_negatives(i, y), key=d.item)  # the nearest first
        triplets = {"all": [(p, n) for p in P for n in N],
                    "hard": [(p, n) for p in P[-1:] for n in N[:1]],
                    "semihard": [(p, next((n for n in N if d[n] > d[p]), N[-1])) for p in P if N]}[mining]
        L_i = 0.0
        h = dict.fromkeys(P + N, 0.0)
        for p, n in triplets:
            u = d[p] - d[n] + margin
            slope = np.exp(-np.logaddexp(0, -u)) if soft else float(u > 0)
            L_i += (np.logaddexp(0, u) if soft else max(0, u)) / len(triplets)
            h[p] += slope / len(triplets)
            h[n] -= slope / len(triplets)
        if triplets:
            yield i, L_i, h

def _max_margin(z, y, margin):
    z = _rows(z, y)
    for i in range(len(z)):
        P, N, D = _positives(i, y), _negatives(i, y), np.sqrt(((z - z[i]) ** 2).sum(1))
        gap = {n: max(0, margin - D[n]) for n in N}
        L_i = sum(D[p] ** 2 / 2 for p in P) + sum(gap[n] ** 2 / 2 for n in N)
        h = {p: 1 / 2 for p in P} | {n: -gap[n] / (2 * D[n]) if D[n] > 0 else 0.0 for n in N}
        if P:
            yield i, L_i / len(P + N), {a: h[a] / len(P + N) for a in h}

def _others(i, y): return [a for a in range(len(y)) if a != i]
def _positives(i, y): return [p for p in _others(i, y) if y[p] == y[i]]
def _negatives(i, y): return [n for n in _others(i, y) if y[n] != y[i]]
def _score_slope(z_i, z_a): return z_a  # ds_ia/dz_i
def _distance_slope(z_i, z_a): return 2 * (z_i - z_a)  # dd_ia/dz_i

def _images(z, views, least=1):
    _require(views >= least and len(_rows(z)) % views == 0, f"{len(z)} rows in {views} views; {least} views at least")
    return [i % (len(z) // views) for i in range(len(z))]

def _pairs(z, y):
    """All (i, p) with p in P(i), each with its share of their mean."""
    pairs = [(i, p) for i in range(len(_rows(z, y))) for p in _positives(i, y)]
    return [(i, p, 1 / len(pairs)) for i, p in pairs]

def _distances(z):
    z = _rows(z)
    _require(len(z) > 1, f"uniformity needs at least two rows, got {z.shape}")
    return {(i, j): (z[i] - z[j]) @ (z[i] - z[j]) for i in range(len(z)) for j in _others(i, z)}

def _lse(x):
    """log sum exp x; log1p keeps a loss of 1e-11 exact."""
    x = np.sort(x)
    return x[-1] + np.log1p(np.exp(x[:-1] - x[-1]).sum())

def _reduce(z, anchors, reduction, slope=_score_slope):
    anchors = list(anchors)
    if reduction == "gradient":
        return _gradient(z, [(i, a, g[a] / len(anchors)) for i, L_i, g in anchors for a in g], slope)
    _require(reduction in ("mean", "none"), f"unknown reduction {reduction!r}")
    L = {i: L_i for i, L_i, g in anchors}
    if reduction == "none":
        return np.array([L.get(i, 0.0) for i in range(len(z))])
    return float(sum(L.values()) / max(1, len(L)))

def _gradient(z, weights, slope):
    """d( sum_ia g_ia s_ia )/dz = (G + G^T) z; the same for d_ia: a weight moves the anchor and its contrast."""
    z, grad = _rows(z), np.zeros(np.shape(z))
    for i, a, g_ia in weights:
        grad[i] += g_ia * slope(z[i], z[a])
        grad[a] += g_ia * slope(z[a], z[i])
    return grad

def _two_gradients(z, contrast, anchors):
    """(d/dz, d/dcontrast) of the mean of the anchors' L_i."""
    anchors = list(anchors)
    M = len(z)
    weights = [(i, M + a, g[a] / len(anchors)) for i, L_i, g in anchors for a in g]
    return tuple(np.split(_gradient(np.vstack([z, contrast]), weights, _score_slope), [M]))

def _rows(z, y=None, dims=(1,)):
    z = np.asarray(z, dtype=np.float64)
    _require(z.ndim == 2, f"z must be (N, D), got {z.shape}")
    fits = y is None or (np.ndim(y) in dims and len(y) == len(z))
    _require(fits, f"y must have a label for each of the {len(z)} rows of z, got {np.shape(y)}")
    return z

def _require(condition, message):
    if not condition:
        raise ValueError(message)
