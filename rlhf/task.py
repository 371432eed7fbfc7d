"""What a run of finetuning_nlg.py trains on: data, policy, reference, reward and judge, as its flags name them."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf import activations, distributed, gold, lora, models, precision, prompting, rewards
from rlhf.errors import UserError
from rlhf.human import feedback
from rlhf.policy import PolicyWithValue


class Task(NamedTuple):
    """Data and models of a run of finetuning_nlg.py."""

    policy: PolicyWithValue
    reference: torch.nn.Module
    prompts: prompting.Texts | prompting.Conversations
    reward: rewards.Reward
    judge: gold.Judge | None
    human: feedback.HumanFeedback | None
    texts: dict[str, list[str]]  # of every split
    dtype: torch.dtype  # of matrix products


def load(args: argparse.Namespace, device: torch.device, updates: int) -> Task:
    texts = prompting.load(args.chat, args.data, args.data_config, args.data_revision, args.text_column)
    reference, model, tokenizer, dtype = _models(args, device)
    prompts = prompting.new(args.chat, tokenizer, args.reward_sees)
    human = _people(args, device, updates) if rewards.includes_people(args.reward) else None
    policy = PolicyWithValue(model, args.separate_value, dtype).eval()
    reward = rewards.load(
        args.reward, args.missing_stop_score, device, args.precision, args.bounded_score,
        human and (human.model, human.tokenizer), prompts.split,
    )  # fmt: skip
    judge = gold.load_judge(args.gold, prompts.readable(texts["valid"]), device, args.precision)
    return Task(policy, reference, prompts, reward, judge, human, texts, dtype)


def _models(args: argparse.Namespace, device: torch.device) -> tuple:
    """The reference, what becomes the policy, their tokenizer, and the precision of matrix products."""
    if args.batch_size % (args.answers * distributed.world_size()):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided into --answers {args.answers} to a query"
            + (f" in each of {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
        )
    reference, tokenizer = models.load_policy(args.policy, "--policy", args.chat)
    tokens = args.query_length + args.response_length
    models.check_length(reference, tokenizer, tokens, "--query-length and --response-length")
    dtype = precision.choose(args.precision, device, reference.to(device))
    model = lora.trained_beside(reference, dtype, args.lora, args.policy)
    if args.start_from:
        _take_weights(model, tokenizer, args.start_from)
    if args.activation_checkpointing:
        activations.checkpoint_layers(model)
    return reference, model, tokenizer, dtype


def _take_weights(model: torch.nn.Module, tokenizer, name: str) -> None:
    """Give a copy of the reference the weights of another model with the same architecture and tokens."""
    other, tokens = models.load_policy(name, "--start-from")
    shapes, needed = ({key: x.shape for key, x in each.state_dict().items()} for each in (other, model))
    if shapes != needed or tokens.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--start-from {name} must be fine-tuned from --policy, and its layers or tokens differ")
    model.load_state_dict(other.state_dict())


def _people(args: argparse.Namespace, device: torch.device, updates: int) -> feedback.HumanFeedback:
    """People, or what answers in their place, and the reward model that will learn their answers."""
    settings = feedback.Settings(
        kind=args.feedback,
        labels=args.labels,
        rounds=args.label_rounds,
        file=Path(args.feedback_file),
        metadata={"annotator": args.annotator},
        epochs=args.reward_epochs,
        lr=args.reward_lr,
        muon=args.optimizer == "muon",
        seed=args.seed,
    )
    who = {"annotator_spec": args.annotator, "noise": args.annotator_noise, "gold": args.gold, "on_page": args.page}
    return feedback.load(args.policy, settings, updates, device, args.precision, **who)
