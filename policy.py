"""A language model as a policy with a value head, and what its logits say: log-probabilities, entropy, KL.

Shapes as in ppo.py: B sequences, R response tokens, T query and response tokens, N the real response tokens of all
sequences, one after the other, V vocabulary, H hidden size.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

import gpt2


class PolicyWithValue(nn.Module):
    """A causal language model with a value head on its last hidden states, zero at the start as in [3].

    With `separate_value` the head sits on a copy of the model instead, so that value and policy share no weights ([2]).
    """

    def __init__(self, model: nn.Module, separate_value: bool = False):
        super().__init__()
        self.model = model
        self.value_model = copy.deepcopy(model) if separate_value else None
        self.value_head = nn.Linear(model.get_input_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, ids: Tensor, mask: Tensor, response_mask: Tensor, temperature: float, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids, mask [B, T], response_mask [B, R] -> logits / temperature [N, V] and values [N], in float32.

        states: the model's hidden states [N, H], where they are known.
        """
        if states is None:
            states = response_states(self.model, ids, mask, response_mask)
        logits = token_logits(self.model, states, temperature)
        if self.value_model is not None:
            states = response_states(self.value_model, ids, mask, response_mask)
        return logits, self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1).float()


def position_ids(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T]: positions that count real tokens only, so that left padding changes nothing."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def response_states(model, ids: Tensor, mask: Tensor, response_mask: Tensor) -> Tensor:
    """ids, mask [B, T], response_mask [B, R] -> hidden states [N, H] from which the real response tokens are predicted.

    They are those one position before: only they need to meet the vocabulary.
    """
    if gpt2.fits(model.base_model):
        wanted = torch.zeros_like(mask, dtype=torch.bool)
        wanted[:, -response_mask.shape[1] - 1 : -1] = response_mask
        return gpt2.hidden_states(model.base_model, ids, mask, position_ids(mask), wanted)
    longest = int(response_mask.sum(1).max())
    width = ids.shape[1] - response_mask.shape[1] + longest  # padding behind the longest response is left out
    ids, mask, real = ids[:, :width], mask[:, :width], response_mask[:, :longest].bool()
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    return out.last_hidden_state[:, -longest - 1 : -1][real]


def token_logits(model, states: Tensor, temperature: float) -> Tensor:
    """Hidden states [N, H] -> logits / temperature [N, V], by dividing the H states and not the V logits."""
    layer = model.get_output_embeddings()
    return linear(states / temperature, layer.weight, None if layer.bias is None else layer.bias / temperature).float()


def of_tokens(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the whole vocabulary -> those of ids [N], [N]."""
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def kl_and_entropy(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(policy, reference) and the policy's entropy [N] of distributions given as log-probabilities [N, V]."""
    p = logp.exp()
    entropy = -dot(p, logp)
    return -entropy - dot(p, ref_logp), entropy


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y [N, V] over the vocabulary, [N]; under autocast it would be one in low precision."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.linalg.vecdot(x, y)


class _LogprobAndKl(torch.autograd.Function):
    """of_tokens(log_softmax(logits), ids) and the KL of log_softmax(logits) to ref_logp, [N] each.

    The same numbers and gradients as autograd's with fewer passes over memory: the [N, V] tensors are what an update
    of a small model spends its time on. With p = softmax(logits): d logp_i / d logits = onehot_i - p, and
    d KL / d logits = p * (logp - ref_logp - KL).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
        logp = log_softmax(logits, -1)
        chosen, p, difference = of_tokens(logp, ids), logp.exp(), logp.sub_(ref_logp)
        kl = dot(p, difference)
        ctx.save_for_backward(p, difference, kl, ids)
        return chosen, kl

    @staticmethod
    def backward(ctx, of_logprob: Tensor, of_kl: Tensor) -> tuple[Tensor, None, None]:
        p, difference, kl, ids = ctx.saved_tensors
        gradient = (difference * of_kl.unsqueeze(-1)).sub_((kl * of_kl + of_logprob).unsqueeze(-1)).mul_(p)
        return gradient.scatter_add_(-1, ids.unsqueeze(-1), of_logprob.unsqueeze(-1)), None, None


def logprob_and_kl(logits: Tensor, ids: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N], ref_logp [N, V] -> log-probabilities of ids and KL to the reference, [N]."""
    return _LogprobAndKl.apply(logits, ids, ref_logp)
