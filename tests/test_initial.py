"""Runs that start from weights: what is taken, what is refused, and a head that is trained before its encoder."""

import copy
import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import torchvision

import common.cli
import common.frozen
import common.initial
import common.models
import pretrain
from children import Launch
from runs import SMALL, log_of, options_of, refusal, same_bits, state_of, train

pytestmark = pytest.mark.seeds_torch
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # ImageNet's


def started(init, arch="resnet18", stem="7x7"):
    """(an encoder that started from the weights, what it was before, (mean, std))."""
    encoder, _ = common.models.build_encoder(arch, stem)
    before = {name: entry.clone() for name, entry in encoder.state_dict().items()}
    statistics = common.initial.start_from(encoder, SimpleNamespace(init=str(init), arch=arch, stem=stem))
    return encoder, before, statistics


@pytest.fixture(scope="module")
def resnet():
    """torchvision's, with statistics of batch norm that are its own."""
    net = torchvision.models.resnet18()
    with torch.no_grad():
        net(torch.rand(4, 3, 64, 64))
    return net.eval()


def r_of(net, x):
    found = []
    handle = net.fc.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return found[0]


DRESSED = {  # how training code saves such weights
    "torchvision's own": lambda state: state,
    "without fc": lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
    "module.": lambda state: {f"module.{k}": v for k, v in state.items()},
    "encoder., a head": lambda state: {f"encoder.{k}": v for k, v in state.items()} | {"head.0.bias": torch.ones(3)},
    "nested": lambda state: {"epoch": 3, "state_dict": {f"module.encoder.{k}": v for k, v in state.items()}},
    "of an old torch": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("dress", DRESSED)
def test_torchvisions_weights_go_in_and_give_torchvisions_features(dress, resnet, tmp_path):
    torch.save(DRESSED[dress](resnet.state_dict()), tmp_path / "weights.pth")
    encoder, _, (mean, std) = started(tmp_path / "weights.pth")
    x = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(x), r_of(resnet, x), rtol=0, atol=1e-6)
    assert torch.equal(mean, MEAN.flatten()) and torch.equal(std, STD.flatten())


