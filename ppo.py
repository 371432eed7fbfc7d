"""Proximal policy optimisation (PPO) of a language model with a KL penalty: rewards, advantages, losses, the update.

References
[1] Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
[2] Stiennon et al. 2020, Learning to summarize from human feedback, arXiv 2009.01325
[3] openai/lm-human-preferences, the code of [1]
[4] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347
[5] Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438

Shapes: B sequences, Q query tokens (padded on the left), R response tokens (padded on the right, behind the stop
token), T = Q + R, V vocabulary, H hidden size. Tensors per token are [B, R], and 0 on padding. Masks are 1 on real
tokens and 0 on padding. Log-probabilities, entropies and KL are in nats. The policy is always softmax(logits /
temperature): when sampling, for the reference and in the update. rlhf/rollout.py makes the rollouts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.distributed import all_reduce, masked_mean
from rlhf.optim import Optimizer
from rlhf.policy import PolicyWithValue
from rlhf.rollout import Rollout, evaluate, forward_batches, shuffled_minibatches


@dataclass(frozen=True)
class Settings:
    """What stays the same in every update."""

    epochs: int  # K, passes over a rollout
    forward_batch: int  # rows in a forward pass
    temperature: float
    exact_kl: bool  # KL over the whole vocabulary, or that of the sampled token as in [3]
    leave_one_out: int  # answers to a query, each the others' baseline; 0 for a critic
    discount: float  # gamma
    gae_lambda: float
    whiten_rewards: bool
    clip_range: float  # of the probability ratio
    value_clip_range: float
    value_coef: float  # weight of the value loss


@dataclass(frozen=True)
class Targets:
    """What an update works towards."""

    advantages: Tensor  # [B, R], whitened
    returns: Tensor  # [B, R]
    kl_weight: float  # of the exact KL in the loss: the KL coefficient in units of the whitened advantages


# rewards


def rewards(rollout: Rollout, scores: Tensor, kl_coef: float, settings: Settings) -> Tensor:
    """[B, R]: what every token is paid, from the scores [B] and the KL to the reference."""
    sampled_kl = rollout.logprobs - rollout.ref_logprobs
    kl = next_token_kl(rollout.exact_kl) if settings.exact_kl else sampled_kl
    return token_rewards(scores, kl, rollout.response_mask, kl_coef)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """[B, R]: -kl_coef * kl at every token, plus the score [B] on the last real one ([1], equation 2)."""
    last = mask.sum(1) - 1
    paid = -kl_coef * kl * mask
    paid[torch.arange(len(scores), device=scores.device), last] += scores
    return paid


def next_token_kl(exact_kl: Tensor) -> Tensor:
    """exact_kl [B, R] -> [B, R]: the KL that a token answers for is that of the distribution after it.

    A distribution's own KL does not depend on which of its tokens was sampled. `update` lowers it directly.
    """
    return torch.cat([exact_kl[:, 1:], torch.zeros_like(exact_kl[:, :1])], 1)


def linear_kl_decay(start_factor: float, progress: float) -> float:
    """A factor of the KL coefficient: start_factor at progress 0, falling in a line to 1 at a half, 1 until the end.

    Where a policy still acts alike in two cases that want different acts, its mean gain from either act is 0, and
    chance alone decides which one it settles for. A high coefficient holds it back until it can tell them apart.
    """
    return max(1.0, start_factor - 2 * (start_factor - 1) * progress)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The adaptive coefficient ([1], section 2.2): kl and target in nats a response, horizon in episodes."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


class KLSchedule:
    """The KL coefficient of every update: adapted to a target KL, or falling in a line where there is none."""

    def __init__(self, kl_coef: float, start_factor: float, target: float | None, horizon: float):
        self.kl_coef, self.start_factor, self.target, self.horizon = kl_coef, start_factor, target, horizon

    def coefficient(self, progress: float) -> float:
        """progress: the part of the run that is done, from 0 to 1."""
        return self.kl_coef if self.target else self.kl_coef * linear_kl_decay(self.start_factor, progress)

    def observe(self, kl: float, episodes: int) -> None:
        """Adapt to the mean KL of so many episodes."""
        if self.target and math.isfinite(kl):
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, self.target, self.horizon, episodes)

    def state_dict(self) -> dict:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict) -> None:
        self.kl_coef = state["kl_coef"]


# advantages


def targets(rollout: Rollout, rewards: Tensor, kl_coef: float, settings: Settings) -> Targets:
    """Advantages of a rollout with rewards [B, R], whitened once over all its tokens, and its returns."""
    mask = rollout.response_mask
    if settings.whiten_rewards:
        kl_coef = kl_coef / masked_std(rewards, mask).item()
        rewards = whiten(rewards, mask, shift_mean=False)
    baseline = leave_one_out(rewards, mask, settings.leave_one_out) if settings.leave_one_out else rollout.values
    advantages, returns = advantages_and_returns(rewards, baseline, mask, settings.discount, settings.gae_lambda)
    kl_weight = kl_coef / masked_std(advantages, mask).item() if settings.exact_kl else 0.0
    return Targets(whiten(advantages, mask), returns, kl_weight)


LEAST_DEVIATION = 0.01  # of scores whose deviation on the reference's texts is 1


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of x [B, R] over real tokens, from the biased variance as in [3], or LEAST_DEVIATION.

    A batch whose texts all get the same reward (none of them ends, say) has nothing to teach. Without a bound its
    rounding errors would become advantages of size 1, and the KL would weigh a thousand times as much.
    """
    variance = masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return (variance + 1e-8).sqrt().clamp(min=LEAST_DEVIATION)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x [B, R] scaled to deviation 1 over real tokens, and shifted to mean 0 unless told to keep its mean."""
    mean = masked_mean(x, mask)
    white = (x - mean) / masked_std(x, mask)
    return (white if shift_mean else white + mean) * mask


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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is a perfect critic, 0 one that knows nothing."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return (1 - variance(returns - values) / variance(returns)).item()


# losses


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


METRICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction")


def losses(
    policy: PolicyWithValue, reference, rollout: Rollout, advantages: Tensor, returns: Tensor, kl_weight: float,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of a few rows of a rollout, its METRICS, both summed over real tokens, and the largest |ratio - 1|.

    Where the rollout was evaluated inside its queries too, the KL there is in the loss: no reward and no other penalty
    would hold the policy after the beginning of a query, and a shorter query may end just there.
    """
    logprobs, values, kl, query_kl = evaluate(policy, reference, rollout, settings.temperature)
    policy_losses, ratio = policy_loss(logprobs, rollout.logprobs, advantages, settings.clip_range)
    value_losses, value_clipped = value_loss(values, rollout.values, returns, settings.value_clip_range)
    per_token = policy_losses + settings.value_coef * value_losses + kl_weight * kl
    loss = rollout.sum(per_token) + kl_weight * query_kl.sum()
    with torch.no_grad():
        approx_kl, deviation = 0.5 * (logprobs - rollout.logprobs) ** 2, (ratio - 1).abs()
        per_token = policy_losses, value_losses, approx_kl, deviation > settings.clip_range, value_clipped
        metrics = torch.stack([rollout.sum(x) for x in per_token])
    return loss, metrics, deviation.max()


