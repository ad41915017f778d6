"""Time and peak memory of the losses, forward and backward, beside other forms of L_out, in turn in one run.

    python benchmarks/losses.py                        2 x 16 to 2 x 65536 rows; the large ones take minutes on a CPU
    python benchmarks/losses.py --images 16 --images 4096 --json table.json
    python benchmarks/losses.py --device cuda --images 65536

"textbook" is the loss as it is usually written: a mask matrix, the row maximum, exp, log, and autograd. Forms that hold
N x N numbers are left out above --dense-rows. pytorch-metric-learning and lightly take part where they are installed.

Times are medians of rounds in which every form runs in turn, short ones after a call that warms the caches (what takes
longer than --budget runs once). Each peak is taken in a process of its own, beyond the inputs. "of limit" is the share
of the arithmetic limit: 2 N^2 D multiply-adds at the rate of a product of a 4096 x 4096 matrix with one of 4096 x D,
measured before the rounds of each size.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses

TAU = 0.1


def textbook_out(z, y):
    log_p, p = textbook_terms(z, y)
    return -((p * log_p).sum(1) / p.sum(1)).mean()


def textbook_in(z, y):
    log_p, p = textbook_terms(z, y)
    return -((p * log_p.exp()).sum(1) / p.sum(1)).log().mean()


def textbook_terms(z, y):
    s = z @ z.T / TAU
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device)
    p = (y[:, None] == y).float() * others
    return s - (s.exp() * others).sum(1, keepdim=True).log(), p


def metric_learning():
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TAU)


def lightly():
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TAU)
    return lambda z, y: loss(*z.chunk(2))


FORMS = {  # name: (makes a function of (z, y), holds N x N numbers)
    "ours, L_out": (lambda: lambda z, y: losses.supcon_out(z, y, TAU), False),
    "ours, L_in": (lambda: lambda z, y: losses.supcon_in(z, y, TAU), False),
    "textbook, L_out": (lambda: textbook_out, True),
    "textbook, L_in": (lambda: textbook_in, True),
    "pytorch-metric-learning": (metric_learning, True),
    "lightly, NT-Xent": (lightly, True),
}


def installed(name):
    try:
        FORMS[name][0]()
    except ImportError:
        return False
    return True


def inputs(images, classes, width, device):
    """Two views of `images` images: unit rows (2 images, width), views stacked, and their labels."""
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(2 * images, width, generator=g)).to(device)
    return z.requires_grad_(), torch.randint(classes, (images,), generator=g).repeat(2).to(device)


def step(loss, z, y):
    """One forward and backward, to its end."""
    z.grad = None
    loss(z, y).backward()
    if z.is_cuda:
        torch.cuda.synchronize()


def seconds(f, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - start) / repeats


def times(runs, budget):
    """The median seconds of each of the functions `runs`, in rounds of all of them, for about `budget` seconds.

    A first call is not counted, unless it takes so long that what it sets up is nothing beside it.
    """
    first = {name: seconds(run, 1) for name, run in runs.items()}
    first = {name: value if value > budget else seconds(runs[name], 1) for name, value in first.items()}
    taken = {name: [value] if value > budget else [] for name, value in first.items()}
    repeats = {name: max(1, round(0.01 / value)) for name, value in first.items()}
    start = time.perf_counter()
    while (
        any(len(values) < 3 and first[name] < budget for name, values in taken.items())
        or time.perf_counter() - start < budget
    ):
        for name, run in runs.items():
            if first[name] < budget:
                if repeats[name] > 1:
                    run()  # what ran before has left the caches cold, which is nothing beside a single long call
                taken[name].append(seconds(run, repeats[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_in_this_process(name, images, classes, width, device):
    """Bytes that one step holds at most beyond its inputs."""
    loss = FORMS[name][0]()
    for few in (8, 300):  # loads what first calls load
        step(loss, *inputs(few, 2, width, device))
    z, y = inputs(images, classes, width, device)
    if z.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, z, y)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # brings the high-water mark down to what is resident now
    step(loss, z, y)
    return resident("VmHWM") - before


def resident(mark):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(mark)).split()[1])


def peak(*arguments):
    command = [sys.executable, __file__, "--peak-of", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


@click.command()
@click.option(
    "--images",
    multiple=True,
    type=click.IntRange(min=1),
    default=(16, 64, 256, 1024, 4096, 8192, 65536),
    show_default=True,
    help="Images, of two views each.",
)
@click.option(
    "--classes", multiple=True, type=click.IntRange(min=1), default=(10, 1000), show_default=True, help="Classes."
)
@click.option("--width", type=click.IntRange(min=1), default=128, show_default=True, help="D.")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--dense-rows", default=8192, show_default=True, help="The largest N for forms that hold N x N numbers.")
@click.option("--budget", default=4.0, show_default=True, help="Seconds of rounds for a size; at least three rounds.")
@click.option("--json", "path", type=click.Path(), help="Write the rows of the table to this file as well.")
@click.option("--peak-of", hidden=True)
def main(images, classes, width, device, dense_rows, budget, path, peak_of):
    """Print a table of times, shares of the arithmetic limit and peak memory."""
    if peak_of:
        return click.echo(peak_in_this_process(*json.loads(peak_of)))
    forms = [name for name in FORMS if installed(name)]
    name = device_name(device)
    click.echo(
        f"{name}, torch {torch.__version__}, python {platform.python_version()}, float32, D = {width}, tau = {TAU}\n"
    )
    click.echo(
        "| rows | classes | form | ms | times ours | of limit, % | peak, MB |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    table = []
    left, right = torch.randn(4096, 4096, device=device), torch.randn(4096, width, device=device)

    def product():
        left @ right
        if left.is_cuda:
            torch.cuda.synchronize()

    for n in images:
        for c in classes:
            z, y = inputs(n, c, width, device)
            fit = [form for form in forms if 2 * n <= dense_rows or not FORMS[form][1]]
            runs = {form: lambda loss=FORMS[form][0](): step(loss, z, y) for form in fit}
            limit = 2 * statistics.median(seconds(product, 1) for _ in range(7)) * len(z) ** 2 / left.numel()
            median = times(runs, budget)
            for form, value in median.items():
                bytes_ = peak(form, n, c, width, device)
                row = {
                    "rows": len(z),
                    "classes": c,
                    "form": form,
                    "ms": 1000 * value,
                    "times_ours": value / median[ours(form)],
                    "of_limit": 100 * limit / value,
                    "peak_mb": None if bytes_ is None else bytes_ / 1e6,
                }
                table.append(row)
                mb = "-" if bytes_ is None else f"{row['peak_mb']:.1f}"
                click.echo(
                    f"| 2 x {n} | {c} | {form} | {row['ms']:.3g} | {row['times_ours']:.2f} | "
                    f"{row['of_limit']:.0f} | {mb} |"
                )
    if path:
        Path(path).write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": table}, indent=1) + "\n")


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def ours(form):
    return "ours, L_in" if form.endswith("L_in") else "ours, L_out"


if __name__ == "__main__":
    main()
