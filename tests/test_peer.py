"""The formulas of ppo.py and TRL's give the same numbers on random tensors.

TRL has no functions for them, so the tests cut its lines out of PPOTrainer.train and run them. Intended differences:
- TRL adds the score one position after the stop token, where it also has a value; ppo.py adds it at the stop token, as
  [3] does. The two agree on responses without padding, which the tests have.
- TRL whitens with the unbiased variance, ppo.py with the biased one, as [3].
- TRL takes the policy's log-probabilities from the sampler's logits in any precision, this project in float32 only.
"""

import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch

import ppo

pytest.importorskip("trl", "1.12.0")
trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
SOURCE = inspect.getsource(trainer.PPOTrainer.train)
B, R = 5, 7
MASK = torch.ones(B, R).long()


def lines(start: str, end: str) -> str:
    """TRL's lines from the one with `start` to before the one with `end`."""
    rows = SOURCE.splitlines()
    first = next(i for i, row in enumerate(rows) if start in row)
    last = next(i for i, row in enumerate(rows[first:], first) if end in row)
    return textwrap.dedent("\n".join(rows[first:last]))


def random_rollout():
    torch.manual_seed(0)
    names = ("logprobs", "ref_logprobs", "values", "new_logprobs", "vpred", "mb_advantage", "mb_return")
    return {name: torch.randn(B, R) for name in names} | {"scores": torch.randn(B)}


def trl_advantages(rollout, whiten):
    args = SimpleNamespace(kl_estimator="k1", kl_coef=0.3, whiten_rewards=whiten, gamma=0.9, lam=0.8)
    last = torch.full((B,), R - 1)
    no_padding = torch.zeros(B, R).bool()
    names = vars(trainer) | rollout
    names |= {"args": args, "responses": MASK, "padding_mask": no_padding, "padding_mask_p1": no_padding}
    names |= {"sequence_lengths": last, "sequence_lengths_p1": last + 1}
    exec(lines("# 4. compute rewards", "# Do multiple epochs"), names)
    return names


@pytest.mark.parametrize("whiten", [False, True])
def test_rewards_and_advantages(whiten):
    rollout = random_rollout()
    theirs = trl_advantages(rollout, whiten)
    rewards = ppo.token_rewards(rollout["scores"], rollout["logprobs"] - rollout["ref_logprobs"], MASK, 0.3)
    unbiased = math.sqrt((B * R - 1) / (B * R))
    if whiten:
        white, mean = ppo.whiten(rewards, MASK, shift_mean=False), rewards.mean()
        rewards = (white - mean) * unbiased + mean
    torch.testing.assert_close(rewards, theirs["rewards"])
    advantages, returns = ppo.advantages_and_returns(rewards, rollout["values"], MASK, 0.9, 0.8)
    torch.testing.assert_close(returns, theirs["returns"])
    torch.testing.assert_close(ppo.whiten(advantages, MASK) * unbiased, theirs["advantages"])


def test_losses():
    names = random_rollout()
    names["mb_values"], names["mb_logprobs"] = names["values"], names["new_logprobs"] + 0.3 * names["logprobs"]
    rows = torch.arange(B)
    theirs = vars(trainer) | names | {"args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)}
    no_padding = torch.zeros(B, R).bool()
    theirs |= {"padding_mask": no_padding, "padding_mask_p1": no_padding, "micro_batch_inds": rows}
    exec(lines("vpredclipped = torch.clamp(", "accelerator.backward(loss)"), theirs)
    policy_losses, ratio = ppo.policy_loss(names["new_logprobs"], names["mb_logprobs"], names["mb_advantage"], 0.2)
    value_losses, clipped = ppo.value_loss(names["vpred"], names["mb_values"], names["mb_return"], 0.2)
    assert ((ratio - 1).abs() > 0.2).any() and clipped.any()  # otherwise the comparison says little
    torch.testing.assert_close(policy_losses.mean(), theirs["pg_loss"])
    torch.testing.assert_close(value_losses.mean(), theirs["vf_loss"])
    torch.testing.assert_close(clipped.float().mean(), theirs["vf_clipfrac"])
    torch.testing.assert_close((policy_losses + 0.1 * value_losses).mean(), theirs["loss"])
