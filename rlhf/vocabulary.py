"""What the logits of a language model say: log-probabilities, entropy, KL.

Shapes: N tokens of all sequences, one after the other, V vocabulary, H hidden size.

The [N, V] tensors are what an update of a small model spends its time on, and what a large one has no memory for. So
they come in chunks that are read while they are in the cache, and nothing is divided by a sum before it is summed.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.precision import is_bfloat16, product

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
    return torch.cat([head.logits(states[rows]).logsumexp(1) for rows in chunks(len(states), head.weight)])


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


def _is_kept(count: int, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `count` tensors [N, V] are kept for the gradient; if not, the backward pass makes them again."""
    return count * len(ids) * len(weight) * dtype.itemsize <= KEPT_BYTES


class _Logprobs(torch.autograd.Function):
    """`token_logprobs` with its gradient: with p = softmax(logits), d logp_i / d logits = onehot_i - p.

    What is kept of it is in the model's precision, rounded after the subtraction: of a sure token little is left.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, low: bool, ids: Tensor) -> Tensor:
        ctx.low, ctx.kept_dtype = low, torch.bfloat16 if low else states.dtype
        keeps = _is_kept(1, ids, weight, ctx.kept_dtype)
        saved, outputs = [], []
        for rows in chunks(len(ids), weight):
            logprobs, slope = _logprobs_and_slope(Head(weight, bias, low), states[rows], ids[rows])
            saved += [slope.to(ctx.kept_dtype)] if keeps else []
            outputs.append(logprobs)
        ctx.save_for_backward(states, weight, bias, ids, *saved)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor):
        states, weight, bias, ids, *saved = ctx.saved_tensors
        head = Head(weight, bias, ctx.low)

        def gradients() -> Iterator[Tensor]:
            for number, rows in enumerate(chunks(len(ids), weight)):
                slope = saved[number] if saved else _logprobs_and_slope(head, states[rows], ids[rows])[1]
                yield slope * grad_logprobs[rows].unsqueeze(1)

        return *_through_head(head, states, ctx.kept_dtype, ctx.needs_input_grad[1:3], gradients()), None, None


def _logprobs_and_slope(head: Head, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of N tokens: log-probabilities [N], and what they gain from each logit, onehot - p [N, V]."""
    _, unnormalised, total, logprobs = softmax_pieces(head.logits(states), ids)
    minus_p = unnormalised.div_(-total.unsqueeze(1))
    return logprobs, minus_p.scatter_add_(1, ids.unsqueeze(1), torch.ones_like(logprobs).unsqueeze(1))


class _LogprobsAndKl(torch.autograd.Function):
    """`logprobs_and_kl` with its gradient. What is kept for it is in the model's precision.

    With d = logits - ref_logits: d KL / d logits = p * (d - E_p[d]), of which the part in brackets is near 0 however
    far from 0 the logits are.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, low: bool, ids: Tensor, reference: tuple):
        ctx.low, ctx.reference, ctx.kept_dtype = low, reference, torch.bfloat16 if low else states.dtype
        keeps = _is_kept(2, ids, weight, ctx.kept_dtype)
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
        head = Head(weight, bias, ctx.low)

        def gradients() -> Iterator[Tensor]:
            for number, rows in enumerate(chunks(len(ids), weight)):
                factors = saved[2 * number : 2 * number + 2]
                if not saved:
                    _, _, *factors = _pieces(head, states, ids, ctx.reference, rows)
                p, centred = factors
                grad_chosen = grad_logprobs[rows].unsqueeze(1)
                gradient = (centred * grad_kl[rows].unsqueeze(1)).sub_(grad_chosen).mul_(p)
                yield gradient.scatter_add_(1, ids[rows].unsqueeze(1), grad_chosen)

        return *_through_head(head, states, ctx.kept_dtype, ctx.needs_input_grad[1:3], gradients()), None, None, None


def _pieces(head: Head, states: Tensor, ids: Tensor, reference: tuple, rows: slice) -> tuple[Tensor, ...]:
    """Of some of N tokens: log-probabilities and KL [n], and p and d - E_p[d], [n, V] each."""
    ref_head, ref_states, ref_log_totals = reference
    logits, unnormalised, total, logprobs = softmax_pieces(head.logits(states[rows]), ids[rows])
    difference = ref_head.logits(ref_states[rows])
    kl, mean_difference = kl_of(logits, unnormalised, total, difference, ref_log_totals[rows])
    return logprobs, kl, unnormalised.div_(total.unsqueeze(1)), difference.sub_(mean_difference.unsqueeze(1))


def _through_head(
    head: Head, states: Tensor, dtype: torch.dtype, needs: tuple[bool, ...], gradients: Iterable[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of states [N, H], weight and bias, from those of the logits in chunks [n, V].

    needs: whether weight and bias want one.
    """
    of_head, grad_states = HeadGradient(states, dtype, *needs), []
    for gradient in gradients:
        grad_states.append(product(gradient, head.weight) if head.is_bfloat16 else gradient @ head.weight)
        of_head.add(gradient)
    grad_weight, grad_bias = of_head.total()
    return torch.cat(grad_states), None if grad_weight is None else grad_weight.to(head.weight.dtype), grad_bias


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
    """The rows of logits [count, V] in parts of CHUNK_BYTES; one part where there are none."""
    size = max(1, CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, start + size) for start in range(0, max(1, count), size)]


def logprobs_and_kl(
    model, states: Tensor, reference, ref_states: Tensor, ref_log_totals: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The first and third of `token_statistics`, with gradients; ref_log_totals [N] are its last."""
    head, ref_head = head_of(model, temperature), head_of(reference, temperature)
    reference_says = ref_head, ref_states / temperature, ref_log_totals
    return _LogprobsAndKl.apply(states / temperature, head.weight, head.bias, head.is_bfloat16, ids, reference_says)


def token_logprobs(model, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Hidden states [N, H] -> log-probabilities of the tokens ids [N], [N], in nats, with gradients."""
    head = head_of(model, temperature)
    return _Logprobs.apply(states / temperature, head.weight, head.bias, head.is_bfloat16, ids)


def token_logits(model, states: Tensor, temperature: float) -> Tensor:
    """Hidden states [N, H] -> logits / temperature [N, V] in float32, by dividing the H states and not the V logits."""
    return head_of(model, temperature).logits(states / temperature)


def select_tokens(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the whole vocabulary -> those of ids [N], [N]."""
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y [N, V] over the vocabulary, [N]."""
    return torch.linalg.vecdot(x, y)
