"""The numbers that a run logs and prints, against an oracle made of its checkpoint, its data and what its loss saw."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.data
import common.journal
import common.models
import common.objectives
import common.optim
import common.run_folder
import oracles
import pretrain
import reference_numpy as ref
from runs import SMALL, StandIn, log_of, same_bits, state_of

pytestmark = pytest.mark.seeds_torch
N, BATCH, EPOCHS, PEAK = 600, 60, 2, 0.05
STEPS = N // BATCH  # of an epoch
NUMBERS = {"--limit": N, "--batch": BATCH, "--epochs": EPOCHS, "--lr": PEAK}
OPTIONS = [*SMALL, "--precision", "float64", *(str(word) for pair in NUMBERS.items() for word in pair)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what was printed, [(z, loss) of every step], [rate of every step])."""
    folder, seen, rates, printed = tmp_path_factory.mktemp("log") / "run", [], [], []
    total_loss, make_optimizer = common.objectives.total_loss, common.optim.make_optimizer

    def noted(*arguments):
        loss = total_loss(*arguments)
        seen.append((arguments[1].detach().numpy(), loss.item()))
        return loss

    def watched(*arguments):
        optimizer = make_optimizer(*arguments)
        optimizer.register_step_pre_hook(lambda optimizer, *rest: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "total_loss", noted)
        patch.setattr(pretrain, "make_optimizer", watched)
        patch.setattr(common.journal, "say", lambda words, err=False: printed.append(words))
        pretrain.main([*OPTIONS, "--run-dir", str(folder)], standalone_mode=False)
    return folder, "\n".join(printed), seen, rates


def epochs_of(folder):
    return [line for line in log_of(folder) if "mean_loss" in line]


def steps_of(folder):
    return [line for line in log_of(folder) if "loss" in line]


def test_every_step_is_logged_with_its_loss_and_its_epoch(run):
    folder, _, seen, _ = run
    lines = steps_of(folder)
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * STEPS + 1))
    assert [line["epoch"] for line in lines] == [1] * STEPS + [2] * STEPS
    assert [line["loss"] for line in lines] == pytest.approx([loss for _, loss in seen], rel=1e-12)


def test_the_logged_rate_is_the_published_schedule_and_the_one_that_the_step_was_taken_with(run):
    folder, _, _, rates = run
    total, warm = EPOCHS * STEPS, EPOCHS * STEPS // 10
    cosine = [PEAK * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * k / total)) / 2) for k in range(total)]
    # before each step
    expected = [0.01 + (cosine[warm] - 0.01) * k / warm if k < warm else cosine[k] for k in range(total)]
    assert rates == pytest.approx(expected)
    assert [line["lr"] for line in steps_of(folder)] == rates


def test_the_mean_loss_is_the_mean_over_the_steps_of_its_epoch(run):
    folder, _, seen, _ = run
    means = [np.mean([loss for _, loss in seen[first : first + STEPS]]) for first in (0, STEPS)]
    assert [line["mean_loss"] for line in epochs_of(folder)] == pytest.approx(means, rel=1e-12)


def test_alignment_and_uniformity_are_the_oracles_of_the_last_batch(run):
    folder, _, seen, _ = run
    for line, (z, _) in zip(epochs_of(folder), seen[STEPS - 1 :: STEPS]):
        assert line["alignment"] == pytest.approx(ref.alignment(z), rel=1e-9)
        assert line["uniformity"] == pytest.approx(ref.uniformity(z), rel=1e-9)


def normalised(pixels, contents):
    return (pixels.double() / 255 - contents["mean"].double().view(3, 1, 1)) / contents["std"].double().view(3, 1, 1)


