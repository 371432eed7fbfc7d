"""The flags of finetuning_nlg.py for feedback from people."""

import argparse
import re

from rlhf import recipes
from rlhf.cli import COUNT, FRACTION, POSITIVE, SAMPLE_COUNT
from rlhf.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Returns the flags, for `refuse_without_people`."""
    group = parser.add_argument_group("feedback from people (--reward human)")
    lr_help = recipes.described(recipes.PEOPLE, "reward_lr", "peak learning rate of these passes")
    add = group.add_argument
    return [
        add("--feedback", type=kind, default="good-bad", metavar="KIND", help="good-bad, or best-of-N, N up to 9"),
        add("--labels", type=SAMPLE_COUNT, default=250, help="answers in all"),
        add("--label-rounds", type=COUNT, default=1, help="times that people are asked, of the policy then"),
        add("--feedback-file", default="data_cls/feedback.jsonl", help="file of all answers"),
        add("--page", action="store_true", help="ask on a browser page of this machine, not at the terminal"),
        add("--annotator", help="answers in a person's place: gold, classifier:FOLDER, or FILE.py:FUNCTION"),
        add("--annotator-noise", type=FRACTION, default=0.0, help="fraction of its answers that are random"),
        add("--reward-epochs", type=COUNT, default=8, help="passes over the answers in every round"),
        add("--reward-lr", type=POSITIVE, help=lr_help),
    ]


def refuse_without_people(args: argparse.Namespace, flags: list[argparse.Action]) -> None:
    """Where no person is asked, a flag that says how has been given by mistake."""
    for flag in flags:
        if getattr(args, flag.dest) != flag.default:
            raise UserError(f"{flag.option_strings[0]} is for --reward human: give it, too, or leave it out")


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Where an annotator answers, no person is asked, and the other way round."""
    if args.annotator_noise and not args.annotator:
        raise UserError("--annotator-noise is that of an --annotator; give one, or leave it out")
    if args.page and args.annotator:
        raise UserError("--page is for people, and --annotator answers in their place; leave out one of them")


def kind(text: str) -> str:
    """An argparse type: good-bad, or best-of-N with N from 2 to 9."""
    if text != "good-bad" and not re.fullmatch("best-of-[2-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither good-bad nor best-of-N with N from 2 to 9")
    return text
