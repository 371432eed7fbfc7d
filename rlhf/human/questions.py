"""Questions to people: whether a text is good or bad, or which of several texts is best ([1], section 2.2)."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rlhf import models
from rlhf.sampling import Sampling

SKIP, UNDO, QUIT = "s", "u", "q"
COMMANDS = {SKIP: "skip", UNDO: "undo", QUIT: "save and quit"}  # key -> what it does, in every question


class Question(NamedTuple):
    """A query and responses to it: one to call good or bad, or several of which one is best."""

    query: str
    samples: tuple[str, ...]


class View(NamedTuple):
    """What a person sees of a question."""

    question: Question
    answer_keys: dict[str, str]  # key -> the answer that it gives
    progress: str


Ask = Callable[[View], str]  # shows a view and returns the key that was pressed


def samples_per_question(kind: str) -> int:
    """The number of samples in a question of this kind: good-bad, or best-of-N."""
    return 1 if kind == "good-bad" else int(kind.removeprefix("best-of-"))


def answer_keys(num_samples: int) -> dict[str, str]:
    """The keys that answer a question with `num_samples` samples, and what they mean."""
    return {"g": "good", "b": "bad"} if num_samples == 1 else {str(i + 1): f"text {i + 1}" for i in range(num_samples)}


def draw_questions(
    policy, prompts, queries: list[str], num_samples: int, sampling: Sampling, seed: int, batch: int = 64
) -> Iterator[Question]:
    """Draw questions without end: random queries, each with `num_samples` responses of the policy.

    The same seed and policy give the same questions. prompts: a class of rlhf/prompting.py. batch: queries per forward
    pass. A question's query with a sample is the text that rewards see.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        query_batch = rng.choices(queries, k=batch)
        repeated = [query for query in query_batch for _ in range(num_samples)]
        texts = models.continuations(policy, prompts, repeated, sampling, generator)
        for i, query in enumerate(query_batch):
            candidates = texts[i * num_samples : (i + 1) * num_samples]
            if num_samples == 1 or len(set(candidates)) > 1:  # equal texts are no choice
                responses = tuple(prompts.split(query, text).response for text in candidates)
                yield Question(candidates[0][: len(candidates[0]) - len(responses[0])], responses)