def test_neighbours_are_the_oracles_of_the_checkpoint_and_many(run):
    """A thirtieth of an epoch's views of the training set vote for a sixtieth of them of the test set; more would cost
    more than 2 % of the epoch, and far fewer would say nothing."""
    folder, _, _, _ = run
    contents = common.run_folder.load_checkpoint(folder / "ckpt.pt")
    encoder, _ = common.models.build_encoder("small", "3x3")
    encoder.double().load_state_dict(contents["encoder"])
    train, test = (common.data.load_data("shapes", None, train, size=16) for train in (True, False))
    bank, query = 2 * N // 30, 2 * N // 60
    with torch.no_grad():
        seen = (train.images[:bank], test.images[:query])
        r, r_test = (encoder.eval()(normalised(pixels, contents)).numpy() for pixels in seen)
    expected = oracles.knn_top1(r, train.labels[:bank].numpy(), r_test, test.labels[:query].numpy())
    assert epochs_of(folder)[-1]["knn_top1"] == pytest.approx(expected) and 0 < expected < 100


def test_what_is_printed_is_what_is_logged(run):
    folder, printed, _, _ = run
    for line in epochs_of(folder):
        for name in ("mean_loss", "alignment", "uniformity", "knn_top1"):
            assert f"{name} {line[name]:.4g}" in printed
    last = steps_of(folder)[-1]
    assert f"epoch 2/2 step 20/20  loss {last['loss']:.4f}  lr {last['lr']:.4g}" in printed


