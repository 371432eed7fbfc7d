"""Evaluation during training: what it measures, that training does not notice it, and which policy is kept."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf import data, distributed, evaluation, models, prompting, querying
from rlhf.errors import UserError
from rlhf.evaluation import COLUMNS, Evaluation
from rlhf.policy import PolicyWithValue
from rlhf.rewards import Part, Reward
from rlhf.rollout import collect
from rlhf.run_log import RunLog
from rlhf.sampling import Sampling
from tests.conftest import TINY_RUN, refused, run
from tests.test_distributed import two_processes

SHORT = ["--response-length", "8"]


# what it measures


def reward_of_length() -> Reward:
    part = Part("length", 1.0, lambda queries, texts: np.array([len(text) for text in texts], float), in_log_odds=False)
    reward = Reward([part], missing_stop_score=-3.0)
    reward.load_state_dict({"score_mean": [20.0], "score_std": [10.0], "ethics_before": 0.0})
    return reward


@pytest.fixture(scope="module")
def world(chain):
    """The trained tiny generator as reference, a policy that is not the same, and queries."""
    model, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    policy = PolicyWithValue(copy.deepcopy(model)).eval()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.5)
    return policy, model.eval(), tokenizer, ["On Monday", "My sister wrote", "I"]


def measured(world, judge=None, seed=3, **changes):
    policy, reference, tokenizer, queries = world
    how = {"sampling": Sampling(12, 0.7, tokenizer.eos_token_id), "kl_coef": 0.25, "forward_batch": 2} | changes
    return evaluation.measure(
        policy, reference=reference, prompts=prompting.Texts(tokenizer), queries=queries, reward=reward_of_length(),
        judge=judge, seed=seed, **how,
    )  # fmt: skip


def test_it_measures_one_response_to_every_query(world):
    policy, reference, tokenizer, queries = world
    sampling = Sampling(12, 0.7, tokenizer.eos_token_id)
    encoded = querying.encode_queries(tokenizer, queries, torch.device("cpu"))
    rollout = collect(policy, reference, *encoded, sampling, torch.Generator().manual_seed(3), forward_batch=2)
    texts = models.decode(tokenizer, rollout.ids, rollout.mask)
    scores = [(len(text) - 20) / 10 if ended else -3.0 for text, ended in zip(texts, rollout.terminated, strict=True)]
    kl = sum(rollout.exact_kl.sum(1).tolist()) / 3
    assert kl > 0.1
    judged = []
    row = measured(world, judge=lambda texts: judged.extend(texts) or np.array([[1, 1], [1, 0], [0, 0]], float))
    expected = [np.mean(scores), np.mean([len(text) for text in texts]), kl, np.mean(scores) - 0.25 * kl, 2 / 3, 1 / 2]
    assert list(row) == list(COLUMNS) and list(row.values()) == pytest.approx(expected, rel=1e-5)
    assert judged == texts


def test_it_draws_the_same_numbers_every_time_and_none_of_the_trainings(world):
    before = torch.get_rng_state()
    first, second, other = measured(world), measured(world), measured(world, seed=4)
    assert first == second and first["eval_kl"] != other["eval_kl"]
    assert torch.equal(torch.get_rng_state(), before)
    assert first["eval_gold_valid"] is None  # without a judge


def test_queries_of_the_final_evaluation_come_last(chain):
    """querying.split_queries holds the same queries out in both splits; those of "valid" are evaluate_nlg.py's."""
    _, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    texts = data.load_texts(str(chain[0] / "data_nlg"))
    prompts = prompting.Texts(tokenizer)
    queries = evaluation.held_out_queries(prompts, texts, 5)
    of_valid = set(querying.split_queries(texts["valid"], tokenizer, 5)[1])
    others = [query not in of_valid for query in queries]
    assert others == sorted(others, reverse=True) and others[0]
    assert not set(queries) & set(prompts.training_queries(texts, 5))
    assert len(queries) <= 64 and queries == evaluation.held_out_queries(prompts, texts, 5)


def test_more_processes_than_queries_are_refused(chain, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 1000)
    _, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    with pytest.raises(UserError, match="are too few for the processes"):
        evaluation.held_out_queries(prompting.Texts(tokenizer), data.load_texts(str(chain[0] / "data_nlg")), 5)


# when, and which is the best


def with_objectives(objectives: dict[int, float], every: int | None, updates: int):
    """An Evaluation of a layer whose weight is the number of its update, and the rows that it gives."""
    layer = torch.nn.Linear(1, 1)

    def measure(policy):
        update = int(policy.weight.item())
        return dict.fromkeys(COLUMNS, 0.5) | {"eval_objective": objectives[update]}

    evaluations, rows = Evaluation(every, updates, measure), {}
    for update in range(1, updates + 1):
        with torch.no_grad():
            layer.weight.fill_(update)
        rows[update] = evaluations.after_update(update, layer)
    return evaluations, rows


def test_it_is_due_every_so_often_and_at_the_end():
    _, rows = with_objectives(dict.fromkeys(range(1, 9), 0.0), every=3, updates=7)
    assert [update for update, row in rows.items() if row["eval_score"] is not None] == [3, 6, 7]
    assert all(list(row) == list(COLUMNS) for row in rows.values())
    assert with_objectives({}, every=None, updates=3)[1] == {1: {}, 2: {}, 3: {}}


