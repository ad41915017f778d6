"""The experiments: each at its smallest scale, what goes on after a kill, and when a claim is held."""

import importlib
import importlib.util
import json
import math
import os
import shlex
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cells
import common.cli
import common.config
import common.data
import common.models
import gradient_anatomy
import linear_probe
import pretrain
import report
import robustness_and_calibration
import stability
import temperature
from cells import Cell, Experiment, Scale, is_above, training_words
from children import Launch
from runs import folder_of

pytestmark = pytest.mark.seeds_torch
EXPERIMENTS = {name: importlib.import_module(name).EXPERIMENT for name in report.NAMES}


# ---------------------------------------------------------------- what is found


def accuracies(*numbers):
    return [{"top1": number} for number in numbers]


def test_a_claim_is_held_where_the_interval_of_the_difference_is_above_zero():
    # variances 1 and 1, three seeds each: 2.776 standard errors are 2.776 (1/3 + 1/3)^(1/2) = 2.27
    low = accuracies(9, 10, 11)
    assert is_above(accuracies(11.3, 12.3, 13.3), low) == "held"
    assert is_above(low, accuracies(11.3, 12.3, 13.3)) == "not held"
    assert is_above(accuracies(11.2, 12.2, 13.2), low) == is_above(low, accuracies(11.2, 12.2, 13.2)) == "undecided"
    assert is_above(accuracies(99), low) == is_above(low, accuracies(99)) == "undecided"  # one seed has no spread
    # two seeds each: 4.303 (0.005/2 + 0.005/2)^(1/2) = 0.30
    assert is_above([{"ece": 1.4}, {"ece": 1.5}], [{"ece": 1}, {"ece": 1.1}], "ece") == "held"
    assert is_above([{"ece": 1.2}, {"ece": 1.3}], [{"ece": 1}, {"ece": 1.1}], "ece") == "undecided"


