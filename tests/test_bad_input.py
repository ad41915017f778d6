"""Bad input: one line that names the option and the remedy, exit status 2, no traceback, no file touched."""

from pathlib import Path

import pytest
import torch

import common.cli
import common.config
import common.data
import common.models
import common.run_folder
import linear_probe
import pretrain
from fuzz_command_lines import fuzz
from runs import FOLDER, SMALL, files_in, folder_of, log_of, refusal, train

pytestmark = pytest.mark.seeds_torch
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
    (
        ["--dataset", "fashionmnist", "--data", "nowhere", "--no-download"],
        "--dataset fashionmnist cannot be read from --data nowhere",
    ),
    (["--size", "4"], "--size"),
    (["--limit", "0"], "--limit"),
    (["--augment", "strong"], "--augment"),
    (["--views", "0"], "--views"),
    (["--views", "1", "--loss", "simclr"], "--views 2"),
    (["--views", "2", "--loss", "n-pair"], "--views 1"),
    (["--batch", "25", "--loss", "n-pair"], "even --batch"),
    (["--limit", "2", "--batch", "2", "--loss", "n-pair"], "two images of every class"),
    (["--arch", "resnet20"], "--arch"),
    (["--arch", "resnet49"], "'resnet49' is no encoder: name small, resnet200 or a classification model of"),
    (["--arch", "squeezenet1_0", "--size", "8"], "--arch squeezenet1_0 cannot take images of --size 8"),
    (["--stem", "5x5"], "--stem"),
    (["--stem", "3x3", "--arch", "vit_b_16"], "--stem has a meaning only for the ResNets"),
    (["--init", "nowhere"], "--init nowhere is not there: name a run, a file of weights, or the word torchvision"),
    (["--init", ""], "is not there: name a run"),
    (["--init", "r" * 300], "cannot be looked for"),
    (["--init", "torchvision"], "torchvision publishes no weights of small: name another --arch"),
    (["--freeze-epochs", "1"], "--freeze-epochs has a meaning only for --init"),
    (["--freeze-epochs", "-1"], "--freeze-epochs"),
    (["--freeze-epochs", "9", "--arch", "resnet18", "--init", "torchvision"], "9 is more than --epochs 4: lower it"),
    (["--projection", "0"], "--projection"),
    (["--projection", "128-"], "is not of the form 128, r-128 or 2048-128"),
    (["--projection", "1-1-1-1-1"], "--projection"),
    (["--projection", "128-r"], "--projection"),
    (["--proj-depth", "3"], "--proj-depth has another name now: --projection"),
    (["--proj-hidden", "9"], "--proj-hidden has another name now: --projection"),
    (["--proj-dim", "64"], "--proj-dim has another name now: --projection"),
    (["--figure"], "--figure has another name now: python -m common.figures RUN..."),
    (["--schedule", "linear"], "--schedule"),
    (["--micro-batch", "0"], "--micro-batch"),
    (["--micro-batch", "7"], "--micro-batch 7 does not divide the 50"),
    (["--workers", "-1"], "--workers"),
    (["--stream"], "--stream reads --dataset folder"),
    (["--sync-bn"], "--sync-bn has a meaning only for several GPUs"),
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
    (["--lr", "nan"], "--lr"),
    (["--lr", "1e400"], "--lr"),
    (["--lr", "1e31"], "--lr"),
    (["--tau", "inf"], "--tau"),
    (["--margin", "0.3"], "--margin has a meaning only for --loss triplet and max-margin"),
    (["--nearest", "0", "--loss", "hard-contrastive"], "--nearest"),
    (["--nearest", "9"], "--nearest has a meaning only for --loss hard-contrastive and simple-contrastive"),
    (["--nearest", "99", "--loss", "hard-contrastive"], "--nearest 99 is more than the 98 negatives of an anchor"),
    (["--views", "1", "--loss", "hard-contrastive"], "--views 2"),
    (["--views", "1", "--loss", "simple-contrastive"], "--views 2"),
    (["--queue", "9", "--loss", "hard-contrastive"], "--queue has no meaning for --loss hard-contrastive"),
    (["--lam", "1", "--loss", "hard-contrastive"], "--lam has a meaning only for --loss simple-contrastive"),
    (["--lam", "-1", "--loss", "simple-contrastive"], "--lam"),
    (["--tau", "1", "--loss", "simple-contrastive"], "--tau has no meaning for --loss simple-contrastive"),
    (["--mining", "hard"], "--mining has a meaning only for --loss triplet"),
    (["--npair-l2", "0.1"], "--npair-l2 has a meaning only for --loss n-pair"),
    (["--loss", "ce", "--projection", "64"], "--projection has a meaning only for a contrastive --loss"),
    (["--loss", "ce", "--loss-scale", "2"], "--loss-scale has a meaning only for a contrastive --loss"),
    (["--loss", "simclr", "--positives-cap", "2"], "--positives-cap has a meaning only for --loss supcon"),
    (["--augment", "none", "--crop-min", "0.5"], "--crop-min has a meaning only for views that are cropped"),
    (["--stem", "7x7"], "--stem has a meaning only for the ResNets"),
    (["--save-minutes", "-1"], "--save-minutes"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--dataset", "cifar10", "--data", "nowhere", "--no-download"], "cifar-10-python.tar.gz"),
    (["--dataset", "cifar100", "--data", "nowhere", "--no-download"], "cifar-100-python.tar.gz"),
    (["--run-dir", "/proc/nowhere"], "--run-dir"),
    (["--run-dir", "/dev/null"], "--run-dir"),
    (["--run-dir", "/dev/null/run"], "--run-dir"),
    (["--resume", "nowhere", "--epochs", "0"], "--epochs"),
    (["surplus"], "surplus"),
    (["--resume", ""], "--resume takes the folder of a run"),
    (["--run-dir", "r" * 300], "cannot be looked for"),
    (["--resume", "r" * 300], "cannot be looked for"),
    (["--dataset", "folder", "--data", "d" * 300], "cannot be read"),
    (["--projection", "99999999999999999999"], "--projection"),
    (["--batch", "9" * 400], "--batch"),
    (["--lr", "1", "--lr-per-256", "1"], "leave one out"),
    (["--queue", "9", "--loss", "triplet"], "--queue has no meaning for --loss triplet"),
    (["--queue", "9", "--mix", "mixup"], "leave one out"),
    (["--denominator", "all", "--loss", "simclr"], "--denominator has a meaning only for --loss supcon and supcon-in"),
    (["--denominator", "negatives", "--mix", "mixup"], "--denominator goes with hard labels: leave --mix out"),
    (["--positives-cap", "2", "--queue", "9"], "leave --queue and --mix out"),
    (["--positives-cap", "2", "--mix", "mixup"], "leave --queue and --mix out"),
    (["--positives-cap", "3"], "--positives-cap 3 is not a multiple of --views 2"),
    (["--mix", "mixup", "--loss", "simclr"], "--mix has no meaning for --loss simclr"),
    (["--labels", "labels.csv"], "--labels has a meaning only for --dataset folder"),
    (["--labels", "nowhere.csv", "--dataset", "folder"], "--labels nowhere.csv cannot be read (No such file"),
    (["--mix-alpha", "2"], "--mix-alpha has a meaning only for --mix"),
    (["--momentum-encoder", "0.9"], "--momentum-encoder has a meaning only for --queue"),
    (["--label-smoothing", "0.1"], "--label-smoothing is cross-entropy's"),
    (["--balanced", "--loss", "n-pair"], "leave --balanced out"),
    (["--nesterov", "--optimizer", "lars"], "--nesterov is SGD's"),
    (["--mix", "mixup", "--micro-batch", "1"], "--mix needs two images at a time"),
    (["--jitter", "1", "--augment", "crop"], "--jitter has a meaning only for --augment sim"),
    (["--label-noise", "0.1", "--loss", "simclr"], "--label-noise has a meaning only for losses that read labels"),
    (["--recipe", "cifar11"], "--recipe"),
    (["--subset", "0"], "--subset"),
    (["--label-noise", "1.5"], "--label-noise"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_options_give_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(pretrain, [*SMALL, *arguments], monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


# Situations: each makes files in a folder, given a trained run's bytes, and returns (script, arguments, words).


def folder_without_classes(here, ckpt):
    (here / "train").mkdir()
    return pretrain, [*FOLDER, "--data", here], "train: the folder has no images: it wants CLASS/*.jpg"


def folder_with_an_empty_class(here, ckpt):
    folder_of(here, ["train"], ["a", "b"])
    (here / "train" / "c").mkdir()
    return pretrain, [*FOLDER, "--data", here], "train: the class c has no images: add some"


def folder_with_one_class(here, ckpt):
    folder_of(here, ["train"], ["a"])
    return pretrain, [*FOLDER, "--data", here], "has one class alone: --loss supcon needs two"


def folder_that_is_a_file(here, ckpt):
    (here / "data").write_text("not a folder")
    return pretrain, [*FOLDER, "--data", here / "data"], "has no folder train"


def folder_with_another_test_set(here, ckpt):
    folder_of(here, ["train"], ["a", "b"])
    folder_of(here, ["test"], ["c"])
    return pretrain, [*FOLDER, "--data", here], "the test set has a class c, and the training set has none"


def damaged_fashionmnist(here, ckpt):
    raw = here / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"cut short")
    return (
        pretrain,
        [*SMALL[4:], "--dataset", "fashionmnist", "--arch", "small", "--data", here],
        "--dataset fashionmnist cannot be read from",
    )


def run_folder_of_another_run(here, ckpt):
    (here / "run").mkdir()
    (here / "run" / "log.jsonl").write_text("a log")
    return pretrain, [*SMALL, "--run-dir", here / "run"], "already holds a run: go on with --resume"


def run_folder_of_a_checkpoint_without_a_log(here, ckpt):
    (here / "run").mkdir()
    (here / "run" / "ckpt.pt").write_bytes(ckpt)
    return pretrain, [*SMALL, "--run-dir", here / "run"], "already holds a run: go on with --resume"


def run_folder_with_a_damaged_checkpoint(here, ckpt):
    (here / "run").mkdir()
    (here / "run" / "ckpt-previous.pt").write_bytes(ckpt[:100])
    return pretrain, [*SMALL, "--run-dir", here / "run"], "already holds a run: go on with --resume"


def run_folder_that_is_a_file(here, ckpt):
    (here / "run").write_text("a file")
    return pretrain, [*SMALL, "--run-dir", here / "run"], "cannot be written: name another --run-dir"


def resume_without_a_checkpoint(here, ckpt):
    (here / "log.jsonl").write_text("a log")
    return pretrain, ["--resume", here], "has no checkpoint"


def resume_with_both_damaged(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt[:1000])
    (here / "ckpt-previous.pt").write_bytes(b"")
    return pretrain, ["--resume", here], "cannot be read as a checkpoint"


def resume_with_an_option_without_a_meaning(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    (here / "labels.csv").write_text("path,label\n")
    words = "--labels has a meaning only for --dataset folder"
    return pretrain, ["--resume", here, "--labels", here / "labels.csv"], words


def resume_of_another_recipe(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return pretrain, ["--resume", here, "--tau", "0.2", "--batch", "20"], "leave out --batch, --tau"


def resume_into_another_folder(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return pretrain, ["--resume", here, "--run-dir", here / "other"], "leave out --run-dir"


def resume_to_fewer_epochs(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return pretrain, ["--resume", here, "--epochs", "3"], "--epochs 3 ends before step 16"


def resume_in_parts_that_do_not_divide(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return pretrain, ["--resume", here, "--epochs", "9", "--micro-batch", "7"], "--micro-batch 7 does not divide"


def changed(here, ckpt, **entries):
    (here / "ckpt.pt").write_bytes(ckpt)
    contents = common.run_folder.load_checkpoint(here / "ckpt.pt")
    contents |= entries | {"config": contents["config"] | entries.get("config", {})}
    torch.save(contents, here / "ckpt.pt")
    return here / "ckpt.pt"


def resume_with_weights_of_another_encoder(here, ckpt):
    changed(here, ckpt, config={"arch": "resnet18"})
    return pretrain, ["--resume", here], "does not hold the weights"


def resume_on_data_of_another_length(here, ckpt):
    changed(here, ckpt, images=150)
    return pretrain, ["--resume", here], "holds 200 images, the run began with 150"


def init_of_another_encoder(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return pretrain, [*SMALL, "--arch", "resnet18", "--init", here], "this run has resnet18: give --arch small"


def init_of_a_folder_without_a_run(here, ckpt):
    return pretrain, [*SMALL, "--init", here], "is not there: name a run"


def init_of_text(here, ckpt):
    (here / "weights.pth").write_text("no weights at all")
    return pretrain, [*SMALL, "--init", here / "weights.pth"], "cannot be read as weights"


def init_of_other_names(here, ckpt):
    torch.save({"weight": torch.zeros(3)}, here / "weights.pth")
    return pretrain, [*SMALL, "--init", here / "weights.pth"], "is not of the encoder small: it lacks 0.0.weight, 0.1."


def probe_of_nothing(here, ckpt):
    return linear_probe, [here / "ckpt.pt"], "there is no checkpoint"


def probe_of_an_empty_folder(here, ckpt):
    return linear_probe, [here], "there is no checkpoint"


def probe_of_an_empty_file(here, ckpt):
    (here / "ckpt.pt").write_bytes(b"")
    return linear_probe, [here / "ckpt.pt"], "cannot be read"


def probe_of_text(here, ckpt):
    (here / "ckpt.pt").write_bytes(b"no checkpoint at all")
    return linear_probe, [here / "ckpt.pt"], "cannot be read"


def probe_of_half_a_checkpoint(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt[: len(ckpt) // 2])
    return linear_probe, [here / "ckpt.pt"], "cannot be read"


def probe_of_another_kind_of_file(here, ckpt):
    torch.save({"state_dict": {}}, here / "ckpt.pt")
    return linear_probe, [here / "ckpt.pt"], "is not a checkpoint of pretrain.py"


def probe_of_a_bare_tensor(here, ckpt):
    torch.save(torch.zeros(3), here / "ckpt.pt")
    return linear_probe, [here / "ckpt.pt"], "is not a checkpoint of pretrain.py"


def probe_of_a_classifier(here, ckpt):
    torch.save({"format": "supcon-probe-1", "weight": torch.zeros(3)}, here / "ckpt.pt")
    return linear_probe, [here / "ckpt.pt"], "is not a checkpoint of pretrain.py"


def probe_of_a_checkpoint_without_an_encoder(here, ckpt):
    return linear_probe, [changed(here, ckpt, encoder=None)], "lacks encoder"


def probe_of_another_encoder(here, ckpt):
    return linear_probe, [changed(here, ckpt, config={"arch": "resnet18"})], "does not hold the weights"


def probe_on_missing_data(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    return linear_probe, [here / "ckpt.pt", "--dataset", "folder", "--data", here / "nowhere"], "has no folder train"


def probe_without_a_test_set_and_nothing_to_hold_out(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    folder_of(here, ["train"], ["a", "b"], count=1)
    return linear_probe, [here / "ckpt.pt", "--dataset", "folder", "--data", here], "has no folder test or val"


def probe_of_other_test_classes(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    folder_of(here, ["train"], ["a", "b"])
    folder_of(here, ["val"], ["a", "c"])
    return linear_probe, [here / "ckpt.pt", "--dataset", "folder", "--data", here], "the test set has a class c"


def probe_of_one_class(here, ckpt):
    (here / "ckpt.pt").write_bytes(ckpt)
    folder_of(here, ["train", "test"], ["a"])
    return linear_probe, [here / "ckpt.pt", "--dataset", "folder", "--data", here], "one class"


def probe_with(*options):
    def situation(here, ckpt):
        (here / "ckpt.pt").write_bytes(ckpt)
        return linear_probe, [here / "ckpt.pt", *options], options[0]

    situation.__name__ = "probe_with_" + "_".join(options)
    return situation


SITUATIONS = [
    folder_without_classes,
    folder_with_an_empty_class,
    folder_with_one_class,
    folder_that_is_a_file,
    folder_with_another_test_set,
    damaged_fashionmnist,
    run_folder_of_another_run,
    run_folder_of_a_checkpoint_without_a_log,
    run_folder_with_a_damaged_checkpoint,
    run_folder_that_is_a_file,
    resume_without_a_checkpoint,
    resume_with_both_damaged,
    resume_of_another_recipe,
    resume_with_an_option_without_a_meaning,
    resume_into_another_folder,
    resume_to_fewer_epochs,
    resume_in_parts_that_do_not_divide,
    resume_with_weights_of_another_encoder,
    resume_on_data_of_another_length,
    init_of_another_encoder,
    init_of_a_folder_without_a_run,
    init_of_text,
    init_of_other_names,
    probe_of_nothing,
    probe_of_an_empty_folder,
    probe_of_an_empty_file,
    probe_of_text,
    probe_of_half_a_checkpoint,
    probe_of_another_kind_of_file,
    probe_of_a_bare_tensor,
    probe_of_a_classifier,
    probe_of_a_checkpoint_without_an_encoder,
    probe_of_another_encoder,
    probe_on_missing_data,
    probe_without_a_test_set_and_nothing_to_hold_out,
    probe_of_other_test_classes,
    probe_of_one_class,
    probe_with("--epochs", "0"),
    probe_with("--lr", "x"),
    probe_with("--lr", "nan"),
    probe_with("--lr", "1e300"),
    probe_with("--weight-decay", "1e31"),
    probe_with("--limit", "0"),
    probe_with("--batch", "0"),
    probe_with("--device", "toaster"),
    probe_with("--fraction", "0.5"),
    probe_with("--subset", "0"),
    probe_with("--save-features", "features.csv"),
    probe_with("--save-features", "nowhere/features.npz"),
    probe_with("--save-features", "features.npz", "--l2-normalize"),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_bad_situations_give_one_line_and_status_2(situation, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, arguments, words = situation(tmp_path, (trained / "ckpt.pt").read_bytes())
    before = files_in(tmp_path)
    assert words in refusal(script, arguments, monkeypatch, capsys)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--stream"], ["--stream", "--workers", "0"]], ids=" ".join)
@pytest.mark.parametrize("contents", [b"", b"no picture", "cut"], ids=["empty", "text", "broken chunk"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_is_named_in_one_line(split, contents, options, tmp_path, monkeypatch, capsys):
    folder_of(tmp_path, ["train", "test"], ["a", "b"])
    path = tmp_path / split / "b" / "2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"xxxx" + whole[64:] if contents == "cut" else contents)
    monkeypatch.setattr(
        common.data, "SAMPLE", 1 if split == "train" else common.data.SAMPLE
    )  # of a streamed folder: met by a worker
    assert str(path) in refusal(
        pretrain,
        [*FOLDER, "--data", tmp_path, "--log-every", "1", "--run-dir", tmp_path / "run", *options],
        monkeypatch,
        capsys,
    )
    if options and split == "train":  # met in the middle of the training
        assert common.run_folder.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == len(log_of(tmp_path / "run"))


def test_resume_refuses_a_folder_of_other_classes_and_takes_an_older_checkpoint(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "two", ["train"], ["a", "b"])
    folder_of(tmp_path / "three", ["train"], ["a", "b", "c"])
    run = tmp_path / "run"
    train(*FOLDER, "--data", tmp_path / "two", "--loss", "ce", "--run-dir", run)
    assert "other classes" in refusal(
        pretrain, ["--resume", run, "--epochs", "2", "--data", tmp_path / "three"], monkeypatch, capsys
    )
    contents = common.run_folder.load_checkpoint(run / "ckpt.pt")
    for option in ("micro_batch", "sync_bn", "compile", "stream", "workers", "queue", "mix", "optimizer", "projection"):
        del contents["config"][option]
    contents["config"] |= {"proj_depth": 2, "proj_hidden": None, "proj_dim": 128, "figure": False}  # of version 0.3
    torch.save(contents, run / "ckpt.pt")
    assert "--queue" in refusal(pretrain, ["--resume", run, "--epochs", "2", "--queue", "9"], monkeypatch, capsys)
    train("--resume", run, "--epochs", "2", "--micro-batch", "2")
    assert log_of(run)[-1]["epoch"] == 2


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": "supcon-pretrain-1", "config": Mischief()}, tmp_path / "ckpt.pt")
    with pytest.raises(common.cli.Refused):
        common.run_folder.load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_random_command_lines_end_well_or_are_refused(tmp_path):
    fuzz(tmp_path, examples=10)


@pytest.mark.long
def test_many_random_command_lines_end_well_or_are_refused(tmp_path):
    fuzz(tmp_path, examples=120)


@pytest.mark.parametrize(
    "depth, hidden, dim, projection",
    [(2, None, 128, "r-128"), (1, None, 64, "64"), (3, 2048, 128, "2048-2048-128"), (3, None, 9, "r-r-9")],
)
def test_the_heads_of_earlier_versions_have_their_widths(depth, hidden, dim, projection):
    old = {"loss": "supcon", "proj_depth": depth, "proj_hidden": hidden, "proj_dim": dim, "figure": False}
    config = common.config.config_of_checkpoint({"config": old})
    assert config.projection == projection and config.loss == "supcon"
    widths = common.models.widths_of(config.projection, 512)
    assert widths == [512] + [hidden or 512] * (depth - 1) + [dim]
