"""losses.py beneath torch.func and torch.export has the values and gradients that it has without them; DTensor.

Each loss runs on as many rows as a matrix of scores holds, and, by a threshold of 0, on more.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import losses
from children import call
from test_losses import rows_of
from test_strips import strips_of

Y = torch.arange(8).repeat(2) % 3
LOSSES = {
    "L_out": lambda z: losses.supcon_out(z, Y),
    "L_in": lambda z: losses.supcon_in(z, Y),
    "NT-Xent": losses.nt_xent,
    "probabilities": lambda z: losses.supcon_out(z, F.one_hot(Y).to(z) * 0.8 + 0.1),
    "one positive": lambda z: losses.supcon_out(z, Y, denominator="one_positive"),
    "a cap": lambda z: losses.supcon_out(z, Y, positives_cap=2),
    "another set": lambda z: losses.supcon_against(z[2:7], Y[2:7], z, Y, own=2),
    "triplet": lambda z: losses.triplet(z, Y, 1.0),
    "max margin": lambda z: losses.max_margin(z, Y),
    "N-pair": lambda z: losses.n_pair(z[:8], z[8:]),
    "hard": lambda z: losses.hard_contrastive(z, 0.1, 3),
    "simple": lambda z: losses.simple_contrastive(z, 0.1),
    "uniformity": losses.uniformity,
    "the module": lambda z: losses.SupConLoss()(z.unflatten(0, (2, -1)).transpose(0, 1), Y[:8]),
}
sizes = pytest.mark.parametrize("rows", [None, 5], ids=["few rows", "many rows"])


def gradient(loss, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


@sizes
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_torch_func_takes_gradients_and_maps(loss, rows):
    z = torch.stack([rows_of(8, 2, 4), rows_of(8, 2, 4).flip(1)])
    with strips_of(rows):
        torch.testing.assert_close(torch.vmap(loss)(z), torch.stack([loss(batch) for batch in z]))
        expected = torch.stack([gradient(loss, batch) for batch in z])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(z), expected)


def test_beneath_torch_func_scores_are_no_halves_of_autocast():
    z = rows_of(8, 2, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        mapped = torch.vmap(losses.nt_xent)(z[None])[0]
    torch.testing.assert_close(mapped, losses.nt_xent(z))


class Loss(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.loss = getattr(losses, name)

    def forward(self, z, y):
        return self.loss(z, y)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older torch does not say that it exports")
@sizes
@pytest.mark.parametrize("name, strict", [("supcon_out", True), ("supcon_out", False), ("supcon_in", False)])
def test_an_exported_loss_has_its_value_and_gradient(name, strict, rows):
    z = rows_of(8, 2, 4)
    with strips_of(rows):
        exported = torch.export.export(Loss(name), (z, Y), strict=strict)
        loss = lambda z: Loss(name)(z, Y)
        torch.testing.assert_close(exported.module()(z, Y), loss(z))
        torch.testing.assert_close(gradient(lambda z: exported.module()(z, Y), z), gradient(loss, z))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if name.startswith("supcon")]  # so that it can be loaded without losses.py


def test_a_dtensor_is_refused_where_its_rows_would_be_needed():
    """Where two ranks shared its rows the value was wrong: an anchor counted among its own contrasts."""
    call(refuse_dtensors, ranks=1)


def refuse_dtensors():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo")
    shards = init_device_mesh("cpu", (1,)), [Shard(0)]
    z, y = rows_of(8, 2, 4), distribute_tensor(Y, *shards)
    shared = distribute_tensor(z, *shards).requires_grad_()
    for loss in (losses.supcon_out, losses.supcon_sharded, lambda z, y: losses.SupConLoss()(z[:, None], y)):
        with pytest.raises(ValueError, match="full_tensor"):
            loss(shared, y)
    value = losses.supcon_in(shared.full_tensor(), y.full_tensor())
    value.backward()
    loss = lambda z: losses.supcon_in(z, Y)
    torch.testing.assert_close(value, loss(z))
    torch.testing.assert_close(shared.grad.full_tensor(), gradient(loss, z))
    dist.barrier()
    dist.destroy_process_group()
