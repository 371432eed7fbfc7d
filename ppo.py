"""Proximal policy optimisation (PPO) of a causal language model with a KL penalty, as pure functions over tensors.

References
[1] Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
[2] Stiennon et al. 2020, Learning to summarize from human feedback, arXiv 2009.01325
[3] openai/lm-human-preferences, the code of [1]
[4] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347
[5] Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438

Shapes: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right, behind the stop
token), T = Q + R, N the real response tokens of all sequences, one after the other, V vocabulary, H hidden size. Masks
are 1 on real tokens and 0 on padding. Log-probabilities, entropies and KL are in nats. The policy is always
softmax(logits / temperature): when sampling, for the reference and in the update.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.policy import PolicyWithValue, hidden_states, logprobs_and_kl, token_statistics
from rlhf.precision import is_low
from rlhf.sampling import real_tokens, sample


@dataclass(frozen=True)
class Rollout:
    """Queries, the policy's responses to them, and what policy and reference say of every response token."""

    query_ids: Tensor  # [B, Q]
    query_mask: Tensor  # [B, Q]
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R], 1 up to and with the stop token
    lengths: Tensor  # [B], real response tokens; on the CPU, where indices are made without waiting for a GPU
    terminated: Tensor  # [B], True where the stop token came
    values: Tensor  # [B, R], expected return before the token is chosen
    logprobs: Tensor  # [B, R], of the sampled tokens under the policy that sampled them
    ref_logprobs: Tensor  # [B, R], of the same tokens under the reference
    exact_kl: Tensor  # [B, R], KL(policy, reference) of the next token over the whole vocabulary
    entropy: Tensor  # [B, R], of the policy at every token
    ref_log_totals: Tensor  # [B, R], log of the sum of exp(logits) of the reference
    ref_states: Tensor  # [B, R, H], the reference's last hidden states: with its output layer, its distributions
    minibatches: tuple[Tensor, ...]  # row numbers: the first pass of `update`, in whose slices logprobs were computed

    @property
    def not_finite(self) -> str | None:
        """The name of the first of the numbers above that is not finite, if one is."""
        numbers = ("logprobs", "ref_logprobs", "exact_kl", "entropy", "values")
        return next((name for name in numbers if not getattr(self, name).isfinite().all()), None)

    @property
    def kl(self) -> Tensor:
        """[B]: log policy - log reference of the whole response, an unbiased sample of the KL ([1], section 2)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)


@dataclass(frozen=True)
class Slice:
    """Some rows of a rollout, for one forward pass, and where their N real response tokens are."""

    ids: Tensor  # [b, t], queries and responses, as wide as the longest response
    mask: Tensor  # [b, t]
    predicting: Tensor  # [N], among all b * t, the places before the response tokens: their states predict them
    places: Tensor  # [N], the response tokens among all B * R of the rollout

    def of(self, x: Tensor) -> Tensor:
        """x [B, R] or [B, R, H] of the whole rollout -> that of the slice's N tokens."""
        return x.flatten(0, 1).index_select(0, self.places)


