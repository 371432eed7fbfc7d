"""A language model as a policy with a value head.

Shapes as in ppo.py: B sequences, R response tokens, T query and response tokens, N the real response tokens of all
sequences, one after the other, H hidden size.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf import lora
from rlhf.forward import hidden_states
from rlhf.precision import LowPrecisionCopy


class PolicyWithValue(nn.Module):
    """A causal language model with a value head on its last hidden states, zero at the start as in [3].

    With `separate_value` the head sits on a copy of the model instead, so that value and policy share no weights ([2]).
    The weights are float32; in bfloat16 `precision` the forward passes are those of copies (precision.py).
    """

    def __init__(self, model: nn.Module, separate_value: bool = False, precision: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.value_model = copy.deepcopy(model) if separate_value else None
        self.value_head = nn.Linear(model.get_input_embeddings().weight.shape[1], 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        models = [model, self.value_model] if separate_value else [model]
        self._copies = {id(each): LowPrecisionCopy(each) for each in models if precision == torch.bfloat16}
        self.register_load_state_dict_post_hook(lambda policy, _: policy.weights_changed())

    def weights_changed(self) -> None:
        """Call this after every step of an optimizer; `optim.ppo_optimizer` sees to it."""
        for low_precision_copy in self._copies.values():
            low_precision_copy.is_stale = True

    def in_precision(self, model: nn.Module | None = None) -> nn.Module:
        """The model that computes for `model`, by default the policy's own: itself, or its copy in bfloat16."""
        model = self.model if model is None else model
        return self._copies[id(model)].refreshed() if self._copies else model

    @torch.no_grad()
    def interpolate(self, reference: nn.Module, fraction: float) -> None:
        """Move the language model's weights along a straight line to this fraction of the way from the reference's.

        reference: in float32. See "Linear interpolation towards initialization" in Rame et al. 2024, arXiv 2406.16768.
        """
        for trained, at_start in lora.with_starting_weights(self.model, reference):
            trained.copy_(torch.lerp(at_start.to(trained), trained, fraction))
        self.weights_changed()

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those of the critic alone: the value head's, and those of a separate value model."""
        of_model = [] if self.value_model is None else self.value_model.parameters()
        return [*self.value_head.parameters(), *of_model]

    @contextlib.contextmanager
    def learning(self, critic_only: bool) -> Iterator[None]:
        """Within it, the critic alone learns if `critic_only`: no weight that the policy has, too, gets a gradient."""
        models = {self.model, self.in_precision()} if critic_only else ()
        weights = {parameter for model in models for parameter in model.parameters() if parameter.requires_grad}
        for parameter in weights:
            parameter.requires_grad_(False)
        yield
        for parameter in weights:
            parameter.requires_grad_(True)

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids, mask [B, T], places [N] in them -> the model's last hidden states there [N, H], and values [N].

        states: the hidden states, where they are known already.
        """
        if states is None:
            states = hidden_states(self.in_precision(), ids, mask, places)
        if self.value_model is None:
            return states, self.value_head(states).squeeze(-1)
        value_states = hidden_states(self.in_precision(self.value_model), ids, mask, places)
        return states, self.value_head(value_states).squeeze(-1)
