"""The Muon optimizer: what it does to singular values, its first step by hand, and torch's own beside it."""

import math

import pytest
import torch
from torch import nn

from rlhf import optim


def quintic(x: float) -> float:
    return 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5


@pytest.mark.parametrize("shape", [(2, 2), (2, 5)])
def test_the_quintic_acts_on_each_singular_value_and_on_nothing_else(shape):
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=torch.manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=torch.manual_seed(1)))
    matrix = left @ torch.diag(torch.tensor([3.0, 4.0])) @ right[:2]  # its norm is 5
    wanted = left @ torch.diag(torch.tensor([quintic(quintic(x)) for x in (0.6, 0.8)])) @ right[:2]
    torch.testing.assert_close(optim.orthogonal(matrix[None], steps=2)[0], wanted, atol=1e-4, rtol=0)


def test_singular_values_that_differ_by_a_factor_of_five_come_out_alike():
    wide = torch.diag(torch.linspace(1, 5, 16)) @ torch.linalg.qr(torch.randn(40, 40))[0][:16]
    values = torch.linalg.svdvals(optim.orthogonal(wide[None])[0])
    assert values.min() > 0.5 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_a_first_step_is_orthogonal_and_as_large_as_adams(shape):
    weight = nn.Parameter(torch.ones(shape))
    gradient = torch.zeros(shape)
    gradient[0, 0] = 7.0
    weight.grad = gradient.clone()
    optim.Muon([weight], lr=0.1, weight_decay=0.5).step()
    moved = torch.full(shape, 1 - 0.1 * 0.5)
    moved[0, 0] -= 0.1 * 0.2 * math.sqrt(3) * quintic(quintic(quintic(1.0)))
    torch.testing.assert_close(weight.detach(), moved, atol=1e-5, rtol=0)


def test_it_is_torchs_muon_in_float32():
    shapes = [(8, 24), (8, 8), (32, 8), (8, 24)]
    draws = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizers = [
        optim.Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=draws)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (one - before).norm()  # bfloat16 has three digits


def test_a_matrix_without_a_gradient_stays():
    weight = nn.Parameter(torch.ones(2, 3))
    optim.Muon([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(2, 3))
