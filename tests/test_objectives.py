"""What pretrain.py makes of the losses: each by its name, its heads, its batches in parts, what a classifier adds."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common.models
import common.objectives
import losses
import pretrain
import reference_numpy as ref

pytestmark = pytest.mark.seeds_torch
n, V, D = 12, 2, 5
IMAGES = torch.arange(n)
LABELS = IMAGES % 3
DEFAULTS = {
    "views": V,
    "tau": 0.3,
    "loss_scale": 1.0,
    "margin": None,
    "nearest": None,
    "lam": None,
    "mining": "semihard",
    "npair_l2": 0.0,
    "num_classes": 3,
    "ce_weight": 0.0,
    "label_smoothing": 0.0,
    "mix": None,
    "queue": 0,
    "balanced": False,
    "batch": n,
    "denominator": "all",
    "positives_cap": None,
}


def config(**options):
    made = SimpleNamespace(**DEFAULTS | options)
    made.margin = common.objectives.OBJECTIVES[made.loss].margin if made.margin is None else made.margin
    return made


def rows(seed=0, count=n * V):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def value(z, y, **options):
    return common.objectives.total_loss(config(**options), z, None, y, torch.arange(n)).item()


def test_every_loss_of_that_name_is_the_oracles():
    z = F.normalize(rows())
    y, a, b = LABELS.repeat(V), z.numpy(), LABELS.repeat(V).numpy()
    assert value(z, y, loss="supcon") == pytest.approx(ref.supcon_out(a, b, 0.3))
    assert value(z, y, loss="supcon-in") == pytest.approx(ref.supcon_in(a, b, 0.3))
    for name, loss in (("supcon", ref.supcon_out), ("supcon-in", ref.supcon_in)):
        for how in ({"denominator": "one_positive"}, {"denominator": "negatives"}, {"positives_cap": V}):
            assert value(z, y, loss=name, **how) == pytest.approx(loss(a, b, 0.3, **how, views=V))
            assert value(z, y, loss=name, **how) != pytest.approx(loss(a, b, 0.3))
    assert value(z, y, loss="simclr") == pytest.approx(ref.nt_xent(a, 0.3))
    for k in (1, 4, (n - 1) * V):
        hard, simple = value(z, y, loss="hard-contrastive", nearest=k), ref.simple_contrastive(a, 0.2, k=k)
        assert hard == pytest.approx(ref.hard_contrastive(a, 0.3, k))
        assert value(z, y, loss="simple-contrastive", nearest=k, lam=0.2) == pytest.approx(simple)
    for mining in ("semihard", "hard", "all"):
        assert value(z, y, loss="triplet", mining=mining) == pytest.approx(ref.triplet(a, b, 0.2, mining=mining))
        wide = value(z, y, loss="triplet", mining=mining, margin=0.7)
        assert wide == pytest.approx(ref.triplet(a, b, 0.7, mining=mining))
    assert value(z, y, loss="max-margin") == pytest.approx(ref.max_margin(a, b, 1.0))
    assert value(z, y, loss="max-margin", margin=1.5) == pytest.approx(ref.max_margin(a, b, 1.5))


def test_n_pair_takes_neighbours_as_pairs_a_group_of_classes_at_a_time_and_the_mean_squared_norm():
    z = rows(count=n)  # rows 2j and 2j + 1 are a pair; three pairs show three classes
    pairs = z.view(-1, 2, D).numpy()
    loss = sum(ref.n_pair(group[:, 0], group[:, 1]) for group in (pairs[:3], pairs[3:])) / 2
    assert value(z, LABELS, loss="n-pair", views=1) == pytest.approx(loss)
    assert value(z, LABELS, loss="n-pair", views=1, npair_l2=0.5) == pytest.approx(loss + 0.5 * (z**2).sum().item() / n)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_alone_and_beside_a_loss_is_smoothed(smoothing):
    z, logits, y = F.normalize(rows()), rows(1)[:, :3], LABELS.repeat(V)
    target = (1 - smoothing) * F.one_hot(y, 3) + smoothing / 3
    ce = -(target * logits.log_softmax(1)).sum(1).mean().item()
    total = lambda **o: common.objectives.total_loss(
        config(label_smoothing=smoothing, **o), z, logits, y, IMAGES
    ).item()
    assert total(loss="ce") == pytest.approx(ce)
    expected = 0.6 * 2 * ref.supcon_out(z.numpy(), y.numpy(), 0.3) + 0.4 * ce
    assert total(loss="supcon", loss_scale=2.0, ce_weight=0.4) == pytest.approx(expected)
    soft = 0.8 * F.one_hot(y, 3) + 0.2 * F.one_hot(y.roll(1), 3)
    mixed = common.objectives.total_loss(config(loss="ce"), z, logits, soft, torch.arange(n)).item()
    assert mixed == pytest.approx(-(soft * logits.log_softmax(1)).sum(1).mean().item())


def model_of(**options):
    defaults = {
        "seed": 0,
        "arch": "small",
        "stem": "3x3",
        "size": 32,
        "loss": "supcon",
        "projection": "r-7",
        "ce_weight": 0.0,
        "num_classes": 3,
        "normalize_encoder": False,
        "ce_detach": False,
    }
    return pretrain.build_model(SimpleNamespace(**defaults | options), None)


X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_features_of_every_loss_but_sohns_lie_on_the_sphere():
    for loss in common.objectives.OBJECTIVES:
        z, _ = model_of(loss=loss)(X)
        on_the_sphere = torch.isclose(z.norm(dim=1), torch.ones(6)).all()
        assert on_the_sphere == (loss != "n-pair") and z.shape == (6, 144 if loss == "ce" else 7)


def test_a_classifier_is_there_where_cross_entropy_is_and_scores_the_encoders_output_not_the_heads():
    assert model_of()(X)[1] is None and model_of(loss="ce").projection is None
    for options in ({"loss": "ce"}, {"ce_weight": 0.5}):
        model = model_of(**options).eval()
        torch.testing.assert_close(model(X)[1], model.classifier(model.encoder(X)))
        model = model_of(normalize_encoder=True, **options).eval()
        torch.testing.assert_close(model(X)[1], model.classifier(F.normalize(model.encoder(X))))


def test_the_projection_sees_the_encoders_output_as_it_is_or_brought_to_norm_1():
    model = model_of().eval()
    torch.testing.assert_close(model(X)[0], F.normalize(model.projection(model.encoder(X))))
    assert (model(X)[0] < 0).any()  # no ReLU at its end
    model = model_of(normalize_encoder=True).eval()
    torch.testing.assert_close(model(X)[0], F.normalize(model.projection(F.normalize(model.encoder(X)))))


def test_a_detached_classifier_leaves_the_encoder_to_the_loss():
    for detach in (True, False):
        model = model_of(ce_weight=0.5, ce_detach=detach)
        model(X)[1].sum().backward()
        assert all(w.grad is None for w in model.encoder.parameters()) == detach


def test_hidden_layers_are_as_wide_as_the_encoder_or_as_said():
    for hidden, expected in (("r", 144), (20, 20)):
        head = model_of(projection=f"{hidden}-{hidden}-7").projection
        widths = [layer.out_features for layer in head if isinstance(layer, torch.nn.Linear)]
        assert widths == [expected, expected, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "supcon"},
        {"loss": "simclr"},
        {"loss": "supcon", "ce_weight": 0.4},
        {"loss": "ce", "views": 1},
        {"loss": "supcon", "views": 3},
    ],
    ids=str,
)
def test_a_batch_in_parts_has_the_loss_features_and_gradients_of_the_whole(options):
    c = config(**options)
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 6)
    classifier = torch.nn.Linear(6, 3) if c.ce_weight or c.loss == "ce" else None
    model = common.models.Model(encoder, torch.nn.Linear(6, D), classifier).double()
    x = torch.randn(c.views, n, 4, dtype=torch.double)

    class Part:  # of the batch, as common.views.Batch
        def __init__(self, rows):
            self.rows, self.index = rows, torch.arange(n)[rows]

        def __len__(self):
            return len(self.index)

        def parts(self, size):
            return [Part(slice(i, i + size)) for i in range(0, n, size)]

        def views(self):
            return x[:, self.rows].flatten(0, 1), LABELS[self.rows].repeat(c.views)

    run = SimpleNamespace(
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        config=c,
        model=model,
        parallel=model,
        queue=None,
        contrasts=lambda: None,
        without_reduction=contextlib.nullcontext,
    )
    z, logits = model(x.flatten(0, 1))
    whole = common.objectives.total_loss(c, z, logits, LABELS.repeat(c.views), torch.arange(n))
    used = [w for w in model.parameters() if c.loss != "ce" or w.shape[0] != D]
    expected = torch.autograd.grad(whole, used)
    for size in (3, 4, 6):
        model.zero_grad()
        c.micro_batch = size
        loss, rows = pretrain.training_step(run, Part(slice(0, n)))
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        torch.testing.assert_close(rows, z.detach(), rtol=1e-12, atol=1e-12)
        for w, grad in zip(used, expected):
            torch.testing.assert_close(w.grad, grad, rtol=1e-10, atol=1e-12)


def test_the_floor_of_unequal_classes_is_the_mean_over_their_shares_and_of_balanced_batches_that_of_equal_ones():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3] * 3)  # class 2 has no image
    floor_of = lambda **o: common.objectives.collapse_and_floor(config(**o), labels)[1]
    apart = math.exp(-1.5 / 0.3)  # of 3 classes: (1 + 1/2)/tau
    of = lambda p: math.log(p + (24 - 1 - p) * apart)
    # 24 rows, of which the classes have 12, 6 and 6
    assert floor_of(loss="supcon") == pytest.approx((of(11) + of(5)) / 2)
    assert floor_of(loss="supcon", balanced=True) == pytest.approx(of(7))
    joined = [{"ce_weight": 0.1}, {"mix": "mixup"}, {"queue": 9}, {"denominator": "negatives"}, {"positives_cap": 2}]
    for options in ({"loss": "triplet"}, {"loss": "ce"}, *({"loss": "supcon"} | more for more in joined)):
        assert common.objectives.collapse_and_floor(config(**options), labels) == (None, None)


def test_running_statistics_stand_still_within_and_move_again_after():
    norm = torch.nn.BatchNorm1d(3)
    with common.models.still_statistics(norm):
        inside = norm(torch.arange(12.0).view(4, 3))
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.num_batches_tracked == 0
    # the batch's own statistics, as in training
    torch.testing.assert_close(inside, norm(torch.arange(12.0).view(4, 3)))
    assert norm.num_batches_tracked == 1 and norm.running_mean.tolist() != [0, 0, 0]


def test_a_smaller_last_group_of_pairs_weighs_as_its_pairs():
    f = torch.randn(5, 4, dtype=torch.double)
    first, last = (losses.n_pair(f[rows], 2 * f[rows]) for rows in (slice(0, 3), slice(3, 5)))
    assert torch.isclose(common.objectives.grouped_n_pair(f, 2 * f, 3), (3 * first + 2 * last) / 5)
