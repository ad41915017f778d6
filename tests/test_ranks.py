"""Losses across 1 to 4 ranks with unequal and empty shards against one process: value and parameters' gradients.

The second half runs on each rank; torchrun starts this file there.
"""

import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":  # torchrun knows no path but this file's
    sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import losses
from children import call
from runs import torchrun

SIZES = (losses.MATRIX, losses.STRIP), (0, (4, 5))  # a matrix of scores, and strips below any shard here
SHARDS = {1: [(0, 13)], 2: [(0, 9), (9, 13)], 3: [(0, 4), (4, 4), (4, 13)], 4: [(0, 0), (0, 1), (1, 8), (8, 13)]}


@pytest.mark.parametrize("ranks", SHARDS)
def test_ranks_with_unequal_shards_are_one_process(ranks):
    call(compare_all, range(4), ranks=ranks)


@pytest.mark.long
@pytest.mark.parametrize("time", range(2))
@pytest.mark.parametrize("ranks", SHARDS)
def test_torchrun_starts_and_ends_ranks_again_and_again(ranks, time):
    process = torchrun(__file__, time, ranks=ranks)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


class Heads(nn.Module):
    """z and class scores, as a pretraining with a joint cross-entropy head has them."""

    def __init__(self):
        super().__init__()
        self.projection, self.classifier = nn.Linear(5, 3).double(), nn.Linear(5, 4).double()

    def forward(self, x):
        return F.normalize(self.projection(x)), self.classifier(x)


def local_losses(z, logits, y, image, queue):
    """What a rank computes of its own rows; on one process, the whole batch."""
    every = torch.ones_like(y, dtype=torch.bool)
    return {
        "L_out": losses.supcon_sharded(z, y),
        "L_in": losses.supcon_sharded(z, y, 0.05, variant="in"),
        "NT-Xent": losses.supcon_sharded(z, image, 0.5),
        "a queue": losses.supcon_sharded(z, y, queue=queue),
        "a queue, L_in": losses.supcon_sharded(z, y, queue=queue, variant="in"),
        "one positive": losses.supcon_sharded(z, y, denominator="one_positive"),
        "negatives, L_in": losses.supcon_sharded(z, y, variant="in", denominator="negatives"),
        "no negatives": losses.supcon_sharded(z, 0 * y, denominator="negatives"),
        "one positive, a queue": losses.supcon_sharded(z, y, queue=queue, denominator="one_positive"),
        "with cross-entropy": losses.supcon_sharded(z, y)
        + losses.global_mean(F.cross_entropy(logits, y, reduction="none"), every),
        "no value counts": losses.global_mean(z.sum(1), ~every),
        "gathered": losses.supcon_out(losses.all_gather_rows(z), losses.all_gather_rows(y)),
        "gathered triplets": losses.triplet(losses.all_gather_rows(z), losses.all_gather_rows(y), mining="hard"),
    }


def whole_losses(z, logits, y, image, queue):
    """The same from the functions that know nothing of ranks."""
    both = torch.cat([z, queue[0]]), torch.cat([y, queue[1]])
    out = losses.supcon_out(z, y)
    return {
        "L_out": out,
        "L_in": losses.supcon_in(z, y, 0.05),
        "NT-Xent": losses.supcon_out(z, image, 0.5),
        "a queue": losses.supcon_against(z, y, *both, own=0),
        "a queue, L_in": losses.supcon_against(z, y, *both, own=0, variant="in"),
        "one positive": losses.supcon_out(z, y, denominator="one_positive"),
        "negatives, L_in": losses.supcon_in(z, y, denominator="negatives"),
        "no negatives": 0 * out,
        "one positive, a queue": losses.supcon_against(z, y, *both, own=0, denominator="one_positive"),
        "with cross-entropy": out + F.cross_entropy(logits, y),
        "no value counts": 0 * out,
        "gathered": out,
        "gathered triplets": losses.triplet(z, y, mining="hard"),
    }


def compare(seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(13, 5, generator=g, dtype=torch.double), torch.randint(3, (13,), generator=g)
    y[5] = 3  # alone in its class, a positive of the queue's
    image = torch.arange(13) % 7
    queue = F.normalize(torch.randn(6, 3, generator=g, dtype=torch.double)), torch.randint(4, (6,), generator=g)
    first, end = SHARDS[dist.get_world_size()][dist.get_rank()]
    torch.manual_seed(seed)
    whole, model = Heads(), Heads()
    model.load_state_dict(whole.state_dict())
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for labels in (y.bool(), y.to(torch.int16), x.half()):
        gathered = losses.all_gather_rows(labels[first:end])
        assert gathered.dtype == labels.dtype and torch.equal(gathered, labels)
    expected = whole_losses(*whole(x), y, image, queue)
    for name, value in expected.items():
        whole.zero_grad()
        value.backward(retain_graph=True)
        model.zero_grad()
        mine = slice(first, end)
        loss = local_losses(*parallel(x[mine]), y[mine], image[mine], queue)[name]
        loss.backward()
        torch.testing.assert_close(loss, value, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")
        for ours, theirs in zip(model.parameters(), whole.parameters()):
            ours, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m: f"gradient of {name}: {m}")


def compare_all(seeds):
    dist.init_process_group("gloo")
    for seed in seeds:
        losses.MATRIX, losses.STRIP = SIZES[seed % 2]
        compare(seed)
    gc.collect()  # DistributedDataParallel holds itself, and gloo aborts at exit while it is there
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    compare_all([2 * int(sys.argv[1]), 2 * int(sys.argv[1]) + 1])
