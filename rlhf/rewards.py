"""What scores texts: a weighted sum of parts, each standardized on the reference policy's own samples.

A part is a classifier (its log-odds or its probability of "positive"), a preference model (its one output), or a
function of the user's.
"""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf import distributed, models, precision, prompting, runtime, user_code
from rlhf.errors import UserError
from rlhf.forward import classifier_logits

SMALLEST_STD = 1e-6  # of raw scores on the reference's samples
WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*(.+)")
RawScore = Callable[[list[str], list[str]], np.ndarray]  # queries, what is seen of the responses -> raw scores [B]
Split = Callable[[str, str], prompting.Sample]  # a query, a text -> what people read


class Part(NamedTuple):
    """One of the terms of a reward."""

    name: str  # in log.csv
    weight: float
    raw_score: RawScore
    in_log_odds: bool  # whether its raw scores are


class Scores(NamedTuple):
    """The scores of B texts."""

    total: Tensor  # [B], what PPO maximizes
    ethics: np.ndarray  # [B], what people read: the probability of "positive"
    by_part: np.ndarray  # [B, parts], standardized, before they are weighted


class Reward:
    """The weighted sum of parts, each with mean 0 and standard deviation 1 on the texts of `calibrate` ([1], section
    2.1). A text that does not end with the stop token has a fixed score."""

    def __init__(self, parts: list[Part], missing_stop_score: float):
        self.parts, self.missing_stop_score = parts, missing_stop_score
        self.score_mean = self.score_std = self.ethics_before = None  # until `calibrate` or `load_state_dict`

    def calibrate(self, queries: list[str], texts: list[str]) -> None:
        """Take mean and standard deviation from the reference's texts, of which every process has a shard.

        A part that does not vary on them keeps its own unit: of a rare event, 1 stays 1.
        """
        raw = np.array(distributed.gather(self.raw_scores(queries, texts).tolist()))
        stds = raw.std(0)
        self.score_mean, self.score_std = raw.mean(0).tolist(), np.where(stds < SMALLEST_STD, 1.0, stds).tolist()
        self.ethics_before = float(self.ethics(raw).mean())

    def __call__(self, queries: list[str], texts: list[str], terminated: Tensor) -> Scores:
        """Score B responses to the queries by their texts; terminated [B]: whether they end with the stop token."""
        raw = self.raw_scores(queries, texts)
        total = torch.tensor(self.combine(raw), device=terminated.device).float()
        return Scores(total.where(terminated, self.missing_stop_score), self.ethics(raw), self.standardize(raw))

    def raw_scores(self, queries: list[str], texts: list[str]) -> np.ndarray:
        """[B, parts], as the parts give them."""
        return np.stack([part.raw_score(queries, texts) for part in self.parts], 1)

    def standardize(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores [..., parts] in standard deviations from the mean of the reference's."""
        return (raw - np.array(self.score_mean)) / np.array(self.score_std)

    def combine(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores [..., parts] -> the weighted sum [...] of the standardized ones."""
        return self.standardize(raw) @ [part.weight for part in self.parts]

    def ethics(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores [B, parts] -> what people read, [B]: the first part's probability of "positive"; a function's
        value as it is."""
        first = raw[:, 0]
        return probability(first) if self.parts[0].in_log_odds else first

    def state_dict(self) -> dict:
        return {"score_mean": self.score_mean, "score_std": self.score_std, "ethics_before": self.ethics_before}

    def load_state_dict(self, state: dict) -> None:
        self.score_mean, self.score_std, self.ethics_before = (
            state[name] for name in ("score_mean", "score_std", "ethics_before")
        )


# from the flags


def load(
    specs: list[str],
    missing_stop_score: float,
    device: torch.device,
    precision_name: str,
    bounded: bool,
    human: tuple | None = None,
    split: Split = prompting.Texts.split,
) -> Reward:
    """Every spec is a folder or hub name of a classifier, FILE.py:FUNCTION, or human; WEIGHT* may stand before it.

    precision_name: one of precision.PRECISIONS. bounded: score by a classifier's probability, not by its log-odds.
    human: the model of people's answers, still to be trained, and its tokenizer. split: takes a text apart for a
    function.
    """
    parts = []
    for spec in specs:
        weight, what = weight_and_reward(spec)
        in_log_odds = False
        if user_code.is_function(what):
            file, function = user_code.file_and_function(what, "--reward")
            name = f"{Path(file).stem}.{function}"
            raw_score = user_function(user_code.load_function(what, "--reward"), split)
        else:
            name, (model, tokenizer) = Path(what).name, human if what == "human" else load_model(what)
            if what != "human":  # that one still learns
                freeze(model, device, precision_name)
            in_log_odds = not bounded or model.config.num_labels == 1  # where a preference model has its 0 is arbitrary
            raw_score = functools.partial(score_texts if in_log_odds else probabilities, model, tokenizer)
        if name in [part.name for part in parts]:
            name += f"_{len(parts) + 1}"
        parts.append(Part(name, weight, user_code.checked(raw_score, f"--reward {spec}"), in_log_odds))
    return Reward(parts, missing_stop_score)


def weight_and_reward(spec: str) -> tuple[float, str]:
    match = WEIGHTED.fullmatch(spec)
    weight, what = (float(match[1]), match[2]) if match else (1.0, spec)
    if not np.isfinite(weight) or weight == 0:
        raise UserError(f"--reward {spec}: its weight is {weight}; give one that counts")
    return weight, what


def includes_people(specs: list[str]) -> bool:
    return "human" in [weight_and_reward(spec)[1] for spec in specs]


def with_saved_human_model(specs: list[str], out: str) -> list[str]:
    """The specs after training, when the model of people's answers is a folder beside the policy."""
    return [re.sub(r"(^|\*)human$", lambda match: f"{match[1]}{human_folder(out)}", spec) for spec in specs]


def human_folder(out: str) -> str:
    """The folder of the model of people's answers."""
    return f"{out}_reward"


def as_list(specs: str | list[str]) -> list[str]:
    """The specs in the settings of a run: old runs have one, without a list."""
    return [specs] if isinstance(specs, str) else specs


def load_model(name: str, flag: str = "--reward"):
    """A reward model and its tokenizer."""
    return models.load_pretrained(AutoModelForSequenceClassification, name, flag)


def frozen_model(model, tokenizer, device: torch.device, precision_name: str) -> RawScore:
    """The raw scores of a model that is not trained."""
    freeze(model, device, precision_name)
    return functools.partial(score_texts, model, tokenizer)


def freeze(model, device: torch.device, precision_name: str) -> None:
    model.to(device)
    precision.freeze(model, precision.choose(precision_name, device, model))


def score_texts(model, tokenizer, queries: list[str], texts: list[str]) -> np.ndarray:
    """A model's raw scores of whole texts; which part of them is the query makes no difference to it."""
    warn_of_cut_texts(model, tokenizer, texts)
    return log_odds(model, tokenizer, texts, model.device)


def warn_of_cut_texts(model, tokenizer, texts: list[str]) -> None:
    """Say it if the longest text is longer than the model reads: what its end says is not scored."""
    tokens, length = len(tokenizer(max(texts, key=len, default=""))["input_ids"]), models.max_length(model, tokenizer)
    if tokens > length:
        runtime.warn_once(
            f"{model.name_or_path} reads {length} tokens, and some texts have more: their ends are not scored; give a "
            "shorter --response-length or --query-length, or a model that reads more"
        )


def probabilities(model, tokenizer, queries: list[str], texts: list[str]) -> np.ndarray:
    """The same between 0 and 1: log-odds have no end, and a text that is surely positive would gain by more praise."""
    return probability(score_texts(model, tokenizer, queries, texts))


def probability(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def user_function(function: Callable, split: Split) -> RawScore:
    """The raw scores of a function of the texts, or, if it takes two arguments, of the queries and the responses."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some that are written in C have none
        parameters = ()
    needed = [x for x in parameters if x.default is x.empty and x.kind <= x.POSITIONAL_OR_KEYWORD]

    def raw_score(queries: list[str], texts: list[str]) -> np.ndarray:
        if len(needed) < 2:
            return np.asarray(function(texts), dtype=float)
        samples = [split(query, text) for query, text in zip(queries, texts, strict=True)]
        messages, responses = ([getattr(sample, name) for sample in samples] for name in ("message", "response"))
        return np.asarray(function(messages, responses), dtype=float)

    return raw_score


def refuse_missing_files(specs: list[str]) -> None:
    """A UserError for a weight or a file that cannot be, before models are loaded."""
    for _, what in map(weight_and_reward, specs):
        if user_code.is_function(what):
            user_code.file_and_function(what, "--reward")


# models


def log_odds(model, tokenizer, texts: list[str], device: torch.device, batch: int = 128) -> np.ndarray:
    """The classifier's log-odds of "positive" for every text [N], or the score of a model with one output.

    The positive class is the one labelled "positive", or the last.
    """
    names = {str(name).lower(): index for name, index in (model.config.label2id or {}).items()}
    positive = names.get("positive", model.config.num_labels - 1)
    length = models.max_length(model, tokenizer)
    texts = models.with_a_token(tokenizer, texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.empty(len(texts))
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            encoded = tokenizer(
                [texts[i] for i in rows],
                truncation=True,
                max_length=length,
                padding=True,
                padding_side="right",  # as in training; on the left a text's positions depend on its neighbours
                return_tensors="pt",
            )
            logits = classifier_logits(model, encoded.to(device)).double()
            if logits.shape[1] > 1:
                others = [i for i in range(logits.shape[1]) if i != positive]
                scores[rows] = (logits[:, positive] - logits[:, others].logsumexp(1)).cpu().numpy()
            else:
                calibration = head_calibration(model)
                scores[rows] = (logits[:, 0].cpu().numpy() - calibration["reward_mean"]) / calibration["reward_std"]
    return scores


def calibrate_head(model, tokenizer, texts: list[str]) -> None:
    """Make the scores of a model with one output 0 on average with deviation 1 on these texts ([1], section 2.1).

    The two numbers are kept in the model's configuration.
    """
    reset_head(model)
    scores = log_odds(model, tokenizer, texts, model.device)
    model.config.reward_mean, model.config.reward_std = float(scores.mean()), max(float(scores.std()), 1e-6)


def reset_head(model) -> None:
    """Take the model's scores as they are: training changes them, and `calibrate_head` comes after it."""
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0


def head_calibration(model) -> dict[str, float]:
    """What `calibrate_head` set; other models' scores are taken as they are."""
    return {name: getattr(model.config, name, value) for name, value in (("reward_mean", 0.0), ("reward_std", 1.0))}
