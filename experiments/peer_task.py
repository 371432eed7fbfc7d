"""This project's task as a peer gets it: prompts, the score, pairs for DPO, and the run folder that is evaluated.

Nothing here needs the peer itself.
"""

import argparse
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rlhf import data, evaluation, frontier, models, outputs, prompting, querying, rewards, runtime
from rlhf.errors import UserError
from rlhf.forward import position_ids
from rlhf.policy import PolicyWithValue
from rlhf.sampling import Sampling, real_tokens, sample

VALIDATION_QUERIES = 512
BATCH = 256  # rows in a model at once


class Task(NamedTuple):
    """What a run of finetuning_nlg.py was given."""

    reference: torch.nn.Module
    tokenizer: Any
    prompts: prompting.Texts
    queries: list[str]
    validation_queries: list[str]  # to choose settings by: neither training nor evaluate_nlg.py asks them
    reward: rewards.Reward  # standardized as in that run
    sampling: Sampling
    kl_coef: float


def load_config(run: Path) -> dict:
    """config.json of the run to compare with."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        _ = config["settings"]["policy"], config["score_mean"]  # other folders have config.json files, too
        return config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {run} is no run folder of finetuning_nlg.py: {error!r}") from error


def load(config: dict, device: torch.device) -> Task:
    """config: config.json of the run."""
    settings = outputs.settings_of(config)
    reference, tokenizer = models.load_policy(settings["policy"], "--policy")
    prompts = prompting.Texts(tokenizer)
    texts = data.load_texts(*(settings[name] for name in ("data", "data_config", "data_revision", "text_column")))
    of_reward = (settings[name] for name in ("precision", "bounded_score"))
    reward = rewards.load(settings["reward"], settings["missing_stop_score"], device, *of_reward)
    reward.load_state_dict(config)
    asked_at_the_end = set(prompts.held_out_queries(texts, settings["query_length"]))
    others = prompts.validation_queries(texts, settings["query_length"])
    return Task(
        reference.to(device).requires_grad_(False),
        tokenizer,
        prompts,
        prompts.training_queries(texts, settings["query_length"]),
        [query for query in others if query not in asked_at_the_end][:VALIDATION_QUERIES],
        reward,
        prompting.sampling_of(argparse.Namespace(**settings), prompts),
        settings["kl_coef"],
    )


# what a peer is fed


def without_special_tokens(tokenizer):
    """A copy that encodes a text as it is, however it is called.

    A tokenizer from scratch closes a text with its end token, after which there is nothing to continue.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.padding_side = "left"
    return tokenizer