# the update


def minibatch_step(
    policy: PolicyWithValue, reference, optimizer: Optimizer, rollout: Rollout, targets: Targets, rows: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One optimizer step on some rows of a rollout: METRICS, means over their tokens; the largest |ratio - 1|; and the
    gradient's norm.

    The rows go through the model in forward batches whose gradients add up to the minibatch's own.
    """
    tokens = all_reduce(rollout.lengths[rows].sum())
    metrics, max_deviation = rollout.values.new_zeros(len(METRICS)), rollout.values.new_zeros(())
    for few in forward_batches(rows, rollout.lengths, settings.forward_batch):
        part, advantages, returns = rollout.select(few, targets.advantages, targets.returns)
        loss, sums, deviation = losses(policy, reference, part, advantages, returns, targets.kl_weight, settings)
        (loss / tokens).backward()
        metrics += sums / tokens
        max_deviation = max_deviation.maximum(deviation)
    return metrics, max_deviation, optimizer.step()


def update(
    policy: PolicyWithValue, reference, optimizer: Optimizer, rollout: Rollout, targets: Targets, settings: Settings,
    generator: torch.Generator,
) -> dict[str, float | None]:  # fmt: skip
    """One PPO update: passes over the rollout in shuffled minibatches. Returns means over all optimizer steps.

    With exact KL the loss holds the KL of every distribution, weighted with targets.kl_weight. Its gradient and that of
    the rewards (`next_token_kl`) together are the gradient of the same objective as with sampled KL in the rewards,
    with less noise.
    The optimizer skips a minibatch whose gradient is not finite; it is counted in "skipped". The first pass is over the
    rollout's own minibatches.
    """
    sums, steps_taken, steps = rollout.values.new_zeros(len(METRICS) + 1), rollout.values.new_zeros(()), 0
    for epoch in range(settings.epochs):
        count = len(rollout.minibatches)
        passes = shuffled_minibatches(len(rollout.lengths), count, generator) if epoch else rollout.minibatches
        for rows in passes:
            metrics, deviation, norm = minibatch_step(policy, reference, optimizer, rollout, targets, rows, settings)
            if steps == 0:
                first_deviation = all_reduce(deviation, "max")
            is_finite = norm.isfinite()  # no `if`: the host has waited in the optimizer, once is enough
            sums += torch.cat([all_reduce(metrics), norm.unsqueeze(0)]).where(is_finite, 0.0)
            steps_taken += is_finite
            steps += 1
    *means, max_deviation, taken = torch.cat([sums / steps_taken, torch.stack([first_deviation, steps_taken])]).tolist()
    explained = explained_variance(rollout.values, targets.returns, rollout.response_mask)
    metrics = {"explained_variance": explained} | dict(zip((*METRICS, "grad_norm"), means, strict=True))
    if settings.leave_one_out:  # there is no critic to speak of
        metrics |= dict.fromkeys(("value_loss", "value_clip_fraction", "explained_variance"))
    return metrics | {"ratio_deviation_first": max_deviation, "skipped": steps - int(taken)}
