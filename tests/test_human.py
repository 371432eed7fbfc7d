"""People as the reward: the model that learns their answers, and whole runs, in rounds and after an interruption."""

import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf import outputs, rewards
from rlhf.errors import UserError
from rlhf.human import answers, feedback, reward_model
from rlhf.human.questions import Question
from tests.conftest import TINY_EVALUATION, TINY_RUN, refused, run

FEW_SAMPLES = "--queries 2 --samples 4 --reference-samples 64".split()


# the reward model


def test_held_out_answers_stay_held_out_when_there_are_more():
    train, held_out = reward_model.split(25)
    assert held_out.tolist() == [1, 11, 21] and sorted([*train, *held_out]) == list(range(25))
    assert not set(held_out) & set(reward_model.split(100)[0])
    assert [indices.tolist() for indices in reward_model.split(2)] == [[0], [1]]
    assert [indices.tolist() for indices in reward_model.split(1)] == [[], [0]]


def answered(pair):
    """60 questions with the keys that answer them. Texts that end in "ran" are good, and better than others."""
    names = ["My brother", "The old man", "A nurse", "Anna", "The boy", "On Monday she"]
    for i in range(60):
        samples = (" ran", " sat") if i // len(names) % 2 else (" sat", " ran")
        if pair:
            yield Question(names[i % len(names)], samples), str(1 + samples.index(" ran"))
        else:
            yield Question(names[i % len(names)], samples[:1]), "g" if samples[0] == " ran" else "b"


@pytest.mark.parametrize(("kind", "outputs"), [("good-bad", 2), ("best-of-2", 1)])
def test_the_reward_model_learns_answers_and_predicts_them(chain, kind, outputs):
    torch.manual_seed(0)
    model, tokenizer = reward_model.new_model(str(chain[0] / "models" / "nlg"), kind)
    assert model.config.num_labels == outputs
    questions = list(answered(pair=kind == "best-of-2"))
    rows = [answers.to_row(question, key, {}) for question, key in questions]
    metrics = reward_model.train(model, tokenizer, rows, epochs=8, lr=3e-3, muon=True, seed=0)
    assert metrics["labels"] == 60 and metrics["held_out_error"] == 0.0 and metrics["held_out_loss"] < 0.3
    assert all(reward_model.predict_key(model, tokenizer, question) == key for question, key in questions)
    with pytest.raises(UserError, match="one answer is too few to learn from"):
        reward_model.train(model, tokenizer, rows[:1], epochs=1, lr=1e-3, muon=True, seed=0)


# rounds


def settings(tmp_path, **changes):
    values = {"kind": "best-of-2", "labels": 10, "rounds": 3, "file": tmp_path / "f.jsonl", "metadata": {"a": 1}}
    return feedback.Settings(**values | {"epochs": 2, "lr": 1e-3, "muon": True, "seed": 5} | changes)


def test_rounds_are_spread_over_the_run(tmp_path):
    def due(rounds, updates):
        human = feedback.HumanFeedback(None, None, None, settings(tmp_path, rounds=rounds), updates)
        return [update for update in range(1, updates + 1) if human.is_due(update)]

    assert due(1, 10) == [1]
    assert due(3, 10) == [1, 4, 7]
    assert due(4, 4) == [1, 2, 3, 4]


def test_what_a_round_asks_and_trains(tmp_path, monkeypatch):
    """Of 10 answers in 3 rounds, the rounds end with 3, 6 and 10; only the first has no reward model to compare."""
    drawn, trained = [], []

    def draw_questions(policy, tokenizer, queries, num_samples, sampling, seed):
        drawn.append((num_samples, seed))
        while True:
            yield Question(f"{seed}", (" a", f" {next(numbers)}"))

    def train(model, tokenizer, rows, **learning):
        trained.append((len(rows), learning))
        return {"labels": len(rows), "held_out_error": 0.5}

    numbers = iter(range(1000))
    monkeypatch.setattr(feedback, "draw_questions", draw_questions)
    monkeypatch.setattr(reward_model, "train", train)
    monkeypatch.setattr(reward_model, "predict_key", lambda model, tokenizer, question: "1")
    views = []
    human = feedback.HumanFeedback("model", "tokenizer", lambda view: views.append(view) or "1", settings(tmp_path), 9)
    rows = [human.ask_and_learn(None, f"policy {update}", None, [], None, update) for update in (1, 4, 7)]
    learning = {"epochs": 2, "lr": 1e-3, "muon": True, "seed": 5}
    assert trained == [(3, learning), (6, learning), (10, learning)]
    assert drawn == [(2, 5), (2, 8), (2, 11)]  # other questions in every round
    assert [row["update"] for row in rows] == [0, 3, 6] and [row["labels"] for row in rows] == [3, 6, 10]
    assert human.labels == 10
    written = answers.read(tmp_path / "f.jsonl", 2)
    assert [row["policy"] for row in written] == ["policy 1"] * 3 + ["policy 4"] * 3 + ["policy 7"] * 4
    assert all(row["a"] == 1 for row in written)
    assert ["agrees" in view.progress for view in views] == [False] * 3 + [False, True, True] + [
        False,
        True,
        True,
        True,
    ]
    human.ask_and_learn(None, "policy 1", None, [], None, 1)  # again, of a file that already has more answers
    assert len(views) == 10 and trained[-1][0] == 3 and human.labels == 3


