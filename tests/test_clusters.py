"""Several nodes, restarts and requeues: the nodes are folders that share nothing, or launches of torchrun here."""

import csv
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import common.cli
import common.data
import common.ranks
import pretrain
import results_table
from children import ENVIRONMENT, PROJECT, Launch, run_script, start
from common.run_folder import load_checkpoint, newest_checkpoint
from runs import FOLDER, SMALL, files_in, folder_of, log_of, probe, refusal, same_bits, state_of, torchrun, train

pytestmark = pytest.mark.seeds_torch
TWO = [*SMALL, "--epochs", "2"]


def train_in_a_folder_of_its_own(folder, *arguments):
    """In a rank: as on a machine that shares no disk with the others."""
    os.chdir(os.path.join(folder, os.environ["RANK"]))
    run_script("pretrain", *arguments)


def on_two_nodes(folder, *arguments):
    """Two ranks that share no disk, the first in folder/0 and the second in folder/1."""
    for rank in "01":
        (folder / rank).mkdir(exist_ok=True)
    return Launch(train_in_a_folder_of_its_own, (str(folder), *map(str, arguments)), ranks=2).wait(timeout=60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs on two ranks, and beside it the same folder after its first epoch."""
    folder = tmp_path_factory.mktemp("whole")
    assert start("pretrain", *TWO, "--run-dir", folder / "run", ranks=2).wait().status == 0
    stopped = [*SMALL, "--epochs", "1", "--warmup", "0.2", "--schedule", "constant"]
    assert start("pretrain", *stopped, "--run-dir", folder / "half", ranks=2).wait().status == 0
    return folder


# ---------------------------------------------------------------- rank 0 reads, and the others need no folder


@pytest.mark.parametrize("other", ["no folder", "an older checkpoint", "a damaged checkpoint"])
def test_a_run_goes_on_from_rank_0s_checkpoint_whatever_the_other_node_holds(other, whole, tmp_path):
    run = tmp_path / "0" / "run"
    shutil.copytree(whole / "half", run)
    if other != "no folder":
        shutil.copytree(whole / "half", tmp_path / "1" / "run")
        newest = tmp_path / "1" / "run" / "ckpt.pt"
        older = (tmp_path / "1" / "run" / "ckpt-previous.pt").read_bytes()  # of step 0
        newest.write_bytes(older if other == "an older checkpoint" else older[:999])
    before = files_in(tmp_path / "1") if other != "no folder" else {}
    assert on_two_nodes(tmp_path, "--resume", "run", "--epochs", "2").status == 0
    shutil.copytree(whole / "half", tmp_path / "unbroken")
    assert start("pretrain", "--resume", tmp_path / "unbroken", "--epochs", "2", ranks=2).wait().status == 0
    assert same_bits(state_of(run), state_of(tmp_path / "unbroken")) and log_of(run) == log_of(tmp_path / "unbroken")
    assert files_in(tmp_path / "1") == before


def test_what_rank_0_alone_refuses_before_the_first_step_ends_every_rank(tmp_path):
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "0" / "run" / "log.jsonl").write_text("a log")
    ended = on_two_nodes(tmp_path, *SMALL, "--run-dir", "run")
    assert [process.exitcode for process in ended.processes] == [2, 2]
    assert ended.err.count("already holds a run") == 1


# ---------------------------------------------------------------- the same data on every node


def one_missing(root):
    (root / "train" / "b" / "3.png").unlink()
    return "it lacks train/b/3.png of the class b"


def another_name(root):
    (root / "train" / "b" / "3.png").rename(root / "train" / "b" / "4.png")
    return "it lacks train/b/3.png of the class b"


def one_more(root):
    shutil.copy(root / "train" / "b" / "3.png", root / "train" / "b" / "4.png")
    return "it has train/b/4.png of the class b as well"


def another_class(root):
    (root / "train" / "b").rename(root / "train" / "c")
    return "it lacks the class b"


@pytest.mark.parametrize("options", [[], ["--stream", "--workers", "0"]], ids=["in memory", "streamed"])
@pytest.mark.parametrize("change", [one_missing, another_name, one_more, another_class])
def test_other_data_on_another_node_is_refused_with_the_first_difference(change, options, tmp_path):
    for rank in "01":
        folder_of(tmp_path / rank / "data", ["train"], ["a", "b"])
    words = change(tmp_path / "1" / "data")
    ended = on_two_nodes(tmp_path, *FOLDER, *options, "--data", "data", "--run-dir", "run")
    assert [process.exitcode for process in ended.processes] == [2, 2] and ended.err.count("\n") == 1
    assert words in ended.err and socket.gethostname() in ended.err and not (tmp_path / "0" / "run").exists()


@pytest.mark.parametrize("other", ["labels", "images"])
def test_labels_of_another_order_and_other_pixels_are_other_data(other):
    class Ranks(common.ranks.Ranks):
        def from_first(self, found):
            return rank_0[type(found)]

    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (20,), generator=g)
    images = torch.randint(256, (20, 3, 8, 8), generator=g, dtype=torch.uint8)
    data = common.data.Data(images, labels, ["a", "b", "c"])
    sums = [zlib.crc32(image.numpy().tobytes()) for image in images]
    names = [f"image {row} ({sums[row]:08x}) of the class {'abc'[label]}" for row, label in enumerate(labels.tolist())]
    rank_0 = {list: sorted([*names, *(f"the class {name}" for name in "abc")])}
    rank_0[bytes] = hashlib.sha256("\0".join(rank_0[list]).encode()).digest()
    common.data.require_same_on_every_rank(data, "here", Ranks())
    changed = {"labels": labels.roll(1)} if other == "labels" else {"images": images.clone()}
    if other == "images":
        changed["images"][7, 0, 0, 0] += 1
    first = "image" if other == "labels" else rf"image 7 \({sums[7]:08x}\)"
    with pytest.raises(common.cli.Refused, match=f"it lacks {first}"):
        common.data.require_same_on_every_rank(data._replace(**changed), "here", Ranks())


# ---------------------------------------------------------------- one command starts, goes on, and is done


def test_one_command_starts_a_run_goes_on_with_it_and_is_done(tmp_path, capsys):
    command = [*SMALL, "--resume", "auto", "--run-dir", tmp_path / "run"]
    train(*SMALL, "--run-dir", tmp_path / "whole")
    stopped = start("pretrain", *command, "--log-every", "1")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert stopped.running() and not time.sleep(0.005)
    stopped.kill()
    train(*command)
    assert same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    files = files_in(tmp_path / "run")
    capsys.readouterr()
    train(*command)
    assert "is finished: python linear_probe.py" in capsys.readouterr().out and files_in(tmp_path / "run") == files


def test_auto_extends_a_run_and_takes_no_run_of_other_options(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    auto = ["--resume", "auto", "--run-dir", run]
    for more, name in (["--lr", "0.3"], "--lr"), (["--loss", "simclr"], "--loss"), (["--seed", "1"], "--seed"):
        assert name in refusal(pretrain, [*SMALL, *auto, *more], monkeypatch, capsys)
    assert "--limit" in refusal(pretrain, [*SMALL[:4], *SMALL[6:], *auto], monkeypatch, capsys)  # which is left out
    train(*SMALL, *auto, "--epochs", "5")  # though the warm-up of a new run of 5 epochs would be longer
    assert log_of(run)[-1]["epoch"] == 5
    train(*SMALL, *auto)  # of 4 epochs
    assert log_of(run)[-1]["epoch"] == 5


def test_more_than_two_ranks_go_on_with_the_bits_of_an_unbroken_run(tmp_path):
    """Of three numbers, unlike two, the order in which they are added decides the bits of the sum."""
    command = [*SMALL, "--limit", "60", "--batch", "30", "--schedule", "constant", "--warmup", "0.2"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    launches = [start("pretrain", *command, "--epochs", "2", "--run-dir", whole, ranks=3),
                start("pretrain", *command, "--epochs", "1", "--run-dir", half, ranks=3)]
    assert [launch.wait().status for launch in launches] == [0, 0]
    assert start("pretrain", "--resume", half, "--epochs", "2", ranks=3).wait().status == 0
    assert same_bits(state_of(half), state_of(whole))
    steps, other = ([line for line in log_of(run) if "loss" in line] for run in (half, whole))
    assert steps == other and len(steps) == 4  # the last epoch is diagnosed, which was the first of `half`


def ranks_of(launcher):
    """The process ids of the ranks that a torchrun has running."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:  # one has ended meanwhile
        return []


def wait_until(happened):
    end = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < end and not time.sleep(0.01)


def kill_a_rank_again_and_again(folder, kills, seed, epochs):
    """torchrun starts the ranks again each time. The run must end with the bits and the log of an unbroken one."""
    chance = random.Random(seed)
    command = [*SMALL, "--epochs", epochs, "--save-minutes", "0", "--run-dir"]
    assert start("pretrain", *command, folder / "whole", ranks=2).wait().status == 0
    launcher = torchrun(f"--max-restarts={kills}", "pretrain.py", *command, folder / "run", "--resume", "auto")
    for _ in range(kills):
        wait_until(lambda: len(ranks_of(launcher)) == 2)
        time.sleep(chance.uniform(0, 8))  # importing, meeting, loading, training, saving
        before = ranks_of(launcher)
        os.kill(chance.choice(before), signal.SIGKILL)
        wait_until(lambda: not set(before) & set(ranks_of(launcher)))
    _, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert same_bits(state_of(folder / "run"), state_of(folder / "whole"))
    assert log_of(folder / "run") == log_of(folder / "whole")


@pytest.mark.long
def test_ranks_that_are_killed_three_times_end_with_the_bits_of_an_unbroken_run(tmp_path):
    kill_a_rank_again_and_again(tmp_path, kills=3, seed=1, epochs=80)


def node_of_two(node, folder, port, *arguments):
    """A launch of torchrun in folder/node, as on one of two machines that share no disk. Rank 0 is on node 0."""
    (folder / node).mkdir(exist_ok=True)
    at = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-id=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    name = f"--local-addr=127.0.0.{1 + int(node)}"  # torchrun numbers the nodes in the order of their addresses
    command = [sys.executable, "-m", "torch.distributed.run", *at, name, PROJECT / "pretrain.py", *arguments]
    with open(folder / f"said-{node}", "a") as said:
        return subprocess.Popen([*map(str, command)], cwd=folder / node, env=os.environ | ENVIRONMENT, stdout=said,
                                stderr=said)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.long
def test_two_launches_of_torchrun_that_are_killed_go_on_from_the_folder_of_node_0(tmp_path):
    command = [*SMALL, "--epochs", "30", "--save-minutes", "0", "--run-dir"]
    assert start("pretrain", *command, tmp_path / "whole", ranks=2).wait().status == 0
    port, run = free_port(), tmp_path / "0" / "run"
    killed = [node_of_two(node, tmp_path, port, *command, "run", "--resume", "auto") for node in "01"]
    wait_until(lambda: (run / "log.jsonl").exists() and len(log_of(run)) > 20)
    for pid in [rank for node in killed for rank in [node.pid, *ranks_of(node)]]:
        os.kill(pid, signal.SIGKILL)
    for node in killed:
        node.wait()
    assert 0 < newest_checkpoint(run)[0]["step"] < 120
    port = free_port()
    again = [node_of_two(node, tmp_path, port, *command, "run", "--resume", "auto") for node in "01"]
    assert [node.wait(timeout=200) for node in again] == [0, 0], (tmp_path / "said-0").read_text()
    assert same_bits(state_of(run), state_of(tmp_path / "whole")) and log_of(run) == log_of(tmp_path / "whole")
    assert not list((tmp_path / "1").iterdir())


# ---------------------------------------------------------------- the ranks meet, or say why not


def meet_within(seconds, patience, *arguments):
    common.ranks.MEETING_TIME, common.ranks.PATIENCE = seconds, patience
    run_script("pretrain", *arguments)


def test_a_rank_that_never_comes_is_said_and_ends_the_others_in_time(tmp_path):
    came = Launch(meet_within, (4, 1, *SMALL, "--run-dir", str(tmp_path / "run")), ranks=3, absent=1)
    came.wait(timeout=40)
    assert [process.exitcode for process in came.processes] == [2, 2]
    assert "waiting for 1 of 3 ranks" in came.err and "the ranks have not met within 4 s" in came.err
    assert "Traceback" not in came.err and not (tmp_path / "run").exists()


def fail_once_to_connect(*arguments):
    """In a rank: the first connection of rank 1 breaks, after it has come."""
    if os.environ["RANK"] == "1":
        wait, times = common.ranks.wait_for_all, itertools.count()

        def break_once(store, rank, world, end):
            if next(times):
                return wait(store, rank, world, end)
            wait(store, rank, 1, end)
            raise torch.distributed.DistNetworkError("broken pipe")

        common.ranks.wait_for_all = break_once
    meet_within(20, 10, *arguments)


def test_a_rank_whose_connection_breaks_comes_back(tmp_path):
    came = Launch(fail_once_to_connect, (*SMALL, "--epochs", "1", "--run-dir", str(tmp_path / "run")), ranks=2)
    assert came.wait(timeout=60).status == 0, came.err


def die_once_all_came(*arguments):
    """In a rank: rank 1 is gone when the others connect to it."""
    if os.environ["RANK"] == "1":
        torch.distributed.init_process_group = lambda *args, **kwargs: os._exit(9)
    meet_within(4, 10, *arguments)


def test_a_rank_that_dies_while_the_group_forms_holds_nobody(tmp_path):
    came = Launch(die_once_all_came, (*SMALL, "--run-dir", str(tmp_path / "run")), ranks=2)
    came.wait(timeout=40)
    assert [process.exitcode for process in came.processes] == [2, 9]
    assert "the ranks have not met within 4 s" in came.err and "Traceback" not in came.err


def read_for_long(*arguments):
    """In a rank: rank 1 takes longer to read its data than the ranks may take to meet."""
    if os.environ["RANK"] == "1":
        load = pretrain.load_on_every_rank
        pretrain.load_on_every_rank = lambda *args: time.sleep(3) or load(*args)
    meet_within(2, 10, *arguments)


def test_ranks_that_have_met_wait_longer_for_one_that_reads(tmp_path):
    command = (*SMALL, "--epochs", "1", "--run-dir", str(tmp_path / "run"))
    came = Launch(read_for_long, command, ranks=2)
    assert came.wait(timeout=60).status == 0, came.err


def on_a_device_of_its_own(*arguments):
    """In a rank: the device of rank 1 is not there."""
    if os.environ["RANK"] == "1":
        pretrain.choose_device = lambda name: common.ranks.choose_device("toaster")
    run_script("pretrain", *arguments)


def test_a_device_that_one_rank_lacks_ends_every_rank_in_one_line(tmp_path):
    ended = Launch(on_a_device_of_its_own, (*SMALL, "--run-dir", str(tmp_path / "run")), ranks=2).wait(timeout=60)
    assert [process.exitcode for process in ended.processes] == [2, 2]
    assert ended.err.count("\n") == 1 and "--device toaster cannot be used here" in ended.err


# ---------------------------------------------------------------- sweeps


def test_every_run_of_a_sweep_is_shown_with_what_differs(trained, tmp_path):
    for name in ("probed", "running", "begun"):
        shutil.copytree(trained, tmp_path / name)
    train(*SMALL, "--lr", "0.3", "--epochs", "1", "--run-dir", tmp_path / "other rate")
    (tmp_path / "begun" / "log.jsonl").unlink()
    log = tmp_path / "running" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 17, "mean_lo')
    (tmp_path / "probed" / "probe.json").write_text('{"top1": 55.5}')
    (tmp_path / "no run").mkdir()
    words = [str(folder) for folder in sorted(tmp_path.iterdir())]
    shown = CliRunner().invoke(results_table.main, [*words, "--csv"], catch_exceptions=False).output
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(shown))}
    assert set(rows) == {"probed", "running", "begun", "other rate"}
    whole = {"run", "epochs", "lr", "warmup", "warmup_from", "epoch", "last loss", "k-NN %", "probe top-1 %"}
    assert {"run", "epochs", "lr"} < set(rows["begun"]) <= whole
    assert rows["other rate"]["lr"] == "0.3" and rows["probed"]["probe top-1 %"] == "55.5"
    loss = log_of(tmp_path / "other rate")[-1]["mean_loss"]
    assert float(rows["other rate"]["last loss"]) == pytest.approx(loss, rel=1e-4)
    assert rows["begun"]["epoch"] == "0 of 4" and rows["running"]["epoch"] == "4 of 4"
    table = CliRunner().invoke(results_table.main, words, catch_exceptions=False).output.splitlines()
    assert len(table) == 6 and table[0].startswith("| run | epochs | lr")