@pytest.mark.parametrize("seeds", [(2, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("deviations", [(1, 1), (1, 0.1), (1, 0)])
def test_equal_means_are_seldom_decided(seeds, deviations):
    """In about 5 % of the draws; for two or three seeds whose deviations differ, Welch's test comes to 8 %."""
    draws = np.random.default_rng(0).standard_normal((4000, sum(seeds)))
    sides = [(accuracies(*deviations[0] * x[: seeds[0]]), accuracies(*deviations[1] * x[seeds[0] :])) for x in draws]
    assert sum(is_above(a, b) != "undecided" for a, b in sides) < 0.09 * 4000


def test_lr_batch_and_views_multiply_the_scales():
    scale = Scale("", 128, 0.2, 4, "", 3)
    of = lambda words: pretrain.main.make_context("pretrain", shlex.split(words)).params
    names = "loss", "views", "epochs", "batch", "lr"
    values = lambda **more: tuple(of(training_words(scale, "ce", **more))[name] for name in names)
    assert values() == ("ce", 2, 4, 128, 0.2)
    assert values(views=1, lr=0.5) == ("ce", 1, 8, 128, 0.1)  # the same number of views
    assert values(times=0.25, batch=2) == ("ce", 2, 1, 256, 0.2)


def test_entropy_of_equal_weights_is_1_and_of_a_nearest_negative_alone_is_0():
    spread_out = torch.eye(5)
    assert temperature.entropy_of_weights(spread_out, 0.1) == pytest.approx(1)
    assert temperature.entropy_of_weights(spread_out, 0.1, 0.5) == pytest.approx(math.log(2) / math.log(4))
    pairs = torch.eye(3).repeat(2, 1)
    assert temperature.entropy_of_weights(pairs, 0.01) == pytest.approx(0, abs=1e-6)
    assert temperature.entropy_of_weights(pairs, None) == pytest.approx(1)


def test_a_deviation_is_given_in_parts_of_the_mean_error():
    assert stability.relative_deviation([80, 90]) == pytest.approx(50**0.5 / 15)
    assert stability.relative_deviation([97.5, 98.5]) == pytest.approx(0.5**0.5 / 2)


def test_a_seed_whose_settings_are_not_all_run_has_no_deviation():
    run = lambda seed, top1: {"seed": seed, "top1": top1}
    found = {"SupCon, a": [run(0, 80), run(1, 50)], "SupCon, b": [run(0, 90)], "cross-entropy, a": [run(1, 10)]}
    assert stability.by_seed(found, "SupCon") == [{"deviation": 50**0.5, "relative": pytest.approx(50**0.5 / 15)}]


def test_beside_supcon_stands_the_cross_entropy_of_the_nearest_clean_accuracy():
    accuracy = {"SupCon": (80, 82), "cross-entropy, 1 x": (85, 86), "cross-entropy, 0.5 x": (79, 82)}
    found = {name: [{"clean_accuracy": value} for value in seeds] for name, seeds in accuracy.items()}
    assert robustness_and_calibration.nearest_to_supcon(found) == "cross-entropy, 0.5 x"
    assert robustness_and_calibration.nearest_to_supcon({"SupCon": found["SupCon"]}) is None


def test_what_rows_contribute_to_a_gradient_has_the_norms_of_the_closed_form():
    z, y = F.normalize(torch.randn(12, 6, dtype=torch.double)), torch.arange(12) % 3
    for variant in ("out", "in"):
        for i in range(3):
            s, p = gradient_anatomy.rows_of(z, y, i)
            norms = gradient_anatomy.closed_form(s, p, gradient_anatomy.sums_of(s, p, 0.2), 0.2, variant)
            torch.testing.assert_close(gradient_anatomy.measured(z, y, i, 0.2, variant), norms)
            assert p.sum() == 3 and len(s) == 11


# ---------------------------------------------------------------- stopped, and started again


def two_cells(scale):
    words = {"a": training_words(scale, "supcon", times=3), "b": training_words(scale, "ce", views=1, times=3)}
    return {name: Cell(train) for name, train in words.items()}


TWO = Experiment("two", "two cells", two_cells, None, None, None)


def run_two(folder):
    cells.run_all(TWO, "smoke", (), "", folder, folder / "runs", "--save-minutes 0")


def run_two_until(folder, step, number):
    """Sends this process a signal in a step, which is counted over both cells."""
    plain, taken = pretrain.training_step, []

    def counted(run, batch):
        taken.append(run.step)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return plain(run, batch)

    pretrain.training_step = counted
    run_two(folder)


def lines_of(folder):
    """The results, but for the commit that they name: it may change while the tests run."""
    results = cells.read(folder / "two-smoke.jsonl")
    return [{key: value for key, value in result.items() if key != "place"} for result in results]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_two(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to stop"])
def test_an_experiment_goes_on_where_it_was(number, undisturbed, tmp_path, monkeypatch):
    stopped = Launch(run_two_until, (tmp_path, 12 + 7, number)).wait()  # 3 epochs of 4 steps in a, 6 in b
    assert stopped.status != 0 and len(lines_of(tmp_path)) == 1
    steps, plain = [], pretrain.training_step
    monkeypatch.setattr(pretrain, "training_step", lambda run, batch: steps.append(run.step) or plain(run, batch))
    run_two(tmp_path)
    assert steps[-1] == 23 and steps == list(range(steps[0], 24))
    assert steps[0] in (5, 6, 7)  # the last checkpoint may have been under way
    assert lines_of(tmp_path) == lines_of(undisturbed)


def test_what_is_trained_is_probed_and_what_has_its_result_is_left_alone(undisturbed, tmp_path, monkeypatch):
    before = lines_of(undisturbed)
    words = []
    plain = cells.command
    monkeypatch.setattr(cells, "command", lambda stage, line: words.append(stage.__name__) or plain(stage, line))
    run_two(undisturbed)
    assert not words and lines_of(undisturbed) == before
    path = undisturbed / "two-smoke.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, second[:100]]))
    assert [result["cell"] for result in cells.read(path)] == ["a"]
    run_two(undisturbed)
    assert words == ["linear_probe"] and lines_of(undisturbed) == before


def test_experiments_with_the_same_training_share_it_and_each_reads_its_images_once(tmp_path, monkeypatch):
    trained_in, read, load = [], [], common.data.load_data
    plain = cells.train_run
    noted = lambda *words, **more: read.append((words, *more.items())) or load(*words, **more)
    monkeypatch.setattr(common.data, "load_data", noted)
    monkeypatch.setattr(cells, "train_run", lambda words, folder: trained_in.append(folder) or plain(words, folder))
    top1 = []
    for name in ("one", "other"):
        twice = TWO._replace(name=name, cells=lambda scale: {key: two_cells(scale)["a"] for key in "ab"})
        read.clear()
        cells.run_all(twice, "smoke", (), "", tmp_path, tmp_path / "runs", "")
        top1 += cells.values(cells.read(tmp_path / f"{name}-smoke.jsonl"), "top1")
        assert len(read) == len(set(read)) > 0
    assert len(trained_in) == 4 and len(set(trained_in)) == 1
    assert len(set(top1)) == 1


def test_a_probe_draws_its_subset_by_the_seed_of_its_training(tmp_path, monkeypatch):
    half = Cell("--loss ce --epochs 1 --batch 8 --subset 0.5", "--subset 0.5")
    one = TWO._replace(cells=lambda scale: {"half": half})
    monkeypatch.setitem(cells.SCALES, "smoke", cells.SCALES["smoke"]._replace(seeds=2))
    cells.run_all(one, "smoke", (1,), "", tmp_path, tmp_path / "runs", "")
    (probed,) = tmp_path.glob("runs/smoke/*/probe-0.5.json")
    assert json.loads(probed.read_text())["fit"]["seed"] == 1


def test_further_words_make_a_training_of_its_own_and_do_not_mix_with_other_results(tmp_path):
    for folder, more in (("plain", ""), ("larger", "--size 16")):
        cells.run_all(TWO, "smoke", (), "a", tmp_path / folder, tmp_path / "runs", more)
    sizes = [json.loads(path.read_text())["options"]["size"] for path in tmp_path.glob("runs/smoke/*/config.json")]
    assert sorted(sizes) == [12, 16]
    for only in "ab":  # the cell b has no result yet
        with pytest.raises(common.cli.Refused, match="holds the cell a, seed 0, of another training"):
            cells.run_all(TWO, "smoke", (), only, tmp_path / "plain", tmp_path / "runs", "--size 16")


@pytest.mark.parametrize("seeds, only", [((7,), ""), ((), "no such cell")])
def test_an_experiment_without_such_a_cell_says_which_it_has(seeds, only, tmp_path):
    with pytest.raises(common.cli.Refused, match="its cells are a, b, with up to 1 seeds"):
        cells.run_all(TWO, "smoke", seeds, only, tmp_path, tmp_path / "runs", "")


def test_labels_of_a_test_set_that_lacks_a_class_are_places_among_the_classes_of_the_run(tmp_path):
    folder_of(tmp_path, ["train"], ["a", "b", "c"])
    folder_of(tmp_path, ["test"], ["b", "c"])
    config = {"dataset": "folder", "data": str(tmp_path), "size": 8, "crop_min": 0.2, "seed": 0}
    contents = {"config": config, "classes": ["a", "b", "c"], "mean": torch.zeros(3), "std": torch.ones(3)}
    _, labels = cells.views_of_test_images(contents, None, "none", 1)
    assert sorted(set(labels.tolist())) == [1, 2]


def test_of_a_training_that_diverged_the_last_good_checkpoint_is_probed(tmp_path):
    rates = {"wild": 1e10, "tame": 1}
    of_rates = lambda scale: {name: Cell(training_words(scale, "ce", lr=lr)) for name, lr in rates.items()}
    wild = TWO._replace(cells=of_rates)
    cells.run_all(wild, "smoke", (), "", tmp_path, tmp_path / "runs", "")
    results = cells.read(tmp_path / "two-smoke.jsonl")
    assert [(result["cell"], result["diverged"]) for result in results] == [("wild", True), ("tame", False)]


def test_a_model_of_a_run_is_the_trained_one_or_the_one_it_began_as(undisturbed):
    (run,) = undisturbed.glob("runs/smoke/*supcon*-s0")
    (one, contents), (other, _) = cells.model_of(run), cells.model_of(run, trained=False)
    assert all(torch.equal(v, contents["encoder"][k]) for k, v in one.encoder.state_dict().items())
    began = pretrain.build_model(SimpleNamespace(**contents["config"]), None)
    assert all(torch.equal(v, began.state_dict()[k]) for k, v in other.state_dict().items())
    assert not torch.equal(one.projection[0].weight, other.projection[0].weight)


# ---------------------------------------------------------------- all of them

RUN = {  # of each experiment, cells that differ in kind
    "losses_compared": ["SupCon, L_out", "cross-entropy", "SupCon + cross-entropy", "NT-Xent", "N-pair",
                        "cross-entropy, CutMix"],
    "supcon_against_cross_entropy": ["search: SupCon, 3 views", "search: cross-entropy, lr x 0.5",
                                     "SupCon, 1 view, 1 x", "cross-entropy, lr x 1, 4 x"],
    "stability": ["SupCon, as it is", "cross-entropy, as it is", "SupCon, colours and blur", "cross-entropy, LARS",
                  "SupCon, RMSProp", "SupCon, rate x 10"],
    "temperature": ["NT-Xent, tau 0.07", "hard, tau 1", "simple", "hard simple"],
    "batch_and_positives": ["as it is", "batch x 0.25", "batch x 4", "cap 0", "cap 8", "a queue", "in parts"],
    "label_noise": ["SupCon, 0 % wrong", "SupCon, 80 % wrong", "cross-entropy, 80 % wrong"],
    "robustness_and_calibration": ["SupCon", "cross-entropy, 1 x"],
    "few_labels": ["SupCon", "cross-entropy of 10 %"],
    "gradient_anatomy": ["SupCon"],
}


def numbers_in(value):
    """Every number of a result, however deep."""
    if isinstance(value, (list, dict)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_is_reported(name, tmp_path):
    whole = EXPERIMENTS[name]
    experiment = whole._replace(cells=lambda scale: {cell: whole.cells(scale)[cell] for cell in RUN[name]})
    cells.run_all(experiment, "smoke", (), "", tmp_path, tmp_path / "runs", "")
    results = cells.read(tmp_path / f"{name}-smoke.jsonl")
    assert [result["cell"] for result in results] == RUN[name]
    for result in results:
        assert numbers_in(result) and all(map(math.isfinite, numbers_in(result))) and 0 <= result["top1"] <= 100
    found = cells.by_cell(results)
    head, rows = experiment.table(found)
    assert rows and {len(row) for row in rows} == {len(head)}
    words = {"held", "not held", "undecided", "held (one seed)", "not held (one seed)"}
    assert {claim.held for claim in experiment.claims(found)} <= words
    if importlib.util.find_spec("matplotlib"):
        cells.write_report(experiment, "smoke", tmp_path)
        assert (tmp_path / f"{name}-smoke.png").stat().st_size > 10_000
        assert experiment.title in (tmp_path / f"{name}-smoke.md").read_text()


@pytest.mark.parametrize("scale", cells.SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_words_of_every_cell_are_a_command_line(name, scale):
    made = EXPERIMENTS[name].cells(cells.SCALES[scale])
    assert set(RUN[name]) <= set(made)
    for cell in made.values():
        words = shlex.split(f"{cells.SCALES[scale].train} {cell.train} --seed 0")
        context = pretrain.main.make_context("pretrain", words)
        options = {k: v for k, v in context.params.items() if k != "resume"}
        config, _ = common.config.read(context, None, options)
        common.config.complete(config, 1)
        linear_probe.main.make_context("probe", shlex.split(f"folder {cells.SCALES[scale].probe} {cell.probe}"))


def test_the_spread_of_seeds_is_their_sample_deviation():
    assert cells.spread([{"top1": 1.0}, {"top1": 3.0}]) == "2.0 ± 1.4"
    assert cells.spread([{"top1": 1.0}]) == "1.0"


def test_half_an_interval_is_students():
    """Any table of Student's t has these, two-sided, at 95 %."""
    table = [12.706, 4.303, 3.182, 2.776, 2.776]
    assert [cells.standard_errors(freedom) for freedom in (1, 2, 3, 4, 99)] == pytest.approx(table)


def test_a_classifier_is_tested_with_the_statistics_of_its_training(monkeypatch):
    norm = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(2))
    model = common.models.Model(norm, None, torch.nn.Identity(), unit=False)
    x = torch.tensor([[5.0, 4.0], [9.0, 4.0]])  # both of class 0, and one of each with the statistics of these two
    monkeypatch.setattr(cells, "model_of", lambda folder: (model, None))
    monkeypatch.setattr(cells, "views_of_test_images", lambda *arguments: (x, torch.tensor([0, 0])))
    assert cells.classifier_top1(None) == 100