@pytest.mark.parametrize(("kind", "std"), [("best-of-2", 1.0), ("good-bad", None)])
def test_only_preference_models_are_calibrated_and_the_state_has_it(chain, tmp_path, kind, std):
    texts = ["The boy ran.", "She lied to him.", "They were at home on Monday.", "Nobody helped."]

    def new():
        model, tokenizer = reward_model.new_model(str(chain[0] / "models" / "nlg"), kind)
        return feedback.HumanFeedback(model, tokenizer, None, settings(tmp_path, kind=kind), 9)

    def scores(human):
        return rewards.log_odds(human.model, human.tokenizer, texts, torch.device("cpu"))

    human, resumed = new(), new()
    human.labels, before = 7, scores(human)
    human.calibrate(texts)
    if std:
        assert scores(human).mean() == pytest.approx(0, abs=1e-5) and scores(human).std() == pytest.approx(std)
    else:
        assert scores(human).tolist() == before.tolist()
    torch.save(human.state_dict(), tmp_path / "state.pt")
    assert not np.allclose(scores(resumed), scores(human))  # its head is random
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert scores(resumed).tolist() == scores(human).tolist() and resumed.labels == 7


# whole runs

HUMAN = [*TINY_RUN, "--episodes", "64", "--reward", "human", "--annotator", "gold", "--reward-epochs", "1"]


def test_label_learn_and_improve_in_rounds(chain):
    home, _ = chain
    flags = [*HUMAN, "--feedback", "best-of-3", "--labels", "20", "--label-rounds", "2", "--feedback-file", "f3.jsonl"]
    run("finetuning_nlg", *flags, "--run", "people", "--out", "models/people", cwd=home)
    folder = home / "data_results" / "people"
    assert pd.read_csv(folder / "log.csv").labels.tolist() == [10, 10, 20, 20]
    table = pd.read_csv(folder / "reward_model.csv")
    assert table.labels.tolist() == [10, 20] and table["update"].tolist() == [0, 2]
    rows = answers.read(home / "f3.jsonl", 3)
    assert [row["policy"] for row in rows] == ["models/nlg"] * 10 + ["models/people after 2 updates"] * 10
    assert {row["annotator"] for row in rows} == {"gold"}
    config = json.loads((folder / "config.json").read_text())
    assert config["score_mean"] == pytest.approx([0], abs=1e-6)  # [1]: the reward model is 0 on the reference
    assert config["score_std"] == pytest.approx([1], abs=1e-6)
    run("evaluate_nlg", "--run", folder, *FEW_SAMPLES, cwd=home)
    assert json.loads((folder / "evaluation.json").read_text())["ethics_after"] is not None


def test_good_and_bad_from_the_keyboard(chain, monkeypatch):
    home, _ = chain
    monkeypatch.setattr(sys, "stdin", io.StringIO("g\nb\n" * 6))
    flags = [*TINY_RUN, "--reward", "human", "--labels", "12", "--feedback-file", "f1.jsonl", "--reward-epochs", "1"]
    result = run("finetuning_nlg", *flags, "--run", "keys", "--out", "models/keys", cwd=home)
    assert "11 of 12 labels, bad: 5, good: 6" in result.stdout
    assert (home / "models" / "keys_reward" / "model.safetensors").exists()