def test_a_run_that_starts_from_torchvisions_weights_hands_on_torchvisions_features(resnet, tmp_path, capsys):
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    options = ["--arch", "resnet18", "--stem", "7x7", "--precision", "float32", "--loss", "ce"]
    options += ["--init", tmp_path / "weights.pth", "--epochs", "1", "--freeze-epochs", "1", "--limit", "50"]
    train(*SMALL, *options, "--run-dir", tmp_path / "run")
    assert "120 of 120 entries; not taken is what comes after r, fc.weight, fc.bias\n" in capsys.readouterr().out
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    r = common.frozen.load_encoder(tmp_path / "run" / "ckpt.pt", torch.device("cpu"))(images)
    x = ((images / 255 - MEAN) / STD).to(memory_format=torch.channels_last)
    exact = r_of(copy.deepcopy(resnet).to(memory_format=torch.channels_last), x)
    assert (r - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("theirs, ours", [("7x7", "3x3"), ("3x3", "7x7")])
def test_of_another_stem_the_first_layer_starts_fresh_and_all_else_is_taken(theirs, ours, tmp_path, capsys):
    source, _ = common.models.build_encoder("resnet18", theirs)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    encoder, before, _ = started(tmp_path / "weights.pth", stem=ours)
    after = encoder.state_dict()
    assert torch.equal(after.pop("conv1.weight"), before["conv1.weight"])
    assert all(torch.equal(entry, source.state_dict()[name]) for name, entry in after.items())
    line = capsys.readouterr().out
    assert "119 of 120 entries; the stem starts fresh, for conv1.weight is (64, 3" in line and line.count("\n") == 1


def of_resnet34():
    return torchvision.models.resnet34().state_dict()


def of_resnet18_but(**entries):
    entries = {name.replace("_", "."): entry for name, entry in entries.items()}
    return lambda: torchvision.models.resnet18().state_dict() | entries


UNFIT = [
    (of_resnet34, "it has layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias and "),
    (of_resnet18_but(layer1_0_conv1_weight=torch.ones(9, 64, 3, 3)), "conv1.weight is (9, 64, 3, 3) there and (64, 64"),
    (of_resnet18_but(bn1_weight=torch.ones(32)), "bn1.weight is (32,) there and (64,) here"),
    (lambda: {"weight": torch.ones(3)}, "it lacks conv1.weight, bn1.weight, bn1.bias and 97 more; it has weight"),
    (lambda: [1, 2], "it lacks conv1.weight"),
]


@pytest.mark.parametrize("state, words", UNFIT, ids=["deeper", "wider", "another norm", "another model", "a list"])
def test_other_weights_are_refused_by_the_first_names_that_differ(state, words, tmp_path):
    torch.save(state(), tmp_path / "weights.pth")
    with pytest.raises(common.cli.Refused) as refused:
        started(tmp_path / "weights.pth")
    assert words in refused.value.message and "--arch" in refused.value.message


def test_the_word_torchvision_asks_for_what_torchvision_publishes(resnet, monkeypatch):
    asked = []

    def get_model(arch, **options):
        asked.append((arch, options))
        return resnet

    encoder, _ = common.models.build_encoder("resnet18", "7x7")
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    config = SimpleNamespace(init="torchvision", arch="resnet18")
    mean, _ = common.initial.start_from(encoder, config)
    assert asked == [("resnet18", {"weights": torchvision.models.ResNet18_Weights.DEFAULT})]
    torch.testing.assert_close(encoder.state_dict()["bn1.running_mean"], resnet.bn1.running_mean)
    torch.testing.assert_close(mean, MEAN.flatten())

    resnet.transform_input = True  # as googlenet and inception_v3 of published weights have it
    mean, std = common.initial.start_from(encoder, config)
    torch.testing.assert_close((0.485 - mean) / std, torch.full((3,), (0.485 - 0.5) / 0.5))
    del resnet.transform_input

    def offline(arch, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(common.cli.Refused, match="https://download.*cannot be fetched .no route to host"):
        common.initial.start_from(encoder, config)


PUBLISHED = ["--arch", "resnet18", "--stem", "7x7", "--init", "torchvision"]


def publish(net, folder, monkeypatch):
    """Puts the weights in the place of those that torchvision publishes of a ResNet-18. Returns their file."""
    torch.save(net.state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    file = (folder / "weights.pth").rename(folder / f"resnet18-{digest[:8]}.pth")  # the digest is checked
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.value, "url", file.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(folder / "kept"))
    return file


def test_published_weights_are_fetched_once(resnet, tmp_path, monkeypatch):
    file = publish(resnet, tmp_path, monkeypatch)
    encoder, _, (mean, std) = started("torchvision")
    file.unlink()
    again, _, _ = started("torchvision")
    assert same_bits(again.state_dict(), encoder.state_dict())
    assert all(torch.equal(entry, resnet.state_dict()[name]) for name, entry in encoder.state_dict().items())
    assert torch.equal(mean, MEAN.flatten()) and torch.equal(std, STD.flatten())


def test_published_weights_that_do_not_arrive_are_refused_in_one_line(resnet, tmp_path, monkeypatch, capsys):
    file = publish(resnet, tmp_path, monkeypatch)
    whole = file.read_bytes()
    file.unlink()
    line = refusal(pretrain, [*SMALL, *PUBLISHED, "--run-dir", tmp_path / "run"], monkeypatch, capsys)
    assert f"--init torchvision: {file.as_uri()} cannot be fetched (" in line
    assert "fetch it elsewhere, and name the file" in line and not (tmp_path / "run").exists()
    file.write_bytes(whole[:1000])
    with pytest.raises(common.cli.Refused, match=r"cannot be fetched \(invalid hash value"):
        started("torchvision")


def test_a_run_that_others_start_from_is_read_once(trained, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(path) or load(path, **options))
    common.initial.read_weights(str(trained), "small")
    assert read == [trained / "ckpt.pt"]


# ---------------------------------------------------------------- fine-tuning

TUNE = [*SMALL, "--loss", "ce", "--subset", "0.5", "--epochs", "3"]


def test_fine_tuning_starts_from_the_encoder_and_the_statistics_of_a_run(trained, tmp_path):
    train(*TUNE, "--init", trained, "--freeze-epochs", "3", "--run-dir", tmp_path / "tuned")
    theirs, ours = state_of(trained), state_of(tmp_path / "tuned")
    for part in ("encoder", "mean", "std"):
        assert same_bits(theirs[part], ours[part])
    assert "classifier" in ours and options_of(tmp_path / "tuned")["init"] == str(trained)


def test_the_head_trains_alone_and_then_the_encoder_joins_it(trained, tmp_path, monkeypatch):
    alone, step = [], pretrain.training_step
    monkeypatch.setattr(pretrain, "training_step", lambda run, *a: alone.append(run.model.is_frozen) or step(run, *a))
    train(*TUNE, "--init", trained, "--freeze-epochs", "2", "--keep-every", "2", "--run-dir", tmp_path)
    frozen = common.frozen.load_checkpoint(tmp_path / "epoch-0002.pt")
    first, last = state_of(trained), state_of(tmp_path)
    assert same_bits(first["encoder"], frozen["encoder"]) and frozen["step"] == 4
    moved = [name for name in last["encoder"] if not torch.equal(first["encoder"][name], last["encoder"][name])]
    assert set(moved) == set(last["encoder"])  # weights and statistics, all of them
    assert not torch.equal(frozen["classifier"]["weight"], last["classifier"]["weight"])
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[3] < losses[0] and alone == [True] * 4 + [False] * 2


def test_a_run_that_goes_on_needs_its_weights_no_more_and_ends_with_the_same_bits(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "first")
    train(*TUNE, "--init", tmp_path / "first", "--freeze-epochs", "1", "--run-dir", tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt-previous.pt", tmp_path / "resumed" / "ckpt.pt")
    shutil.rmtree(tmp_path / "first")
    train("--resume", tmp_path / "resumed")
    assert same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "resumed"))


@pytest.mark.parametrize("more", [[], ["--micro-batch", "5"]], ids=["whole", "in parts"])
def test_ranks_whose_encoder_joins_later_take_the_steps_of_one_process(more, trained, tmp_path):
    """Until then the encoder is as in evaluation. Afterwards batch norm sees the images of a rank."""
    options = [*TUNE, "--batch", "20", "--init", trained, "--freeze-epochs", "2", "--precision", "float64", *more]
    train(*options, "--run-dir", tmp_path / "one")
    launch = Launch(train, (*map(str, options), "--run-dir", str(tmp_path / "two")), ranks=2).wait()
    assert launch.status == 0, launch.err
    one, two = ([line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert len(one) == 15 and one[:10] == pytest.approx(two[:10], rel=1e-9) and len(set(two)) == 15
    encoders = [state_of(tmp_path / name)["encoder"] for name in ("one", "two")]
    before = state_of(trained)["encoder"]
    for encoder in encoders:
        assert all(not torch.equal(encoder[name], before[name].double()) for name in encoder if "weight" in name)
