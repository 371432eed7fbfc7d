"""A language model as a policy with a value head, and what its logits say: log-probabilities, entropy, KL.

Shapes as in ppo.py: B sequences, R response tokens, T query and response tokens, N the real response tokens of all
sequences, one after the other, V vocabulary, H hidden size.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf import fast_path
from rlhf.precision import LowPrecisionCopy, is_bfloat16, product


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


def position_ids(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T]: positions that count real tokens only, so that left padding changes nothing."""
    return (mask.cumsum(1) - 1).clamp(min=0)


# The two forward passes of every model. GPT-2 and Llama take the fast path, all others transformers' own.


def hidden_states(model, ids: Tensor, mask: Tensor, places: Tensor, positions: Tensor | None = None) -> Tensor:
    """ids, mask [B, T], places [N] of real tokens among all B * T -> the model's last hidden states there, [N, H].

    positions [B, T]: `position_ids`, or those that the model was trained with.
    """
    positions = position_ids(mask) if positions is None else positions
    if fast_path.is_supported(model.base_model):
        return fast_path.hidden_states(model.base_model, ids, mask, positions, places)
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return fast_path.Take.apply(out.last_hidden_state.flatten(0, 1), places)


def next_hidden_states(model, tokens: Tensor, mask: Tensor, padded: bool, positions: Tensor, cache) -> Tensor:
    """The last hidden states [B, H] of tokens [B] at positions [B], which are added to `cache`.

    mask [B, T]; padded: whether any of it is 0.
    """
    if fast_path.is_supported(model.base_model):
        return fast_path.next_states(model.base_model, tokens, mask if padded else None, positions, cache)
    out = model.base_model(
        input_ids=tokens.unsqueeze(1),
        attention_mask=mask,
        position_ids=positions.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


# the vocabulary

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**30}  # of logits at a time; a CPU's caches hold little


class Head(NamedTuple):
    """The output layer of a language model, for states that are divided by the temperature."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    is_bfloat16: bool  # whether it multiplies in bfloat16

    def logits(self, states: Tensor) -> Tensor:
        """[N, H] -> [N, V], in float32."""
        logits = product(states, self.weight.T) if self.is_bfloat16 else states @ self.weight.T
        return logits if self.bias is None else logits + self.bias


def head_of(model, temperature: float) -> Head:
    layer = model.get_output_embeddings()
    return Head(layer.weight, None if layer.bias is None else layer.bias / temperature, is_bfloat16(model))


class TokenStatistics(NamedTuple):
    """What policy and reference say of N tokens, [N] each, in nats."""

    logprobs: Tensor
    ref_logprobs: Tensor
    exact_kl: Tensor  # KL(policy, reference) of the whole distribution
    entropy: Tensor  # of the policy
    ref_log_totals: Tensor  # log of the sum of exp(logits) of the reference


# The [N, V] tensors are what an update of a small model spends its time on, and what a large one has no memory for. So
# they come in chunks that are read while they are in the cache, and nothing is divided by a sum before it is summed.


@torch.no_grad()
def token_statistics(
    model, states: Tensor, reference, ref_states: Tensor, ids: Tensor, temperature: float
) -> TokenStatistics:
    """Hidden states [N, H] of policy and reference -> what both say of the tokens ids [N] that came."""
    head, ref_head = head_of(model, temperature), head_of(reference, temperature)
    states, ref_states = states / temperature, ref_states / temperature
    statistics = []
    for rows in chunks(len(ids), head.weight):
        logits, unnormalised, total, logprobs = softmax_pieces(head.logits(states[rows]), ids[rows])
        ref_logits = ref_head.logits(ref_states[rows])
        ref_log_total = ref_logits.logsumexp(1)
        ref_logprobs = select_tokens(ref_logits, ids[rows]) - ref_log_total
        entropy = total.log() - dot(unnormalised, logits) / total
        kl, _ = kl_of(logits, unnormalised, total, ref_logits, ref_log_total)
        statistics.append((logprobs, ref_logprobs, kl, entropy, ref_log_total))
    return TokenStatistics(*(torch.cat(chunk) for chunk in zip(*statistics, strict=True)))


@torch.no_grad()
def log_totals(model, states: Tensor, temperature: float) -> Tensor:
    """Hidden states [N, H] -> log of the sum of exp(logits) [N]."""
    head, states = head_of(model, temperature), states / temperature
    totals = [head.logits(states[rows]).logsumexp(1) for rows in chunks(len(states), head.weight)]
    return torch.cat(totals) if totals else states.new_zeros(0)


def softmax_pieces(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, V], which change, and ids [N] -> logits less their largest, their exp, its sum, log-probabilities."""
    logits -= logits.amax(1, keepdim=True)
    unnormalised = logits.exp()
    total = unnormalised.sum(1)
    return logits, unnormalised, total, select_tokens(logits, ids) - total.log()


def kl_of(
    logits: Tensor, unnormalised: Tensor, total: Tensor, ref_logits: Tensor, ref_log_total: Tensor
) -> tuple[Tensor, Tensor]:
    """The KL [N] of `softmax_pieces` to softmax(ref_logits), whose place the differences of the logits take, and the
    mean of these differences [N]: KL = E[logits - ref_logits] - log total + log of the reference's total."""
    mean_difference = dot(unnormalised, ref_logits.neg_().add_(logits)) / total
    return mean_difference - total.log() + ref_log_total, mean_difference


KEPT_BYTES = 2**29  # of [N, V] tensors for the gradient, at most; a small model needs far less, and is faster so


