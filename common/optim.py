"""Learning-rate schedules, LARS, TensorFlow's RMSProp, and logistic regression by L-BFGS.

The optimisers use torch._foreach functions, as torch.optim does: one call, and on a GPU a few kernels, for all tensors.
"""

import math

import torch
import torch.nn.functional as F


def scheduled(schedule, t, epoch, *, milestones=(0.7, 0.8, 0.9), gamma=0.1):
    """The learning rate as a part of its peak, at the share t of the training, `epoch` epochs after the warm-up.

    cosine       falls to 1/1000, as in the reference code
    step         is multiplied by `gamma` at each of the `milestones`, which are shares of the training
    exponential  is multiplied by 0.97 every half epoch, as in the official code's probes
    constant     stays at the peak
    """
    if schedule == "cosine":
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * t)) / 2
    if schedule == "step":
        return gamma ** sum(t >= milestone for milestone in milestones)
    if schedule == "exponential":
        return 0.97 ** math.floor(2 * max(epoch, 0))
    return 1.0


def learning_rate(config, step, steps_per_epoch, **step_options):
    """The learning rate of a step: the warm-up, linear from config.warmup_from, and then the schedule.

    step_options: milestones and gamma of the schedule "step", where they are not the usual ones.
    """
    warm = config.warmup * steps_per_epoch
    planned = planned_rate(config, max(step, warm), steps_per_epoch, **step_options)
    if step < warm:
        return config.warmup_from + (planned - config.warmup_from) * step / warm
    return planned


def planned_rate(config, step, steps_per_epoch, **step_options):
    total = config.epochs * steps_per_epoch
    return config.lr * scheduled(config.schedule, step / total, step / steps_per_epoch - config.warmup, **step_options)


def set_learning_rate(optimizer, lr):
    """Sets the learning rate of all parameters, and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017, algorithm 1).

    For a tensor w of weights with gradient g, which includes the decay:

        v <- momentum v + lr * eta ||w|| / ||g|| * g        w <- w - v

    Vectors (biases, batch norm) have neither decay nor adaptation. The ratio is 1 where a norm is zero.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            learning = [w for w in group["params"] if w.grad is not None]
            matrices, vectors = [w for w in learning if w.ndim > 1], [w for w in learning if w.ndim < 2]
            if matrices:
                g = torch._foreach_add([w.grad for w in matrices], matrices, alpha=group["weight_decay"])
                a, b = torch.stack(torch._foreach_norm(matrices)), torch.stack(torch._foreach_norm(g))
                ratio = torch.where((a > 0) & (b > 0), group["eta"] * a / b, 1.0)
                self.move(matrices, torch._foreach_mul(g, (group["lr"] * ratio).unbind()), group["momentum"])
            if vectors:
                self.move(vectors, torch._foreach_mul([w.grad for w in vectors], group["lr"]), group["momentum"])

    def move(self, weights, changes, momentum):
        for w in weights:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        v = [self.state[w]["momentum"] for w in weights]
        torch._foreach_mul_(v, momentum)
        torch._foreach_add_(v, changes)
        torch._foreach_sub_(weights, v)


class RMSProp(torch.optim.Optimizer):
    """TensorFlow's RMSProp, for which the official code's learning rates are made.

        s <- decay s + (1 - decay) g^2        v <- momentum v + lr g / sqrt(s + eps)        w <- w - v

    The mean square s starts at 1, and epsilon is inside the root. In torch's own RMSprop s starts at 0 and epsilon is
    outside, so that a small gradient moves a weight hundreds of times as far.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, decay=0.9, eps=1e-3):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay": decay, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if not self.state[w]:
                    self.state[w] |= {"square": torch.ones_like(w), "momentum": torch.zeros_like(w)}
            s, v = [self.state[w]["square"] for w in weights], [self.state[w]["momentum"] for w in weights]
            g = torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])
            torch._foreach_lerp_(s, torch._foreach_mul(g, g), 1 - group["decay"])
            root = torch._foreach_sqrt(torch._foreach_add(s, group["eps"]))
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, torch._foreach_div(torch._foreach_mul(g, group["lr"]), root))
            torch._foreach_sub_(weights, v)


def make_optimizer(config, groups, lr):
    """SGD, LARS or RMSProp, each with momentum, for groups of parameters as torch.optim takes them."""
    if config.optimizer == "lars":
        return LARS(groups, lr, config.momentum)
    if config.optimizer == "rmsprop":
        return RMSProp(groups, lr, config.momentum)
    return torch.optim.SGD(groups, lr, config.momentum, nesterov=config.nesterov)


ITERATIONS = 100  # of L-BFGS at most


def logistic_regression(r, labels, num_classes, decay, label_smoothing=0.0):
    """The weights (C, D) and biases (C,) with the least mean cross-entropy + decay/2 ||weights||^2, by L-BFGS.

    It looks for V, where weights = V A and A = (mean of r r^T + 10 decay)^(-1/2). In V the loss is about equally
    steep in all directions, so that some dozen steps lead to its minimum; in the weights it takes thousands.
    """
    whiten = inverse_root(r.T @ r / len(r), 10 * decay)
    white = r @ whiten
    V, bias = r.new_zeros(num_classes, r.shape[1]).requires_grad_(), r.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([V, bias], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=20,
                                  tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe")
    rows = max(1, 2**24 // num_classes)  # at a time

    def loss_and_gradient():
        optimizer.zero_grad()
        total = decay / 2 * (V @ whiten).square().sum()
        total.backward()
        for part, y in zip(white.split(rows), labels.split(rows)):
            scores = part @ V.T + bias
            loss = F.cross_entropy(scores, y, reduction="sum", label_smoothing=label_smoothing) / len(r)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(loss_and_gradient)
    return (V @ whiten).detach(), bias.detach()


def inverse_root(matrix, ridge):
    """(matrix + ridge)^(-1/2) of a symmetric matrix (D, D) without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix.double().cpu())
    values = values.clamp(min=0) + ridge + 1e-6 * values.max() + 1e-12
    return ((vectors * values.rsqrt()) @ vectors.T).to(matrix)
