"""Feedback from people: questions, keys, the file of answers, what stands in for a person, the whole loop."""

import csv
import io
import itertools
import json
import os
import pty
import shutil
import signal
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from rlhf.errors import Stopped, UserError

import train_cls
from rlhf import data, rewards, supervised
from rlhf.human import feedback, people
from rlhf.human.feedback import Question, View
from tests.conftest import ROOT, TINY_RUN, refused, run

PAIR = Question("On Monday", (" she lied.", " she helped."))
ASKED = [Question("Query", (f" a{i}", f" b{i}")) for i in range(20)]


FEW_SAMPLES = "--queries 2 --samples 4 --reference-samples 64".split()


def pressing(*keys):
    """Asks that get these answers, and the views that were shown."""
    waiting, shown = list(keys), []

    def ask(view):
        shown.append(view)
        return waiting.pop(0)

    return ask, shown


def gather(path, ask, wanted, asked=ASKED, opinion=None):
    return feedback.gather(iter(asked), path, wanted, 2, ask, {"policy": "p", "annotator": None}, opinion)


# asking


def test_every_answer_is_a_line_that_train_cls_reads(tmp_path):
    path = tmp_path / "folder" / "feedback.jsonl"
    ask, _ = pressing("2", "1")
    rows = gather(path, ask, 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == rows
    assert lines[0] | {"time": None} == {
        "query": "Query", "sample0": " a0", "sample1": " b0", "best": 1, "time": None, "policy": "p", "annotator": None
    }  # fmt: skip
    candidates, best = data.comparisons(data.load_file(path))
    assert candidates == [["Query a0", "Query b0"], ["Query a1", "Query b1"]]
    assert best.tolist() == [1, 0]


def test_good_or_bad_is_a_label(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, shown = pressing("g", "b")
    feedback.gather(iter([Question("A", (" b",)), Question("C", (" d",))]), path, 2, 1, ask, {}, None)
    assert [(row["text"], row["label"]) for row in feedback.read(path, 1)] == [("A b", 1), ("C d", 0)]
    assert shown[0].choices == {"g": "good", "b": "bad"}
    assert shown[1].progress == "1 of 2 labels, good: 1"


def test_skip_undo_and_other_keys(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, shown = pressing("x", "1", "s", "2", "u", "1", "2")
    rows = gather(path, ask, 3)
    assert [view.question.samples[0] for view in shown] == [" a0", " a0", " a1", " a2", " a3", " a2", " a4"]
    assert [(row["sample0"], row["best"]) for row in rows] == [(" a0", 0), (" a2", 0), (" a4", 1)]
    assert feedback.read(path, 2) == rows
    assert shown[4].progress == "2 of 3 labels, text 1: 1, text 2: 1, skipped: 1"


def test_undo_before_the_first_answer_does_nothing(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, _ = pressing("1")
    gather(path, ask, 1)
    ask, _ = pressing("u", "1")  # the answer of the session before stays
    assert len(gather(path, ask, 2)) == 2


def test_quitting_and_a_kill_lose_nothing_and_nothing_is_asked_twice(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, _ = pressing("1", "2", "q")
    with pytest.raises(Stopped, match=r"2 labels are in .*; the same command with --resume goes on") as stop:
        gather(path, ask, 5)
    assert stop.value.args[0] == signal.SIGINT
    ask, shown = pressing("1", "1", "1")
    assert len(gather(path, ask, 5)) == 5
    assert [view.question for view in shown] == ASKED[2:5]


def test_agreement_with_the_reward_model_is_shown(tmp_path):
    ask, shown = pressing("1", "2", "1")
    gather(tmp_path / "f.jsonl", ask, 3, opinion=lambda question: "1")
    assert shown[0].progress == "0 of 3 labels"
    assert shown[2].progress.endswith("the reward model agrees in 1 of 2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "line 1 is no answer"),
        ("{}", "line 1 is no answer"),
        ('{"query": "a", "sample": "b", "label": 1, "text": "ab"}', "line 1 answers another kind of question"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line, words):
    path = tmp_path / "feedback.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        feedback.read(path, 2)


def test_questions_are_the_policys_and_the_same_again(chain):
    from rlhf import models

    policy, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    flags = {"length": 5, "temperature": 0.7, "stop_id": tokenizer.eos_token_id}
    ask = [
        list(itertools.islice(feedback.questions(policy, tokenizer, ["On Monday", "A man"], 4, seed, **flags), 5))
        for seed in (0, 0, 1)
    ]
    assert ask[0] == ask[1] != ask[2]
    assert all(len(set(question.samples)) > 1 for question in ask[0])


# the terminal


def test_the_terminal_shows_the_question_and_reads_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    view = View(PAIR, feedback.choices(2), "3 of 60 labels")
    assert feedback.at_terminal(view) == "2"
    said = capsys.readouterr().out
    for part in (
        "3 of 60 labels",
        "On Monday …",
        "1  … she lied.",
        "2  … she helped.",
        "[u] undo",
        "[q] save and quit",
    ):
        assert part in said
    assert feedback.at_terminal(view) == "q"  # the input ended


@pytest.mark.parametrize(("typed", "key"), [(b"2", "2"), (b"S", "s"), (b"\x03", "q")])
def test_one_key_is_enough_at_a_terminal(monkeypatch, typed, key):
    person, inner = pty.openpty()
    with os.fdopen(inner, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        later = threading.Timer(0.2, os.write, (person, typed))
        later.start()
        assert feedback.pressed() == key
        later.join()
    os.close(person)


# what stands in for a person


def test_annotators(tmp_path):
    judge = f"{ROOT}/data_cls/scenarios.py:judge"
    (tmp_path / "long.py").write_text("def score(texts):\n    return [len(text) - 15 for text in texts]\n")
    ask = feedback.annotator(f"{tmp_path}/long.py:score", judge, 0.0, 0, torch.device("cpu"), "float32")
    assert ask(View(PAIR, feedback.choices(2), "")) == "2"
    assert ask(View(Question("On", (" no.",)), feedback.choices(1), "")) == "b"
    assert ask(View(Question("On Monday", (" she helped.",)), feedback.choices(1), "")) == "g"


def test_the_gold_annotator_prefers_right_over_wrong_over_nonsense():
    with open(ROOT / "data_cls" / "train.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right, wrong = (next(row["text"] for row in rows if row["label"] == label) for label in "10")
    ask = feedback.annotator("gold", f"{ROOT}/data_cls/scenarios.py:judge", 0.0, 0, torch.device("cpu"), "float32")
    for samples, key in (((wrong, right), "2"), (("Stone the of.", wrong), "2"), ((right, "Stone."), "1")):
        assert ask(View(Question("", samples), feedback.choices(2), "")) == key
    assert ask(View(Question("", (wrong,)), feedback.choices(1), "")) == "b"


def test_noise_is_as_frequent_as_said(tmp_path):
    (tmp_path / "first.py").write_text("def score(texts):\n    return [-i for i in range(len(texts))]\n")
    ask = feedback.annotator(f"{tmp_path}/first.py:score", "", 0.4, 0, torch.device("cpu"), "float32")
    keys = [ask(View(Question("", (f"{i}", "b", "c", "d")), feedback.choices(4), "")) for i in range(2000)]
    assert keys.count("1") / 2000 == pytest.approx(0.6 + 0.4 / 4, abs=0.04)


# learning from comparisons


def test_the_loss_of_a_comparison_is_the_papers():
    """[1], equation 1: -log of the softmax of the best's score."""
    scores, best = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), np.array([1, 2])
    expected = [-np.log(np.e**2 / (np.e + np.e**2 + 1)), np.log(3)]
    assert supervised.choice_log_loss(scores, best) == pytest.approx(expected)

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            score = (input_ids * attention_mask).sum(1, keepdim=True).float()
            return type("Out", (), {"logits": score})

    losses, counts = supervised.choice_loss(Model(), [[[1], [2, 0], [0]], [[0], [0, 0], [0]]], torch.tensor(best), 0)
    assert losses.tolist() == pytest.approx(expected)
    assert counts.tolist() == [1, 1]


def test_label_smoothing_leaves_a_loss_of_zero_where_a_label_is_learned():
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Out", (), {"logits": torch.tensor([[0.0, np.log(0.95 / 0.05)], [0.0, 9.0]])})

    losses, _ = supervised.choice_loss(Model(), [[[1]], [[1]]], torch.tensor([1, 1]), 0, label_smoothing=0.1)
    assert losses[0].item() == pytest.approx(0.0, abs=1e-6)
    assert losses[1].item() > 0.1  # surer than its label


def test_what_is_reported_of_comparisons():
    """Two of three rows are right, five of the six pairs; a pair that differs by log 3 should go so in 3 of 4."""
    scores, best = np.array([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.5]]), np.array([0, 1, 2])
    found = train_cls.measure_comparisons(scores, best)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["pairwise_accuracy"] == pytest.approx(5 / 6)
    scores = np.tile([np.log(3), 0.0], (4, 1))
    assert train_cls.measure_comparisons(scores, np.array([0, 0, 0, 1]))["calibration_error"] == pytest.approx(0)
    assert train_cls.measure_comparisons(scores, np.array([0, 0, 0, 0]))["calibration_error"] == pytest.approx(0.25)


def test_held_out_answers_stay_held_out_when_there_are_more():
    train, held_out = people.split(25)
    assert held_out.tolist() == [1, 11, 21] and sorted([*train, *held_out]) == list(range(25))
    assert not set(held_out) & set(people.split(100)[0])
    assert [part.tolist() for part in people.split(2)] == [[0], [1]]
    assert [part.tolist() for part in people.split(1)] == [[], [0]]


def test_columns_of_comparisons(tmp_path):
    def read(name, text):
        (tmp_path / name).write_text(text)
        return data.comparisons(data.load_file(tmp_path / name))

    assert read("a.csv", "chosen,rejected\ngood,bad\n")[0] == [["good", "bad"]]
    assert read("b.csv", "prompt,chosen,rejected\nI am, good, bad\n")[0] == [["I am good", "I am bad"]]
    candidates, best = read("c.csv", "query,sample0,sample1,sample2,best\nI,a,b,c,2\n")
    assert (candidates, best.tolist()) == ([["Ia", "Ib", "Ic"]], [2])
    empty = '{"query": "I", "sample0": "", "sample1": " do", "best": 0}\n'  # a policy may end at once
    assert read("f.jsonl", empty)[0] == [["I", "I do"]]
    with pytest.raises(UserError, match="row 1 lacks a candidate"):
        read("g.jsonl", empty.replace('"I"', '""'))
    assert read("d.csv", "text,label\na,1\n") is None
    with pytest.raises(UserError, match="row 1: best must be a number from 0 to 1, the place of a sample"):
        read("e.csv", "query,sample0,sample1,best\nI,a,b,2\n")
    with pytest.raises(UserError, match="row 2 lacks a candidate"):
        read("f.csv", "chosen,rejected\na,b\nc,\n")


def test_a_model_learns_preferences(chain, tmp_path):
    """A word that is always chosen scores higher, and all texts score 0 on average with deviation 1."""
    rows = [{"chosen": f"the dog ran {i}", "rejected": f"the dog sat {i}"} for i in range(120)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    home = tmp_path / "home"
    home.mkdir()
    run("train_cls", "--data", path, "--epochs", 3, "--lm-epochs", 0, "--lr", "3e-3", "--out", "models/pref", cwd=home)
    found = json.loads((home / "data_results" / "pref_metrics.json").read_text())["results"]["valid"]
    assert found["pairwise_accuracy"] == found["accuracy"] == 1.0
    model, tokenizer = rewards.load_model(str(home / "models" / "pref"))
    texts = [row[name] for row in rows for name in row]
    scores = rewards.log_odds(model, tokenizer, texts, torch.device("cpu"))
    assert abs(scores.mean()) < 0.1 and scores.std() == pytest.approx(1, abs=0.1)
    assert "the splits are not of one kind" in refused("train_cls", "--data", mixed(tmp_path), cwd=home)


def mixed(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "train.csv").write_text("chosen,rejected\na,b\nc,d\n")
    (folder / "test.csv").write_text("text,label\na,1\nb,0\n")
    return folder


# the whole loop

HUMAN = [*TINY_RUN, "--episodes", "64", "--reward", "human", "--annotator", "gold", "--reward-epochs", "1"]


def test_label_learn_and_improve_in_rounds(chain):
    home, _ = chain
    flags = [*HUMAN, "--feedback", "best-of-3", "--labels", "20", "--label-rounds", "2", "--feedback-file", "f3.jsonl"]
    run("finetuning_nlg", *flags, "--run", "people", "--out", "models/people", cwd=home)
    folder = home / "data_results" / "people"
    assert pd.read_csv(folder / "log.csv").labels.tolist() == [10, 10, 20, 20]
    assert pd.read_csv(folder / "reward_model.csv").labels.tolist() == [10, 20]
    rows = feedback.read(home / "f3.jsonl", 3)
    assert [row["policy"] for row in rows] == ["models/nlg"] * 10 + ["models/people after 2 updates"] * 10
    config = json.loads((folder / "config.json").read_text())
    assert config["score_mean"] == pytest.approx([0], abs=1e-6)  # [1]: the reward model is 0 on the reference
    assert config["score_std"] == pytest.approx([1], abs=1e-6)
    run("evaluate_nlg", "--run", folder, *FEW_SAMPLES, cwd=home)
    assert json.loads((folder / "evaluation.json").read_text())["ethics_after"] is not None


def test_good_and_bad_from_the_keyboard(chain, monkeypatch):
    home, _ = chain
    monkeypatch.setattr(sys, "stdin", io.StringIO("g\nb\n" * 6))
    flags = [*TINY_RUN, "--reward", "human", "--labels", "12", "--feedback-file", "f1.jsonl", "--reward-epochs", "1"]
    said = run("finetuning_nlg", *flags, "--run", "keys", "--out", "models/keys", cwd=home)
    assert "11 of 12 labels, bad: 5, good: 6" in said.stdout
    assert (home / "models" / "keys_reward" / "model.safetensors").exists()


def test_quitting_while_labelling_loses_nothing(chain, monkeypatch):
    home, _ = chain
    flags = [*TINY_RUN, "--episodes", "64", "--reward", "human", "--labels", "12", "--label-rounds", "2"]
    flags += ["--feedback-file", "f2.jsonl", "--reward-epochs", "1", "--run", "quit", "--out", "models/quit"]
    keys = ["g", "b"] * 6
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*keys[:8], "q"]) + "\n"))
    said = run("finetuning_nlg", *flags, cwd=home, code=130)
    assert "8 labels are in f2.jsonl" in said.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(keys[8:]) + "\n"))
    run("finetuning_nlg", *flags, "--resume", cwd=home)
    at_once = [*flags[:-4], "--run", "once", "--out", "models/once"]
    shutil.copy(home / "f2.jsonl", home / "copy.jsonl")
    run("finetuning_nlg", *at_once, cwd=home)  # all answers are there: nothing is asked
    assert (home / "f2.jsonl").read_bytes() == (home / "copy.jsonl").read_bytes()
    for name in ("model.safetensors",):
        assert (home / "models" / "quit" / name).read_bytes() == (home / "models" / "once" / name).read_bytes()


def test_what_people_can_get_wrong(chain):
    home, _ = chain
    assert "neither good-bad nor best-of-N" in refused("finetuning_nlg", "--feedback", "best-of-1", cwd=home)
    assert "--label-rounds 5 are more than" in refused("finetuning_nlg", *HUMAN, "--label-rounds", 5, cwd=home)
    assert "there is no file none.py" in refused("finetuning_nlg", *HUMAN[:-4], "--annotator", "none.py:f", cwd=home)


# several rewards


def test_several_rewards_are_normalised_weighted_and_added(chain, tmp_path):
    home, _ = chain
    (tmp_path / "own.py").write_text("def short(queries, responses):\n    return [-len(r) for r in responses]\n")
    rewards = ["--reward", "models/cls", f"--reward=-0.5*{tmp_path}/own.py:short"]
    run("finetuning_nlg", *TINY_RUN, *rewards, "--run", "two", "--out", "models/two", cwd=home)
    log = pd.read_csv(home / "data_results" / "two" / "log.csv")
    ended = log.terminated == 1  # a response without an end has a score of its own
    total = log["score_cls"] - 0.5 * log["score_own.short"]
    assert total[ended].tolist() == pytest.approx(log.score[ended].tolist(), abs=1e-4)
    run("evaluate_nlg", "--run", "data_results/two", *FEW_SAMPLES, cwd=home)


def test_rewards_by_hand(tmp_path):
    (tmp_path / "own.py").write_text(
        "def texts(texts):\n    return [len(t) for t in texts]\n"
        "def responses(queries, responses, factor=2):\n    return [factor * len(r) for r in responses]\n"
    )
    specs = [f"{tmp_path}/own.py:texts", f"0.5*{tmp_path}/own.py:responses"]
    parts = rewards.load(specs, torch.device("cpu"), "float32")
    assert [(part.name, part.weight) for part in parts] == [("own.texts", 1.0), ("own.responses", 0.5)]
    raw = rewards.raw_scores(parts, ["ab", "a"], ["abcd", "abc"])
    assert raw.tolist() == [[4, 4], [3, 4]]
    normal = rewards.normalised(raw, {"score_mean": [3.0, 2.0], "score_std": [2.0, 4.0]})
    assert normal.tolist() == [[0.5, 0.5], [0.0, 0.5]]
    for spec in ("0*models/cls", "1e999*models/cls"):
        with pytest.raises(UserError, match="give one that counts"):
            rewards.load([spec], torch.device("cpu"), "float32")


@pytest.mark.parametrize("name", ["length", "descriptive"])
def test_examples(name):
    (part,) = rewards.load([f"{ROOT}/examples/{name}.py:score"], torch.device("cpu"), "float32")
    plain, rich = "He ran.", "The old dog slept in the warm kitchen of a small quiet house."
    scores = part.score(["", ""], [plain, rich])
    assert scores[1] > scores[0]
    if name == "length":
        assert scores.tolist() == [2 - 12, 0 - 1]
