"""What the tests of whole runs share: running the scripts here, reading what they leave, making folders of images."""

import importlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import common.cli
from children import ENVIRONMENT, PROJECT
from common.run_folder import load_checkpoint

SMALL = [
    "--dataset",
    "shapes",
    "--size",
    "16",
    "--limit",
    "200",
    "--batch",
    "50",
    "--epochs",
    "4",
    "--log-every",
    "1",
    "--device",
    "cpu",
]
FOLDER = ["--dataset", "folder", "--arch", "small", "--size", "16", "--batch", "4", "--epochs", "1", "--device", "cpu"]


def train(*arguments):
    """pretrain.py with these words on its command line, in this process; what it refuses is raised."""
    return run_here("pretrain", *arguments)


def probe(*arguments):
    return run_here("linear_probe", *arguments)


def run_here(script, *arguments):
    return importlib.import_module(script).main([*map(str, arguments)], standalone_mode=False)


def torchrun(*arguments, ranks=2):
    """Starts a script on several ranks as users do."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *map(str, arguments),
    ]
    heed = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a test run in the background ignores it, and hands that on
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )


def log_of(run):
    """The log without its clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "images_per_s"} for line in lines]


def state_of(run):
    """The checkpoint without its clock and the options, which name the folder."""
    return {k: v for k, v in load_checkpoint(run / "ckpt.pt").items() if k not in ("seconds", "config")}


def options_of(run):
    return load_checkpoint(run / "ckpt.pt")["config"]


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def refusal(script, arguments, monkeypatch, capsys):
    """The one line on stderr with which a script ends, at exit status 2, for what a user can put right."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        common.cli.run_command(script.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def folder_of(root, splits, classes, count=4, size=(30, 24), kind="png"):
    """ImageFolder's layout with pictures of noise, brighter class by class."""
    for split in splits:
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-20, 20, (3, *size), generator=torch.Generator().manual_seed(i))
                TF.to_pil_image((40 + 60 * k + noise).to(torch.uint8)).save(root / split / name / f"{i}.{kind}")


class StandIn(SimpleNamespace):
    """As much of a run as a Journal looks at."""

    device = torch.device("cpu")
    ends_epoch = property(lambda self: self.step % self.steps_per_epoch == 0)


def files_in(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }
