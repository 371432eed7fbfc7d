"""The flags of finetuning_nlg.py that say how the policy writes, what it is paid, and how it learns."""

import argparse

import common
from common import COUNT, FRACTION, POSITIVE, SAMPLE_COUNT, number


def add_rollout_flags(rollout: argparse._ArgumentGroup) -> None:
    common.add_sampling_flags(rollout)
    rollout.add_argument("--answers", type=COUNT, default=1, help="responses to every query of a batch")
    rollout.add_argument("--stop", help="a token that ends a response (default: the tokenizer's end of text)")
    rollout.add_argument("--stop-after", type=number(int, 0), default=0, help="tokens before --stop counts")
    rollout.add_argument(
        "--missing-stop-score", type=number(float), default=-1.0, help="score of a response without it"
    )
    rollout.add_argument(
        "--reference-samples", type=SAMPLE_COUNT, default=4096, help="samples that normalise the score"
    )


def add_reward_flags(reward: argparse._ArgumentGroup) -> None:
    reward.add_argument("--kl-coef", type=number(float, 0), default=0.15, help="price of a nat of KL, first or fixed")
    reward.add_argument(
        "--kl-start",
        type=number(float, 1),
        default=4.0,
        help="times the price at the start of the run, falling to the price at its middle; not with --target-kl",
    )
    reward.add_argument(
        "--kl",
        choices=("exact", "sampled"),
        default="exact",
        help="KL over the vocabulary, or of the sampled token as in [3]",
    )
    reward.add_argument("--target-kl", type=POSITIVE, help="adapt the coefficient to this KL, in nats a response")
    reward.add_argument("--kl-horizon", type=POSITIVE, default=10_000, help="of that adaptation, in episodes")


def add_ppo_flags(learning: argparse._ArgumentGroup) -> None:
    learning.add_argument("--episodes", type=COUNT, default=56_320, help="responses in all")
    learning.add_argument("--batch-size", type=COUNT, default=256, help="responses per update")
    learning.add_argument("--minibatches", type=COUNT, default=4, help="optimizer steps per pass over a batch")
    learning.add_argument("--ppo-epochs", type=COUNT, default=1, help="K, passes over a batch")
    learning.add_argument("--lr", type=POSITIVE, default=1e-3, help="learning rate, falling to 0")
    learning.add_argument(
        "--optimizer",
        choices=("muon", "adam"),
        default="muon",
        help="muon learns a small model faster; adam, at a third of the learning rate or less, is [3]'s",
    )
    learning.add_argument("--clip-range", type=POSITIVE, default=0.2, help="of the probability ratio")
    learning.add_argument("--value-clip-range", type=POSITIVE, default=0.2, help="of the value")
    learning.add_argument("--value-coef", type=number(float, 0), default=0.1, help="weight of the value loss")
    learning.add_argument(
        "--leave-one-out",
        action="store_true",
        help="no critic: a value is the mean return of the other --answers to the same query",
    )
    learning.add_argument("--discount", type=FRACTION, default=1.0, help="gamma")
    learning.add_argument("--gae-lambda", type=FRACTION, default=1.0, help="lambda")
    learning.add_argument("--whiten-rewards", action=argparse.BooleanOptionalAction, default=False, help="as in [3]")
    learning.add_argument("--forward-batch", type=COUNT, default=64, help="rows in a model at once; saves memory")
    learning.add_argument("--kl-limit", type=POSITIVE, default=20.0, help="warn of a KL above, in nats a response")
