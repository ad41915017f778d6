"""The processes that train together: those that torchrun starts, or one process alone."""

import contextlib
import datetime
import gc
import os
import traceback

import torch
import torch.distributed as dist

import losses
from common.cli import Refused


def choose_device(name):
    """The torch device of that name; under torchrun the GPU of this rank. Raises Refused where it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)
        x.item()  # "meta" has no values
        return x.device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise Refused(f"--device {name} cannot be used here: leave it out, or try --device cpu") from e


@contextlib.contextmanager
def tf32_allowed(allowed):
    """Convolutions may, or may not, round to TF32 in this block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class RefusedElsewhere(SystemExit):
    """Another rank has refused something and says so. This one ends silently, with status 2 as well."""

    def __init__(self):
        super().__init__(2)


class Ranks:
    """The process group of a run. Without torchrun there is none, and this process is rank 0 of 1.

    A refusal on one rank is raised on all: `hold_refusals` keeps what this rank refuses, and `meet` raises it
    everywhere.
    """

    def __init__(self, device):
        """device: a torch device, as choose_device gives it."""
        self.device, self.rank, self.world, self.refusal = torch.device(device), 0, 1, None

    def __enter__(self):
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if "LOCAL_RANK" not in os.environ:
            return self
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:  # ranks wait for one that downloads or reads; torchrun notices one that is gone
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        except (ValueError, RuntimeError) as e:
            raise Refused("LOCAL_RANK is set, but torchrun's other variables make no process group: "
                          "start with torchrun, or unset it") from e
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, kind, error, trace):
        """Leaves the group together with the others; after an error that they do not know of, at once."""
        agreed = error is None or isinstance(error, (Refused, SystemExit))
        if self.world > 1 and agreed:
            traceback.clear_frames(trace)  # gloo aborts at exit while a DistributedDataParallel is there:
            gc.collect()  # an error's frames keep it, and it keeps itself
            dist.barrier()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def hold_refusals(self):
        """Keeps what the block refuses for the next meeting. Nothing else may be refused before it."""
        try:
            yield
        except Refused as e:
            self.refusal = self.refusal or e

    def largest(self, *numbers):
        """The largest of each number over the ranks. They travel between CPUs, so that no rank waits for its GPU."""
        held = torch.tensor(numbers, dtype=torch.int32)
        if self.world > 1:
            dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.tolist()

    def meet(self):
        """Waits for all ranks. What one has refused is raised on all; the first of several that have is the one to speak."""
        (speaker,) = self.largest(self.world - self.rank if self.refusal else 0)
        if speaker:
            raise self.refusal if self.rank == self.world - speaker else RefusedElsewhere()


def gather_views(rows, views):
    """The ranks' rows (V n_r, ...), view by view, as the global batch (V n, ...), view by view."""
    by_image = rows.unflatten(0, (views, -1)).transpose(0, 1)  # (n_r, V, ...)
    return losses.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)