@pytest.mark.parametrize(
    ("objectives", "best"),
    [
        ([0.1, 0.3, 0.2], 2),
        ([-5.0, -7.0, -6.0], 1),
        ([0.1, 0.3, 0.3], 2),  # the earlier of two alike
        ([math.nan, 0.1, math.nan], 2),
        ([math.nan, -math.inf, math.nan], None),
    ],
)
def test_the_best_is_kept_also_through_a_checkpoint(objectives, best):
    evaluations, _ = with_objectives(dict(enumerate(objectives, 1)), every=1, updates=3)
    resumed, layer = Evaluation(1, 3, None), torch.nn.Linear(1, 1)
    resumed.load_state_dict(evaluations.state_dict())
    chosen = resumed.bring_back_best(layer)
    assert (chosen and chosen.update) == best
    if best:
        assert layer.weight.item() == best and chosen.results["eval_objective"] == objectives[best - 1]
    resumed.forget_best()
    assert resumed.bring_back_best(layer) is None


# in a run


def without_timings(path) -> pd.DataFrame:
    log = pd.read_csv(path)
    return log.drop(columns=[name for name in log if "second" in name])


def test_training_notices_neither_evaluation_nor_guard(chain):
    """The run of `chain` has a guard, whose limit it stays below, and no evaluation."""
    home = chain[0]
    flags = [*TINY_RUN, "--eval-every", 1, "--no-kl-guard", "--run", "watched", "--out", "models/watched"]
    said = run("finetuning_nlg", *flags, cwd=home)
    one, other = (home / "models" / name / "model.safetensors" for name in ("nlg_ppo", "watched"))
    assert one.read_bytes() == other.read_bytes()
    plain, watched = (
        without_timings(home / "data_results" / name / "log.csv") for name in ("K2_lr_1e-3_seed0", "watched")
    )
    pd.testing.assert_frame_equal(watched.drop(columns=list(COLUMNS)), plain)
    assert watched[[*COLUMNS[:-1]]].notna().all(axis=None) and (watched.eval_kl > 0).all()
    objective = watched.eval_score - 0.15 * watched.eval_kl  # --kl-coef, not the coefficient of the update
    assert watched.eval_objective.tolist() == pytest.approx(objective.tolist(), abs=1e-4)
    assert f", held out: score {watched.eval_score[1]:.2f}, KL {watched.eval_kl[1]:.2f}" in said.stderr


def test_the_best_policy_survives_a_kill_and_is_what_the_run_leaves(chain, monkeypatch):
    home, weights = chain[0], []

    def falls(policy, **_):
        """The first of two evaluations is the best."""
        weights.append({name: x.clone() for name, x in policy.model.state_dict().items()})
        return dict.fromkeys(COLUMNS, 0.25) | {"eval_objective": -float(len(weights))}

    monkeypatch.setattr(evaluation, "measure", falls)
    flags = [*TINY_RUN, *SHORT, "--episodes", 64, "--eval-every", 2, "--keep-best", "--save-every", 1]
    flags += ["--run", "best", "--out", "models/best"]

    def dies_after_the_third(log, *_):
        if log.last_row["update"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "check", dies_after_the_third)
        run("finetuning_nlg", *flags, cwd=home)
    weights.pop()  # of update 4, which the checkpoint has not
    said = run("finetuning_nlg", *flags, "--resume", cwd=home)
    assert "models/best is the policy after update 2, the best by eval_objective" in said.stdout
    assert pd.read_csv(home / "data_results" / "best" / "log.csv").eval_score.isna().tolist() == [True, False] * 2

    best, last = weights
    model, _ = models.load_policy(str(home / "models" / "best"), "--policy")
    assert all(torch.equal(x, best[name]) for name, x in model.state_dict().items())
    assert not all(torch.equal(x, last[name]) for name, x in model.state_dict().items())
    card = (home / "models" / "best" / "README.md").read_text(encoding="utf-8")
    assert "PPO: after update 2, the best by eval_objective" in card
    assert card.count("0.2500") == len(COLUMNS) - 1 and "-1.0000" in card


def test_two_processes_agree(chain):
    home = chain[0]
    where = ["--run", "two", "--out", "models/two"]
    flags = [*TINY_RUN, *SHORT, "--eval-every", "1", "--keep-best", "--critic-warmup", "1", *where]
    assert two_processes("finetuning_nlg", home, *flags) == [0, 0]
    log = pd.read_csv(home / "data_results" / "two" / "log.csv")
    assert log[["eval_score", "eval_kl"]].notna().all(axis=None)
    assert abs(log.eval_kl[0]) < 1e-3 < log.eval_kl[1]  # the first update was the critic's
    best = int(log["update"][log.eval_objective.idxmax()])
    card = (home / "models" / "two" / "README.md").read_text(encoding="utf-8")
    assert f"PPO: after update {best}" in card
    settings = json.loads((home / "data_results" / "two" / "config.json").read_text(encoding="utf-8"))
    assert settings["processes"] == 2


def test_flags(chain):
    assert "give --eval-every, too" in refused("finetuning_nlg", *TINY_RUN, "--keep-best", cwd=chain[0])
    assert "--eval-every" in refused("finetuning_nlg", *TINY_RUN, "--eval-every", 0, cwd=chain[0])
