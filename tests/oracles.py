"""Optimisers, calibration, nearest neighbours and corruption errors in float64 loops, from the papers' formulas."""

import numpy as np


def lars(w, grads, lr, momentum=0.9, weight_decay=0.0, eta=1e-3):
    """A tensor w of weights after a step for each of the gradients (You et al. 2017, algorithm 1).

        g <- g + weight_decay w        v <- momentum v + lr eta ||w|| / ||g|| g        w <- w - v        v = 0 at first

    A vector (a bias, batch norm) has no decay, and its ratio is 1. The ratio is 1 where a norm is 0, too.
    """
    w = np.array(w, dtype=np.float64)
    v, norm = np.zeros_like(w), lambda x: np.sqrt(sum(x_i**2 for x_i in x.ravel()))
    for g in grads:
        ratio, g = 1.0, np.asarray(g, dtype=np.float64)
        if w.ndim > 1:
            g = g + weight_decay * w
            if norm(w) > 0 and norm(g) > 0:
                ratio = eta * norm(w) / norm(g)
        v = momentum * v + lr * ratio * g
        w = w - v
    return w


def rmsprop(w, grads, lr, momentum=0.9, weight_decay=0.0, decay=0.9, eps=1e-3):
    """A tensor w of weights after a step of TensorFlow's RMSProp for each of the gradients, number by number.

    g <- g + weight_decay w        s <- decay s + (1 - decay) g^2        v <- momentum v + lr g / sqrt(s + eps)
    w <- w - v                     s = 1 at first
    """
    w = np.array(w, dtype=np.float64)
    for i in np.ndindex(w.shape):
        s, v = 1.0, 0.0
        for g in grads:
            g_i = g[i] + weight_decay * w[i]
            s = decay * s + (1 - decay) * g_i**2
            v = momentum * v + lr * g_i / np.sqrt(s + eps)
            w[i] -= v
    return w


def expected_calibration_error(p, y, bins=15):
    """sum_m |B_m|/n |acc(B_m) - conf(B_m)| (Guo et al. 2017).

    B_m holds the rows of p (n, C) whose highest entry is in ((m-1)/M, m/M].
    """
    p, error = np.asarray(p, dtype=np.float64), 0.0
    for m in range(1, bins + 1):
        B = [i for i in range(len(p)) if (m - 1) / bins < max(p[i]) <= m / bins]
        if B:
            acc = sum(int(np.argmax(p[i])) == y[i] for i in B) / len(B)
            conf = sum(max(p[i]) for i in B) / len(B)
            error += len(B) / len(p) * abs(acc - conf)
    return error


def knn_top1(bank, bank_y, query, query_y, k=200, tau=0.07):
    """Top-1 in percent: each of the k rows nearest by cosine votes exp(cos/tau) for its label (Wu et al. 2018)."""
    bank, query = np.asarray(bank, dtype=np.float64), np.asarray(query, dtype=np.float64)
    right = 0
    for q, label in zip(query, query_y):
        cos = [q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank]
        votes = {}
        for j in sorted(range(len(bank)), key=lambda j: -cos[j])[:k]:
            votes[bank_y[j]] = votes.get(bank_y[j], 0) + np.exp(cos[j] / tau)
        right += max(votes, key=votes.get) == label
    return 100 * right / len(query)


def retrieval(z, y):
    """Recall at 1, R-precision and MAP@R in percent (Musgrave et al. 2020), a query and a neighbour at a time.

    MAP@R of a query is 1/R sum_{i = 1 ... R} P(i), P(i) the precision at i if the i-th nearest is right, else 0.
    """
    z = [row / np.linalg.norm(row) for row in np.asarray(z, dtype=np.float64)]
    values = []
    for i in range(len(z)):
        others = sorted((j for j in range(len(z)) if j != i), key=lambda j: -(z[i] @ z[j]))
        R = sum(y[j] == y[i] for j in others)
        if R == 0:
            continue
        right = [y[j] == y[i] for j in others[:R]]
        precisions = [sum(right[:k]) / k if right[k - 1] else 0 for k in range(1, R + 1)]
        values.append((right[0], sum(right) / R, sum(precisions) / R))
    return [100 * sum(column) / len(values) for column in zip(*values)]


def mean_corruption_error(errors, reference):
    """mean_c sum_s E_sc / sum_s R_sc in percent (Hendrycks & Dietterich 2019).

    errors and reference {corruption c: [error at severity s, ...]}.
    """
    return 100 * sum(sum(errors[c]) / sum(reference[c]) for c in errors) / len(errors)


def relative_mean_corruption_error(errors, clean, reference, reference_clean):
    """The same for the growth of the errors: mean_c sum_s (E_sc - E_clean) / sum_s (R_sc - R_clean)."""
    growth = {c: [e - clean for e in errors[c]] for c in errors}
    return mean_corruption_error(growth, {c: [r - reference_clean for r in reference[c]] for c in errors})
