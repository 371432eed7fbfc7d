"""finetuning_nlg.py with one detail wrong and all else as it is: what does the detail matter?

    python -m experiments.wrong dropout --seed 1         # what follows the detail are flags of finetuning_nlg.py
    python -m experiments.study details             # all of them, three seeds each, beside the right one

Every detail is one that code for PPO on language models has got wrong somewhere (README.md, How it works).
"""

import functools
import sys

import torch
from torch import nn

import finetuning_nlg
import ppo
from rlhf import cli, errors, optim, policy, rewards, sampling


def nothing() -> None:
    """The right one."""


def dropout() -> None:
    """A tenth of the activations is dropped, while sampling and in the update, as in a model left in training mode."""

    def eval_with_dropout(module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.1
        return module.train()

    policy.PolicyWithValue.eval = eval_with_dropout


def at_temperature_1(function, *arguments):
    """The function, whose last argument is the temperature, at 1."""
    return function(*arguments[:-1], 1.0)


def temperature() -> None:
    """The sampler divides the logits by the temperature, log-probabilities and KL are of those that are not divided."""
    for name in ("token_statistics", "logprobs_and_kl"):
        setattr(ppo, name, functools.partial(at_temperature_1, getattr(ppo, name)))


def positions() -> None:
    """Left padding counts as tokens."""

    def all_counted(mask: torch.Tensor) -> torch.Tensor:
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)

    sampling.position_ids = policy.position_ids = all_counted


def value_head() -> None:
    """The value head starts with random weights instead of zeros."""
    right = policy.PolicyWithValue.__init__

    def init(self, *args, **kwargs) -> None:
        right(self, *args, **kwargs)
        nn.init.normal_(self.value_head.weight, std=(self.value_head.in_features + 1) ** -0.5)

    policy.PolicyWithValue.__init__ = init


def advantages() -> None:
    """Advantages are not whitened."""
    ppo.whiten = lambda x, mask, shift_mean=True: x * mask
    ppo.masked_std = lambda x, mask: torch.ones((), device=x.device)  # the exact KL's weight follows them


def adam_eps() -> None:
    """PyTorch's 1e-8 in place of 1e-5; of Adam's parameters, which Muon leaves it."""
    optim.Adam.EPS = 1e-8


def score() -> None:
    """The score is the classifier's log-odds as they are, neither centred nor scaled."""
    rewards.normalised = lambda raw, _: raw


DETAILS = {
    one.__name__: one for one in (nothing, dropout, temperature, positions, value_head, advantages, adam_eps, score)
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "none"
    if name not in DETAILS:
        raise errors.UserError(f"{name} is no detail; the first argument is one of {', '.join(DETAILS)}")
    DETAILS[sys.argv.pop(1)]()
    finetuning_nlg.main()


if __name__ == "__main__":
    cli.run(main)