def with_padding_of_its_own(tokenizer):
    """A copy that pads on the left, with another token than the one that ends texts, which TRL tells apart by it.

    A model that is its own padding gets the last of the tokenizer's special tokens, which no text has.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = str(tokenizer.added_tokens_decoder[max(tokenizer.added_tokens_decoder)])
    return tokenizer


def count_real_positions(model) -> None:
    """Give the model position ids that count real tokens only, where it is called with a mask and without them.

    `generate` does so itself. A forward pass of a GPT-2 counts the padding on the left, too: its log-probabilities of a
    response are then those of other positions than the response was sampled at.
    """

    def add_positions(module, arguments, options):
        mask = options.get("attention_mask")
        if mask is not None and options.get("position_ids") is None:
            ids = arguments[0] if arguments else options["input_ids"]
            options["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]  # with a cache, of the new tokens
        return arguments, options

    model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)


def score_function(reward: rewards.Reward, stop_id: int):
    """The standardized score as a reward function of TRL, which knows by the token ids which completions end."""

    def standardized_score(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_):
        terminated = torch.tensor([ids[-1] == stop_id for ids in completion_ids])
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return reward(prompts, texts, terminated).total.tolist()

    return standardized_score


class TextScore(torch.nn.Module):
    """The standardized score where PPOTrainer expects a reward model with the policy's vocabulary.

    PPOTrainer calls the body with token ids, and the head with the last hidden states, and takes the number at the last
    real token. This body reads the text, and says its score everywhere.
    """

    base_model_prefix = "body"

    def __init__(self, reward: rewards.Reward, tokenizer):
        super().__init__()
        self.reward, self.tokenizer, self.score = reward, tokenizer, torch.nn.Identity()

    def body(self, input_ids: Tensor, attention_mask: Tensor, **_) -> SimpleNamespace:
        """input_ids, attention_mask: [B, T], padded on both sides."""
        texts = models.decode(self.tokenizer, input_ids, attention_mask)
        rows, last = torch.arange(len(texts)), last_real(attention_mask)
        terminated = input_ids[rows, last] == self.tokenizer.eos_token_id
        score = self.reward(texts, texts, terminated).total  # a classifier reads the whole texts only
        return SimpleNamespace(hidden_states=[score[:, None, None].expand(*input_ids.shape, 1)])


def last_real(mask: Tensor) -> Tensor:
    """mask: [B, T], padded on both sides -> where the last real token of every row is, [B]."""
    return mask.shape[1] - 1 - mask.long().flip(1).argmax(1)


def preference_pairs(
    prompt_ids: list[list[int]], response_ids: list[list[int]], scores: Tensor, answers: int
) -> list[dict[str, list[int]]]:
    """The best and the worst of every `answers` responses, which are to one query; none where all score the same."""
    pairs = []
    for start in range(0, len(scores), answers):
        group = scores[start : start + answers]
        best, worst = start + int(group.argmax()), start + int(group.argmin())
        if scores[best] > scores[worst]:
            row = {"prompt_ids": prompt_ids[start], "chosen_ids": response_ids[best]}
            pairs.append(row | {"rejected_ids": response_ids[worst]})
    return pairs


def sample_pairs(task: Task, episodes: int, answers: int, seed: int) -> list[dict[str, list[int]]]:
    """Pairs from so many responses of the reference, `answers` to every query."""
    generator = torch.Generator().manual_seed(seed)
    queries = querying.QueryStream(task.queries, seed).take(episodes // answers)
    repeated = [query for query in queries for _ in range(answers)]
    prompt_ids, response_ids, scores = task.tokenizer(repeated, add_special_tokens=False)["input_ids"], [], []
    for start in range(0, len(repeated), BATCH):
        few = repeated[start : start + BATCH]
        query_ids, query_mask = task.prompts.encode(few, task.reference.device)
        ids, _ = sample(task.reference, query_ids, query_mask, task.sampling, generator)
        mask, terminated = real_tokens(ids, task.sampling)
        texts = task.prompts.texts(few, query_ids, query_mask, ids, mask)
        scores.append(task.reward(few, texts, terminated).total)
        response_ids += [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
    return preference_pairs(prompt_ids, response_ids, torch.cat(scores), answers)


# what a peer's run leaves


def validate(task: Task, model, seed: int) -> dict[str, float]:
    """Score, KL and score - kl_coef * KL of a policy on the queries to choose settings by."""
    row = evaluation.measure(
        PolicyWithValue(model).to(task.reference.device).eval(), reference=task.reference, prompts=task.prompts,
        queries=task.validation_queries, reward=task.reward, judge=None, sampling=task.sampling, kl_coef=task.kl_coef,
        forward_batch=BATCH, seed=seed,
    )  # fmt: skip
    return {name: row[f"eval_{name}"] for name in ("score", "kl", "objective")}


def write_config(folder: Path, config: dict, out: Path, own: dict, **more) -> None:
    """config.json of a peer's run, as evaluate_nlg.py reads it: that of the run to compare with but for what differs.

    own: settings of the peer, under the names that they have in finetuning_nlg.py.
    """
    settings = config["settings"] | own | {"run": folder.name, "results": folder.parent.as_posix()}
    runtime.write_json(folder / "config.json", config | {"settings": settings | {"out": out.as_posix()}} | more)


def quality(run: Path, minutes: float) -> dict[str, float]:
    """A run's row in a table of peers, from its evaluation.json."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "fraction_of_optimum": frontier.known_fraction(found),
        "score": found["score_after"],
        "kl": found["kl"],
        "gold_ethical": found["gold"]["ethical_after"],
        "gold_valid": found["gold"]["valid_after"],
        "minutes": minutes,
    }


def minutes_of(run: Path) -> float:
    """The minutes that a run of finetuning_nlg.py took, from its log."""
    log = pd.read_csv(run / "log.csv")
    return log[["seconds_rollout", "seconds_score", "seconds_update"]].to_numpy(dtype=np.float64).sum() / 60
