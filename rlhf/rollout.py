"""A rollout: the policy's responses to queries, and what policy and reference say of each of their tokens.

Shapes as in ppo.py: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right), T = Q +
R, H hidden size. Tensors per token are [B, R] and 0 on padding. The models see the N real response tokens only, one
after the other; `pack` and `unpack` translate. M tokens inside the queries can be evaluated too, behind these N.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from rlhf import distributed, fast_path
from rlhf.forward import hidden_states
from rlhf.policy import PolicyWithValue
from rlhf.precision import is_bfloat16
from rlhf.sampling import Sampling, real_tokens, sample
from rlhf.vocabulary import log_totals, logprobs_and_kl, token_statistics

ON_CPU = ("lengths", "prefixes")
NOT_PER_TOKEN = ("query_ids", "query_mask", "terminated", "ref_query_states", "ref_query_log_totals")


@dataclass(frozen=True)
class Responses:
    """Queries with responses to them."""

    query_ids: Tensor  # [B, Q]
    query_mask: Tensor  # [B, Q]
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R], 1 up to and with the stop token
    lengths: Tensor  # [B], real response tokens; on the CPU, so that making indices does not wait for a GPU
    prefixes: Tensor  # [B], tokens inside the query that are evaluated too: its last ones but one; on the CPU

    def select(self, rows: Tensor, *others: Tensor):
        """The same of b rows [b], R cut to their longest response; and, if there are any, of other tensors [B, R]."""
        longest, device = int(self.lengths[rows].max()), self.query_ids.device
        on_device = rows.to(device, non_blocking=True)

        def of_rows(name: str) -> Tensor | tuple:
            value = getattr(self, name)
            if name == "minibatches":
                return ()
            if name in ON_CPU:
                return value[rows]
            value = value.index_select(0, on_device)
            return value if name in NOT_PER_TOKEN else value[:, :longest]

        selected = type(self)(**{field.name: of_rows(field.name) for field in fields(self)})
        return (selected, *(x.index_select(0, on_device)[:, :longest] for x in others)) if others else selected

    @property
    def ids(self) -> Tensor:  # [B, T]
        return torch.cat([self.query_ids, self.response_ids], 1)

    @property
    def mask(self) -> Tensor:  # [B, T]
        return torch.cat([self.query_mask, self.response_mask], 1)

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query_ids, self.query_mask, self.response_ids, self.response_mask

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The N real response tokens among all B * R; the tokens before them among all B * T; the M tokens inside the
        queries among all B * Q."""
        query, width = self.query_ids.shape[1], self.response_ids.shape[1]
        row, column = (torch.arange(width) < self.lengths.unsqueeze(1)).nonzero(as_tuple=True)
        real, before = row * width + column, row * (query + width) + query + column - 1
        from_the_end = torch.arange(query - 1, -1, -1)  # the last token of a query predicts the response
        inside = (from_the_end > 0) & (from_the_end <= self.prefixes.unsqueeze(1))
        inside = inside.flatten().nonzero().squeeze(1)
        return tuple(x.to(self.query_ids.device, non_blocking=True) for x in (real, before, inside))

    @property
    def predicting(self) -> Tensor:
        """[N + M], places among all B * T: the tokens whose hidden states predict the response tokens, and those inside
        the queries."""
        _, before, inside = self._places
        query, width = self.query_ids.shape[1], self.response_ids.shape[1]
        return torch.cat([before, inside + inside // query * width])

    @property
    def predicted(self) -> Tensor:
        """[N + M], the tokens that come there."""
        return torch.cat([self.pack(self.response_ids), self.query_ids.flatten()[self._places[2] + 1]])

    def pack_queries(self, x: Tensor) -> Tensor:
        """[B, Q, ...] -> [M, ...], the tokens inside the queries."""
        return x.flatten(0, 1).index_select(0, self._places[2])

    def unpack_queries(self, x: Tensor) -> Tensor:
        """[M, ...] -> [B, Q, ...], with zeros elsewhere."""
        batch, width = self.query_ids.shape
        return fast_path.Put.apply(x, self._places[2], batch * width).view(batch, width, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        """[B, R, ...] -> [N, ...], the real tokens."""
        return x.flatten(0, 1).index_select(0, self._places[0])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x [B, R] over the real tokens."""
        return self.pack(x).sum()

    def unpack(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, R, ...], with zeros on padding."""
        batch, width = self.response_ids.shape
        return fast_path.Put.apply(x, self._places[0], batch * width).view(batch, width, *x.shape[1:])


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses of the policy, and what policy and reference say of each token. All per token, in nats."""

    terminated: Tensor  # [B], True where the stop token came
    values: Tensor  # [B, R], expected return before the token is chosen
    logprobs: Tensor  # [B, R], of the sampled tokens under the policy that sampled them
    ref_logprobs: Tensor  # [B, R], of the same tokens under the reference
    exact_kl: Tensor  # [B, R], KL(policy, reference) of the next token over the whole vocabulary
    entropy: Tensor  # [B, R], of the policy at every token
    ref_log_totals: Tensor  # [B, R], log of the sum of exp(logits) of the reference
    ref_states: Tensor  # [B, R, H], the reference's last hidden states: with its output layer, its distributions
    ref_query_states: Tensor  # [B, Q, H], the same inside the queries, where `prefixes` says
    ref_query_log_totals: Tensor  # [B, Q]
    minibatches: tuple[Tensor, ...]  # rows of each minibatch of the update's first pass

    @property
    def not_finite(self) -> str | None:
        """The name of the first of the numbers above that is not finite, if one is."""
        numbers = ("logprobs", "ref_logprobs", "exact_kl", "entropy", "values")
        return next((name for name in numbers if not getattr(self, name).isfinite().all()), None)

    @property
    def kl(self) -> Tensor:
        """[B]: log policy - log reference of the whole response, an unbiased sample of the KL ([1], section 2)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)


def shuffled_minibatches(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A pass over the rows of all processes in `count` random minibatches: which of this process's are in each.

    `generator`, a CPU's, must be in the same state in all processes.
    """
    order = torch.randperm(distributed.world_size() * rows, generator=generator)
    first = distributed.rank() * rows
    return tuple(part[(part >= first) & (part < first + rows)] - first for part in order.chunk(count))


def forward_batches(rows: Tensor, lengths: Tensor, size: int) -> Iterator[Tensor]:
    """Rows in batches of at most `size` for a forward pass, those of similar length together to save padding."""
    if len(rows):
        yield from rows[lengths[rows].argsort(stable=True)].split(size)


@torch.no_grad()
def collect(
    policy: PolicyWithValue,
    reference,
    query_ids: Tensor,
    query_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    forward_batch: int,
    minibatches: tuple[Tensor, ...] | None = None,
    shortest_query: int | None = None,
) -> Rollout:
    """Sample a response to each of the queries [B, Q], and evaluate policy and reference on every token.

    shortest_query: after so many tokens a query could have ended; what comes next inside the queries is evaluated too.

    In float32 the policy's hidden states are those that the sampler saw. In bfloat16 the sampler's differ by rounding
    from those of the update, so they are computed again, in the same batches as in the update's first pass over
    `minibatches`: there the ratio is 1.
    """
    response_ids, states = sample(policy.in_precision(), query_ids, query_mask, sampling, generator)
    mask, terminated = real_tokens(response_ids, sampling)
    lengths, query_lengths = torch.stack([mask.sum(1), query_mask.sum(1)]).cpu()  # one wait for a GPU
    longest = int(lengths.max())
    response_ids, mask = response_ids[:, :longest], mask[:, :longest]
    prefixes = (query_lengths - (shortest_query or query_ids.shape[1])).clamp(min=0)
    responses = Responses(query_ids, query_mask, response_ids, mask, lengths, prefixes)
    minibatches = minibatches or (torch.arange(len(mask)),)
    evaluated = {}
    for rows in (rows for minibatch in minibatches for rows in forward_batches(minibatch, lengths, forward_batch)):
        part, part_states = responses.select(rows, states)
        known_states = None if is_bfloat16(policy.in_precision()) else part.pack(part_states)
        on_device = rows.to(mask.device, non_blocking=True)
        for name, x in first_evaluation(policy, reference, part, sampling.temperature, known_states).items():
            width = x.shape[1] if name in NOT_PER_TOKEN else longest
            whole = evaluated.setdefault(name, x.new_zeros(len(mask), width, *x.shape[2:]))
            whole[on_device, : x.shape[1]] = x
    return Rollout(
        query_ids, query_mask, response_ids, mask, lengths, prefixes, terminated, **evaluated, minibatches=minibatches
    )


def first_evaluation(
    policy: PolicyWithValue, reference, part: Responses, temperature: float, states: Tensor | None
) -> dict[str, Tensor]:
    """The fields of a Rollout that policy and reference say. states [N, H]: the policy's on the response, if known."""
    real = len(part.pack(part.response_ids))
    ref_states = hidden_states(reference, part.ids, part.mask, part.predicting)
    places = part.predicting if states is None else part.predicting[:real]
    states, values = policy(part.ids, part.mask, places, states)
    says = states, reference, ref_states[: len(states)], part.predicted[: len(states)]
    statistics = token_statistics(policy.in_precision(), *says, temperature)
    packed = statistics._asdict() | {"values": values, "ref_states": ref_states}
    inside = {"ref_query_states": ref_states[real:]}
    inside["ref_query_log_totals"] = log_totals(reference, ref_states[real:], temperature)
    return {name: part.unpack(x[:real]) for name, x in packed.items()} | {
        name: part.unpack_queries(x) for name, x in inside.items()
    }


def evaluate(
    policy: PolicyWithValue, reference, rollout: Rollout, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of a rollout's tokens under the policy as it is now, its values, and its exact KL to the
    reference, [B, R] each, and the same KL inside the queries [M]; with gradients."""
    states, values = policy(rollout.ids, rollout.mask, rollout.predicting)
    ref_states = torch.cat([rollout.pack(rollout.ref_states), rollout.pack_queries(rollout.ref_query_states)])
    ref_log_totals = rollout.pack(rollout.ref_log_totals), rollout.pack_queries(rollout.ref_query_log_totals)
    reference_says = reference, ref_states, torch.cat(ref_log_totals)
    logprobs, kl = logprobs_and_kl(policy.in_precision(), states, *reference_says, rollout.predicted, temperature)
    real = len(ref_log_totals[0])
    return *(rollout.unpack(x[:real]) for x in (logprobs, values, kl)), kl[real:]
