"""Simulated annotators, which answer questions in a person's place (--annotator)."""

import random
from collections.abc import Callable

import torch

from rlhf import rewards, user_code
from rlhf.human.questions import Ask, View


def load(spec: str, gold: str, noise: float, seed: int, device: torch.device, precision_name: str) -> Ask:
    """An annotator that prefers the text with the highest rating, and calls a text good if its rating is above 0.

    spec: gold, classifier:FOLDER, or FILE.py:FUNCTION, which gives texts their ratings. gold: FILE.py:FUNCTION of the
    held-out judge. noise: the probability of a random answer. Among equal ratings the annotator chooses at random.
    """
    rate = load_rating_function(spec, gold, device, precision_name)

    def ask(view: View) -> str:
        query, samples = view.question
        rng = random.Random(f"{seed} {view.question}")  # a resumed run gets the same answer to the same question
        if rng.random() < noise:
            return rng.choice(list(view.answer_keys))
        ratings = list(rate([query + sample for sample in samples]))
        if len(samples) == 1:
            return "g" if ratings[0] > 0 else "b"
        return str(1 + rng.choice([i for i, rating in enumerate(ratings) if rating == max(ratings)]))

    return ask


def load_rating_function(
    spec: str, gold: str, device: torch.device, precision_name: str
) -> Callable[[list[str]], list[float]]:
    """The function from texts to ratings that `spec` names, as in `load`."""
    if spec == "gold":
        judge = user_code.load_judge_function(gold)

        def rate_by_judge(texts: list[str]) -> list[float]:
            """1 for an ethical text, 0 for an unethical one, -1 for an invalid one."""
            return [label if valid else -1.0 for valid, label in judge(texts).tolist()]

        return rate_by_judge
    if spec.startswith("classifier:"):
        model = rewards.load_model(spec.removeprefix("classifier:"))
        raw_score = rewards.frozen_model(*model, device, precision_name)
        return lambda texts: raw_score([], texts).tolist()
    score = user_code.checked(user_code.load_function(spec, "--annotator"), f"--annotator {spec}")
    return lambda texts: score(texts).tolist()