def test_runs_without_a_test_set_are_shown(tmp_path):
    folder_of(tmp_path / "data", ["train"], ["a", "b"])
    train(*FOLDER, "--data", tmp_path / "data", "--run-dir", tmp_path / "run")
    shown = CliRunner().invoke(results_table.main, [str(tmp_path / "run")], catch_exceptions=False)
    assert shown.exit_code == 0 and "| run | 1 of 1 |" in shown.output


def test_weights_are_kept_over_the_epochs_and_probed_beside_one_another(tmp_path):
    run = tmp_path / "run"
    train(*SMALL, "--keep-every", "2", "--queue", "60", "--run-dir", run)
    kept = {path.name: load_checkpoint(path) for path in run.glob("epoch-*.pt")}
    assert {name: contents["step"] for name, contents in kept.items()} == {"epoch-0002.pt": 8, "epoch-0004.pt": 16}
    last = load_checkpoint(run / "ckpt.pt")
    assert same_bits(kept["epoch-0004.pt"]["encoder"], last["encoder"])
    assert not kept["epoch-0004.pt"]["optimizer"] and "queue" not in kept["epoch-0004.pt"]
    assert (run / "epoch-0004.pt").stat().st_size < 0.6 * (run / "ckpt.pt").stat().st_size
    result = probe(run / "epoch-0002.pt", "--limit", "100")
    assert result["step"] == 8 and (run / "probe-epoch-0002-first100.json").exists()
    contents = torch.load(run / "classifier-epoch-0002-first100.pt", weights_only=True)
    assert contents["step"] == 8 and same_bits(dict(contents["encoder"]), dict(kept["epoch-0002.pt"]["encoder"]))


