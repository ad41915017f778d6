"""The project on the imitated device: the values of the CPU, and how often a step waits for the device.

The scripts run there in one process, to whose end the tests of a group wait; each test then looks at its own part.
"""

import copy
import functools
import json
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import losses
import pretrain
from children import PROJECT, call
from runs import SMALL, train
from test_losses import rows_of
from test_strips import strips_of

# Of each configuration of pretrain.py, how often a step waits for the device, beside what it logs: twice at most. L_out
# and L_in wait once where they take strips, to look at the size of the scores; triplets of all negatives twice, to
# count the positives; the scaler of float16 once, to look for an overflow.
STEPS = {
    "": 1,
    "--micro-batch 8": 1,
    "--queue 64 --micro-batch 20": 1,
    "--loss supcon-in --queue 64 --optimizer rmsprop": 1,
    "--loss simclr --views 3": 1,
    "--positives-cap 2 --optimizer lars": 0,
    "--denominator one_positive --augment crop --ce-weight 0.5": 0,
    "--mix mixup --ce-weight 0.5 --optimizer lars": 1,
    "--mix cutmix --loss ce": 0,
    "--loss hard-contrastive": 0,
    "--loss simple-contrastive --normalize-encoder": 0,
    "--loss triplet": 0,
    "--loss triplet --mining hard": 0,
    "--loss triplet --mining all": 2,
    "--loss n-pair": 0,
    "--loss max-margin --balanced": 0,
    "--augment rand --workers 0": 1,
    "--size 66 --batch 12 --limit 24": 1,
    "--precision bfloat16": 1,
    "--precision float16": 2,
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return found_by(run_steps, tmp_path_factory)


@pytest.mark.parametrize("options", STEPS)
def test_a_step_has_the_losses_of_the_cpu_and_seldom_waits(options, steps):
    found = steps[options]
    assert "error" not in found, found["error"]
    tolerance = 2e-2 if "bfloat16" in options else 1e-4
    assert found["there"] == pytest.approx(found["here"], rel=tolerance, abs=tolerance)
    assert sum(found["waits"].values()) == STEPS[options], found["waits"]
    assert STEPS[options] <= 2


def test_the_page_shows_these_waits():
    shown = re.findall(r"^\| (none|`.*`) \| [-\d]+ \| (\d+) \|$", (PROJECT / "docs" / "scaling.md").read_text(), re.M)
    assert {options.strip("`"): int(waits) for options, waits in shown} == {"none": STEPS[""]} | {
        options: waits for options, waits in STEPS.items() if options}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return found_by(run_stages, tmp_path_factory)


@pytest.mark.parametrize("stage", ["a run that goes on", "probe", "SGD's probe", "robustness"])
def test_other_stages_have_the_numbers_of_the_cpu(stage, stages):
    here, there = stages[stage]
    assert len(here) > 20
    assert there == pytest.approx(here, rel=1e-3, abs=0.1)


def test_losses_and_gradients_are_those_of_the_cpu():
    call(compare_losses)


@pytest.mark.seeds_torch
@pytest.mark.parametrize("precision, fast", [("bfloat16", True), ("float32", False)])
def test_convolutions_are_fast_unless_float32_is_asked_for(precision, fast, tmp_path, monkeypatch):
    cudnn, step, seen = torch.backends.cudnn, pretrain.training_step, set()

    def training_step(*arguments):
        seen.add((cudnn.allow_tf32, cudnn.benchmark))
        return step(*arguments)

    monkeypatch.setattr(pretrain, "training_step", training_step)
    train(*SMALL, "--limit", 50, "--epochs", 1, "--precision", precision, "--run-dir", tmp_path / "run")
    assert seen == {(fast, fast)}


def test_an_encoder_fetches_images_without_a_wait():
    call(encode_images)


def test_ranks_wait_twice_for_the_loss_of_all_rows():
    """For the numbers of their rows, and for the size of the scores."""
    call(gather_rows, ranks=2)


def test_devices_that_mix_are_refused_and_waits_are_counted():
    call(meet_faults)


# ---------------------------------------------------------------- in processes of their own


def found_by(function, tmp_path_factory):
    folder = tmp_path_factory.mktemp(function.__name__)
    call(function, folder, timeout=300)
    return json.loads((folder / "found.json").read_text())


def draw_few_images_once():
    import common.data

    shapes = common.data.shapes
    common.data.shapes = functools.cache(lambda n, size, seed: shapes(min(n, 300), size, seed))


def run_steps(folder):
    import imitated_gpu

    draw_few_images_once()
    type_of = pretrain.type_of_autocast  # a CPU takes a second for two images in float16: their scaler runs without it
    pretrain.type_of_autocast = lambda precision, device: None if precision == "float16" else type_of(precision, device)
    losses.MATRIX, found = 16, {}  # strips already at these sizes
    for number, options in enumerate(STEPS):
        here, there = (folder / f"{place}{number}" for place in ("here", "there"))
        pretrain.main([*imitated_gpu.SMALL, *options.split(), "--device", "cpu", "--run-dir", str(here)],
                      standalone_mode=False)
        lines = [json.loads(line) for line in (here / "log.jsonl").read_text().splitlines()]
        found[options] = {"here": [line["loss"] for line in lines if "loss" in line]}
        try:
            values, waits = imitated_gpu.pretrain_there(options.split(), there)
            found[options] |= {"there": values, "waits": {", ".join(where): n for where, n in waits.items()}}
        except Exception as e:
            found[options]["error"] = f"{type(e).__name__}: {e}"
    (folder / "found.json").write_text(json.dumps(found))


def run_stages(folder):
    import common.optim
    import linear_probe
    import robustness
    from imitated_gpu import SMALL, run_there

    draw_few_images_once()
    common.optim.ITERATIONS = 3  # of L-BFGS
    found = {}
    for place in ("here", "there"):
        run = folder / place
        pretrain.main([*SMALL, "--queue", "64", "--device", "cpu", "--run-dir", str(run)], standalone_mode=False)
        for stage, script, options, report in (
            ("a run that goes on", pretrain, ["--resume", run, "--epochs", 2], "log.jsonl"),
            ("probe", linear_probe, [run, "--limit", 100, "--weight-decay", 0.001], "probe-first100.json"),
            ("SGD's probe", linear_probe, [run, "--limit", 90, "--epochs", 1, "--augment"], "probe-first90.json"),
            ("robustness", robustness, [run / "classifier-first100.pt", "--limit", 20], "robustness-first100*.json"),
        ):
            if place == "there":
                run_there(script, options)
            else:
                script.main([*map(str, options), "--device", "cpu"], standalone_mode=False)
            (report,) = run.glob(report)
            entries = report.read_text().splitlines() if report.suffix == ".jsonl" else [report.read_text()]
            found.setdefault(stage, []).append(numbers_of([json.loads(entry) for entry in entries]))
    (folder / "found.json").write_text(json.dumps(found))


def numbers_of(x):
    """All numbers in nested lists and dicts but those of the clock."""
    if isinstance(x, dict):
        return numbers_of([part for name, part in x.items() if "seconds" not in name and name != "images_per_s"])
    if isinstance(x, list):
        return [number for part in x for number in numbers_of(part)]
    return [x] if isinstance(x, (int, float)) else []


def losses_of(z, y, tau, soft, memory):
    """z (16, D) of two views, y (16,) or as probabilities `soft`, and memory, (features, labels) of other rows."""
    return {
        "L_out": losses.supcon_out(z, y),
        "L_in": losses.supcon_in(z, y, tau),
        "probabilities": losses.supcon_out(z, soft, tau),
        "probabilities, L_in": losses.supcon_in(z, soft),
        "another set": losses.supcon_against(z[2:7], y[2:7], z, y, tau, own=2),
        "a queue": losses.supcon_sharded(z, y, tau, queue=memory),
        "a queue, L_in": losses.supcon_sharded(z, y, queue=memory, variant="in"),
        "negatives": losses.supcon_out(z, y, denominator="negatives"),
        "a cap": losses.supcon_in(z, y, positives_cap=2),
        "NT-Xent": losses.nt_xent(z, tau),
        "N-pair": losses.n_pair(z[:8], z[8:]),
        "hard": losses.hard_contrastive(z, tau, 3),
        "simple": losses.simple_contrastive(z, 0.1, k=3),
        "triplets": losses.triplet(z, y),
        "all triplets": losses.triplet(z, y, mining="all", soft=True),
        "pairs": losses.max_margin(z, y),
        "uniformity": losses.uniformity(z),
        "alignment": losses.alignment(z),
        "tolerance": losses.tolerance(z, y),
        "the module": losses.SupConLoss()(z.unflatten(0, (2, -1)).transpose(0, 1), y[:8]),
    }


def values_and_gradients(z, y, tau, *others):
    z, tau = z.detach().requires_grad_(), tau.detach().requires_grad_()
    found = {}
    for name, value in losses_of(z, y, tau, *others).items():
        gradients = torch.autograd.grad(value, [z, tau], allow_unused=True)
        found[name] = [value.detach(), *(g for g in gradients if g is not None)]
    return found


def compare_losses():
    from imitated_gpu import DEVICE, imitated

    y, tau = torch.arange(8).repeat(2) % 3, torch.tensor(0.2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        memory = rows_of(5, 1, 4).to(dtype)
        given = [rows_of(8, 2, 4).to(dtype), y, tau, 0.8 * F.one_hot(y) + 0.1, memory, y[:5]]
        for form in ((None,), (5, True), (5, False), (5, False, False)):
            with strips_of(*form):
                expected = values_and_gradients(*given[:4], (memory, y[:5]))
                with imitated():
                    *there, rows, labels = (x.to(DEVICE) for x in given)
                    for autocast in (False, True):
                        with torch.autocast("gpu", torch.bfloat16, enabled=autocast):
                            found = values_and_gradients(*there, (rows, labels))
                        for name, numbers in found.items():
                            numbers = [x.cpu() for x in numbers]
                            torch.testing.assert_close(numbers, expected[name], msg=lambda m: f"{name}, {dtype}: {m}")


def encode_images():
    import imitated_gpu
    from common.frozen import Frozen
    from common.models import small_encoder

    images, third = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.full((3,), 1 / 3)
    here, config = small_encoder(), {"size": 16, "precision": "float32"}
    with imitated_gpu.imitated():
        there = Frozen(copy.deepcopy(here), third, third, config, imitated_gpu.DEVICE)
        imitated_gpu.waits.clear()
        r = there(images)
        assert imitated_gpu.waits.total() == 0
        torch.testing.assert_close(there(images.to(imitated_gpu.DEVICE)).cpu(), r.cpu())
    torch.testing.assert_close(r.held, Frozen(here, third, third, config, "cpu")(images))


def gather_rows():
    from imitated_gpu import DEVICE, imitated, waits

    dist.init_process_group("gloo")
    all_reduce, mine = dist.all_reduce, slice(5) if dist.get_rank() else slice(5, 16)
    dist.all_reduce = lambda x: all_reduce(getattr(x, "held", x))
    z, y = rows_of(8, 2, 4)[mine].requires_grad_(), (torch.arange(16) % 3)[mine]
    with strips_of(5):
        expected = losses.supcon_sharded(z, y)
        expected.backward()
        with imitated():
            there, labels = (x.detach().to(DEVICE) for x in (z, y))
            there.requires_grad_()
            waits.clear()
            value = losses.supcon_sharded(there, labels)
            value.backward()
            assert waits.total() == 2, waits
            torch.testing.assert_close(value.detach().cpu(), expected.detach())
    torch.testing.assert_close(there.grad.held, z.grad)
    dist.barrier()
    dist.destroy_process_group()


def meet_faults():
    import imitated_gpu
    from imitated_gpu import DEVICE

    with imitated_gpu.imitated():
        x = torch.ones(3).to(DEVICE)
        with pytest.raises(RuntimeError, match="on cpu"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="on cpu"):
            losses.supcon_out(torch.ones(4, 2).to(DEVICE), torch.arange(4))
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        assert imitated_gpu.waits.total() == 2
        assert x.sum().item() == 3 and imitated_gpu.waits.total() == 3
