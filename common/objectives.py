"""The losses by name: one function and one row of a table each.

To add a loss, write a function of (config, z, y, images, queue) and give it a row in OBJECTIVES. An option of its own
is a field of Config in common/config.py, with a row in MEANT_FOR there.
"""

import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

import losses
from common.ranks import gather_views

# ---------------------------------------------------------------- the functions
#
# Each takes this rank's z (V n_r, D) and labels y (V n_r,), or class probabilities (V n_r, C), view by view; `images`
# (n_r,), which numbers the images of the global batch; and a queue (features, labels) of contrasts, or None. It returns
# the value of the global batch.


def supcon_out(config, z, y, images, queue):
    if config.positives_cap is not None:
        return capped(losses.supcon_out, config, z, y)
    return losses.supcon_sharded(z, y, config.tau, queue=queue, denominator=config.denominator)


def supcon_in(config, z, y, images, queue):
    if config.positives_cap is not None:
        return capped(losses.supcon_in, config, z, y)
    return losses.supcon_sharded(z, y, config.tau, queue=queue, variant="in", denominator=config.denominator)


def capped(loss, config, z, y):
    z, y = gather_views(z, config.views), gather_views(y, config.views)  # every rank looks at all rows
    return loss(z, y, config.tau, denominator=config.denominator, positives_cap=config.positives_cap,
                views=config.views)


def nt_xent(config, z, y, images, queue):
    """An image is its own class."""
    return losses.supcon_sharded(z, images.repeat(config.views), config.tau, queue=queue)


def hard_contrastive(config, z, y, images, queue):
    z = gather_views(z, config.views)  # every rank looks at all rows
    return losses.hard_contrastive(z, config.tau, config.nearest, views=config.views)


def simple_contrastive(config, z, y, images, queue):
    z = gather_views(z, config.views)
    return losses.simple_contrastive(z, config.lam, views=config.views, k=config.nearest)


def triplet(config, z, y, images, queue):
    z, y = gather_views(z, config.views), gather_views(y, config.views)  # every rank looks at all rows
    return losses.triplet(z, y, config.margin, mining=config.mining)


def max_margin(config, z, y, images, queue):
    z, y = gather_views(z, config.views), gather_views(y, config.views)
    return losses.max_margin(z, y, config.margin)


def n_pair(config, z, y, images, queue):
    """Sohn's loss of the pairs that lie side by side in the batch, and his penalty on the norm of z."""
    z = gather_views(z, config.views)
    return grouped_n_pair(z[0::2], z[1::2], config.num_classes) + config.npair_l2 * z.square().sum(1).mean()


def grouped_n_pair(anchor, positive, num_classes):
    """Sohn's N-pair loss takes one pair of each class: so do the groups that shuffled_pairs lines up."""
    groups = zip(anchor.split(num_classes), positive.split(num_classes))
    return torch.cat([losses.n_pair(a, p, reduction="none") for a, p in groups]).mean()


# ---------------------------------------------------------------- the table


class Objective(NamedTuple):
    """What a loss needs, and its defaults where an option is not given."""

    contrastive_loss: Callable | None  # of z; None where cross-entropy of r is all there is
    views: int = 2
    lr: float = 0.5  # per 1024 images
    tau: float | None = None  # None: has no temperature
    margin: float | None = None  # None: has no margin
    nearest: float | None = None  # the part of the negatives that an anchor keeps; None: cannot leave any out
    has_lam: bool = False  # whether its negatives have a weight
    scaled: bool = False  # by tau/0.07, as the reference code scales its contrastive losses
    labels: bool = True  # whether it reads them
    soft: bool = False  # whether it takes class probabilities
    pairs: bool = False  # whether it takes pairs of images of one class, side by side
    unit: bool = True  # whether it takes z on the unit sphere
    queue: bool = False  # whether contrasts from earlier batches may join
    views_min: int = 1
    bounds_known: bool = False  # whether its value for collapsed features, and its least value, are known


OBJECTIVES = {
    "supcon": Objective(supcon_out, tau=0.1, scaled=True, soft=True, queue=True, bounds_known=True),
    "supcon-in": Objective(supcon_in, tau=0.1, scaled=True, soft=True, queue=True, bounds_known=True),
    "simclr": Objective(nt_xent, tau=0.5, scaled=True, labels=False, queue=True, views_min=2, bounds_known=True),
    "hard-contrastive": Objective(hard_contrastive, tau=0.5, scaled=True, labels=False, views_min=2, nearest=0.0819),
    "simple-contrastive": Objective(simple_contrastive, labels=False, views_min=2, nearest=1, has_lam=True),
    "triplet": Objective(triplet, margin=0.2),
    "n-pair": Objective(n_pair, views=1, lr=0.1, pairs=True, unit=False),
    "max-margin": Objective(max_margin, margin=1.0),
    "ce": Objective(None, views=1, lr=0.8, soft=True),
}


# ---------------------------------------------------------------- what a batch is trained with


def total_loss(config, z, logits, y, images, queue=None):
    """The loss of the global batch: (1 - w) loss-scale * contrast + w cross-entropy, w = ce-weight (Gunel et al. 2021).

    Arguments as of the functions above; logits (V n_r, C) or None.
    """
    contrastive_loss = OBJECTIVES[config.loss].contrastive_loss
    if contrastive_loss is None:
        return cross_entropy(logits, y, config.label_smoothing)
    loss = config.loss_scale * contrastive_loss(config, z, y, images, queue)
    if logits is None:
        return loss
    return (1 - config.ce_weight) * loss + config.ce_weight * cross_entropy(logits, y, config.label_smoothing)


def cross_entropy(logits, y, smoothing=0.0):
    """The mean over the rows of all ranks; y (N,) labels or (N, C) class probabilities."""
    y = y.to(logits.dtype) if y.ndim == 2 else y
    values = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    return losses.global_mean(values, torch.ones_like(values, dtype=torch.bool))


def collapse_and_floor(config, labels):
    """(loss for collapsed features, least loss of any features), or (None, None) where they are not known.

    If all features are alike, the loss is log|A(i)| = log(N - 1). It is least where the rows of each class are one
    point, and the points of the G classes are the corners of a simplex, whose inner products are -1/(G - 1). An anchor
    with p rows of its class beside it, and N - 1 - p of others, then has the loss

        log(p exp(1/tau) + (N - 1 - p) exp(-1/(G - 1)/tau)) - 1/tau = log(p + (N - 1 - p) exp(-(1 + 1/(G - 1))/tau)).

    For NT-Xent each image is a class. A simplex needs G - 1 dimensions: with fewer the loss stays above. For classes of
    unequal size this is the loss of the simplex, and the least one is a little lower.
    """
    objective = OBJECTIVES[config.loss]
    rows = config.batch * config.views
    is_masked = config.denominator != "all" or config.positives_cap is not None
    if not objective.bounds_known or config.ce_weight or config.mix or config.queue or is_masked:
        return None, None
    if objective.labels:
        share = torch.bincount(labels).double() / len(labels)
        share = share[share > 0]
        share = torch.full_like(share, 1 / len(share)) if config.balanced else share
    else:
        share = torch.full((config.batch,), 1 / config.batch, dtype=torch.double)
    p = (rows * share - 1).clamp(min=0)
    others = (rows - 1 - p) * math.exp(-(1 + 1 / max(len(share) - 1, 1)) / config.tau)
    least = share @ (p + others).log()
    return config.loss_scale * math.log(rows - 1), config.loss_scale * least.item()