def test_images_are_normalised_by_their_own_mean_and_deviation(run):
    contents = common.run_folder.load_checkpoint(run[0] / "ckpt.pt")
    x = common.data.load_data("shapes", None, True, size=16, limit=N).images.double() / 255
    torch.testing.assert_close(contents["mean"].double(), x.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(contents["std"].double(), x.std((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_raw_features_are_measured_on_the_sphere():
    z = 30 * torch.randn(8, 3, generator=common.data.generator(0), dtype=torch.double)
    data = SimpleNamespace(labels=torch.arange(4) % 2)
    run_of = lambda views: SimpleNamespace(config=SimpleNamespace(views=views))
    found = pretrain.diagnose(run_of(2), z, data, None)
    unit = torch.nn.functional.normalize(z).numpy()
    assert found["alignment"] == pytest.approx(ref.alignment(unit))
    assert found["uniformity"] == pytest.approx(ref.uniformity(unit))
    assert "knn_top1" not in found  # without a test set
    assert "alignment" not in pretrain.diagnose(run_of(1), z, data, None)


def test_a_diagnosis_leaves_the_encoder_training_with_its_statistics():
    encoder, _ = common.models.build_encoder("small", "3x3")
    before = {name: entry.clone() for name, entry in encoder.state_dict().items()}
    common.models.features(encoder, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3), torch.ones(3))
    assert same_bits(before, encoder.state_dict()) and all(module.training for module in encoder.modules())
    common.models.features(encoder.eval(), torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3), torch.ones(3))
    assert not any(module.training for module in encoder.modules())


def test_a_run_that_goes_on_amid_an_epoch_logs_the_whole_epoch_and_all_its_seconds(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain.main([*SMALL, "--epochs", "1", "--save-minutes", "0", "--run-dir", str(whole)], standalone_mode=False)
    run.mkdir()
    for name in ("config.json", "log.jsonl"):
        (run / name).write_bytes((whole / name).read_bytes())
    amid = common.run_folder.load_checkpoint(whole / "ckpt-previous.pt")
    assert amid["step"] == 3
    torch.save(amid | {"seconds": 1000.0}, run / "ckpt.pt")
    pretrain.main(["--resume", str(run)], standalone_mode=False)
    assert log_of(run) == log_of(whole) and same_bits(state_of(run), state_of(whole))
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["seconds"] > 1000


def journal(folder, monkeypatch, steps, **options):
    """The log of so many steps of 50 images, each of which takes four minutes, and the steps at which it saves."""
    now, saved = [0.0], []
    monkeypatch.setattr(common.journal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    defaults = {"batch": 50, "epochs": 1, "save_minutes": 10, "log_every": 4, "tensorboard": False, "run": folder}
    config = SimpleNamespace(**defaults | options)
    contents = lambda losses, seconds: saved.append(len(losses)) or {"encoder": {}}
    run = StandIn(config=config, step=0, steps_per_epoch=100, total_steps=100, checkpoint=contents)
    journal = common.journal.Journal(run, 1, None, None, None)
    for run.step in range(1, steps + 1):
        now[0] += 240
        journal.note_step(run, torch.tensor(1.0), 0.1)
        journal.save_now_and_then(run, asked=False)
    journal.folder.close()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], saved[1:]


def test_a_checkpoint_is_saved_when_its_minutes_have_passed(tmp_path, monkeypatch):
    assert journal(tmp_path / "ten", monkeypatch, 9)[1] == [3, 6, 9]
    assert journal(tmp_path / "five", monkeypatch, 9, save_minutes=5)[1] == [2, 4, 6, 8]


def epochs_that_are_saved(folder, monkeypatch, *, epochs, epoch_takes, save_takes):
    """The epochs after which a run saves whose clock moves on by these seconds."""
    now, saved = [0.0], []
    monkeypatch.setattr(common.journal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    config = SimpleNamespace(batch=50, epochs=epochs, save_minutes=1e9, log_every=1, keep_every=None, tensorboard=False,
                             workers=0, run=folder)
    run = StandIn(config=config, step=0, steps_per_epoch=1, total_steps=epochs,
                          checkpoint=lambda losses, seconds: saved.append(run.step) or {"encoder": {}})
    journal = common.journal.Journal(run, 1, None, None, None)

    def write(*what):
        now[0] += save_takes

    monkeypatch.setattr(journal.folder, "_write", write)
    for run.step in range(1, epochs + 1):
        now[0] += epoch_takes
        journal.note_step(run, torch.tensor(1.0), 0.1)
        journal.note_epoch(run, {})
        journal.folder.wait()
    journal.close(run)
    return saved[1:]


def test_an_epoch_is_saved_while_saves_take_under_2_percent_of_the_time_and_the_last_one_always(tmp_path, monkeypatch):
    saves = lambda name, **seconds: epochs_that_are_saved(tmp_path / name, monkeypatch, **seconds)
    assert saves("long", epochs=5, epoch_takes=60, save_takes=1) == [1, 2, 3, 4, 5]
    # after k epochs of 10 s and s saves of 1 s: s < 0.02 (10 k + s), k > 4.9 s
    assert saves("short", epochs=18, epoch_takes=10, save_takes=1) == [1, 5, 10, 15, 18]
    assert saves("slow", epochs=9, epoch_takes=1, save_takes=10) == [1, 9]


def test_of_several_ranks_every_so_manieth_epoch_is_diagnosed_and_the_last_one():
    run_at = lambda step: SimpleNamespace(step=step, steps_per_epoch=4, total_steps=28, ends_epoch=step % 4 == 0)
    for world, epochs in (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (8, [7]):
        assert [step for step in range(1, 29) if pretrain.is_diagnosed(run_at(step), world)] == [4 * e for e in epochs]


def test_images_a_second_are_counted_over_the_epoch_and_logged_every_few_steps(tmp_path, monkeypatch):
    lines, _ = journal(tmp_path / "run", monkeypatch, 9)
    assert [line["step"] for line in lines] == [4, 8]
    assert all(line["images_per_s"] == round(50 / 240, 1) for line in lines)


def test_seconds_and_images_a_second_are_those_of_training_alone(tmp_path, monkeypatch):
    """An epoch of four steps of four minutes, a diagnosis of an hour, and an epoch of steps of two minutes."""
    now = [0.0]
    monkeypatch.setattr(common.journal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(common.journal, "describe_run", lambda *about: {})
    config = SimpleNamespace(batch=50, epochs=2, save_minutes=1e9, log_every=4, keep_every=None, tensorboard=False,
                             workers=0, run=tmp_path / "run")
    contents = lambda losses, seconds: {"encoder": {}}
    run = StandIn(config=config, step=0, steps_per_epoch=4, total_steps=8, checkpoint=contents)
    journal = common.journal.Journal(run, 1, None, None, None)
    for run.step in range(1, 9):
        now[0] += 240 if run.step <= 4 else 120
        journal.note_step(run, torch.tensor(1.0), 0.1)
        if run.step % 4 == 0:
            now[0] += 3600
            journal.note_epoch(run, {})
    journal.close(run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines if "loss" in line] == [round(50 / 240, 1), round(50 / 120, 1)]
    assert [line["seconds"] for line in lines if "mean_loss" in line] == [960, 1440]
