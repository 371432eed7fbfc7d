"""What judges texts: the parts of a reward, and the gold judge.

A part is a classifier (its log-odds of "positive"), a preference model (its one output), or a function of one's own.
"""

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GPT2ForSequenceClassification

from rlhf import distributed, fast_path, models, precision
from rlhf.errors import UserError

WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*(.+)")
Score = Callable[[list[str], list[str]], np.ndarray]  # queries, and texts that begin with them -> raw scores [B]
Judge = Callable[[list[str]], np.ndarray]  # texts -> are they valid, and ethical, [N, 2]: 1, 0, or NaN if it cannot say


@dataclass(frozen=True)
class Reward:
    """A part of the reward, with its weight and its name in log.csv."""

    name: str
    weight: float
    score: Score
    is_model: bool


def weight_and_reward(spec: str) -> tuple[float, str]:
    match = WEIGHTED.fullmatch(spec)
    weight, what = (float(match[1]), match[2]) if match else (1.0, spec)
    if not np.isfinite(weight) or weight == 0:
        raise UserError(f"--reward {spec}: its weight is {weight}; give one that counts")
    return weight, what


def asks_people(specs: list[str]) -> bool:
    return "human" in [weight_and_reward(spec)[1] for spec in specs]


def load(specs: list[str], device: torch.device, in_precision: str, people: tuple | None = None) -> list[Reward]:
    """Every spec is a folder or hub name of a classifier, FILE.py:FUNCTION, or human; WEIGHT* may stand before it.

    in_precision: one of precision.PRECISIONS. people: the model of their answers, which is still to be trained, and its
    tokenizer.
    """
    parts = []
    for spec in specs:
        weight, what = weight_and_reward(spec)
        is_model = ".py:" not in what
        if what == "human":
            score = functools.partial(of_texts, *people)
        elif is_model:
            score = of_model(*load_model(what), device, in_precision)
        else:
            score = of_function(load_function(what, "--reward"))
        file, _, function = what.rpartition(":")
        name = Path(what).name if is_model else f"{Path(file).stem}.{function}"
        if name in [part.name for part in parts]:
            name += f"_{len(parts) + 1}"
        parts.append(Reward(name, weight, checked(score, spec), is_model))
    return parts


def load_model(name: str, flag: str = "--reward"):
    """A reward model and its tokenizer."""
    return models.load_pretrained(AutoModelForSequenceClassification, name, flag)


def of_model(model, tokenizer, device: torch.device, in_precision: str) -> Score:
    model.to(device)
    precision.freeze(model, precision.choose(in_precision, device, model))
    return functools.partial(of_texts, model, tokenizer)


def of_texts(model, tokenizer, queries: list[str], texts: list[str]) -> np.ndarray:
    """The score of whole texts; what is query in them makes no difference to a model."""
    return log_odds(model, tokenizer, texts, model.device)


def of_function(function: Callable) -> Score:
    """A function of the texts, or, if it takes two, of the queries and the responses."""
    needed = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind <= parameter.POSITIONAL_OR_KEYWORD
    ]

    def score(queries: list[str], texts: list[str]) -> np.ndarray:
        if len(needed) < 2:
            return np.asarray(function(texts), dtype=float)
        responses = [text[len(query) :] for query, text in zip(queries, texts, strict=True)]
        return np.asarray(function(queries, responses), dtype=float)

    return score


def checked(score: Score, spec: str) -> Score:
    """The same, but what is wrong with it is said in one line."""

    def safe(queries: list[str], texts: list[str]) -> np.ndarray:
        try:
            scores = score(queries, texts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it is the user's own code
            raise UserError(f"--reward {spec} failed: {error!r}") from error
        if scores.shape != (len(texts),):
            raise UserError(f"--reward {spec} gave scores of shape {scores.shape} for {len(texts)} texts")
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))[0]
            raise UserError(f"--reward {spec} gave {scores[bad]} for the text {texts[bad]!r}")
        return scores

    return safe


def raw_scores(parts: list[Reward], queries: list[str], texts: list[str]) -> np.ndarray:
    """[B, parts], as the parts give them."""
    return np.stack([part.score(queries, texts) for part in parts], 1)


def reading(parts: list[Reward], raw: np.ndarray) -> np.ndarray:
    """What people read of raw scores [B, parts], [B]: the first part's, a model's as the probability of "positive"."""
    first = raw[:, 0]
    return 1 / (1 + np.exp(-first)) if parts[0].is_model else first


def normalisation(reward: list[Reward], queries: list[str], texts: list[str]) -> dict:
    """What the reference's texts say for the run, those of all processes together."""
    mine = raw_scores(reward, queries, texts)
    raw = np.array(distributed.gather(mine.tolist()))
    return {
        "score_mean": raw.mean(0).tolist(),
        "score_std": raw.std(0).clip(1e-6).tolist(),
        "ethics_before": float(reading(reward, raw).mean()),
    }