def test_of_the_ranks_of_a_probe_one_works(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    ended = start("linear_probe", tmp_path / "run", "--limit", "100", ranks=2).wait()
    assert ended.status == 0 and ended.out.count("top-1") == 1
    assert json.loads((tmp_path / "run" / "probe-first100.json").read_text())["step"] == 16
    tested = start("robustness", tmp_path / "run" / "classifier-first100.pt", "--limit", "5", ranks=2).wait()
    assert tested.status == 0 and tested.out.count("severity") == 1


def test_runs_that_are_being_written_are_shown(tmp_path):
    """The last line of their log may be half a line."""
    options = {"dataset": "shapes", "data": "data", "loss": "supcon", "augment": "crop", "batch": 8, "views": 2,
               "epochs": 2, "seed": 0}
    for name, tau in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"options": options | {"tau": tau}}))
        (tmp_path / name / "probe.json").write_text(json.dumps({"top1": 70.5}))
        lines = [{"step": 5 * k, "epoch": k, "mean_loss": float(k), "knn_top1": 40.0 + k} for k in (1, 2)]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "mean_loss": 9'
        (tmp_path / name / "log.jsonl").write_text(text)
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--csv"]
    shown = CliRunner().invoke(results_table.main, words, catch_exceptions=False).output.splitlines()
    assert shown[0] == "run,tau,epoch,last loss,k-NN %,probe top-1 %"
    assert shown[1:] == ["a,0.1,2 of 2,2,42,70.5", "b,0.2,2 of 2,2,42,70.5"]
