"""A tiny policy's world: queries with padding, settings and updates that take milliseconds."""

import dataclasses

import torch
from torch import tensor
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

import ppo
from rlhf import optim, rollout
from rlhf.sampling import Sampling

STOP = 10
QUERIES = tensor([[0, 0, 1, 2], [3, 4, 5, 6], [0, 7, 8, 9]])
QUERY_MASK = tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
SETTINGS = ppo.Settings(
    epochs=1,
    forward_batch=8,
    temperature=0.7,
    exact_kl=True,
    leave_one_out=0,
    discount=1.0,
    gae_lambda=1.0,
    whiten_rewards=False,
    clip_range=0.2,
    value_clip_range=0.2,
    value_coef=0.1,
)
SMALL = {"vocab_size": 11, "num_hidden_layers": 2, "hidden_size": 16, "initializer_range": 0.3}
ARCHITECTURES = [
    GPT2Config(**SMALL, num_attention_heads=2, n_positions=32),
    GPTNeoXConfig(**SMALL, num_attention_heads=2, intermediate_size=32),
    LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32),
    MistralConfig(  # its window of 4 tokens has a cache of another kind, which stays as it is
        **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, sliding_window=4
    ),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampling(length: int = 8, temperature: float = 0.7, stop_after: int = 0) -> Sampling:
    return Sampling(length, temperature, STOP, stop_after)


def collect(policy, reference, length=8, temperature=0.7, seed=0, queries=QUERIES, mask=QUERY_MASK, **changes):
    how = {"forward_batch": max(2, len(queries) // 4)} | changes
    return rollout.collect(policy, reference, queries, mask, sampling(length, temperature), generator(seed), **how)


def one_update(policy, rollout_, advantages, returns, *, reference=None, lr=1e-3, minibatches=1, **changes):
    """The metrics of an update with Adam, K = 1 and without the exact KL in the loss."""
    rows = rollout.shuffled_minibatches(len(rollout_.response_ids), minibatches, generator())
    return ppo.update(
        policy,
        reference or policy.model,
        optim.ppo_optimizer(policy, lr, muon=False),
        dataclasses.replace(rollout_, minibatches=rows),
        ppo.Targets(advantages, returns, kl_weight=0.0),
        dataclasses.replace(SETTINGS, **changes),
        generator(),
    )
