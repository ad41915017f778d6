"""What must move from epoch to epoch, step to step, view to view, image to image and seed to seed does move; what must
stay (the same seed, a run that goes on, another number of ranks, parts or workers) stays, bit by bit."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.data
import common.frozen
import common.views
import linear_probe
import pretrain
import robustness

pytestmark = pytest.mark.seeds_torch
N, SIZE, BATCH, STEPS, V = 12, 32, 6, 2, 2  # an epoch has two steps
WAYS = {
    "on the device": {"augment": "sim"},
    "in workers": {"augment": "auto"},
    "in workers, colours on the device": {"augment": "stacked-rand"},
}
LABELS = torch.arange(N) % 3
PICTURE = (255 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))).to(torch.uint8)
ALIKE = common.data.Data(PICTURE.expand(N, 3, SIZE, SIZE), LABELS, ["a", "b", "c"])  # so that only the views can differ
ROWS = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1)
NUMBERED = ALIKE._replace(images=ROWS.expand(N, 3, SIZE, SIZE))  # an image is its row


def batches(data, first=0, rank=0, world=1, **options):
    """Of each step from the first one on (views (V, images of the rank, 3, H, W), their labels (V, ...))."""
    config = {
        "seed": 0,
        "views": V,
        "batch": BATCH,
        "size": SIZE,
        "augment": "sim",
        "crop_min": 0.2,
        "jitter": 0.5,
        "loss": "supcon",
        "balanced": False,
        "stream": False,
        "mix": None,
        "mix_alpha": 1.0,
        "num_classes": 3,
        "workers": 0,
    }
    config = SimpleNamespace(**config | {"epochs": 2, "micro_batch": None} | options)
    if config.stream:
        data = data._replace(files=data.images)  # read_image is the identity, see below
    ranks = SimpleNamespace(device=torch.device("cpu"), rank=rank, world=world)
    source = common.views.make_batches(config, data, ranks, torch.zeros(3), torch.ones(3), first)
    for batch in source:
        parts = [part.views() for part in batch.parts(config.micro_batch or len(batch))]
        yield [pretrain.join_parts(rows, V).unflatten(0, (V, -1)) for rows in zip(*parts)]


@pytest.fixture(autouse=True)
def files_are_images(monkeypatch):
    monkeypatch.setattr(common.views, "read_image", lambda image: image)


def views(*arguments, **options):
    return torch.stack([x for x, _ in batches(*arguments, **options)])  # (steps, V, images, 3, H, W)


def order(**options):
    """The rows that the steps show, (steps, images)."""
    return (255 * views(NUMBERED, augment="none", **options)[:, 0, :, 0, 0, 0]).round().long()


ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@ways
def test_no_two_views_of_a_picture_in_two_epochs_are_alike(way):
    shown = views(ALIKE, **way).flatten(0, 2)
    assert len(shown.unique(dim=0)) == 2 * STEPS * V * BATCH


@ways
def test_views_move_with_the_seed_and_stay_without(way):
    first, again, other = views(ALIKE, **way), views(ALIKE, **way), views(ALIKE, seed=1, **way)
    assert torch.equal(first, again)
    assert len(torch.cat([first, other]).flatten(0, 2).unique(dim=0)) == 2 * first.flatten(0, 2).shape[0]


@ways
def test_views_stay_in_a_run_that_goes_on_amid_an_epoch(way):
    whole = views(ALIKE, **way)
    for step in range(1, 2 * STEPS):
        assert torch.equal(views(ALIKE, step, **way), whole[step:])
    assert torch.equal(order(first=1), order()[1:])


@ways
def test_views_do_not_depend_on_ranks_and_parts(way):
    whole = views(ALIKE, **way)
    assert torch.equal(views(ALIKE, micro_batch=3, **way), whole)
    assert torch.equal(views(ALIKE, rank=1, world=3, **way), whole[:, :, 2:4])
    assert torch.equal(views(ALIKE, rank=1, world=3, micro_batch=1, **way), whole[:, :, 2:4])


def test_views_do_not_depend_on_the_number_of_workers():
    none, two = (views(ALIKE, 1, augment="auto", workers=workers) for workers in (0, 2))
    assert torch.equal(none, two)


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"loss": "n-pair"}], ids=["shuffled", "balanced", "pairs"])
def test_the_order_of_the_images_moves_with_epoch_and_seed(options):
    first, second = order(**options).view(2, N)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(N))  # an epoch shows every image once
    assert not torch.equal(first, second)
    assert not torch.equal(order(seed=1, **options).view(2, N)[0], first)


@pytest.mark.parametrize("ordered", [common.views.shuffled_balanced, common.views.shuffled_pairs])
def test_the_order_of_the_classes_moves_too(ordered):
    labels = torch.arange(5).repeat(4)
    first = {labels[ordered(labels, common.data.generator(0, epoch))[0]].item() for epoch in range(40)}
    assert first == set(range(5))


def test_labels_go_with_their_images():
    for x, y in batches(NUMBERED, augment="none"):
        assert torch.equal(LABELS[(255 * x[:, :, 0, 0, 0]).round().long()], y)


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixing_moves_with_epoch_step_view_and_seed(how):
    pure = torch.eye(3)
    shares = []
    for seed in (0, 0, 1):
        for _, y in batches(NUMBERED, augment="none", mix=how, seed=seed):  # of neighbours of two classes
            mixed = [[row for row in rows if not any(torch.equal(row, one) for one in pure)] for rows in y]
            shares.append([round(max(rows[0].tolist()), 6) if rows else 1.0 for rows in mixed])
    a, again, other = shares[:4], shares[4:8], shares[8:]
    assert a == again
    assert len({share for step in a + other for share in step}) > (12 if how == "mixup" else 8)  # of 16 draws


def test_a_probes_augmented_views_move_from_epoch_to_epoch_and_with_the_seed(trained, monkeypatch):
    class Seen(Exception):
        pass

    def probe(r, labels, num_classes, cells, fit, augmented):
        raise Seen(augmented(0), augmented(1), augmented(0))

    monkeypatch.setattr(linear_probe, "probe", probe)
    seen = []
    for seed in "01":
        with pytest.raises(Seen) as caught:
            linear_probe.main([str(trained), "--augment", "--limit", "20", "--seed", seed], standalone_mode=False)
        seen.append(caught.value.args)
    (first, second, again), (other, _, _) = seen
    assert torch.equal(first, again)
    for a, b in itertools.combinations((first, second, other), 2):
        assert not torch.isclose(a, b).all(1).any()


def test_augmented_images_of_a_probe_each_have_a_view_of_their_own():
    config = {"size": SIZE, "precision": "float32", "crop_min": 0.2}
    frozen = common.frozen.Frozen(torch.nn.Flatten(), torch.zeros(3), torch.ones(3), config, torch.device("cpu"))
    # three batches of images
    shown = [common.frozen.extract(frozen, ALIKE, key=(0, 6, epoch), batch=4) for epoch in range(2)]
    assert len(torch.cat(shown).unique(dim=0)) == 2 * N


def test_noise_of_corruptions_moves_with_image_severity_name_and_seed(monkeypatch):
    """As many images as are corrupted at a time, twice, all alike: each has noise of its own."""
    grey = torch.full((1000, 3, 9, 9), 128, dtype=torch.uint8)
    test = common.data.Data(grey, torch.zeros(1000, dtype=torch.long), ["a", "b"])
    corrupted, streams = robustness.corrupt, []
    monkeypatch.setattr(robustness, "corrupt", lambda *a: streams.append(a[3].initial_seed()) or corrupted(*a))

    def signs(name, severity, seed=0):
        made = torch.cat([x for x, _ in robustness.Made(test, seed, True).batches(name, severity)])
        return (made > 128).flatten(1)

    first, again, other = signs("gaussian_noise", 5), signs("gaussian_noise", 5), signs("gaussian_noise", 4)
    assert torch.equal(first, again) and len(torch.cat([first, other]).unique(dim=0)) == 2000
    streams.clear()
    for name in ("gaussian_noise", "impulse_noise"):
        for severity in range(1, 6):
            for seed in range(2):
                signs(name, severity, seed)
    assert len(set(streams)) == 2 * 5 * 2 * 2


def test_first_weights_move_with_the_seed_and_stay_without():
    def weights(seed):
        config = SimpleNamespace(
            seed=seed,
            arch="small",
            stem="3x3",
            size=16,
            loss="supcon",
            projection="r-8",
            ce_weight=0.5,
            num_classes=3,
            normalize_encoder=False,
            ce_detach=False,
        )
        return {name: w for name, w in pretrain.build_model(config, None).named_parameters() if w.ndim > 1}

    first, again, other = weights(0), weights(0), weights(1)
    for name, w in first.items():
        assert torch.equal(w, again[name]) and not torch.isclose(w, other[name]).any(1).all()


def test_keys_that_differ_anywhere_have_streams_of_their_own():
    """Short keys are not longer ones with zeros, a large number is not two small ones, and a use is not another."""
    keys = [key for length in (1, 2, 3, 4, 5) for key in itertools.product((0, 1, 2), repeat=length)]
    keys += [(2**32, 1), (1, 2**32), (2**32 + 1,), (2**63 - 1,)]
    keys += [("order",), ("order", 0), ("order", 0, 0), ("views", 0)]
    streams = {tuple(torch.rand(4, generator=common.data.generator(*key), dtype=torch.double).tolist()) for key in keys}
    assert len(streams) == len(keys)


def test_streams_whose_32_bit_seeds_agree_differ():
    """torch's generator on a CPU forgets the upper half of a seed: among 200,000 keys some pairs share the lower."""
    lower = {}
    for k in range(200_000):
        word = int(np.random.SeedSequence([2, k, 0, 0, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1)) % 2**32
        lower.setdefault(word, []).append(k)
    pair = next(ks for ks in lower.values() if len(ks) > 1)
    first, second = (common.data.generator(k, 0) for k in pair)
    assert first.initial_seed() % 2**32 == second.initial_seed() % 2**32
    assert not torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_a_stream_is_equally_distributed_in_its_first_numbers():
    first = torch.stack([torch.rand(2, generator=common.data.generator("views", k)) for k in range(4000)])
    assert (first.mean(0) - 0.5).abs().max() < 0.02 and first.T.corrcoef()[0, 1].abs() < 0.06


@ways
def test_views_are_cropped_as_much_as_they_are_asked_to(way):
    assert not torch.equal(views(ALIKE, **way, crop_min=0.9), views(ALIKE, **way, crop_min=0.2))


def test_colours_are_changed_as_much_as_they_are_asked_to():
    assert not torch.equal(views(ALIKE, jitter=0.1), views(ALIKE, jitter=0.5))


def test_what_workers_have_cropped_is_not_cropped_again(monkeypatch):
    made = common.views.Batch
    boxes = []
    monkeypatch.setattr(common.views, "Batch", lambda *args: boxes.extend(d.box for d in args[5]) or made(*args))
    list(batches(ALIKE, stream=True))
    assert boxes and (torch.cat(boxes) == torch.tensor([0.0, 0.0, SIZE, SIZE])).all()


def test_each_part_of_a_batch_is_mixed_by_a_share_of_its_own():
    config = SimpleNamespace(seed=0, views=1, batch=8, size=8, augment="none", crop_min=0.2, jitter=0.5, loss="supcon",
                             balanced=False, stream=False, mix="mixup", mix_alpha=1.0, num_classes=2, epochs=1)
    data = common.data.Data(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2, ["a", "b"])
    ranks = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
    (batch,) = common.views.make_batches(config, data, ranks, torch.zeros(3), torch.ones(3), 0)
    shares = []
    for part in batch.parts(4):
        part.labels = torch.tensor([0, 1, 0, 1])
        _, mixed = part.views()
        shares.append(mixed[0].max())
    assert shares[0] != shares[1]
