"""Accuracy, confusions, calibration and nearest neighbours. Shares are in percent unless a docstring says otherwise."""

import torch
import torch.nn.functional as F

SIMILARITIES = 2**26  # that are held at a time: 256 MB


def topk(scores, labels, k):
    """Accuracy in percent: how often the label is among the k highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).sum().item() / len(labels)


def confusion(scores, labels):
    """(C, C): how many images of class i are taken for class j."""
    n = scores.shape[1]
    return torch.bincount(labels * n + scores.argmax(1), minlength=n * n).view(n, n).cpu()


def worst_confusions(scores, labels, classes, count=5):
    """The most frequent mistakes as [true class, predicted class, percent of the true class's images]."""
    n = len(classes)
    table = confusion(scores, labels).double()
    share = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    values, where = share.flatten().topk(min(count, n * n))
    return [[classes[i // n], classes[i % n], round(v, 2)] for v, i in zip(values.tolist(), where.tolist()) if v > 0]


def reliability(scores, labels, bins=15):
    """(expected calibration error, table), as fractions (Guo et al. 2017).

    The table has a row [images, mean confidence, accuracy] for each of `bins` equal bins (a, b] of the confidence. The
    error is the mean over the images of their bin's |accuracy - confidence|.
    """
    scores, labels = scores.cpu().double(), labels.cpu()  # not every device has doubles
    confidence, predicted = scores.softmax(1).max(1)
    right = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count, total, hits = (torch.zeros(bins, dtype=torch.double) for _ in range(3))
    for sums, values in ((count, torch.ones_like(right)), (total, confidence), (hits, right)):
        sums.index_add_(0, which, values)
    table = torch.stack([count, total / count.clamp(min=1), hits / count.clamp(min=1)], 1)
    error = (count * (table[:, 2] - table[:, 1]).abs()).sum() / len(labels)
    return error.item(), table.tolist()


def per_class(scores, labels, classes):
    """Accuracy in percent of each class that has images."""
    table = confusion(scores, labels).double()
    images = table.sum(1)
    shares = zip(classes, (100 * table.diagonal() / images.clamp(min=1)).tolist(), images.tolist())
    return {name: share for name, share, count in shares if count}


def best_temperature(scores, labels):
    """T > 0 of the least cross-entropy of scores / T (Guo et al. 2017)."""
    scores, labels = scores.cpu().double(), labels.cpu()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(scores / log_t.clamp(-7, 7).exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.clamp(-7, 7).exp().item()


def knn_top1(bank, bank_labels, query, query_labels, k=200, tau=0.07):
    """Weighted k-NN accuracy in percent (Wu et al. 2018): neighbours vote exp(s/tau), s the cosine similarity."""
    bank = F.normalize(bank)
    right = 0
    count = max(1, SIMILARITIES // len(bank))
    for q, y in zip(F.normalize(query).split(count), query_labels.split(count)):
        s, nearest = (q @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(q), int(bank_labels.max()) + 1, device=bank.device, dtype=s.dtype)
        votes.scatter_add_(1, bank_labels[nearest], ((s - 1) / tau).exp())  # at most 1: no overflow in any type
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(query)


def retrieval(features, labels):
    """How well each row finds the rows of its label among all others, by cosine similarity: the means, in percent.

    With R other rows of the label, recall at 1 is whether the nearest row is one of them, the R-precision is their
    share among the R nearest, and MAP@R is 1/R sum_{i = 1 ... R} [the i-th nearest is one] * (their share among the i
    nearest) (Musgrave et al. 2020). Rows alone in their class are left out; if all are, the values are None.
    """
    z = F.normalize(features)
    R = labels.bincount()[labels] - 1
    asked = torch.nonzero(R).squeeze(1)
    found = []
    if not len(asked):
        return {"recall_at_1": None, "r_precision": None, "map_at_r": None}
    for rows in asked.split(max(1, SIMILARITIES // len(z))):
        s = z[rows] @ z.T
        s[torch.arange(len(rows), device=s.device), rows] = -torch.inf
        rank = torch.arange(1, int(R.max()) + 1, device=s.device)
        hits = (labels[s.topk(len(rank)).indices] == labels[rows, None]) & (rank <= R[rows, None])
        precision = hits.cumsum(1) / rank
        found.append(torch.stack([hits[:, 0], hits.sum(1) / R[rows], (hits * precision).sum(1) / R[rows]]).double())
    recall, r_precision, map_at_r = (100 * torch.cat(found, 1).mean(1)).tolist()
    return {"recall_at_1": recall, "r_precision": r_precision, "map_at_r": map_at_r}
