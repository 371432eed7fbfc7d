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
from torch.nn.functional import log_softmax

import parallel
from optimization import optimizer_step
from policy import PolicyWithValue, kl_and_entropy, logprob_and_kl, of_tokens, response_states, token_logits
from sampler import real_tokens, sample


@dataclass(frozen=True)
class Rollout:
    """Queries, the policy's responses to them, and what policy and reference say of every response token."""

    query_ids: Tensor  # [B, Q]
    query_mask: Tensor  # [B, Q]
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R], 1 up to and with the stop token
    terminated: Tensor  # [B], True where the stop token came
    logprobs: Tensor  # [B, R], of the sampled tokens under the policy that sampled them
    ref_logprobs: Tensor  # [B, R], of the same tokens under the reference
    exact_kl: Tensor  # [B, R], KL(policy, reference) of the next token over the whole vocabulary
    entropy: Tensor  # [B, R], of the policy at every token
    values: Tensor  # [B, R], expected return before the token is chosen
    ref_distribution: Tensor  # [N, V], the reference's log-probabilities of the whole vocabulary

    @property
    def not_finite(self) -> str | None:
        """The name of the first of the numbers above that is not finite, if one is."""
        numbers = ("logprobs", "ref_logprobs", "exact_kl", "entropy", "values")
        return next((name for name in numbers if not getattr(self, name).isfinite().all()), None)

    @property
    def kl(self) -> Tensor:
        """[B]: log policy - log reference of the whole response, an unbiased sample of the KL ([1], section 2)."""
        return ((self.logprobs - self.ref_logprobs) * self.response_mask).sum(1)


def slices(rows: Tensor, mask: Tensor, size: int) -> tuple[Tensor, ...]:
    """Row numbers in parts of at most `size`, rows of like length together, so that little of a part is padding."""
    return rows[mask[rows].sum(1).argsort(stable=True)].split(size) if len(rows) else ()


