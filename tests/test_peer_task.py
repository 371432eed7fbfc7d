"""What TRL's trainers are given, and what is kept of their runs. The tests of TRL itself need trl 1.16."""

import dataclasses
import importlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_nlg
from experiments import peer_task
from rlhf import models, rewards
from rlhf.errors import UserError
from rlhf.forward import position_ids
from tests import tiny
from tests.conftest import refused, run

RUN = "data_results/K2_lr_1e-3_seed0"
TEXTS = ["The cat sat on the mat.", "The dog sat on the log."]


# without TRL


def test_a_prompt_is_encoded_without_the_end_token():
    tokenizer = models.scratch_tokenizer(TEXTS)
    ids = tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert tokenizer("The cat")["input_ids"] == [*ids, tokenizer.eos_token_id]
    bare = peer_task.without_special_tokens(tokenizer)
    assert bare(text=["The cat"])["input_ids"] == [ids]  # as GRPOTrainer and RLOOTrainer call it
    assert bare.padding_side == "left" and bare.pad_token_id != bare.eos_token_id
    assert tokenizer("The cat")["input_ids"][-1] == tokenizer.eos_token_id  # the policy's own stays as it was


def test_padding_on_the_left_moves_no_position(tiny_model):
    wanted = torch.cat([tiny_model(tiny.QUERIES[i : i + 1, -n:]).logits[:, -1] for i, n in enumerate((2, 4, 3))])
    before = tiny_model(input_ids=tiny.QUERIES, attention_mask=tiny.QUERY_MASK).logits[:, -1]
    assert (before - wanted)[[0, 2]].abs().max() > 0.1  # what TRL does, and why it is repaired
    peer_task.count_real_positions(tiny_model)
    torch.testing.assert_close(tiny_model(input_ids=tiny.QUERIES, attention_mask=tiny.QUERY_MASK).logits[:, -1], wanted)
    generated = tiny_model.generate(
        tiny.QUERIES, attention_mask=tiny.QUERY_MASK, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    alone = tiny_model.generate(tiny.QUERIES[2:, 1:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated[2, 4:].tolist() == alone[0, 3:].tolist()


def test_the_score_is_standardized_and_knows_what_ended():
    seen = []

    def raw_score(queries, texts):
        seen.extend(zip(queries, texts, strict=True))
        return np.array([float(len(text)) for text in texts])

    reward = rewards.Reward([rewards.Part("length", 1.0, raw_score, False)], missing_stop_score=-1.0)
    reward.load_state_dict({"score_mean": [4.0], "score_std": [2.0], "ethics_before": 0.5})
    score = peer_task.score_function(reward, stop_id=0)
    scores = score(["ab", "ab"], ["cdef", "cdefgh"], [[5, 6, 0], [5, 6, 7]], trainer_state=None)
    assert scores == [(6 - 4) / 2, -1.0]  # the second has no stop token
    assert seen == [("ab", "abcdef"), ("ab", "abcdefgh")]


def test_a_model_that_is_its_own_padding_gets_another_for_trl():
    tokenizer = models.scratch_tokenizer(TEXTS)
    assert peer_task.with_padding_of_its_own(tokenizer).pad_token_id == tokenizer.pad_token_id  # it has one
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    padded = peer_task.with_padding_of_its_own(tokenizer)
    assert (padded.pad_token, padded.padding_side) == ("<spare>", "left")
    assert tokenizer.pad_token == tokenizer.eos_token  # the policy's own stays as it was


def test_the_score_of_the_text_stands_at_its_last_token():
    tokenizer, seen = models.scratch_tokenizer(TEXTS), []

    def raw_score(queries, texts):
        seen.extend(texts)
        return np.array([float(len(text)) for text in texts])

    reward = rewards.Reward([rewards.Part("length", 1.0, raw_score, False)], missing_stop_score=-1.0)
    reward.load_state_dict({"score_mean": [1.0], "score_std": [2.0], "ethics_before": 0.5})
    whole = tokenizer("The cat sat")["input_ids"]  # with the end token
    width = len(whole)
    short = tokenizer("The", add_special_tokens=False)["input_ids"] + whole[-1:]
    ids, mask = torch.zeros(3, width + 1).long(), torch.zeros(3, width + 1).bool()
    for row, (start, tokens) in enumerate([(1, whole), (1, short), (2, whole[:-1])]):
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tensor(tokens), True
    assert peer_task.last_real(mask).tolist() == [width, len(short), width]
    model = peer_task.TextScore(reward, tokenizer)
    states = getattr(model, model.base_model_prefix)(input_ids=ids, attention_mask=mask, position_ids=None)
    scores = model.score(states.hidden_states[-1]).squeeze(-1)[torch.arange(3), peer_task.last_real(mask)]
    assert seen == ["The cat sat", "The", "The cat sat"]
    assert scores.tolist() == [(11 - 1) / 2, (3 - 1) / 2, -1.0]  # the third has no stop token


def test_pairs_are_the_best_and_the_worst_of_a_query():
    prompts = [[1], [1], [1], [2], [2], [2], [3], [3], [3]]
    responses = [[10], [11], [12], [20], [21], [22], [30], [31], [32]]
    scores = tensor([0.5, 2.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
    assert peer_task.preference_pairs(prompts, responses, scores, 3) == [
        {"prompt_ids": [1], "chosen_ids": [11], "rejected_ids": [12]},
        {"prompt_ids": [3], "chosen_ids": [32], "rejected_ids": [30]},  # all answers to 2 score the same
    ]


def test_pairs_of_two_take_all_answers():
    pairs = peer_task.preference_pairs([[1], [1], [2], [2]], [[3], [4], [5], [6]], tensor([0.0, 1.0, 1.0, 0.0]), 2)
    assert [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs] == [([4], [3]), ([5], [6])]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        peer_task.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is no run folder"):
        peer_task.load_config(tmp_path)


def test_the_minutes_of_a_run(tmp_path):
    log = {"update": [1, 2], "seconds_rollout": [10, 20], "seconds_score": [3, 7], "seconds_update": [30, 50]}
    pd.DataFrame(log).to_csv(tmp_path / "log.csv", index=False)
    assert peer_task.minutes_of(tmp_path) == 2.0


@pytest.fixture(scope="module")
def home(chain, tmp_path_factory):
    """A folder with trained models that the tests of this file may change."""
    return shutil.copytree(chain[0], tmp_path_factory.mktemp("peers") / "home")


@pytest.fixture
def task(home, monkeypatch):
    monkeypatch.chdir(home)
    return peer_task.load(peer_task.load_config(Path(RUN)), torch.device("cpu"))


def test_the_task_is_that_of_the_run(task):
    config = json.loads(Path(RUN, "config.json").read_text())
    assert (task.reward.score_mean, task.reward.score_std) == (config["score_mean"], config["score_std"])
    assert dataclasses.astuple(task.sampling) == (40, 0.7, task.tokenizer.eos_token_id, 0)
    texts = (Path("data_nlg") / "valid.txt").read_text(encoding="utf-8").splitlines()
    asked_at_the_end = task.prompts.held_out_queries({"valid": texts}, 5)
    assert task.validation_queries and not set(task.validation_queries) & {*asked_at_the_end, *task.queries}


def test_pairs_are_sampled_from_the_reference_and_ranked(task):
    pairs = peer_task.sample_pairs(task, episodes=64, answers=4, seed=0)
    assert 0 < len(pairs) <= 16
    stop = task.sampling.stop_id
    for pair in pairs:
        assert stop not in pair["prompt_ids"] and 1 <= len(pair["prompt_ids"]) <= 5
        scores = []
        for name in ("chosen_ids", "rejected_ids"):
            ids = pair[name]
            assert stop not in ids[:-1] and (ids[-1] == stop or len(ids) == 40)
            query, text = (task.tokenizer.decode(x, skip_special_tokens=True) for x in (pair["prompt_ids"], ids))
            scores.append(task.reward([query], [query + text], tensor([ids[-1] == stop])).total.item())
        assert scores[0] > scores[1]


def test_validation_is_of_the_policy_and_its_price(task):
    validation = peer_task.validate(task, task.reference, seed=0)
    assert validation["kl"] == pytest.approx(0, abs=1e-5)
    assert validation["objective"] == pytest.approx(validation["score"] - task.kl_coef * validation["kl"])
    assert task.kl_coef == 0.15


def test_evaluate_nlg_reads_a_peers_config(home, monkeypatch):
    monkeypatch.chdir(home)
    config, folder = peer_task.load_config(Path(RUN)), Path("data_results/peers/hand")
    own = {"lr": 3e-4, "ppo_epochs": 1, "episodes": 8}
    peer_task.write_config(folder, config, Path("models/peers/hand"), own, minutes=1.5, trl={"method": "dpo"})
    settings, record = evaluate_nlg.load_run(folder)
    assert (settings.out, settings.run, settings.lr, settings.episodes) == ("models/peers/hand", "hand", 3e-4, 8)
    assert (record["minutes"], record["trl"], record["score_std"]) == (1.5, {"method": "dpo"}, config["score_std"])
    evaluate_nlg.shared_settings({Path(RUN): evaluate_nlg.load_run(Path(RUN)), folder: (settings, record)})
    shutil.rmtree(folder)


# with TRL


@pytest.fixture
def peers_today():
    pytest.importorskip("trl", "1.16.0")
    return importlib.import_module("experiments.peers_today")


DEFAULTS = {  # trl 1.16.0: batch size, K, answers, learning rate, beta
    "grpo": (8, 1, 8, 1e-6, 0.0),
    "grpo-unscaled": (8, 1, 8, 1e-6, 0.0),
    "rloo": (8, 1, 2, 1e-6, 0.05),
    "dpo": (8, 3, 2, 1e-6, 0.1),
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_what_the_user_leaves_out_is_trls_default(peers_today, method):
    settings = peers_today.Settings(method, episodes=64, seed=0, minibatches=1)
    filled = settings.filled()
    assert (filled.batch_size, filled.epochs, filled.answers, filled.lr, filled.beta) == DEFAULTS[method]
    given = dataclasses.replace(settings, lr=0.5, beta=0.0, batch_size=4).filled()
    assert (given.batch_size, given.epochs, given.lr, given.beta) == (4, DEFAULTS[method][1], 0.5, 0.0)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_trl_computes_the_log_probabilities_that_it_samples_with(peers_today, task, tmp_path, method):
    settings = peers_today.Settings(method, 32, 0, 2, batch_size=16, epochs=2, beta=0.1).filled()
    trainer = peers_today.new_trainer(settings, task, tmp_path)
    assert trainer.args.max_steps == 32 // 16 * 2 * 2
    kwargs = trainer.generation_kwargs
    assert [kwargs[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")] == [0.7, 0, 1.0, 40]
    rows = trainer._generate_and_score_completions([{"prompt": query} for query in task.queries[:16]])
    mask = rows["prompt_mask"]
    assert (mask == 0).any() and not (rows["prompt_ids"] == task.sampling.stop_id).any()
    ids, both = (
        torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1),
        torch.cat([mask, rows["completion_mask"]], 1),
    )
    with torch.no_grad():
        logits = task.reference(ids, attention_mask=both, position_ids=position_ids(both)).logits / 0.7
    width = rows["completion_ids"].shape[1]
    expected = logits.log_softmax(-1)[:, -width - 1 : -1].gather(2, rows["completion_ids"].unsqueeze(2)).squeeze(2)
    for model in (trainer.model, trainer.ref_model):
        logps, *_ = trainer._get_per_token_logps_and_entropies(model, ids, both, width)
        torch.testing.assert_close(logps[rows["completion_mask"] == 1], expected[rows["completion_mask"] == 1])


def test_unscaled_grpo_does_not_divide_by_the_deviation_of_a_querys_scores(peers_today, task, tmp_path):
    """Advantages are scores less their query's mean; of GRPO as it comes, these over their deviation."""
    for method in ("grpo", "grpo-unscaled"):
        settings = peers_today.Settings(method, 32, 0, 1, batch_size=16).filled()
        trainer = peers_today.new_trainer(settings, task, tmp_path)
        rows = trainer._generate_and_score_completions([{"prompt": task.queries[0]} for _ in range(8)])
        deviation = rows["advantages"].std()
        assert deviation > 0 and (abs(deviation - 1) < 1e-3) == (method == "grpo")


def test_dpo_learns_from_the_sampled_tokens(peers_today, task, tmp_path):
    settings = peers_today.Settings("dpo", 32, 0, 1, batch_size=4, epochs=1).filled()
    trainer = peers_today.new_trainer(settings, task, tmp_path)
    assert trainer.train_dataset.to_list() == peer_task.sample_pairs(task, 32, 2, seed=0)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["completion_mask"].sum(1).tolist() == [
        len(trainer.train_dataset[0][name]) for name in ("chosen_ids", "rejected_ids")
    ]


def test_every_method_trains_and_is_evaluated(peers_today, home, monkeypatch):
    flags = "--episodes 32 --batch-size 16 --minibatches 2 --lr 1e-3".split()
    flags += ["--evaluation", "--queries 2 --samples 8 --reference-samples 64"]  # of the full size: half a minute
    run("experiments.peers_today", *flags, cwd=home)
    table = pd.read_csv(home / "data_results/peers.csv").set_index("run")
    names = ["dpo_K3_lr_1e-3_beta_0.1_seed0"]
    names += [f"grpo{scaling}_K1_lr_1e-3_beta_0_seed0" for scaling in ("-unscaled", "")]
    names += ["rloo_K1_lr_1e-3_beta_0.05_seed0"]
    assert table.index.tolist() == ["K2_lr_1e-3_seed0", *names]
    assert (table.kl[names] > 0).all() and (table.minutes > 0).all()
    for name in names:
        out, folder = home / "models/peers" / name, home / "data_results/peers" / name
        assert AutoTokenizer.from_pretrained(out)("The")["input_ids"][-1] == 0  # the policy's tokenizer is unchanged
        AutoModelForCausalLM.from_pretrained(out)
        config = json.loads((folder / "config.json").read_text())
        assert config["versions"]["trl"].startswith("1.16.") and config["trl"]["lr"] == 1e-3
        assert {"loss", "learning_rate", "step"} <= set(pd.read_csv(folder / "trl_log.csv"))

    monkeypatch.setattr(peers_today, "new_trainer", None)  # what is trained is not trained again
    done = subprocess.CompletedProcess("", 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done)
    ours = [f"data_results/K2_lr_1e-3_seed{seed}" for seed in (0, 1)]
    shutil.copytree(home / ours[0], home / ours[1])  # a run of another seed, which is in the table as it is
    run("experiments.peers_today", *flags, "--run", *ours, cwd=home)
    table = pd.read_csv(home / "data_results/peers.csv").run.tolist()
    assert table == [Path(ours[0]).name, Path(ours[1]).name, *names]


def test_a_search_takes_the_best_objective(peers_today, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_results").mkdir()
    trained = []

    def train(settings, task, config, run, out):
        trained.append((settings.episodes, run, out))
        objective = 1.0 if (settings.lr, settings.beta) == (3e-4, 0.15) else 0.5
        return {"minutes": 1.0, "validation": {"score": 2.0, "kl": 3.0, "objective": objective}}

    monkeypatch.setattr(peers_today, "train", train)
    for method, best in (("grpo", (3e-4, 0.15)), ("dpo", (1e-4, 0.1)), ("grpo", (3e-4, 0.15))):
        settings = peers_today.Settings(method, 80, 0, 1).filled()
        chosen = peers_today.search(settings, None, {}, Path("data_results/peers"))
        assert (chosen.lr, chosen.beta, chosen.episodes) == (*best, 80)
    name = "peers/search/grpo_K1_lr_1e-4_beta_0.05_seed0"
    assert trained[0] == (20, Path("data_results") / name, Path("models") / name) and len(trained) == 3 * 6
    table = pd.read_csv("data_results/peers_search.csv")
    assert table.method.value_counts().to_dict() == {"grpo": 6, "dpo": 6}  # the second search replaced the first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--search --lr 1e-3", "--search chooses learning rate and beta itself"),
        ("--methods dpo --beta 0", "--beta 0: DPO learns nothing"),
        ("--batch-size 10 --minibatches 4", "--batch-size 10 cannot be divided into --minibatches 4"),
        ("--batch-size 12", "--batch-size 12 cannot be divided into --answers 8 to a query of grpo"),
        ("--episodes 4", "--episodes 4 is less than the 8 that grpo begins with"),
        ("--search --episodes 16", "--episodes 4 is less than the 8 that grpo begins with"),
        ("--answers 1", "'1' is not a whole number at least 2"),
        ("--methods ppo", "invalid choice: 'ppo'"),
        ("--run nowhere", "--run nowhere is no run folder of finetuning_nlg.py"),
    ],
)
def test_flags_that_cannot_be(peers_today, home, flags, message):
    assert message in refused("experiments.peers_today", *flags.split(), cwd=home)
