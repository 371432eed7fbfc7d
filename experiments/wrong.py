"""finetuning_nlg.py with one detail wrong: how much does the detail matter?

    python -m experiments.wrong dropout --run dropout --out models/dropout    # the detail, flags of finetuning_nlg.py
    python -m experiments.study details                  # every detail and the correct code, three seeds each

Code for PPO on language models has got each of these details wrong somewhere (docs/method.md). The run's config.json
names the detail.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from torch import nn

import finetuning_nlg
import ppo
from rlhf import cli, forward, optim, policy, rewards, rollout, sampling
from rlhf.errors import UserError


def nothing() -> None:
    """The correct code, as a baseline."""


def dropout() -> None:
    """A tenth of the activations is dropped in the rollout and in the update, as in a model left in training mode."""

    def eval_with_dropout(module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.1
        return module.train()

    policy.PolicyWithValue.eval = eval_with_dropout


def temperature() -> None:
    """The sampler divides the logits by the temperature; log-probabilities and KL ignore it."""

    def at_temperature_1(function, *arguments):
        return function(*arguments[:-1], 1.0)  # the last argument of both functions is the temperature

    for name in ("token_statistics", "logprobs_and_kl"):
        setattr(rollout, name, functools.partial(at_temperature_1, getattr(rollout, name)))


def positions() -> None:
    """Position ids count the left padding."""

    def padded_position_ids(mask: torch.Tensor) -> torch.Tensor:
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)

    sampling.position_ids = forward.position_ids = padded_position_ids


def value_head() -> None:
    """The value head starts with random weights instead of zeros."""
    zero_init = policy.PolicyWithValue.__init__

    def random_init(self, *args, **kwargs) -> None:
        zero_init(self, *args, **kwargs)
        nn.init.normal_(self.value_head.weight, std=(self.value_head.in_features + 1) ** -0.5)

    policy.PolicyWithValue.__init__ = random_init


def advantages() -> None:
    """Advantages are not whitened."""
    ppo.whiten = lambda x, mask, shift_mean=True: x * mask
    ppo.masked_std = lambda x, mask: torch.ones((), device=x.device)  # so that the weight of the exact KL matches them


def adam_eps() -> None:
    """Adam's eps is PyTorch's 1e-8 instead of 1e-5; with Muon, Adam trains embeddings, norms and heads only."""
    optim.Adam.EPS = 1e-8


def score() -> None:
    """Scores are the classifier's log-odds, neither centred nor scaled."""
    rewards.Reward.standardize = lambda self, raw: raw


DETAILS = {
    detail.__name__: detail
    for detail in (nothing, dropout, temperature, positions, value_head, advantages, adam_eps, score)
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "(none)"
    if name not in DETAILS:
        raise UserError(f"{name} is no detail; the first argument is one of {', '.join(DETAILS)}")
    DETAILS[name]()
    finetuning_nlg.parse_args = functools.partial(parse_args, finetuning_nlg.parse_args)
    finetuning_nlg.main()


def parse_args(parse: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """The settings of the run, which the detail is one of, as `parse` reads all flags but the first."""
    program, detail, *flags = words = sys.argv
    sys.argv = [program, *flags]
    args = parse()
    sys.argv = words  # what config.json says was run
    args.detail = detail
    return args


if __name__ == "__main__":
    cli.run(main)
