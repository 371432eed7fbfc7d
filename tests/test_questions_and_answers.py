"""Questions to people, the file of their answers, the terminal, and simulated annotators."""

import csv
import io
import itertools
import json
import os
import pty
import signal
import sys
import threading
from collections import Counter

import pytest
import torch

from rlhf import choice_data, data, models, prompting, rewards
from rlhf.errors import Stopped, UserError
from rlhf.human import annotator, answers, terminal
from rlhf.human.questions import Question, View, answer_keys, draw_questions, samples_per_question
from rlhf.sampling import Sampling
from tests.conftest import ROOT

PAIR = Question("On Monday", (" she lied.", " she helped."))
QUESTIONS = [Question("Query", (f" a{i}", f" b{i}")) for i in range(20)]
JUDGE = f"{ROOT}/data_cls/scenarios.py:judge"


def pressing(*keys):
    """An `ask` that presses these keys, and the list of the views that it gets."""
    next_keys, views = iter(keys), []

    def ask(view):
        views.append(view)
        return next(next_keys)

    return ask, views


def collect(path, ask, total, predict_key=None):
    metadata = {"policy": "p", "annotator": None}
    return answers.collect(iter(QUESTIONS), path, total, 2, ask, metadata, predict_key)


# questions


def test_kinds_of_questions():
    assert [samples_per_question(kind) for kind in ("good-bad", "best-of-2", "best-of-9")] == [1, 2, 9]
    assert answer_keys(1) == {"g": "good", "b": "bad"}
    assert answer_keys(3) == {"1": "text 1", "2": "text 2", "3": "text 3"}


def test_questions_are_the_policys_and_the_same_for_the_same_seed(chain):
    policy, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    sampling = Sampling(5, 0.7, tokenizer.eos_token_id)
    prompts, queries = prompting.Texts(tokenizer), ["On Monday", "A man"]
    first, again, other = (
        list(itertools.islice(draw_questions(policy, prompts, queries, 4, sampling, seed), 5)) for seed in (0, 0, 1)
    )
    assert first == again != other
    for question in first:
        assert question.query in queries
        assert len(question.samples) == 4 and len(set(question.samples)) > 1


def test_equal_samples_are_no_question_but_one_alone_is(monkeypatch):
    responses = iter([" a", " a", " a", " b", " c", " c", " d", " d"])

    def continuations(policy, prompts, queries, sampling, generator):
        return [query + next(responses) for query in queries]

    monkeypatch.setattr(models, "continuations", continuations)
    pairs = draw_questions(None, prompting.Texts(None), ["Q"], 2, None, 0, batch=2)
    assert next(pairs) == Question("Q", (" a", " b"))  # not (" a", " a")
    singles = draw_questions(None, prompting.Texts(None), ["Q"], 1, None, 0, batch=2)
    assert list(itertools.islice(singles, 2)) == [Question("Q", (" c",)), Question("Q", (" c",))]


# answers


