"""Whole runs of the two scripts: exact resume, two ranks as one process, a probe that leaves the encoder alone, bad input."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import images
import linear_probe
import pretrain

PROJECT = Path(__file__).resolve().parent.parent
SMALL = ["--dataset", "shapes", "--size", "16", "--limit", "200", "--batch", "50", "--epochs", "4", "--log-every", "1", "--device", "cpu"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, env=ONE_THREAD, capture_output=True, text=True, timeout=300, **options)


def log_of(run):
    """The log without its clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "images_per_s"} for line in lines]


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def checkpoint_of(run):
    contents = pretrain.load_checkpoint(run / "ckpt.pt")
    return {k: v for k, v in contents.items() if k not in ("seconds", "config")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = python("pretrain.py", *SMALL, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_unbroken_one(trained, tmp_path):
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "pretrain.py", *SMALL, "--run-dir", run], cwd=PROJECT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (run / "ckpt.pt").exists():
        assert process.poll() is None and not time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pretrain.load_checkpoint(run / "ckpt.pt")["step"] < 16
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 999, "loss": 0.0}\n{"step": 9')  # what a kill leaves behind
    done = python("pretrain.py", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert log_of(run) == log_of(trained)
    assert same_bits(checkpoint_of(run), checkpoint_of(trained))


def test_resume_may_extend_a_run_but_not_change_its_recipe(trained, tmp_path):
    run = tmp_path / "extended"
    done = python("pretrain.py", *SMALL, "--epochs", "1", "--schedule", "constant", "--warmup", "0", "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert python("pretrain.py", "--resume", run, "--epochs", "2").returncode == 0
    assert log_of(run)[-1]["epoch"] == 2
    refused = python("pretrain.py", "--resume", run, "--tau", "0.2", "--batch", "20")
    assert refused.returncode == 2 and "--batch, --tau" in refused.stderr
    assert log_of(run)[-1]["epoch"] == 2


RANKS = '''
import sys, torch, pretrain
make = pretrain.build_encoder
def frozen_statistics(*arguments):
    encoder, width = make(*arguments)
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return encoder, width
pretrain.build_encoder = frozen_statistics
pretrain.run_command(pretrain.main)
'''


@pytest.mark.parametrize("ranks, other", [(2, []), (1, ["--micro-batch", "4"]), (2, ["--micro-batch", "2"])], ids=["ranks", "parts", "both"])
@pytest.mark.parametrize("loss", [
    ["--loss", "supcon", "--ce-weight", "0.3"],
    ["--loss", "n-pair", "--lr", "0.001"],
    ["--loss", "triplet", "--mining", "hard"],
    ["--loss", "simclr", "--augment", "stacked-rand"],
    ["--loss", "ce"],
], ids=lambda loss: loss[1])
def test_ranks_and_parts_take_the_steps_of_one_process(loss, ranks, other, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    options = [*SMALL, "--limit", "64", "--batch", "16", "--epochs", "2", "--precision", "float64", "--lr", "0.01", *loss]
    environment = {"env": ONE_THREAD | {"PYTHONPATH": str(PROJECT)}, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    one = subprocess.run([sys.executable, script, *options, "--run-dir", "one"], **environment)
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    two = subprocess.run([*torchrun, script, *options, *other, "--run-dir", "two"], **environment)
    assert two.returncode == 0, two.stderr
    a, b = ([line["loss"] for line in log_of(tmp_path / run) if "loss" in line] for run in ("one", "two"))
    assert len(a) == 8 and len(set(a)) == 8
    assert a == pytest.approx(b, rel=1e-10, abs=1e-10)


def test_of_the_two_passes_over_a_part_one_moves_the_running_statistics(tmp_path):
    run = tmp_path / "run"
    pretrain.main([*SMALL, "--epochs", "1", "--micro-batch", "10", "--run-dir", str(run)], standalone_mode=False)
    encoder = checkpoint_of(run)["encoder"]
    assert {int(v) for k, v in encoder.items() if k.endswith("num_batches_tracked")} == {4 * 5}


@pytest.mark.parametrize("loss", list(pretrain.RECIPES))
def test_every_loss_trains_and_its_checkpoint_is_probed(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = pretrain.main([*SMALL, "--epochs", "1", "--loss", loss], standalone_mode=False)
    run = tmp_path / f"runs/shapes-small-{loss}-s0"
    assert {line["step"] for line in log_of(run)} == {1, 2, 3, 4}
    last = log_of(run)[-1]
    assert last["uniformity"] <= 0 and 0 <= last["knn_top1"] <= 100
    result = linear_probe.main([str(run / "ckpt.pt"), "--limit", "200", "--epochs", "2"], standalone_mode=False)
    assert result["top1"] <= result["top5"] <= 100


def test_a_probe_leaves_the_checkpoint_and_the_encoder_as_they_were(trained):
    before = (trained / "ckpt.pt").read_bytes()
    frozen = linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    bits = linear_probe.fingerprint(frozen.encoder)
    result = linear_probe.main([str(trained / "ckpt.pt"), "--limit", "300", "--epochs", "3", "--baselines"], standalone_mode=False)
    assert (trained / "ckpt.pt").read_bytes() == before
    assert linear_probe.fingerprint(linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu")).encoder) == bits
    assert json.loads((trained / "probe.json").read_text())["top1"] == result["top1"]
    assert {"raw_pixels_top1", "untrained_encoder_top1"} <= result.keys()
    frozen.encoder.train()(torch.rand(2, 3, 16, 16))
    assert linear_probe.fingerprint(frozen.encoder) != bits  # batch-norm statistics count


def test_the_saved_classifier_gives_the_reported_accuracy(trained):
    result = linear_probe.main([str(trained / "ckpt.pt"), "--limit", "300", "--epochs", "3"], standalone_mode=False)
    saved = torch.load(trained / "classifier.pt", weights_only=True)
    frozen = linear_probe.load_encoder(trained / "ckpt.pt", torch.device("cpu"))
    test = images.load_data("shapes", None, False, size=16)
    r = pretrain.features(frozen.encoder, test.images, frozen.mean, frozen.std, frozen.autocast)
    scores = r @ saved["weight"].T + saved["bias"]
    assert linear_probe.topk(scores, test.labels, 1) == pytest.approx(result["top1"], abs=0.11)


def test_a_linear_probe_finds_what_is_linear_at_any_scale_of_the_features():
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 6, generator=g)
    y = torch.arange(4).repeat(50)
    r = (centres[y] + 0.3 * torch.randn(200, 6, generator=g)) * torch.tensor([1e-3, 1, 10, 1, 1, 1e2]) + 5
    classifier, scores, top1 = linear_probe.probe(r[:100], y[:100], r[100:], y[100:], 4, epochs=50, batch=20)
    assert top1 == 100 and isinstance(classifier, torch.nn.Linear)


def test_probe_metrics_by_hand():
    scores = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 3, 2], [1, 2, 3]])
    y = torch.tensor([0, 0, 1, 1])  # row 1: 0 taken for 1; row 3: 1 taken for 2
    assert linear_probe.topk(scores, y, 1) == 50 and linear_probe.topk(scores, y, 2) == 75
    assert sorted(linear_probe.worst_confusions(scores, y, ["a", "b", "c"])) == [["a", "b", 50.0], ["b", "c", 50.0]]


def test_transfer_resizes_another_data_set_to_the_checkpoints_size(trained, tmp_path):
    folder_of(tmp_path, ["train", "test"], ["dark", "light"])
    result = linear_probe.main([str(trained / "ckpt.pt"), "--dataset", "folder", "--data", str(tmp_path)], standalone_mode=False)
    assert result["top1"] == 100 and result["test_images"] == 8 and (trained / "probe-folder.json").exists()


def refusal(script, arguments, monkeypatch, capsys):
    """The one line on stderr with which a script ends, at exit status 2, for what a user can put right."""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        pretrain.run_command(script.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("augment", ["sim", "auto"])
def test_a_streamed_folder_trains_on_the_same_views_with_and_without_workers(augment, tmp_path):
    folder_of(tmp_path, ["train"], ["dark", "light"], size=(90, 70))
    options = ["--dataset", "folder", "--data", str(tmp_path), "--size", "70", "--stem", "3x3", "--arch", "small", "--stream", "--augment", augment]
    options += ["--batch", "4", "--epochs", "1", "--log-every", "1", "--precision", "float64", "--lr", "1e-9", "--warmup", "0"]
    logs = []
    for name, other in (("whole", []), ("workers", ["--workers", "0"])):
        pretrain.main([*options, *other, "--run-dir", str(tmp_path / name)], standalone_mode=False)
        logs.append([line["loss"] for line in log_of(tmp_path / name) if "loss" in line])
    assert len(logs[0]) == 2 and logs[0] == logs[1]


BAD = [
    (["--batch", "0"], "--batch"),
    (["--batch", "many"], "--batch"),
    (["--batch", "500"], "--batch 500 is larger than the 200"),
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "1.5"], "--epochs"),
    (["--lr", "0"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--tau", "0"], "--tau"),
    (["--tau", "-0.1"], "--tau"),
    (["--tau", "0.1", "--loss", "ce"], "--tau has no meaning for --loss ce"),
    (["--loss", "supercon"], "--loss"),
    (["--loss-scale", "0"], "--loss-scale"),
    (["--margin", "-1"], "--margin"),
    (["--mining", "easy"], "--mining"),
    (["--npair-l2", "-1"], "--npair-l2"),
    (["--ce-weight", "1"], "--ce-weight"),
    (["--ce-weight", "0.5", "--loss", "ce"], "--ce-weight"),
    (["--ce-detach"], "--ce-detach needs"),
    (["--dataset", "imagenet"], "--dataset"),
    (["--dataset", "folder", "--data", "nowhere"], "--data nowhere has no folder train"),
    (["--dataset", "fashionmnist", "--data", "nowhere", "--no-download"], "--dataset fashionmnist is not in --data nowhere"),
    (["--size", "4"], "--size"),
    (["--limit", "0"], "--limit"),
    (["--augment", "strong"], "--augment"),
    (["--views", "0"], "--views"),
    (["--views", "1", "--loss", "simclr"], "--views 2"),
    (["--views", "2", "--loss", "n-pair"], "--views 1"),
    (["--batch", "25", "--loss", "n-pair"], "even --batch"),
    (["--limit", "2", "--batch", "2", "--loss", "n-pair"], "two images of every class"),
    (["--arch", "resnet20"], "--arch"),
    (["--stem", "5x5"], "--stem"),
    (["--proj-depth", "0"], "--proj-depth"),
    (["--proj-hidden", "0"], "--proj-hidden"),
    (["--proj-dim", "0"], "--proj-dim"),
    (["--schedule", "linear"], "--schedule"),
    (["--micro-batch", "0"], "--micro-batch"),
    (["--micro-batch", "7"], "--micro-batch 7 does not divide the 50"),
    (["--workers", "-1"], "--workers"),
    (["--stream"], "--stream reads --dataset folder"),
    (["--sync-bn"], "--sync-bn needs several GPUs"),
    (["--micro-batch", "1", "--loss", "ce"], "raise --batch, --micro-batch or --views"),
    (["--device", "meta"], "--device meta"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--warmup", "4"], "--warmup 4.0 must be shorter than --epochs 4"),
    (["--warmup", "-1"], "--warmup"),
    (["--warmup-from", "-1"], "--warmup-from"),
    (["--weight-decay", "-1"], "--weight-decay"),
    (["--momentum", "1"], "--momentum"),
    (["--nesterov", "--momentum", "0"], "--nesterov"),
    (["--seed", "-1"], "--seed"),
    (["--device", "toaster"], "--device toaster"),
    (["--precision", "int8"], "--precision"),
    (["--log-every", "0"], "--log-every"),
    (["--resume", "nowhere"], "nowhere"),
    (["--unknown"], "--unknown"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_options_give_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(pretrain, [*SMALL, *arguments], monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def folder_of(root, splits, classes, count=4, size=(30, 24)):
    """ImageFolder's layout with pictures of noise, brighter class by class."""
    for split in splits:
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-20, 20, (3, *size), generator=torch.Generator().manual_seed(i))
                TF.to_pil_image((40 + 60 * k + noise).to(torch.uint8)).save(root / split / name / f"{i}.png")


FOLDER = ["--dataset", "folder", "--arch", "small", "--size", "16", "--batch", "4", "--epochs", "1", "--device", "cpu"]


@pytest.mark.parametrize("options", [[], ["--stream"], ["--stream", "--workers", "0"]], ids=" ".join)
@pytest.mark.parametrize("contents", [b"", b"no picture", "cut"], ids=["empty", "text", "broken chunk"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_is_named_in_one_line(split, contents, options, tmp_path, monkeypatch, capsys):
    folder_of(tmp_path, ["train", "test"], ["a", "b"])
    path = tmp_path / split / "b" / "2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"xxxx" + whole[64:] if contents == "cut" else contents)
    monkeypatch.setattr(images, "SAMPLE", 1 if split == "train" else images.SAMPLE)  # of a streamed folder: met by a worker
    assert str(path) in refusal(pretrain, [*FOLDER, "--data", tmp_path, "--run-dir", tmp_path / "run", *options], monkeypatch, capsys)


def test_folders_whose_classes_do_not_match_are_refused(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path, ["train"], ["a", "b"])
    folder_of(tmp_path, ["test"], ["b"])
    assert "differ in their classes" in refusal(pretrain, [*FOLDER, "--data", tmp_path, "--run-dir", tmp_path / "run"], monkeypatch, capsys)


def test_resume_refuses_a_folder_of_other_classes_and_takes_an_older_checkpoint(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "two", ["train"], ["a", "b"])
    folder_of(tmp_path / "three", ["train"], ["a", "b", "c"])
    run = tmp_path / "run"
    pretrain.main([*FOLDER, "--data", str(tmp_path / "two"), "--loss", "ce", "--run-dir", str(run)], standalone_mode=False)
    assert "other classes" in refusal(pretrain, ["--resume", run, "--epochs", "2", "--data", tmp_path / "three"], monkeypatch, capsys)
    contents = pretrain.load_checkpoint(run / "ckpt.pt")
    for option in ("micro_batch", "sync_bn", "compile", "stream", "workers"):
        del contents["config"][option]
    torch.save(contents, run / "ckpt.pt")
    assert "--sync-bn" in refusal(pretrain, ["--resume", run, "--epochs", "2", "--sync-bn"], monkeypatch, capsys)
    pretrain.main(["--resume", str(run), "--epochs", "2", "--micro-batch", "2"], standalone_mode=False)
    assert log_of(run)[-1]["epoch"] == 2


@pytest.mark.parametrize("limit", ["8", "24"])
def test_a_handful_of_images_is_diagnosed_too(limit, tmp_path):
    pretrain.main([*SMALL, "--limit", limit, "--batch", "4", "--epochs", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert 0 <= log_of(tmp_path / "run")[-1]["knn_top1"] <= 100


def test_a_run_folder_is_never_overwritten(trained, monkeypatch, capsys):
    before = (trained / "log.jsonl").read_bytes()
    assert "already holds a run" in refusal(pretrain, [*SMALL, "--run-dir", trained], monkeypatch, capsys)
    assert (trained / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("contents, arguments, words", [
    (None, [], "there is no checkpoint"),
    (b"", [], "cannot be read"),
    (b"no checkpoint at all", [], "cannot be read"),
    ({"format": "another"}, [], "not a checkpoint of pretrain.py"),
    ("trained", ["--dataset", "folder", "--data", "nowhere"], "--data nowhere"),
    ("trained", ["--epochs", "0"], "--epochs"),
    ("trained", ["--lr", "x"], "--lr"),
    ("trained", ["--limit", "0"], "--limit"),
    ("trained", ["--device", "toaster"], "--device toaster"),
])
def test_a_probe_of_what_cannot_be_probed_gives_one_line_and_status_2(contents, arguments, words, trained, tmp_path, monkeypatch, capsys):
    path = tmp_path / "ckpt.pt"
    if contents == "trained":
        path.write_bytes((trained / "ckpt.pt").read_bytes())
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents:
        torch.save(contents, path)
    assert words in refusal(linear_probe, [path, *arguments], monkeypatch, capsys)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": "supcon-pretrain-1", "config": Mischief()}, tmp_path / "ckpt.pt")
    with pytest.raises(images.Refused):
        pretrain.load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch, capsys):
    explosive = ["--loss", "n-pair", "--npair-l2", "0", "--lr", "1e30", "--warmup", "0"]
    error = refusal(pretrain, [*SMALL, *explosive, "--run-dir", tmp_path / "run"], monkeypatch, capsys)
    assert "at step" in error and "--lr" in error


def test_a_loss_that_sits_at_collapse_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "collapse_and_floor", lambda config, labels: (pretrain.losses.math.log(99) * config.loss_scale, 0.0))
    monkeypatch.setattr(pretrain.F, "normalize", lambda z, **k: z * 0 + 1 / z.shape[1] ** 0.5)
    pretrain.main([*SMALL, "--epochs", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    assert "collapse value" in capsys.readouterr().err
