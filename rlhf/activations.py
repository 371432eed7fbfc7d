"""Activation checkpointing: of every layer only its input is kept for the backward pass, which computes the rest again.

transformers' own switch works in training mode only, and not on the fast path; PPO trains in evaluation mode, without
dropout, on both.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import UserError


class _Checkpointed:
    """Mixed into the class of a layer, whose forward pass it wraps; without gradients, as in sampling, nothing changes.

    The pass of a whole text needs no cache, and the second one would fill it twice.
    """

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            args = [None if isinstance(x, Cache) else x for x in args]
            kwargs = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
        return run(self, super().forward, *args, **kwargs)


def checkpoint_layers(model: nn.Module) -> None:
    """Let a model keep the input of each of its layers only."""
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--activation-checkpointing knows no layers in a {type(model).__name__}; leave it out")
    for layer in layers:
        layer.__class__ = type(type(layer).__name__, (_Checkpointed, type(layer)), {})


def run(layer: nn.Module, function: Callable[..., Tensor], *args, **kwargs) -> Tensor:
    """function(*args), the forward pass of a layer or what stands in its place."""
    if isinstance(layer, _Checkpointed) and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return function(*args, **kwargs)