def test_every_answer_is_a_line_that_train_cls_reads(tmp_path):
    path = tmp_path / "folder" / "feedback.jsonl"
    ask, _ = pressing("2", "1")
    rows = collect(path, ask, 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == rows
    assert lines[0] | {"time": None} == {
        "query": "Query", "sample0": " a0", "sample1": " b0", "best": 1, "time": None, "policy": "p", "annotator": None
    }  # fmt: skip
    comparisons = choice_data.comparisons(data.load_file(path))
    assert comparisons.candidates == [["Query a0", "Query b0"], ["Query a1", "Query b1"]]
    assert comparisons.chosen.tolist() == [1, 0]


def test_good_or_bad_is_a_label_that_train_cls_reads(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, views = pressing("g", "b")
    answers.collect(iter([Question("A", (" b",)), Question("C", (" d",))]), path, 2, 1, ask, {}, None)
    assert [(row["text"], row["label"]) for row in answers.read(path, 1)] == [("A b", 1), ("C d", 0)]
    assert views[0].answer_keys == {"g": "good", "b": "bad"}
    assert views[1].progress == "1 of 2 labels, good: 1"
    labels = choice_data.labelled(data.load_file(path), None, "label", None)
    assert (labels.candidates, labels.chosen.tolist()) == ([["A b"], ["C d"]], [1, 0])


def test_a_text_with_other_ends_of_lines_and_a_file_that_an_editor_left_open(tmp_path):
    path, odd = tmp_path / "f.jsonl", Question("On\u2028Monday", (" she\x85 lied.\n", " she helped.\r"))
    answers.append(path, answers.to_row(odd, "2", {}))
    path.write_text(path.read_text("utf-8").rstrip("\n"), "utf-8")
    answers.append(path, answers.to_row(PAIR, "1", {}))
    assert [answers.question_in(row) for row in answers.read(path, 2)] == [odd, PAIR]
    with pytest.raises(UserError, match=r"is no file; give the name of a \.jsonl file"):
        answers.read(tmp_path, 2)


def test_a_row_says_question_and_answer():
    for question, key, label in ((PAIR, "2", 1), (Question("A", (" b",)), "g", 1), (Question("A", (" b",)), "b", 0)):
        row = answers.to_row(question, key, {"policy": "p"})
        assert (answers.question_in(row), answers.label_in(row), row["policy"]) == (question, label, "p")


def test_skip_undo_and_other_keys(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, views = pressing("x", "1", "s", "2", "u", "1", "2")
    rows = collect(path, ask, 3)
    assert [view.question.samples[0] for view in views] == [" a0", " a0", " a1", " a2", " a3", " a2", " a4"]
    assert [(row["sample0"], row["best"]) for row in rows] == [(" a0", 0), (" a2", 0), (" a4", 1)]
    assert answers.read(path, 2) == rows
    assert views[4].progress == "2 of 3 labels, text 1: 1, text 2: 1, skipped: 1"


def test_undo_does_not_reach_the_answers_of_the_session_before(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, _ = pressing("1")
    first = collect(path, ask, 1)
    ask, _ = pressing("u", "1")
    rows = collect(path, ask, 2)
    assert len(rows) == 2 and rows[:1] == first


def test_quitting_loses_nothing_and_no_question_is_asked_twice(tmp_path):
    path = tmp_path / "feedback.jsonl"
    ask, _ = pressing("1", "2", "q")
    with pytest.raises(Stopped, match=r"2 labels are in .*; the same command with --resume goes on") as stop:
        collect(path, ask, 5)
    assert stop.value.args[0] == signal.SIGINT
    ask, views = pressing("1", "1", "1")
    assert len(collect(path, ask, 5)) == 5
    assert [view.question for view in views] == QUESTIONS[2:5]


def test_no_question_is_asked_twice_in_a_session(tmp_path):
    """Neither an answered nor a skipped one; undo alone asks again."""
    a, b, c, d = QUESTIONS[:4]
    ask, views = pressing("1", "s", "u", "2", "1")
    rows = answers.collect(iter([a, a, b, a, b, c, d]), tmp_path / "f.jsonl", 2, 2, ask, {}, None)
    assert [view.question for view in views] == [a, b, c, a, d]
    assert [(answers.question_in(row), answers.label_in(row)) for row in rows] == [(a, 1), (d, 0)]


def test_a_policy_without_new_questions_is_not_sampled_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MOST_REPEATED", 10)
    ask, _ = pressing("1", "2", "1")
    with pytest.raises(UserError, match="the last 11 questions were asked before"):
        answers.collect(itertools.cycle(QUESTIONS[:3]), tmp_path / "f.jsonl", 4, 2, ask, {}, None)
    assert len(answers.read(tmp_path / "f.jsonl", 2)) == 3
    with pytest.raises(UserError, match="the last 14 questions were asked before"):  # 3 of them in the file
        answers.collect(itertools.cycle(QUESTIONS[:3]), tmp_path / "f.jsonl", 4, 2, ask, {}, None)


def test_every_answer_is_on_the_disk_before_the_next_question(tmp_path):
    path = tmp_path / "feedback.jsonl"
    counts = []

    def ask(view):
        counts.append(len(answers.read(path, 2)))
        return "1"

    collect(path, ask, 3)
    assert counts == [0, 1, 2]


def test_agreement_with_the_reward_model_is_shown_and_undone(tmp_path):
    ask, views = pressing("1", "2", "u", "1", "1")
    collect(tmp_path / "f.jsonl", ask, 3, predict_key=lambda question: "1")
    assert views[0].progress == "0 of 3 labels"
    assert views[2].progress == "2 of 3 labels, text 1: 1, text 2: 1, the reward model agrees in 1 of 2"
    assert views[3].progress.endswith("the reward model agrees in 1 of 1")
    assert views[4].progress.endswith("the reward model agrees in 2 of 2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2 is not an answer"),
        ("{}", "line 2 is not an answer"),
        ("[]", "line 2 is not an answer"),
        ('{"query": "a", "sample": "b", "text": "ab", "label": "good"}', "line 2 is not an answer"),
        ('{"query": null, "sample": null, "label": 1}', "line 2 is not an answer"),
        ('{"query": "a", "sample": "b", "label": 1, "text": "ab"}', "line 2 answers another kind of question"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line, message):
    path = tmp_path / "feedback.jsonl"
    path.write_text(json.dumps(answers.to_row(PAIR, "1", {})) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        answers.read(path, 2)


@pytest.mark.parametrize(
    ("question", "label", "wrong", "message"),
    [
        (PAIR, "best", 7, "line 1: its answer is 7; correct it to one from 0 to 1"),
        (PAIR, "best", -1, "line 1: its answer is -1; correct it to one from 0 to 1"),
        (Question("A", (" b", " c", " d")), "best", 3, "line 1: its answer is 3; correct it to one from 0 to 2"),
        (Question("A", (" b",)), "label", 2, "line 1: its answer is 2; correct it to one from 0 to 1"),
    ],
)
def test_an_answer_that_is_none_of_its_question_is_refused(tmp_path, question, label, wrong, message):
    """As a hand may write it; the training would fail on it later."""
    path, key = tmp_path / "feedback.jsonl", "g" if label == "label" else "1"
    answers.append(path, answers.to_row(question, key, {}) | {label: wrong})
    with pytest.raises(UserError, match=message):
        answers.read(path, len(question.samples))


# the terminal


def test_the_terminal_shows_the_question_and_reads_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    view = View(PAIR, answer_keys(2), "3 of 60 labels")
    assert terminal.ask(view) == "2"
    printed = capsys.readouterr().out
    for line in (
        "3 of 60 labels",
        "On Monday …",
        "1  … she lied.",
        "2  … she helped.",
        "[1] text 1  [2] text 2  [s] skip  [u] undo  [q] save and quit",
    ):
        assert f"\n{line}\n" in printed
    assert terminal.ask(view) == "q"  # the input ended


ARROW_DOWN = b"\x1b[B"


@pytest.mark.parametrize(
    ("typed", "key"), [(b"2", "2"), (b"S", "s"), (b"\x03", "q"), (b"\x04", "q"), (ARROW_DOWN, "\x1b")]
)
def test_one_key_is_enough_at_a_terminal(monkeypatch, typed, key):
    keyboard, screen = pty.openpty()
    with os.fdopen(screen, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        typing = threading.Timer(0.2, os.write, (keyboard, typed))
        typing.start()
        assert terminal.read_key() == key
        typing.join()
        os.write(keyboard, b"g")
        assert terminal.read_key() == "g"  # nothing of the key before is left
    os.close(keyboard)


# simulated annotators


def load_annotator(spec, noise=0.0, seed=0, gold=JUDGE):
    return annotator.load(spec, gold, noise, seed, torch.device("cpu"), "float32")


def test_a_function_as_the_annotator(tmp_path):
    (tmp_path / "long.py").write_text("def score(texts):\n    return [len(text) - 15 for text in texts]\n")
    ask = load_annotator(f"{tmp_path}/long.py:score")
    assert ask(View(PAIR, answer_keys(2), "")) == "2"
    assert ask(View(Question("On", (" no.",)), answer_keys(1), "")) == "b"
    assert ask(View(Question("On Monday", (" she helped.",)), answer_keys(1), "")) == "g"


def test_a_classifier_as_the_annotator(chain):
    folder = str(chain[0] / "models" / "cls")
    ask = load_annotator(f"classifier:{folder}")
    texts = ["On Monday she lied.", "On Monday she helped."]
    scores = rewards.log_odds(*rewards.load_model(folder), texts, torch.device("cpu"))
    assert ask(View(PAIR, answer_keys(2), "")) == str(1 + scores.argmax())
    assert ask(View(Question("On Monday", (" she lied.",)), answer_keys(1), "")) == ("g" if scores[0] > 0 else "b")


def test_the_gold_annotator_prefers_right_over_wrong_over_nonsense():
    with open(ROOT / "data_cls" / "train.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right, wrong = (next(row["text"] for row in rows if row["label"] == label) for label in "10")
    ask = load_annotator("gold")
    for samples, key in (((wrong, right), "2"), (("Stone the of.", wrong), "2"), ((right, "Stone."), "1")):
        assert ask(View(Question("", samples), answer_keys(2), "")) == key
    for text, key in ((right, "g"), (wrong, "b"), ("Stone.", "b")):
        assert ask(View(Question("", (text,)), answer_keys(1), "")) == key


def test_a_judge_may_return_plain_tuples(tmp_path):
    (tmp_path / "own.py").write_text(
        "def judge(text):\n    return (True, int('helped' in text)) if 'On' in text else (False, None)\n"
    )
    ask = load_annotator("gold", gold=f"{tmp_path}/own.py:judge")
    assert ask(View(PAIR, answer_keys(2), "")) == "2"
    assert ask(View(Question("", ("Nonsense", "On Monday she lied.")), answer_keys(2), "")) == "2"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError"),
        ("return 1.0", r"gave scores of shape \(\) for 2 texts"),
        ("return [1.0]", r"gave scores of shape \(1,\) for 2 texts"),
        ("return [0.0, float('nan')]", "gave nan for the text 'On Monday she helped.'"),
    ],
)
def test_an_annotator_that_gives_no_ratings(tmp_path, body, message):
    (tmp_path / "own.py").write_text(f"def rate(texts):\n    {body}\n")
    with pytest.raises(UserError, match=rf"--annotator .*own.py:rate {message}"):
        load_annotator(f"{tmp_path}/own.py:rate")(View(PAIR, answer_keys(2), ""))


def test_noise_is_as_frequent_as_the_flag_says(tmp_path):
    (tmp_path / "first.py").write_text("def score(texts):\n    return [-i for i in range(len(texts))]\n")
    ask = load_annotator(f"{tmp_path}/first.py:score", noise=0.4)
    views = [View(Question("", (f"{i}", "b", "c", "d")), answer_keys(4), "") for i in range(2000)]
    keys = [ask(view) for view in views]
    assert keys.count("1") / 2000 == pytest.approx(0.6 + 0.4 / 4, abs=0.04)
    assert [ask(view) for view in views] == keys  # a resumed run gets the same answers


def test_equal_ratings_are_decided_at_random(tmp_path):
    (tmp_path / "same.py").write_text("def score(texts):\n    return [float(text != 'd') for text in texts]\n")
    ask = load_annotator(f"{tmp_path}/same.py:score")
    keys = [ask(View(Question("", (f"{i}", "b", "c", "d")), answer_keys(4), "")) for i in range(1500)]
    counts = Counter(keys)
    assert set(counts) == {"1", "2", "3"}
    assert all(count / 1500 == pytest.approx(1 / 3, abs=0.05) for count in counts.values())


def test_answers_in_another_encoding_are_told_in_one_line(tmp_path):
    (tmp_path / "answers.jsonl").write_bytes('{"query": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"answers.jsonl is no text in UTF-8"):
        answers.read(tmp_path / "answers.jsonl", 1)