def places(mask: Tensor) -> Tensor:
    """mask [B, R] -> [B, R]: the place of every real token among the N real ones."""
    return (mask.flatten().cumsum(0) - 1).view(mask.shape)


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
    forward_batch: int,
    generator: torch.Generator,
) -> Rollout:
    """Sample responses to queries [B, Q], and read off what policy and reference say of each of their tokens.

    In float32 the policy's hidden states are those that the sampler saw. In low precision they come from the forward
    pass of the update: the two differ there, and the ratio would not start at 1.
    """
    response_ids, states = sample(
        policy.model,
        query_ids,
        query_mask,
        length=length,
        temperature=temperature,
        stop_id=stop_id,
        stop_after=stop_after,
        generator=generator,
    )
    mask, terminated = real_tokens(response_ids, stop_id, stop_after)
    ids, full_mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, mask], 1)
    place, tokens = places(mask), int(mask.sum())
    per_token = [torch.empty(tokens, device=ids.device) for _ in range(5)]
    ref_distribution = torch.empty(tokens, policy.model.get_output_embeddings().weight.shape[0], device=ids.device)
    for rows in slices(torch.arange(len(ids), device=ids.device), mask, forward_batch):
        real = mask[rows].bool()
        known = None if torch.is_autocast_enabled(ids.device.type) else states[rows][real]
        logits, values = policy(ids[rows], full_mask[rows], mask[rows], temperature, known)
        ref_states = response_states(reference, ids[rows], full_mask[rows], mask[rows])
        logp, ref_logp = log_softmax(logits, -1), log_softmax(token_logits(reference, ref_states, temperature), -1)
        here, chosen = place[rows][real], response_ids[rows][real]
        found = of_tokens(logp, chosen), of_tokens(ref_logp, chosen), *kl_and_entropy(logp, ref_logp), values
        for whole, part in zip((*per_token, ref_distribution), (*found, ref_logp), strict=True):
            whole[here] = part
    nothing = torch.zeros(mask.shape, device=ids.device)
    per_token = [nothing.masked_scatter(mask.bool(), part) for part in per_token]
    return Rollout(query_ids, query_mask, response_ids, mask, terminated, *per_token, ref_distribution)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, R] over the real tokens of all processes."""
    summed, tokens = parallel.total(torch.stack([(x * mask).sum(), mask.sum()]))
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
    mask = rollout.response_mask
    real = mask[rows].bool()
    ids = torch.cat([rollout.query_ids[rows], rollout.response_ids[rows]], 1)
    full_mask = torch.cat([rollout.query_mask[rows], mask[rows]], 1)
    response_ids, old_logprobs, old_values, advantage, wanted = (
        x[rows][real] for x in (rollout.response_ids, rollout.logprobs, rollout.values, advantages, returns)
    )
    logits, values = policy(ids, full_mask, mask[rows], temperature)
    ref_logp = rollout.ref_distribution.index_select(0, places(mask)[rows][real])  # 5 times as fast as [...] on a CPU
    logprobs, kl = logprob_and_kl(logits, response_ids, ref_logp)
    policy_losses, ratio = policy_loss(logprobs, old_logprobs, advantage, clip_range)
    value_losses, value_clipped = value_loss(values, old_values, wanted, value_clip_range)
    with torch.no_grad():
        approx_kl, deviation = 0.5 * (logprobs - old_logprobs) ** 2, (ratio - 1).abs()
        of_tokens = policy_losses, value_losses, approx_kl, deviation > clip_range, value_clipped
        statistics = torch.stack([x.sum() for x in of_tokens])
    return (policy_losses + value_coef * value_losses + kl_weight * kl).sum(), statistics, deviation.max()


def update(
    policy: PolicyWithValue,
    optimizers: list[torch.optim.Optimizer],
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    *,
    epochs: int,
    minibatches: int,
    forward_batch: int,
    steps_done: int,
    generator: torch.Generator,
    **settings: float,
) -> dict[str, float]:
    """One PPO update: `epochs` passes over the rollout in shuffled minibatches. Returns means over all of them.

    With a `kl_weight` the loss holds the exact KL to the reference too. Its gradient and that of the rewards to come
    (`kl_to_come`) together are the gradient of the same objective as with sampled KL in the rewards, with less noise.
    A minibatch goes through the model in slices of `forward_batch` rows whose gradients add up to its own;
    `settings` are those of `slice_losses`.
    A minibatch whose gradient is not finite never reaches the weights: it is "skipped", and counted.
    Of several processes, with as many rows each, every one works on its rows of a minibatch; `generator`, a CPU's,
    shuffles the rows of all, and must be in the same state in all.
    """
    mask, parameters = rollout.response_mask, list(policy.parameters())
    rows_here = torch.arange(len(mask)) + parallel.rank() * len(mask)
    sums, first = torch.zeros(len(STATISTICS) + 1, device=mask.device), torch.zeros((), device=mask.device)
    steps = kept = 0
    for _ in range(epochs):
        order = torch.randperm(parallel.count() * len(mask), generator=generator)
        for minibatch in order.chunk(minibatches):
            minibatch = (minibatch[torch.isin(minibatch, rows_here)] - rows_here[0]).to(mask.device)
            tokens, found = parallel.total(mask[minibatch].sum()), torch.zeros_like(sums[:-1])
            for rows in slices(minibatch, mask, forward_batch):
                loss, statistics, deviation = slice_losses(policy, rollout, rows, advantages, returns, **settings)
                (loss / tokens).backward()
                found += statistics / tokens
                first = first if steps else first.maximum(deviation)
            parallel.add_gradients(parameters)
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            if norm.isfinite():
                kept += 1
                optimizer_step(optimizers, steps_done + kept)
                sums += torch.cat([parallel.total(found), norm.unsqueeze(0)])
            else:
                policy.zero_grad()
            steps += 1
    means = (sums / kept).tolist() if kept else [math.nan] * len(sums)
    return dict(zip((*STATISTICS, "grad_norm"), means, strict=True)) | {
        "ratio_deviation_first": max(parallel.gather([first.item()])),
        "skipped": steps - kept,
    }
