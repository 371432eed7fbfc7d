"""Evaluation during training: now and then the policy answers held-out queries, and the best policy is kept."""

from collections.abc import Callable

import numpy as np

from rlhf import distributed, gold, lora
from rlhf.checkpoint import cpu_copy
from rlhf.errors import UserError
from rlhf.model_card import Chosen
from rlhf.policy import PolicyWithValue
from rlhf.rewards import Reward
from rlhf.rollout import collect
from rlhf.sampling import Sampling

QUERIES = 64  # at most
COLUMNS = tuple(f"eval_{name}" for name in ("score", "ethics", "kl", "objective", "gold_valid", "gold_ethical"))

Row = dict[str, float | None]  # COLUMNS
Measure = Callable[[PolicyWithValue], Row]


def held_out_queries(prompts, texts: dict[str, list[str]], length: int) -> list[str]:
    """The queries of every evaluation, at least one for each process."""
    queries = prompts.validation_queries(texts, length)[:QUERIES]
    if len(queries) < distributed.world_size():
        raise UserError(f"--eval-every: {len(queries)} held-out queries are too few for the processes; give more texts")
    return queries


def measure(
    policy: PolicyWithValue, *, reference, prompts, queries: list[str], reward: Reward, judge: gold.Judge | None,
    sampling: Sampling, kl_coef: float, forward_batch: int, seed: int,
) -> Row:  # fmt: skip
    """What one response to each of the queries, of which every process takes a shard, says of a policy.

    The responses are drawn with the same random numbers every time, and with none of the training's.
    """
    shard, rng = distributed.shard(queries), distributed.generator(seed)
    encoded = prompts.encode(shard, policy.value_head.weight.device)
    rollout = collect(policy, reference, *encoded, sampling, rng, forward_batch=forward_batch)
    texts = prompts.texts(shard, *rollout.tokens)
    scores = reward(shard, texts, rollout.terminated)
    per_response = scores.total.tolist(), scores.ethics.tolist(), rollout.exact_kl.sum(1).tolist()
    score, ethics, kl = (float(np.mean(distributed.gather(x))) for x in per_response)
    shares = gold.shares(gold.judged(judge, distributed.gather(texts)))
    return dict(zip(COLUMNS, (score, ethics, kl, score - kl_coef * kl, *shares.values()), strict=True))


class Evaluation:
    """Measures the policy after every `every` updates and the last one, and keeps the one with the best objective.

    every: None for never.
    """

    def __init__(self, every: int | None, updates: int, measure: Measure):
        self._every, self._updates, self._measure = every, updates, measure
        self._best: dict | None = None

    def after_update(self, update: int, policy: PolicyWithValue) -> Row:
        """The columns of an update's row, empty where no evaluation is due; none at all where none ever is."""
        if self._every is None:
            return {}
        if update % self._every and update < self._updates:
            return dict.fromkeys(COLUMNS)
        row = self._measure(policy)
        if row["eval_objective"] > (self._best["results"]["eval_objective"] if self._best else -np.inf):
            weights = cpu_copy(lora.TrainedWeights(policy).state_dict())
            self._best = {"update": update, "results": row, "policy": weights}
        return row

    def forget_best(self) -> None:
        """The reward has changed: earlier objectives do not compare with later ones."""
        self._best = None

    def bring_back_best(self, policy: PolicyWithValue) -> Chosen | None:
        """Give the policy the weights of the best one, if there is one."""
        if self._best is None:
            return None
        lora.TrainedWeights(policy).load_state_dict(self._best["policy"])
        return Chosen(self._best["update"], "the best by eval_objective", self._best["results"])

    def state_dict(self) -> dict:
        return {"best": self._best}

    def load_state_dict(self, state: dict) -> None:
        self._best = state["best"]