def take_slice(
    rows: Tensor, lengths: Tensor, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> Slice:
    """Rows [b] of queries [B, Q] and responses [B, R], with the lengths [B] of these; rows and lengths on the CPU."""
    device, width, of_query = query_ids.device, response_ids.shape[1], query_ids.shape[1]
    longest = int(lengths[rows].max())
    row, column = (torch.arange(longest) < lengths[rows].unsqueeze(1)).nonzero(as_tuple=True)
    predicting = row * (of_query + longest) + of_query - 1 + column
    places = rows[row] * width + column
    rows, predicting, places = (x.to(device, non_blocking=True) for x in (rows, predicting, places))
    ids = torch.cat([query_ids[rows], response_ids[rows, :longest]], 1)
    mask = torch.cat([query_mask[rows], response_mask[rows, :longest]], 1)
    return Slice(ids, mask, predicting, places)


def shuffled(rows: int, minibatches: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A pass over the rows of all processes in random minibatches: which of this process's `rows` are in each.

    `generator`, a CPU's, must be in the same state in all processes.
    """
    order, first = torch.randperm(distributed.count() * rows, generator=generator), distributed.rank() * rows
    parts = order.chunk(minibatches)
    return tuple(part[(part >= first) & (part < first + rows)] - first for part in parts)


def slices(rows: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, ...]:
    """Row numbers in parts of at most `size`, rows of like length together, so that little of a part is padding."""
    return rows[lengths[rows].argsort(stable=True)].split(size) if len(rows) else ()


@torch.no_grad()
def collect(
    policy: PolicyWithValue,
    reference,
    query_ids: Tensor,
    query_mask: Tensor,
    *,
    length: int,
    temperature: float,
    stop_id: int,
    stop_after: int = 0,
    minibatches: tuple[Tensor, ...] | None = None,
    forward_batch: int,
    generator: torch.Generator,
) -> Rollout:
    """Sample responses to queries [B, Q], and read off what policy and reference say of each of their tokens.

    In float32 the policy's hidden states are those that the sampler saw. In bfloat16 the sampler's differ from those of
    the update, so they are computed anew, in the very slices of the update's first pass over `minibatches`, as
    `shuffled` gives them: there the ratio is 1.
    """
    model = policy.in_precision()
    response_ids, states = sample(
        model,
        query_ids,
        query_mask,
        length=length,
        temperature=temperature,
        stop_id=stop_id,
        stop_after=stop_after,
        generator=generator,
    )
    mask, terminated = real_tokens(response_ids, stop_id, stop_after)
    lengths = mask.sum(1).cpu()
    longest = int(lengths.max())
    response_ids, mask, states = response_ids[:, :longest], mask[:, :longest], states[:, :longest]
    per_token = [torch.zeros(mask.numel(), device=mask.device) for _ in range(6)]
    per_state = torch.zeros(mask.numel(), states.shape[-1], device=mask.device)
    minibatches = minibatches or (torch.arange(len(mask)),)
    for rows in (rows for minibatch in minibatches for rows in slices(minibatch, lengths, forward_batch)):
        part = take_slice(rows, lengths, query_ids, query_mask, response_ids, mask)
        known = None if is_low(model) else part.of(states)
        states_here, values = policy(part.ids, part.mask, part.predicting, known)
        ref_states = hidden_states(reference, part.ids, part.mask, part.predicting)
        found = token_statistics(model, states_here, reference, ref_states, part.of(response_ids), temperature)
        for whole, of_slice in zip((*per_token, per_state), (values, *found, ref_states), strict=True):
            whole.index_copy_(0, part.places, of_slice)
    values, *per_token = (whole.view(mask.shape) for whole in per_token)
    per_state = per_state.view(*mask.shape, -1)
    return Rollout(
        query_ids, query_mask, response_ids, mask, lengths, terminated, values, *per_token, per_state, minibatches
    )


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, R] over the real tokens of all processes."""
    summed, tokens = distributed.total(torch.stack([(x * mask).sum(), mask.sum()]))
    return summed / tokens


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of x [B, R] over real tokens, from the biased variance as in [3]."""
    return (masked_mean((x - masked_mean(x, mask)) ** 2, mask) + 1e-8).sqrt()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x [B, R] scaled to deviation 1 over real tokens, and shifted to mean 0 unless told to keep its mean."""
    mean = masked_mean(x, mask)
    white = (x - mean) / masked_std(x, mask)
    return (white if shift_mean else white + mean) * mask


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards [B, R]: -kl_coef * kl at every token, plus the score [B] on the last real one ([1], equation 2).

    kl [B, R] is log policy - log reference of the sampled token as in [3], or `kl_to_come` of the exact KL.
    """
    last = mask.sum(1) - 1
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def kl_to_come(exact_kl: Tensor) -> Tensor:
    """exact_kl [B, R] -> [B, R]: the KL that a token answers for is that of the distribution after it.

    A distribution's own KL does not depend on which of its tokens was sampled. `update` lowers it directly.
    """
    return torch.cat([exact_kl[:, 1:], torch.zeros_like(exact_kl[:, :1])], 1)


def leave_one_out(rewards: Tensor, mask: Tensor, answers: int) -> Tensor:
    """Rewards [B, R] -> values [B, R] without a critic: the mean total reward of the other answers to the same query.

    Every `answers` rows, at least two, are answers to one query (Kool et al. 2019; Ahmadian et al. 2024, section 3).
    """
    totals = (rewards * mask).sum(1).view(-1, answers)
    others = (totals.sum(1, keepdim=True) - totals) / (answers - 1)
    return others.view(-1, 1) * mask


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation ([5], equation 16), [B, R] each; an episode ends with its last real token.

    delta_t = r_t + discount * V_{t+1} - V_t;  A_t = delta_t + discount * gae_lambda * A_{t+1};  return_t = A_t + V_t
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = (delta + discount * gae_lambda * advantage) * mask[:, t]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss ([4], equation 7) and the probability ratio, [B, R] each."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, clipped around the rollout's values as in [3], and where the clip binds, [B, R] each."""
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)  # the value itself where it is not clipped
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is a perfect critic, 0 one that knows nothing."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return (1 - variance(returns - values) / variance(returns)).item()


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The adaptive coefficient ([1], section 2.2): kl and target in nats per response, horizon in episodes."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def falling_kl_coef(kl_coef: float, times: float, done: float) -> float:
    """`times` kl_coef at first, falling in a line to kl_coef when half of the run is done; done from 0 to 1.

    Where a policy still acts alike in two cases that want different acts, its mean gain from either act is 0, and
    chance alone decides which one it settles for. A dear KL holds it where it began until it can tell them apart.
    """
    return kl_coef * max(1.0, times - 2 * (times - 1) * done)


STATISTICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction")


def slice_losses(
    policy: PolicyWithValue,
    reference,
    rollout: Rollout,
    rows: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip_range: float,
    value_clip_range: float,
    value_coef: float,
    kl_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of some rows of a rollout, its STATISTICS, both summed over their tokens, and their largest |ratio - 1|.

    advantages and returns are those of the whole rollout, [B, R].
    """
    part = take_slice(
        rows, rollout.lengths, rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.response_mask
    )
    response_ids, old_logprobs, old_values, advantage, wanted = (
        part.of(x) for x in (rollout.response_ids, rollout.logprobs, rollout.values, advantages, returns)
    )
    states, values = policy(part.ids, part.mask, part.predicting)
    of_reference = reference, part.of(rollout.ref_states), part.of(rollout.ref_log_totals)
    logprobs, kl = logprobs_and_kl(policy.in_precision(), states, *of_reference, response_ids, temperature)
    policy_losses, ratio = policy_loss(logprobs, old_logprobs, advantage, clip_range)
    value_losses, value_clipped = value_loss(values, old_values, wanted, value_clip_range)
    with torch.no_grad():
        approx_kl, deviation = 0.5 * (logprobs - old_logprobs) ** 2, (ratio - 1).abs()
        per_token = policy_losses, value_losses, approx_kl, deviation > clip_range, value_clipped
        statistics = torch.stack([x.sum() for x in per_token])
    return (policy_losses + value_coef * value_losses + kl_weight * kl).sum(), statistics, deviation.max()


def update(
    policy: PolicyWithValue,
    reference,
    optimizers: list[torch.optim.Optimizer],
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    *,
    epochs: int,
    forward_batch: int,
    generator: torch.Generator,
    **settings: float,
) -> dict[str, float]:
    """One PPO update: `epochs` passes over the rollout in shuffled minibatches. Returns means over all of them.

    With a `kl_weight` the loss holds the exact KL to the reference too. Its gradient and that of the rewards to come
    (`kl_to_come`) together are the gradient of the same objective as with sampled KL in the rewards, with less noise.
    A minibatch goes through the model in slices of `forward_batch` rows whose gradients add up to its own;
    `settings` are those of `slice_losses`.
    A minibatch whose gradient is not finite never reaches the weights: it is "skipped", and counted.
    The first pass is over the rollout's own minibatches, later ones are `shuffled`. Of several processes, with as many
    rows each, every one works on its rows of a minibatch.
    """
    mask, parameters = rollout.response_mask, list(policy.parameters())
    sums, first = torch.zeros(len(STATISTICS) + 1, device=mask.device), torch.zeros((), device=mask.device)
    steps = taken = 0
    for epoch in range(epochs):
        count = len(rollout.minibatches)
        for minibatch in shuffled(len(mask), count, generator) if epoch else rollout.minibatches:
            tokens = distributed.total(rollout.lengths[minibatch].sum().to(mask.device, non_blocking=True))
            found = torch.zeros_like(sums[:-1])
            for rows in slices(minibatch, rollout.lengths, forward_batch):
                loss, statistics, deviation = slice_losses(
                    policy, reference, rollout, rows, advantages, returns, **settings
                )
                (loss / tokens).backward()
                found += statistics / tokens
                first = first if steps else first.maximum(deviation)
            distributed.add_gradients(parameters)
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            if norm.isfinite():
                taken += 1
                for optimizer in optimizers:
                    optimizer.step()
                sums += torch.cat([distributed.total(found), norm.unsqueeze(0)])
            policy.zero_grad()
            steps += 1
    means = (sums / taken).tolist() if taken else [math.nan] * len(sums)
    return dict(zip((*STATISTICS, "grad_norm"), means, strict=True)) | {
        "ratio_deviation_first": max(distributed.gather([first.item()])),
        "skipped": steps - taken,
    }
