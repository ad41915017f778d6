"""A pretraining step of ResNet-50 on H100s, on paper: FLOPs, bytes, memory, times. Nothing of it was measured on a GPU.

    python benchmarks/scaling.py                                                     the tables of docs/scaling.md
    python benchmarks/scaling.py --tflops 312 --tflops-float32 19.5 --bandwidth 2.0 --nvlink 300     on A100s

The parts of a step run on the tests' imitated device, without numbers. docs/scaling.md says how they are counted.
"""

import contextlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests/tools")]
import losses
from common.models import Model, build_encoder, build_projection, widths_of
from common.views import draw_view, make_view

D, VIEWS, NODE = 128, 2, 8  # NVLink joins 8 GPUs
NO_KERNELS = {"detach", "empty", "empty_like", "new_empty", "resize_", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts the kernels that are started while it is entered, and what a graph keeps; `gpu` has the rates."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.count, self.flops, self.busy, self.kept, self.bytes_kept = gpu, 0, 0, 0.0, {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, result)) if hasattr(x, "held")]
        if tensors and not op.is_view and name not in NO_KERNELS:
            formula = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
            flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            moved = sum(min(x.held.nbytes, x.held.untyped_storage().nbytes()) for x in tensors)
            rate = self.gpu.tflops if tensors[0].dtype == torch.bfloat16 else self.gpu.tflops_float32
            self.count += 1
            self.flops += flops
            self.busy += max(flops / rate, moved / self.gpu.bandwidth) / 1e12
        return result

    @property
    def ms(self):
        return max(1e3 * self.busy, self.count * self.gpu.launch / 1e3)

    def keep(self, x):
        storage = getattr(x, "held", x).untyped_storage()
        if storage._cdata not in self.kept and not isinstance(x, torch.nn.Parameter):
            self.kept[storage._cdata] = storage
            self.bytes_kept += storage.nbytes()
        return x


@contextlib.contextmanager
def imitated():
    import imitated_gpu  # which registers its device for the whole process
    with imitated_gpu.imitated(held_on="meta"):
        yield imitated_gpu.DEVICE


def views(gpu, n, size):
    """The Kernels that make one view of n images."""
    with imitated() as gpu0, Kernels(gpu) as kernels:
        images, mean = torch.empty(n, 3, size, size, dtype=torch.uint8, device=gpu0), torch.empty(3, device=gpu0)
        make_view(images, draw_view(n, size, "sim", ("scaling",)).to(gpu0), mean, mean)
    return kernels


def encoding(gpu, n, size, graph=True):
    """(Kernels, weights) of the model's pass over n views and, with a graph, back."""
    with torch.device("meta"):
        encoder, width = build_encoder("resnet50", "3x3" if size <= 64 else "7x7")
        model = Model(encoder, build_projection(widths_of(f"r-{D}", width)), autocast=torch.bfloat16)
    with imitated() as gpu0, torch.set_grad_enabled(graph):
        model.to_empty(device=gpu0)
        x = torch.empty(n, 3, size, size, device=gpu0)
        with Kernels(gpu) as kernels, saved_tensors_hooks(kernels.keep, lambda x: x):
            z, _ = model(x)
            if graph:
                z.backward(torch.empty_like(z))
    return kernels, sum(p.numel() for p in model.parameters())


def loss(gpu, rows, mine):
    """The Kernels of L_out and its gradient, of `mine` rows against the rows of all GPUs."""
    losses._are_near = lambda *sums: True  # as for unit rows; here it has no numbers to look at
    with imitated() as gpu0:
        z, y = torch.empty(rows, D, device=gpu0).requires_grad_(), torch.empty(rows, dtype=torch.long, device=gpu0)
        with Kernels(gpu) as kernels, saved_tensors_hooks(kernels.keep, lambda x: x):
            value = losses.supcon_out(z, y) if mine == rows else losses.supcon_against(z[:mine], y[:mine], z, y, own=0)
            value.backward()
    return kernels


def step(gpu, size, batch, gpus):
    """What one of the GPUs does, sends and holds in a step: a dict."""
    rows, mine = VIEWS * batch, VIEWS * batch // gpus
    scores, (some, weights) = loss(gpu, rows, mine), encoding(gpu, 64, size)
    beside = 16 * weights + scores.bytes_kept + 8 * math.prod(losses.STRIP_ON_GPU)  # gradients, momentum; two strips
    part = mine
    while part > 1 and beside + part * some.bytes_kept / 64 > 1e9 * gpu.memory:
        part //= 2
    parts = mine // part
    (passes, _), (first, _) = encoding(gpu, part, size), encoding(gpu, part, size, graph=False)
    made = VIEWS * views(gpu, part // VIEWS, size).ms
    ring = 2 * (gpus - 1) / gpus  # how often each GPU sends what all add up
    z, gradient = 2 * ring * rows * D * 4 / 1e6, ring * weights * 4 / 1e6  # MB: z and its gradient
    link = gpu.nvlink if gpus <= NODE else min(gpu.nvlink, NODE * gpu.network / 8)  # MB/ms; a node's cards together
    ms = {"views": parts * made, "encoder": parts * passes.ms, "first pass": (parts > 1) * parts * (made + first.ms),
          "loss": scores.ms, "send z": z / link, "send gradient": gradient / link}
    return {"batch": batch, "GPUs": gpus, "views at a time": part, "GB": (beside + passes.bytes_kept) / 1e9,
            "encoder, TFLOP": parts * passes.flops / 1e12, "loss, TFLOP": scores.flops / 1e12, "sent, MB": z + gradient,
            **{f"{name}, ms": time for name, time in ms.items()}, "loss, %": 100 * ms["loss"] / sum(ms.values())}


def table(rows):
    write = lambda v: f"{v:,}" if isinstance(v, int) else f"{v:,.{0 if v >= 99.95 else 1 if v >= 1 else 2}f}"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(write, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--size", "sizes", type=int, multiple=True, default=(32, 224), help="Pixels; each makes a table.")
@click.option("--batch", "batches", type=int, multiple=True, default=(1024, 4096, 16384, 65536), help="Images in all.")
@click.option("--gpus", "counts", type=int, multiple=True, default=(1, 8, 64), help="How many GPUs there are.")
@click.option("--tflops", default=989.0, help="TFLOP/s in bfloat16.")
@click.option("--tflops-float32", default=67.0, help="TFLOP/s in float32, without TF32.")
@click.option("--bandwidth", default=3.35, help="TB/s between a GPU and its memory.")
@click.option("--memory", default=80.0, help="GB of a GPU.")
@click.option("--nvlink", default=450.0, help="GB/s that a GPU sends to others of its node.")
@click.option("--network", default=400.0, help="Gb/s of each GPU's network card.")
@click.option("--launch", default=5.0, help="Microseconds in which the CPU starts a kernel.")
def main(sizes, batches, counts, **rates):
    """Prints what a step of ResNet-50 costs."""
    if min(sizes) < 1 or any(count < 1 or batch < count or batch % count for batch in batches for count in counts):
        raise click.UsageError("--size and --gpus are at least 1, and every --batch is a multiple of every --gpus")
    for size in sizes:
        rows = [step(SimpleNamespace(**rates), size, batch, gpus) for batch in batches for gpus in counts]
        print(f"{size} x {size} pixels:\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
