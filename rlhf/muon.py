"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024).

torch.optim.Muon computes in bfloat16, which processors without instructions for it do some thirty times slower than
float32, and one matrix after another, which keeps a small model waiting. The numbers are the same but for rounding.
"""

import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic that takes singular values from (0, 1] to about 1
ADAMS_STEP = 0.2  # the usual size of Adam's step of a weight, in learning rates


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers inside a transformer, without embeddings and heads."""
    return [layer.weight for layer in model.base_model.modules() if isinstance(layer, (nn.Linear, Conv1D))]


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """matrices [N, I, J], I <= J -> nearly the nearest ones with orthonormal rows: singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it is taller than wide."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with steps as large as Adam's usually are."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape are made orthogonal together
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for (_, width), matrices in by_shape.items():
                updates = orthogonalize(torch.stack([wide(self._nesterov(matrix)) for matrix in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    step = update.T if matrix.shape[0] > matrix.shape[1] else update
                    matrix.add_(step, alpha=-group["lr"] * ADAMS_STEP * math.sqrt(width))

    def _nesterov(self, matrix: nn.Parameter) -> Tensor:
        """Update the momentum of a matrix with its gradient, and look one step ahead."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)
