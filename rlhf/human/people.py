"""A reward model that people's answers teach, from where it is, in rounds ([1], section 2.2)."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf import models, rewards, run_log, runtime, supervised
from rlhf.cli import COUNT, FRACTION, POSITIVE, SAMPLE_COUNT
from rlhf.errors import UserError
from rlhf.human import feedback, page
from rlhf.human.feedback import Question, answer_of, question_of, samples_of

BATCH = 32  # answers a step of the reward model


def add_flags(people: argparse._ArgumentGroup) -> None:
    people.add_argument(
        "--feedback", type=feedback.kind, default="good-bad", metavar="KIND", help="good-bad, or best-of-N, N up to 9"
    )
    people.add_argument("--labels", type=SAMPLE_COUNT, default=250, help="answers in all")
    people.add_argument(
        "--label-rounds", type=COUNT, default=1, help="times that people are asked, of the policy as it then is"
    )
    people.add_argument("--feedback-file", default="data_cls/feedback.jsonl", help="where every answer is kept")
    people.add_argument("--page", action="store_true", help="ask on a browser page of this machine, not here")
    people.add_argument(
        "--annotator", help="who answers in a person's place: gold, classifier:FOLDER, or FILE.py:FUNCTION"
    )
    people.add_argument("--annotator-noise", type=FRACTION, default=0.0, help="how often that one answers at random")
    people.add_argument("--reward-epochs", type=COUNT, default=8, help="passes over the answers in every round")
    people.add_argument("--reward-lr", type=POSITIVE, default=1e-3, help="peak learning rate of these")


def asker(args: argparse.Namespace, device: torch.device) -> feedback.Ask:
    """A person at the terminal or at a page, or what answers in their place."""
    if args.annotator:
        return feedback.annotator(args.annotator, args.gold, args.annotator_noise, args.seed, device, args.precision)
    return page.asker(feedback.choices(samples_of(args.feedback))) if args.page else feedback.at_terminal


def new_model(policy: str, kind: str):
    """A reward model to be trained, from the policy's weights as in [1], and its tokenizer."""
    model, tokenizer = models.load_pretrained(
        AutoModelForSequenceClassification, policy, "--model", num_labels=2 if samples_of(kind) == 1 else 1
    )
    with torch.no_grad():
        model.score.weight.normal_(0, (model.score.in_features + 1) ** -0.5)
    return model, tokenizer


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The answers to learn from, and a tenth held out: the same in every round, so that none was learned before."""
    held_out = np.arange(count) % 10 == min(1, count - 1)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def learn(model, tokenizer, rows: list[dict], *, epochs: int, lr: float, muon: bool, seed: int) -> dict:
    """Trains the reward model on answers from where it is; returns how it did on a tenth that it did not see."""
    device = model.device
    texts = [[query + sample for sample in samples] for query, samples in map(question_of, rows)]
    chosen = torch.tensor([answer_of(row) for row in rows], device=device)
    train, held_out = split(len(rows))
    if not len(train):
        raise UserError("one answer is too few to learn from; give more --labels")
    longest = models.longest(model, tokenizer)
    ids = [supervised.encode(tokenizer, row, longest) for row in texts]

    def scores(numbers) -> np.ndarray:
        flat = [text for i in numbers for text in texts[i]]
        return rewards.log_odds(model, tokenizer, flat, device).reshape(len(numbers), -1)

    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    history = supervised.fit(
        model,
        [sum(map(len, ids[i])) for i in train],
        lambda part: supervised.choice_loss(
            model, [ids[train[i]] for i in part], chosen[train[part]], tokenizer.pad_token_id
        ),
        lambda: supervised.choice_errors(scores(held_out), chosen[held_out].cpu().numpy()),
        epochs=epochs,
        batch_size=BATCH,
        lr=lr,
        muon=muon,
        device=device,
        seed=seed,
        decay=0.3,
        label="reward model",
        keep=lambda *_: None,
        saved=None,
    )
    best = min(history, key=lambda row: row["loss"])
    return {"labels": len(rows), "held_out_loss": best["loss"], "held_out_error": best["error"]}


def opinion(model, tokenizer) -> Callable[[Question], str]:
    """The key that the reward model would press."""

    def key(question: Question) -> str:
        texts = [question.query + sample for sample in question.samples]
        scores = rewards.log_odds(model, tokenizer, texts, model.device)
        return ("g" if scores[0] > 0 else "b") if len(texts) == 1 else str(1 + scores.argmax())

    return key


def ask_and_learn(
    args: argparse.Namespace,
    people: tuple[torch.nn.Module, PreTrainedTokenizerBase],
    ask: feedback.Ask,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[str],
    sampling: dict,
    *,
    wanted: int,
    done: int,
) -> dict:
    """Asks about the policy's texts, after `done` updates, until there are `wanted` answers, and learns from them.

    people: the reward model and its tokenizer. Returns the row of reward_model.csv.
    """
    samples = samples_of(args.feedback)
    rows = feedback.gather(
        feedback.questions(policy, tokenizer, queries, samples, **sampling | {"seed": args.seed + done}),
        Path(args.feedback_file),
        wanted,
        samples,
        ask,
        about={"policy": f"{args.out} after {done} updates" if done else args.policy, "annotator": args.annotator},
        opinion=opinion(*people) if done else None,
    )
    found = learn(
        *people,
        rows[:wanted],
        epochs=args.reward_epochs,
        lr=args.reward_lr,
        muon=args.optimizer == "muon",
        seed=args.seed,
    )
    return {"update": done} | found


def save(args: argparse.Namespace, model, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """The reward model beside the policy, with a model card."""
    table = pd.read_csv(Path(args.results) / args.run / run_log.REWARD_MODEL).set_index("labels")
    record = {"settings": vars(args)} | runtime.provenance(device)
    card = models.card("What people's answers taught", "text-classification", args.feedback_file, record, table)
    models.save_folder(f"{args.out}_reward", model, tokenizer, card)
