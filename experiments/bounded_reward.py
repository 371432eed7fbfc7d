"""A reward with a bound: the reward model's probability of "positive", where its log-odds are the usual score.

    python finetuning_nlg.py ... --reward experiments/bounded_reward.py:score

Log-odds have no end: a text that is surely positive gains by being more so. A probability near 1 does not, so that
stock words of praise pay less. For the film reviews of `make pretrained TASK=sentiment`, from the project's folder.
"""

import functools

import numpy as np
import torch

from rlhf import rewards

MODEL = "models/pretrained/sentiment/reward"


@functools.cache
def log_odds() -> rewards.RawScore:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return rewards.frozen_model(*rewards.load_model(MODEL), device, "auto")


def score(texts: list[str]) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds()([], texts)))
