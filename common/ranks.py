"""The processes that train together: those that torchrun starts, or one process alone."""

import contextlib
import gc
import os
import time
import traceback
from datetime import timedelta

import click
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
def fast_convolutions(wanted):
    """In this block convolutions may round to TF32, and cuDNN may try which way is the fastest; or neither."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = wanted, wanted
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


MEETING_TIME = 300  # seconds that the ranks have to find each other in
PATIENCE = 10  # seconds before a rank says that it waits
WORKING_TIME = timedelta(hours=2)  # ranks wait for one that downloads or reads; torchrun notices one that is gone


def form_group():
    """Forms the process group of the ranks that torchrun started. Raises Refused where they do not find each other."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    end = time.monotonic() + MEETING_TIME
    met = 0  # meetings that failed after all ranks had come: every rank counts the same
    while True:
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=time_left(end)))
            store = dist.PrefixStore(f"meeting {restart} {met}", store)
            wait_for_all(store, rank, world, end)
            met += 1
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=time_left(end))
            return set_timeout(WORKING_TIME)
        except ValueError as e:
            raise Refused("LOCAL_RANK is set, but torchrun's other variables make no process group "
                          f"({e}): start with torchrun, or unset it") from e
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            if time.monotonic() > end - 1:
                raise Refused(f"the ranks have not met within {MEETING_TIME} s ({reason}): "
                              "see that torchrun runs on every node, with the same --nnodes and endpoint") from e
        time.sleep(1)


def time_left(end):
    return timedelta(seconds=max(1, end - time.monotonic()))


def set_timeout(timeout):
    """How long the ranks of the group wait for each other from now on."""
    public = getattr(dist, "set_timeout", None)  # not before torch 2.14
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, dist.group.WORLD)


def wait_for_all(store, rank, world, end):
    """Returns as soon as `world` ranks have come to the store. Raises RuntimeError after the time `end`."""
    is_new = store.add(f"rank {rank}", 1) == 1  # and not back after a broken connection
    came = store.add("came", int(is_new))
    says_at = time.monotonic() + PATIENCE
    while came < world:
        if time.monotonic() > end:
            raise RuntimeError(f"{came} of {world} ranks came")
        if time.monotonic() > says_at and os.environ["LOCAL_RANK"] == "0":  # once on every node
            click.echo(f"waiting for {world - came} of {world} ranks, for up to {MEETING_TIME} s", err=True)
            says_at = end
        time.sleep(0.05)
        came = store.add("came", 0)


class RefusedElsewhere(SystemExit):
    """Another rank has refused something and says so. This one ends silently, with status 2 as well."""

    def __init__(self):
        super().__init__(2)


class Ranks:
    """The process group of a run. Without torchrun there is none, and this process is rank 0 of 1.

    A refusal on one rank is raised on all: `hold_refusals` keeps what this rank refuses, and `meet` raises it
    everywhere. `refusing_together` does both.
    """

    def __init__(self):
        self.device, self.rank, self.world, self.refusal = torch.device("cpu"), 0, 1, None

    def __enter__(self):
        if "LOCAL_RANK" in os.environ:
            form_group()
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        return self

    def use(self, device):
        """From now on this rank computes on that device, as choose_device gives it."""
        self.device = device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

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
        """Keeps what the block refuses for the next meeting. Until then only such blocks may refuse something."""
        try:
            yield
        except Refused as e:
            self.refusal = self.refusal or e

    @contextlib.contextmanager
    def refusing_together(self):
        """What one rank refuses in this block is raised on all of them at its end."""
        with self.hold_refusals():
            yield
        self.meet()

    def largest(self, *numbers):
        """The largest of each number over the ranks. They travel between CPUs, so that no rank waits for its GPU."""
        held = torch.tensor(numbers, dtype=torch.int32)
        if self.world > 1:
            dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.tolist()

    def from_first(self, found):
        """What rank 0 has found, on every rank."""
        held = [found]
        if self.world > 1:
            dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def meet(self):
        """Waits for all ranks. What one of them has refused is raised on all; if several have, the first one speaks."""
        (speaker,) = self.largest(self.world - self.rank if self.refusal else 0)
        if speaker:
            raise self.refusal if self.rank == self.world - speaker else RefusedElsewhere()


def gather_views(rows, views):
    """The ranks' rows (V n_r, ...), view by view, as the global batch (V n, ...), view by view."""
    by_image = rows.unflatten(0, (views, -1)).transpose(0, 1)  # (n_r, V, ...)
    return losses.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)
