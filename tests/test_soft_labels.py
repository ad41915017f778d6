"""Class probabilities at sizes where nobody holds a matrix of all overlaps: what rounding makes of an overlap of 0."""

import pytest
import torch
import torch.nn.functional as F

import losses

LONE, OTHERS, PRIVATE = 24, 600, 40  # more than 512 x 512 scores


def batch(dtype):
    """Rows of which the first LONE share no class with any other row, each over PRIVATE classes of its own with odd
    probabilities, so that a sum of overlaps over all rows less the row's own is 0 but for rounding."""
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(LONE + OTHERS, 16, generator=g, dtype=dtype))
    shared = torch.randn(OTHERS, 10, generator=g, dtype=dtype).softmax(1)
    private = torch.randn(LONE, PRIVATE, generator=g, dtype=dtype).softmax(1)
    y = torch.block_diag(*private.split(1), shared)
    overlaps = (y @ y.T).fill_diagonal_(0)
    assert (overlaps[:LONE] == 0).all() and (overlaps[LONE:].sum(1) > 0).all()
    return z, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [losses.supcon_out, losses.supcon_in])
def test_a_row_whose_overlap_with_all_others_is_zero_is_a_lone_anchor_whatever_rounding_leaves(loss, dtype):
    z, y = batch(dtype)
    z.requires_grad_()
    values = loss(z, y, 0.1, reduction="none")
    assert (values[:LONE] == 0).all() and (values[LONE:] > 0).all()
    (grad,) = torch.autograd.grad(values[:LONE].sum(), z, retain_graph=True)
    assert (grad == 0).all()
    torch.testing.assert_close(loss(z, y, 0.1), values[LONE:].mean())  # and the mean leaves it out


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
def test_a_small_overlap_is_none_of_rounding(share):
    """The other side: two rows that share a class with a small probability are each other's only positive, and as such
    weigh as much as any: L_i = log sum_A exp(s_ia) - s_ip."""
    z, y = batch(torch.float64)
    y = F.pad(y, (0, 1))
    y[:2] *= 1 - share**0.5
    y[:2, -1] = share**0.5  # an overlap of `share`
    values = losses.supcon_out(z, y, 0.1, reduction="none")
    s = (z[:2] @ z.T / 0.1).masked_fill(torch.eye(2, len(z), dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(values[:2], s.logsumexp(1) - s[[0, 1], [1, 0]])
    assert (values[2:LONE] == 0).all()