def test_quitting_while_labelling_loses_nothing(chain, monkeypatch):
    home, _ = chain
    flags = [*TINY_RUN, "--episodes", "64", "--reward", "human", "--labels", "12", "--label-rounds", "2"]
    flags += ["--feedback-file", "f2.jsonl", "--reward-epochs", "1"]
    stopped = [*flags, "--run", "quit", "--out", "models/quit"]
    keys = ["g", "b"] * 6
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*keys[:8], "q"]) + "\n"))
    result = run("finetuning_nlg", *stopped, cwd=home, code=130)
    assert "8 labels are in f2.jsonl" in result.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(keys[8:]) + "\n"))
    run("finetuning_nlg", *stopped, "--resume", cwd=home)
    shutil.copy(home / "f2.jsonl", home / "copy.jsonl")
    run("finetuning_nlg", *flags, "--run", "once", "--out", "models/once", cwd=home)  # the file has all answers
    assert (home / "f2.jsonl").read_bytes() == (home / "copy.jsonl").read_bytes()
    for folder in ("", "_reward"):
        weights = [
            (home / "models" / f"{name}{folder}" / "model.safetensors").read_bytes() for name in ("quit", "once")
        ]
        assert weights[0] == weights[1]


def test_mistakes_in_the_flags(chain):
    home, _ = chain
    assert "neither good-bad nor best-of-N" in refused("finetuning_nlg", "--feedback", "best-of-1", cwd=home)
    for flag in (["--annotator", "gold"], ["--page"], ["--labels", 60], ["--reward-lr", 1e-4]):
        assert f"{flag[0]} is for --reward human" in refused("finetuning_nlg", *TINY_RUN, *flag, cwd=home)
    refusals = {
        ("--page",): "--page is for people, and --annotator answers in their place",
        ("--feedback-file", "data_cls/train.csv/x.jsonl"): "its folder cannot be made",
    }
    for flags, words in refusals.items():
        assert words in refused("finetuning_nlg", *HUMAN, "--run", "no", "--out", "models/no", *flags, cwd=home)
    alone = [*TINY_RUN, "--reward", "human", "--annotator-noise", 0.1]
    assert "--annotator-noise is that of an --annotator" in refused("finetuning_nlg", *alone, cwd=home)
    assert "--label-rounds 5 are more than" in refused("finetuning_nlg", *HUMAN, "--label-rounds", 5, cwd=home)
    assert "there is no file none.py" in refused("finetuning_nlg", *HUMAN[:-4], "--annotator", "none.py:f", cwd=home)


def test_what_is_written_beside_the_policy_replaces_models_only(chain):
    home, _ = chain
    mine = home / "models" / "mine_reward" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    said = refused("finetuning_nlg", *HUMAN, "--run", "mine", "--out", "models/mine", cwd=home)
    assert "models/mine_reward is there and is no model folder" in said and mine.read_text() == "mine"
    flags = ["--reward", "models/x_reward", "--out", "models/x"]
    assert "would replace --reward models/x_reward" in refused("finetuning_nlg", *HUMAN, *flags, cwd=home)


def test_the_model_of_other_peoples_answers_is_not_taken_for_this_runs(chain):
    """Two runs with the same --out, the first of whose policies was put aside."""
    home, _ = chain
    for name in ("one", "two"):
        answered = ["--feedback-file", f"data_cls/{name}.jsonl", "--labels", 4, "--seed", len(name) + (name == "two")]
        run("finetuning_nlg", *HUMAN, *answered, "--run", name, "--out", "models/shared", cwd=home)
        if name == "one":
            (home / "models" / "shared").rename(home / "models" / "aside")
    evaluation = ["--run", "data_results/one", "--policy", "models/aside", *TINY_EVALUATION[2:]]
    assert "models/shared_reward has the model of data_results/two" in refused("evaluate_nlg", *evaluation, cwd=home)


def test_a_reward_model_does_not_start_as_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/nlg"}')
    with pytest.raises(UserError, match="is adapters: give it merged"):
        reward_model.new_model(str(tmp_path), "good-bad")


@pytest.mark.parametrize("record", ["{", "{}", "[1]"])
def test_a_damaged_record_of_a_model_is_told_in_one_line(tmp_path, record):
    (tmp_path / "metrics.json").write_text(record)
    with pytest.raises(UserError, match=r"metrics.json does not say of which run its model is .*; train it again"):
        outputs.refuse_policy_of_another_run(tmp_path, {"out": str(tmp_path)})
