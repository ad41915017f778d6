"""Learning-rate schedules by hand; LARS and RMSProp against the oracle; logistic regression."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import common.optim
import oracles
from runs import SMALL, log_of, train

pytestmark = pytest.mark.seeds_torch


def config(**options):
    return SimpleNamespace(
        **{"lr": 0.5, "epochs": 1000, "warmup": 10.0, "warmup_from": 0.01, "schedule": "cosine"} | options
    )


def test_warmup_and_cosine_are_the_reference_codes():
    lr = [common.optim.learning_rate(config(), step, 10) for step in range(10001)]
    assert (
        lr[0] == 0.01 and lr[50] == pytest.approx((0.01 + lr[100]) / 2) and lr[100] == pytest.approx(0.49988, abs=5e-6)
    )
    assert all(a > b for a, b in zip(lr[100:], lr[101:])) and lr[10000] == pytest.approx(0.5e-3)
    assert lr[5000] == pytest.approx(0.5 * (1e-3 + 1) / 2)


def test_step_exponential_and_constant_by_hand():
    step = [common.optim.learning_rate(config(schedule="step", warmup=0.0), s, 1) for s in (0, 699, 700, 800, 900, 999)]
    assert step == pytest.approx([0.5, 0.5, 0.05, 0.005, 0.0005, 0.0005])
    probe = [
        common.optim.learning_rate(
            config(schedule="step", warmup=0.0, epochs=100, lr=5.0), s, 1, milestones=(0.6, 0.75, 0.9), gamma=0.2
        )
        for s in (59, 60, 75, 90)
    ]
    assert probe == pytest.approx([5, 1, 0.2, 0.04])
    exponential = [
        common.optim.learning_rate(config(schedule="exponential", warmup=0.0), s, 4) for s in (0, 1, 2, 3, 4, 400)
    ]
    assert exponential == pytest.approx([0.5 * 0.97**k for k in (0, 0, 1, 1, 2, 200)])
    warmed = [
        common.optim.learning_rate(config(schedule="exponential", warmup=2.0, warmup_from=0.0), s, 4)
        for s in (0, 4, 8, 10)
    ]
    assert warmed == pytest.approx([0, 0.25, 0.5, 0.5 * 0.97])  # it decays from the end of the warm-up on
    assert common.optim.learning_rate(config(schedule="constant", warmup=0.0), 7, 4) == 0.5


shapes = st.sampled_from([(3,), (2, 3), (4, 1), (2, 1, 3, 3)])


@given(
    st.integers(0, 2**32 - 1),
    shapes,
    st.sampled_from([0, 0.5, 0.9]),
    st.sampled_from([0, 1e-4, 0.1]),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 1]),
)
def test_lars_is_the_oracles(seed, shape, momentum, decay, scale_w, scale_g):
    rng = np.random.default_rng(seed)
    w, grads = scale_w * rng.normal(size=shape), [scale_g * rng.normal(size=shape) for _ in range(20)]
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = common.optim.LARS([{"params": [p], "weight_decay": decay}], 0.3, momentum, eta=0.02)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(
        p.detach().numpy(), oracles.lars(w, grads, 0.3, momentum, decay, 0.02), rtol=1e-12, atol=1e-14
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.9]), st.sampled_from([0, 0.01]))
def test_lars_is_sgd_where_its_ratio_is_1(seed, momentum, decay):
    rng = np.random.default_rng(seed)
    vector, matrix = torch.tensor(rng.normal(size=5)), torch.tensor(rng.normal(size=(3, 4)))
    ours, sgd = ([torch.nn.Parameter(vector.clone()), torch.nn.Parameter(matrix.clone())] for _ in range(2))
    lars = common.optim.LARS(ours, 0.1, momentum, decay, eta=1.0)
    plain = torch.optim.SGD(
        [{"params": sgd[:1], "weight_decay": 0}, {"params": sgd[1:]}], 0.1, momentum, weight_decay=decay
    )
    for _ in range(20):
        g = torch.tensor(rng.normal(size=(3, 4)))
        with torch.no_grad():  # ||g + decay w|| = ||w||: the ratio eta ||w|| / ||g|| is 1
            g = g * ours[1].norm() / g.norm() - decay * ours[1]
        for parameters in (ours, sgd):
            parameters[0].grad, parameters[1].grad = torch.tensor(np.arange(5.0)), g.clone()
        lars.step()
        plain.step()
    for a, b in zip(ours, sgd):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(
    st.integers(0, 2**32 - 1), shapes, st.sampled_from([0, 0.9]), st.sampled_from([0, 0.1]), st.sampled_from([1e-4, 1])
)
def test_rmsprop_is_the_oracles(seed, shape, momentum, decay, scale):
    rng = np.random.default_rng(seed)
    w, grads = rng.normal(size=shape), [scale * rng.normal(size=shape) for _ in range(20)]
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = common.optim.RMSProp([{"params": [p], "weight_decay": decay}], 0.3, momentum)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(
        p.detach().numpy(), oracles.rmsprop(w, grads, 0.3, momentum, decay), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("make", [common.optim.LARS, common.optim.RMSProp])
def test_an_optimisers_state_survives_a_checkpoint(make):
    def run(restart):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = make(layer.parameters(), 0.1)
        for step in range(6):
            if step == 3 and restart:
                state, optimizer = optimizer.state_dict(), make(layer.parameters(), 0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return layer.weight

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize(
    "optimizer",
    [["--optimizer", "lars", "--lr", "1"], ["--optimizer", "rmsprop", "--lr", "0.001"], ["--lr-per-256", "0.1"]],
)
def test_every_optimiser_trains(optimizer, tmp_path):
    train(*SMALL, *optimizer, "--schedule", "exponential", "--run-dir", tmp_path / "run")
    epochs = [line["mean_loss"] for line in log_of(tmp_path / "run") if "mean_loss" in line]
    assert epochs[-1] < epochs[0]


def test_schedule_is_the_reference_codes():
    config = SimpleNamespace(lr=0.5, epochs=1000, warmup=10, warmup_from=0.01, schedule="cosine")
    rate = lambda step: common.optim.learning_rate(config, step, 48)
    assert rate(0) == pytest.approx(0.01)
    # the reference warms up to its cosine's value at epoch 10: 5e-4 + (0.5 - 5e-4) (1 + cos(pi 10/1000)) / 2 = 0.49988
    assert rate(480) == pytest.approx(0.49988, abs=1e-5)
    assert rate(240) == pytest.approx((0.01 + 0.49988) / 2, abs=1e-5)
    assert rate(48_000) == pytest.approx(0.5e-3)
    config.schedule = "step"
    assert [round(rate(48 * e), 6) for e in (20, 700, 800, 900)] == [0.5, 0.05, 0.005, 0.0005]


@pytest.mark.parametrize(
    "name, kind", [("sgd", torch.optim.SGD), ("lars", common.optim.LARS), ("rmsprop", common.optim.RMSProp)]
)
def test_an_optimiser_by_its_name_has_the_rate_momentum_and_decay_that_are_asked_for(name, kind):
    w = torch.nn.Parameter(torch.ones(2, 2))
    asked = SimpleNamespace(optimizer=name, momentum=0.7, nesterov=name == "sgd")
    optimizer = common.optim.make_optimizer(asked, [{"params": [w], "weight_decay": 0.03}], 0.2)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.7, 0.03)
    assert name != "sgd" or group["nesterov"]
    assert name != "lars" or group["eta"] == 1e-3  # the official code's, as are decay and epsilon
    assert name != "rmsprop" or (group["decay"], group["eps"]) == (0.9, 1e-3)


@pytest.mark.parametrize("make", [common.optim.LARS, common.optim.RMSProp])
def test_a_step_keeps_the_rate_that_it_was_taken_with(make):
    """The rate is inside the momentum, v <- momentum v + lr ..., so at a rate of 0 a weight moves on by momentum v."""
    w = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = make([w], 0.1, momentum=0.9)
    places = [w.detach().clone()]
    for rate in (0.1, 0.0, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.full((2, 3), 0.5)
        optimizer.step()
        places.append(w.detach().clone())
    first, second, third = (after - before for before, after in zip(places, places[1:]))
    assert (first < 0).all()
    torch.testing.assert_close(second, 0.9 * first, rtol=1e-3, atol=0)
    torch.testing.assert_close(third, 0.9 * second, rtol=1e-3, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("decay", [1e-4, 1e-2])
def test_logistic_regression_ends_at_its_minimum_where_features_are_nearly_dependent(decay, smoothing):
    """At the minimum of a convex function the gradient is zero. One direction of r is a thousandth of the others."""
    g = torch.Generator().manual_seed(5)
    r = torch.randn(300, 8, generator=g)
    r[:, 7] = r[:, 0] + 1e-3 * torch.randn(300, generator=g)
    labels = (r[:, 7] - r[:, 0] + 0.001 * torch.randn(300, generator=g) > 0).long() + (r[:, 1] > 0)
    weight, bias = common.optim.logistic_regression(r, labels, 3, decay, smoothing)
    weight, bias = (v.double().requires_grad_() for v in (weight, bias))
    loss = F.cross_entropy(r.double() @ weight.T + bias, labels, label_smoothing=smoothing)
    gradients = torch.autograd.grad(loss + decay / 2 * weight.square().sum(), (weight, bias))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    assert loss < 0.9 * math.log(3)


def test_logistic_regression_of_separable_features_ends():
    r = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(5, 1)
    weight, bias = common.optim.logistic_regression(r, torch.tensor([0, 1]).repeat(5), 2, 0.0)
    assert weight.isfinite().all() and (r @ weight.T + bias).argmax(1).tolist() == [0, 1] * 5


def test_logistic_regression_in_parts_has_no_gradient_left():
    """Of 2^17 classes it takes 128 rows at a time."""
    g = torch.Generator().manual_seed(0)
    r, labels = torch.randn(130, 2, generator=g), torch.arange(130) % 2
    weights, bias = (x.double() for x in common.optim.logistic_regression(r, labels, 2**17, 0.1))
    w = weights.requires_grad_()
    loss = F.cross_entropy(r.double() @ w.T + bias, labels) + 0.05 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-3
