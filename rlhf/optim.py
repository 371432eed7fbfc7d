"""The optimizers: Adam as in [3] (see ppo.py) for PPO, AdamW for supervised training, Muon beside either."""

import math

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.muon import Muon, inner_matrices
from rlhf.policy import PolicyWithValue


class Adam(torch.optim.Adam):
    """Adam as TensorFlow defines it, which [3] used. It counts its own steps; a step that is skipped does not count.

    TensorFlow adds eps before the second moment's bias is corrected, PyTorch after. With eps / sqrt(1 - beta2^step)
    PyTorch's Adam is the same. Early steps are several times smaller that way.
    """

    EPS, BETAS = 1e-5, (0.9, 0.999)

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr=lr, eps=self.EPS, betas=self.BETAS, fused=True)
        for group in self.param_groups:
            group["steps"] = 0  # in the group, so that state_dict() has it

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            if any(parameter.grad is not None for parameter in group["params"]):
                group["steps"] += 1
                group["eps"] = self.EPS / math.sqrt(1 - self.BETAS[1] ** group["steps"])
        super().step(closure)


class Optimizer:
    """One or two of torch's optimizers that train a model's parameters together, on the gradients of all processes."""

    def __init__(
        self, parameters: list[nn.Parameter], members: list[torch.optim.Optimizer], max_grad_norm: float | None = None
    ):
        self.parameters, self.members, self.max_grad_norm = parameters, members, max_grad_norm

    def set_lr(self, lr: float) -> float:
        """The learning rate of all parameters, but for groups that have one of their own relative to it."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr * group.get("relative_lr", 1.0)
        return lr

    def step(self) -> Tensor:
        """Take a step with the gradients of all processes, and clear them. Returns their norm over all parameters.

        A gradient that is not finite never reaches the weights: then nothing changes.
        """
        distributed.all_reduce_gradients(self.parameters)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            if self.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            for member in self.members:
                member.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, state: list[dict]) -> None:
        for member, of_member in zip(self.members, state, strict=True):
            member.load_state_dict(of_member)


def ppo_optimizer(policy: PolicyWithValue, lr: float, muon: bool, value_lr: float | None = None) -> Optimizer:
    """Adam as in [3]; with `muon`, Muon for the policy's inner matrices and Adam for the rest.

    value_lr: of what belongs to the critic alone, if it differs.
    """
    matrices, critic = inner_matrices(policy.model) if muon else [], policy.critic_parameters()
    groups = [
        {"params": _others(policy, matrices + critic)},
        {"params": critic, "relative_lr": value_lr / lr if value_lr else 1.0},
    ]
    members = [Adam(groups, lr), *([Muon(matrices, lr)] if matrices else [])]
    for member in members:
        member.register_step_post_hook(lambda *_: policy.weights_changed())
    return Optimizer(_trained(policy), members)


def supervised_optimizer(model: nn.Module, lr: float, muon: bool) -> Optimizer:
    """AdamW; with `muon`, Muon for the matrices of the model's body. Gradients are clipped to norm 1.

    Whether an act is right depends on two things together, which a small new model is slow to see; Muon is faster.
    """
    matrices = inner_matrices(model) if muon else []
    adamw = torch.optim.AdamW(_others(model, matrices), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    members = [Muon(matrices, lr, weight_decay=0.01), adamw] if matrices else [adamw]
    return Optimizer(_trained(model), members, max_grad_norm=1.0)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters that train: all but those under adapters."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _others(module: nn.Module, matrices: list[nn.Parameter]) -> list[nn.Parameter]:
    """The module's parameters that train, without these matrices."""
    chosen = {id(matrix) for matrix in matrices}
    return [parameter for parameter in _trained(module) if id(parameter) not in chosen]
