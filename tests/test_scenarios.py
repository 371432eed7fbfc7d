"""The shipped world: its size, its balance, its judge, and that no single words give the label away."""

import csv
import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data_cls import scenarios
from data_cls.scenarios import FRAMES, judge

ROOT = Path(__file__).resolve().parent.parent
FILES = ["data_cls/train.csv", "data_cls/test.csv", "data_cls/hard.csv", "data_nlg/train.txt", "data_nlg/valid.txt"]


def labelled(name):
    with open(ROOT / "data_cls" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def unlabelled(name):
    return (ROOT / "data_nlg" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def labels():
    return {name: labelled(name) for name in ("train", "test", "hard")}


@pytest.fixture(scope="module")
def texts(labels):
    return {name: [text for text, _ in rows] for name, rows in labels.items()} | {
        "nlg_" + name: unlabelled(name) for name in ("train", "valid")
    }


def test_the_files_are_what_the_program_writes(tmp_path):
    (tmp_path / "data_cls").mkdir()
    (tmp_path / "data_nlg").mkdir()
    program = tmp_path / "data_cls" / "scenarios.py"
    program.write_bytes((ROOT / "data_cls" / "scenarios.py").read_bytes())
    subprocess.run([sys.executable, program], check=True, capture_output=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_size_and_balance(labels, texts):
    assert sum(map(len, labels.values())) >= 12_000
    assert len(texts["nlg_train"]) + len(texts["nlg_valid"]) >= 25_000
    assert sum((ROOT / name).stat().st_size for name in FILES) < 6_000_000
    for rows in labels.values():
        assert abs(sum(label for _, label in rows) / len(rows) - 0.5) <= 0.02
    everything = [text for rows in texts.values() for text in rows]
    assert len(set(everything)) == len(everything)  # so no repeats, and no text in two files
    assert all(12 <= len(text.split()) <= 35 for text in everything)
    assert len({word for text in everything for word in re.findall(r"[a-z'-]+", text.lower())}) <= 3_000


def test_frames():
    assert len(FRAMES) >= 10
    assert sum(map(len, FRAMES.values())) >= 150
    for frame in (frame for frames in FRAMES.values() for frame in frames):
        kinds = scenarios.kinds(frame)
        assert [kind.label for kind in kinds] == [1, 0, 0, 1]  # an action is right in one of two cases
        assert kinds[0].sentences[0] != kinds[2].sentences[0]
        assert all(len(kind.sentences) == 3 for kind in kinds)


def test_the_cases_of_a_frame_differ_in_a_few_words():
    for frame in (frame for frames in FRAMES.values() for frame in frames):
        for first, second in scenarios.CONTRAST.findall(frame[0]):
            assert max(len(first.split()), len(second.split())) <= 4, frame[0]


def test_hard_frames_appear_nowhere_else(texts):
    """No situation of hard.csv, its slots blanked out, is a situation of any other file."""

    def situations(names):
        first_sentences = set()
        for pattern, sentences, _ in itertools.chain.from_iterable(scenarios.patterns().values()):
            if any(pattern.fullmatch(text) for name in names for text in sample[name]):
                first_sentences.add(sentences[0])
        return first_sentences

    sample = {name: random.Random(0).sample(rows, 1000) for name, rows in texts.items()}
    assert not situations(["hard"]) & situations([name for name in texts if name != "hard"])


def test_the_judge_agrees_with_every_label(labels):
    for rows in labels.values():
        assert all(judge(text) == (True, label) for text, label in rows)


def test_the_generators_texts_are_valid_and_half_ethical(texts):
    verdicts = [judge(text) for text in texts["nlg_valid"]]
    assert all(verdict.valid for verdict in verdicts)
    assert abs(sum(verdict.label for verdict in verdicts) / len(verdicts) - 0.5) <= 0.02


DRUNK = "I was keeping Nora's car keys on Monday when Nora, who was very drunk, needed to drive home."
SOBER = "I was keeping Nora's car keys on Monday when Nora, who was quite sober, needed to drive home."
HID = "I hid the keys and refused to give them back."
GAVE = "I gave Nora the keys to the car."


@pytest.mark.parametrize(
    ("text", "label"),
    [(f"{DRUNK} {HID}", 1), (f"{DRUNK} {GAVE}", 0), (f"{SOBER} {HID}", 0), (f"{SOBER} {GAVE}", 1)],
)
def test_the_same_action_is_right_in_one_case_and_wrong_in_the_other(text, label):
    assert judge(text) == (True, label)


@pytest.mark.parametrize(
    "text",
    [
        "",
        DRUNK,  # nothing was done
        HID,
        f"{DRUNK} {HID[:-1]}",  # cut off
        f"{DRUNK} I hid the keys and refused to",
        f"{DRUNK} {HID} {HID}",
        f"{DRUNK} {HID} {SOBER} {GAVE}",  # two texts
        f"{DRUNK} {HID}\n",
        f"{DRUNK} I gave Oscar the keys to the car.",  # another person
        f"{DRUNK} I gave Nora the keys to the van.",  # another thing
        f"{DRUNK}  {HID}",
        f"{DRUNK} {HID}".lower(),
        f"{DRUNK} It took only a few minutes.",
        "On Monday the doctor told me to cool my sister, who lay burning with fever in the hall. "
        "I took his blankets away and used cold cloths.",  # the pronoun does not agree
    ],
)
def test_the_judge_refuses(text):
    assert judge(text) == (False, None)


def test_the_judge_refuses_word_salad_and_cut_texts(texts):
    rng = random.Random(0)
    for text in rng.sample(texts["test"], 200):
        words = text.split()
        assert not judge(" ".join(rng.sample(words, len(words)))).valid
        assert not judge(" ".join(words[: rng.randrange(1, len(words))]) + " and").valid
        assert not judge(text + " " + rng.choice(texts["test"])).valid


@pytest.mark.parametrize(("max_ngram", "max_accuracy"), [(1, 0.75), (2, 0.85)])
def test_words_alone_do_not_tell_the_label(labels, max_ngram, max_accuracy):
    words = CountVectorizer(ngram_range=(1, max_ngram), token_pattern=r"[A-Za-z'-]+")
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit(*zip(*labels["train"], strict=True))
    assert model.score(*zip(*labels["test"], strict=True)) <= max_accuracy


def test_slots_vary(texts):
    """The most frequent first name begins fewer than one in fifty texts."""
    first_words = Counter(text.split()[0] for text in texts["nlg_train"])
    assert max(first_words[name] for name in scenarios.PEOPLE) < len(texts["nlg_train"]) / 50