class _LogprobsAndKl(torch.autograd.Function):
    """`logprobs_and_kl` with its gradient. What is kept for it is in the model's precision; where that would be more
    than KEPT_BYTES, no [N, V] tensor is kept, and the backward pass makes it again, chunk by chunk.

    With p = softmax(logits) and d = logits - ref_logits: d logp_i / d logits = onehot_i - p, and
    d KL / d logits = p * (d - E_p[d]), of which the part in brackets is near 0 however far from 0 the logits are.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, low: bool, ids: Tensor, reference: tuple):
        ctx.low, ctx.reference, ctx.kept_dtype = low, reference, torch.bfloat16 if low else states.dtype
        keeps = 2 * len(ids) * len(weight) * ctx.kept_dtype.itemsize <= KEPT_BYTES
        saved, outputs = [], []
        for rows in chunks(len(ids), weight):
            logprobs, kl, *factors = _pieces(Head(weight, bias, low), states, ids, reference, rows)
            saved += [x.to(ctx.kept_dtype) for x in factors] if keeps else []
            outputs.append((logprobs, kl))
        ctx.save_for_backward(states, weight, bias, ids, *saved)
        return tuple(torch.cat(chunk) for chunk in zip(*outputs, strict=True))

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_kl: Tensor):
        states, weight, bias, ids, *saved = ctx.saved_tensors
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_head = HeadGradient(states, ctx.kept_dtype, needs_weight, needs_bias)
        grad_states = []
        for number, rows in enumerate(chunks(len(ids), weight)):
            factors = saved[2 * number : 2 * number + 2]
            if not saved:
                _, _, *factors = _pieces(Head(weight, bias, ctx.low), states, ids, ctx.reference, rows)
            p, centred = factors
            grad_chosen = grad_logprobs[rows].unsqueeze(1)
            gradient = (centred * grad_kl[rows].unsqueeze(1)).sub_(grad_chosen).mul_(p)
            gradient.scatter_add_(1, ids[rows].unsqueeze(1), grad_chosen)
            grad_states.append(product(gradient, weight) if ctx.low else gradient @ weight)
            of_head.add(gradient)
        grad_weight, grad_bias = of_head.total()
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return torch.cat(grad_states), grad_weight, grad_bias, None, None, None


def _pieces(head: Head, states: Tensor, ids: Tensor, reference: tuple, rows: slice) -> tuple[Tensor, ...]:
    """Of some of N tokens: log-probabilities and KL [n], and p and d - E_p[d], [n, V] each."""
    ref_head, ref_states, ref_log_totals = reference
    logits, unnormalised, total, logprobs = softmax_pieces(head.logits(states[rows]), ids[rows])
    difference = ref_head.logits(ref_states[rows])
    kl, mean_difference = kl_of(logits, unnormalised, total, difference, ref_log_totals[rows])
    return logprobs, kl, unnormalised.div_(total.unsqueeze(1)), difference.sub_(mean_difference.unsqueeze(1))


class HeadGradient:
    """The gradient of an output layer for states [N, H], from that of the logits in chunks [n, V].

    A product of few rows with so many columns is slow, so chunks wait for others, up to KEPT_BYTES.
    """

    def __init__(self, states: Tensor, dtype: torch.dtype, needs_weight: bool, needs_bias: bool):
        self._states, self._dtype, self._needs = states, dtype, (needs_weight, needs_bias)
        self._waiting, self._rows, self._total = [], 0, (None, None)

    def add(self, gradient: Tensor) -> None:
        if any(self._needs):
            self._waiting.append(gradient.to(self._dtype))
            if sum(x.nbytes for x in self._waiting) > KEPT_BYTES // 2:
                self._multiply()

    def total(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias, None where they are not needed."""
        if self._waiting:
            self._multiply()
        return self._total

    def _multiply(self) -> None:
        gradient = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        states = self._states[self._rows : self._rows + len(gradient)]
        needs_weight, needs_bias = self._needs
        parts = (
            (gradient.T @ states.to(gradient.dtype)).to(states.dtype) if needs_weight else None,
            gradient.sum(0, dtype=states.dtype) if needs_bias else None,
        )
        self._total = tuple(x if old is None else old + x for old, x in zip(self._total, parts, strict=True))
        self._waiting, self._rows = [], self._rows + len(gradient)


def chunks(count: int, weight: Tensor) -> list[slice]:
    """The rows of logits [count, V] in parts of CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, start + size) for start in range(0, count, size)]


def logprobs_and_kl(
    model, states: Tensor, reference, ref_states: Tensor, ref_log_totals: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The first and third of `token_statistics`, with gradients; ref_log_totals [N] are its last."""
    head, ref_head = head_of(model, temperature), head_of(reference, temperature)
    reference_says = ref_head, ref_states / temperature, ref_log_totals
    return _LogprobsAndKl.apply(states / temperature, head.weight, head.bias, head.is_bfloat16, ids, reference_says)


def token_logits(model, states: Tensor, temperature: float) -> Tensor:
    """Hidden states [N, H] -> logits / temperature [N, V] in float32, by dividing the H states and not the V logits."""
    head = head_of(model, temperature)
    if head.is_bfloat16 and torch.is_grad_enabled():
        logits = _Project.apply(states / temperature, head.weight)
        return logits if head.bias is None else logits + head.bias
    return head.logits(states / temperature)


class _Project(torch.autograd.Function):
    """states [N, H], weight [V, H] -> logits [N, V] with float32 sums, and gradients too."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight.T)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        states, weight = ctx.saved_tensors
        return product(gradient, weight), product(gradient.T, states).to(weight.dtype)


def select_tokens(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the whole vocabulary -> those of ids [N], [N]."""
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y [N, V] over the vocabulary, [N]."""
    return torch.linalg.vecdot(x, y)
