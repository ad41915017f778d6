"""The probe's grid on features that are extracted once, beside the usual loop that encodes every image in every epoch.

    python benchmarks/linear_probe.py runs/cifar10-jpeg-supcon          # a folder of pretrain.py

1. The grid of twenty cells, 100 epochs each, on 50,000 x 512 made features of ten classes: seconds of the fit.
2. End to end on the run's own training images: ours on all of them; the usual loop, one probe at the cell that ours
   chose, on --part images through all epochs, its time scaled to all of them. The two are compared on that part.
"""

import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import linear_probe as ours  # noqa: E402
from common.cli import run_command  # noqa: E402
from common.data import load_data, take  # noqa: E402
from common.frozen import extract, load_encoder  # noqa: E402
from common.metrics import topk  # noqa: E402
from common.ranks import choose_device  # noqa: E402

CELLS = [(lr, decay) for lr in ours.LRS for decay in ours.DECAYS]


def settings(epochs):
    return SimpleNamespace(
        epochs=epochs,
        batch=512,
        lr=1.0,
        warmup=0.0,
        warmup_from=0.0,
        optimizer="sgd",
        momentum=0.9,
        nesterov=True,
        schedule="cosine",
        label_smoothing=0.0,
        standardize=True,
        seed=0,
    )


def made_features(n, width, classes, device):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    r = torch.randn(classes, width, generator=g)[y] * 0.2 + torch.randn(n, width, generator=g)
    return r.to(device), y.to(device)


def usual_loop(frozen, train, test, cell, epochs, batch=512):
    """(top-1, seconds without the test) of a linear layer trained as most codes do.

    Every batch is encoded when its turn comes, epoch after epoch.
    """
    start = now(frozen.mean.device)
    device = frozen.mean.device
    lr, decay = cell
    y_train, y_test = train.labels.to(device), test.labels.to(device)
    with torch.no_grad():
        r = extract(frozen, train)
        centre, spread = r.mean(0), r.std(0).clamp(min=1e-6)  # the standardisation that ours has as well
    linear = torch.nn.Linear(r.shape[1], len(train.classes), device=device)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr, 0.9, nesterov=True, weight_decay=decay)
    steps = len(y_train) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(y_train)).split(batch)[:steps]:
            with torch.no_grad():
                x = (frozen(train.images[rows]) - centre) / spread
            optimizer.zero_grad()
            F.cross_entropy(linear(x), y_train[rows.to(device)]).backward()
            optimizer.step()
            schedule.step()
    seconds = now(device) - start
    with torch.no_grad():
        return topk(linear((extract(frozen, test) - centre) / spread), y_test, 1), seconds


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--epochs", default=100, show_default=True)
@click.option(
    "--part",
    type=click.IntRange(min=512),
    default=5000,
    show_default=True,
    help="Images that the usual loop is measured on.",
)
@click.option("--device")
def main(run, epochs, part, device):
    """Time the probe of RUN's encoder."""
    device = choose_device(device)
    name = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else name
    click.echo(f"{name}, torch {torch.__version__}, python {platform.python_version()}; {run}")
    r, y = made_features(50_000, 512, 10, device)
    start = now(device)
    ours.probe(r, y, 10, CELLS, settings(epochs))
    click.echo(
        f"50,000 x 512 features, {len(CELLS)} cells, {epochs} epochs, and the best cell once more: "
        f"{now(device) - start:.1f} s"
    )

    frozen = load_encoder(run / "ckpt.pt", device)
    source = (frozen.config["dataset"], frozen.config["data"])
    train, test = load_data(*source, train=True, size=frozen.size), load_data(*source, train=False, size=frozen.size)
    n = len(train.labels)

    def end_to_end(some):
        start = now(device)
        r_train, r_test = extract(frozen, some), extract(frozen, test)
        found = ours.probe(r_train, some.labels.to(device), len(train.classes), CELLS, settings(epochs))
        top1 = topk(found.classifier(r_test), test.labels.to(device), 1)
        return top1, found.cell, now(device) - start

    few = take(train, torch.arange(min(part, n)))
    part_top1, cell, _ = end_to_end(few)
    usual_top1, usual = usual_loop(frozen, few, test, cell, epochs)
    usual *= n / len(few.labels)
    top1, _, seconds = end_to_end(train)
    click.echo(
        f"{len(few.labels)} images of {frozen.config['dataset']}: ours {part_top1:.2f} %, the usual loop "
        f"{usual_top1:.2f} % (lr {cell[0]:g}, weight decay {cell[1]:g})"
    )
    click.echo(
        f"{n} images: ours, {len(CELLS)} probes, {seconds:.1f} s ({top1:.2f} %); "
        f"the usual loop, 1 probe, {usual:.0f} s (scaled from {len(few.labels)} images): {usual / seconds:.0f} times"
    )


if __name__ == "__main__":
    run_command(main)