def normalised(raw: np.ndarray, run: dict) -> np.ndarray:
    """Raw scores [..., parts], each with mean 0 and deviation 1 on the reference's samples, whose numbers a run has."""
    return (raw - np.array(run["score_mean"])) / np.array(run["score_std"])


def log_odds(model, tokenizer, texts: list[str], device: torch.device, batch: int = 128) -> np.ndarray:
    """The classifier's log-odds of "positive" for every text, or the score of a model with one output.

    The positive class is the one labelled "positive", or the last. The mean and deviation in the configuration of a
    preference model of ours make its scores those of [1]: 0 and 1 on the samples it was trained on.
    """
    names = {str(name).lower(): index for name, index in (model.config.label2id or {}).items()}
    positive = names.get("positive", model.config.num_labels - 1)
    length = models.longest(model, tokenizer)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.empty(len(texts))
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            encoded = tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=length, padding=True, return_tensors="pt"
            )
            logits = outputs(model, encoded.to(device)).double()
            if logits.shape[1] > 1:
                others = [i for i in range(logits.shape[1]) if i != positive]
                scores[rows] = (logits[:, positive] - logits[:, others].logsumexp(1)).cpu().numpy()
            else:
                normal = normal_of(model)
                scores[rows] = (logits[:, 0].cpu().numpy() - normal["reward_mean"]) / normal["reward_std"]
    return scores


def outputs(model, encoded) -> Tensor:
    """What a classifier says of texts [B, T], [B, kinds]."""
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = ((ids != model.config.pad_token_id) * columns).argmax(1, keepdim=True)
    is_gpt2 = isinstance(model, GPT2ForSequenceClassification) and fast_path.is_supported(model.base_model)
    if not is_gpt2 or len(encoded) > 2 or not mask.gather(1, last).all():
        return model(**encoded).logits
    places = torch.arange(len(ids), device=ids.device) * ids.shape[1] + last.squeeze(1)
    states = fast_path.hidden_states(model.base_model, ids, mask, columns.expand_as(ids), places)
    return model.score(states)  # only one state of a text meets the head


def normalise(model, tokenizer, texts: list[str]) -> None:
    """Makes the scores of a model with one output 0 on average with deviation 1 on these texts ([1], section 2.1)."""
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    scores = log_odds(model, tokenizer, texts, model.device)
    model.config.reward_mean, model.config.reward_std = float(scores.mean()), max(float(scores.std()), 1e-6)


def normal_of(model) -> dict[str, float]:
    """What `normalise` set."""
    return {name: getattr(model.config, name, value) for name, value in (("reward_mean", 0.0), ("reward_std", 1.0))}


def with_people(specs: list[str], out: str) -> list[str]:
    """The specs after training, when the model of people's answers is a folder beside the policy."""
    return [re.sub(r"(^|\*)human$", rf"\1{out}_reward", spec) for spec in specs]


def load_function(spec: str, flag: str) -> Callable:
    """FILE.py:FUNCTION"""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{flag} {spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise UserError(f"{flag} {spec} cannot be loaded: {error!r}") from error


def gold_judge(spec: str, texts: list[str], device: torch.device, in_precision: str) -> Judge | None:
    """FILE.py:FUNCTION, or None where it does not know the data (most of these texts are invalid); or a classifier's
    folder, whose "positive" is taken for the truth, and which cannot tell what is no text at all."""
    if ".py:" not in spec:
        score = of_model(*load_model(spec, "--gold"), device, in_precision)
        return lambda texts: np.array([(np.nan, odds > 0) for odds in score(texts, texts)], dtype=float).reshape(-1, 2)
    if not Path(spec.rpartition(":")[0]).is_file():
        return None
    function = load_function(spec, "--gold")

    def judge(texts: list[str]) -> np.ndarray:
        verdicts = [function(text) for text in texts]
        return np.array([(valid, label or 0.0) for valid, label in verdicts], dtype=float).reshape(-1, 2)

    return judge if judge(texts[:100])[:, 0].mean() > 0.5 else None


def judged(judge: Judge | None, texts: list[str]) -> np.ndarray:
    """[N, 2]: is the text valid, is it ethical; NaN where nobody knows."""
    return judge(texts) if judge else np.full((len(texts), 2), np.nan)


def gold_shares(verdicts: np.ndarray, weights: np.ndarray | float = 1.0) -> dict[str, float | None]:
    """Of verdicts [..., 2] under weights [...]: the shares of valid texts, and of ethical ones among the valid."""
    valid, ethical = verdicts[..., 0], verdicts[..., 1]
    all_of_them, judges_form = weights * np.ones_like(valid), not np.isnan(valid).any()
    good = weights * valid if judges_form else all_of_them
    return {
        "valid": float(good.sum() / all_of_them.sum()) if judges_form else None,
        "ethical": float((good * ethical).sum() / good.sum()) if good.sum() and not np.isnan(ethical).any() else None,
    }
