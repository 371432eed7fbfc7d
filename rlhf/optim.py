"""The optimizers: Adam as in [3] (see ppo.py), and Muon for the matrices of small models.

Muon is momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024). torch.optim.Muon
computes in bfloat16, which processors without instructions for it do some thirty times slower than float32; and one
matrix after another, which keeps a small model waiting. The numbers are the same but for rounding.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from rlhf.policy import PolicyWithValue

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic that takes singular values from (0, 1] to about 1


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers inside a transformer, without embeddings and heads."""
    return [layer.weight for layer in model.base_model.modules() if isinstance(layer, (nn.Linear, Conv1D))]


def orthogonal(matrices: Tensor, steps: int = 3) -> Tensor:
    """matrices [N, I, J], I <= J -> nearly the nearest ones with orthonormal rows: singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with steps as large as Adam's usually are (0.2 a weight, times lr)."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for shape, matrices in shapes.items():
                wide = [(matrix.grad.T if matrix.shape[0] > matrix.shape[1] else matrix.grad) for matrix in matrices]
                gradients, state = torch.stack(wide), self.state[matrices[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(gradients))
                momentum.lerp_(gradients, 1 - MOMENTUM)
                updates = orthogonal(gradients.lerp_(momentum, MOMENTUM))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update.T if matrix.shape[0] > matrix.shape[1] else update
                    matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(shape[1]))


class Adam(torch.optim.Adam):
    """Adam as TensorFlow defines it, which [3] used; it counts its own steps, and a step that is skipped is none.

    TensorFlow adds eps before the second moment's bias is corrected, PyTorch after; eps / sqrt(1 - beta2^step) makes
    PyTorch's Adam the same. Early steps are several times smaller that way.
    """

    EPS, BETAS = 1e-5, (0.9, 0.999)

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, lr=lr, eps=self.EPS, betas=self.BETAS, fused=True)
        for group in self.param_groups:
            group["steps"] = 0  # here, so that a checkpoint has it

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            group["eps"] = self.EPS / math.sqrt(1 - self.BETAS[1] ** group["steps"])
        super().step(closure)


def make_optimizers(policy: PolicyWithValue, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Adam as in [3]; with `muon`, Muon for the policy's inner matrices, and Adam for the rest."""
    matrices = inner_matrices(policy.model) if muon else []
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in policy.parameters() if id(parameter) not in chosen]
    optimizers = [Adam(others, lr), *([Muon(matrices, lr)] if matrices else [])]
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: policy.weights_changed())
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> float:
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr
    return lr
