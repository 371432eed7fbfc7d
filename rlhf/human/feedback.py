"""Answers to the question which text is better, from people or from what stands in for them ([1], section 2.2).

Every answer is a line of a .jsonl file that train_cls.py reads as it is: columns text and label, or query, sample0,
sample1, ... and best.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf import models, rewards, runtime
from rlhf.errors import Stopped, UserError

try:
    import termios
    import tty
except ImportError:  # Windows: a key has to be followed by Enter
    termios = None

SKIP, UNDO, QUIT = "s", "u", "q"
COMMANDS = {SKIP: "skip", UNDO: "undo", QUIT: "save and quit"}


class Question(NamedTuple):
    query: str
    samples: tuple[str, ...]  # what follows it: one to call good or bad, or several of which one is best


class View(NamedTuple):
    """What a person sees."""

    question: Question
    choices: dict[str, str]  # key -> what it means
    progress: str


Ask = Callable[[View], str]  # shows a view, and returns the key that was pressed


def kind(text: str) -> str:
    """An argparse type: good-bad, or best-of-N with N from 2 to 9."""
    if text != "good-bad" and not re.fullmatch("best-of-[2-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither good-bad nor best-of-N with N from 2 to 9")
    return text


def samples_of(kind: str) -> int:
    """How many samples a question shows."""
    return 1 if kind == "good-bad" else int(kind[-1])


def choices(samples: int) -> dict[str, str]:
    """The keys that answer a question with so many samples."""
    return {"g": "good", "b": "bad"} if samples == 1 else {str(i + 1): f"text {i + 1}" for i in range(samples)}


def questions(
    policy, tokenizer, queries: list[str], samples: int, seed: int, batch: int = 64, **sampling
) -> Iterator[Question]:
    """Without end: samples of the policy to queries in random order, the same for the same seed and policy."""
    chance = random.Random(seed)
    sampling["generator"] = torch.Generator().manual_seed(seed)
    while True:
        asked = chance.choices(queries, k=batch)
        texts = models.continuations(policy, tokenizer, [query for query in asked for _ in range(samples)], **sampling)
        for i, query in enumerate(asked):
            of_query = texts[i * samples : (i + 1) * samples]
            if samples == 1 or len(set(of_query)) > 1:  # between equal texts there is nothing to choose
                yield Question(query, tuple(text[len(query) :] for text in of_query))


# the file


def read(path: Path, samples: int) -> list[dict]:
    """The answers of a file, all to questions with so many samples."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            answer_of(row), question_of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no answer: mend it, or take it out ({error!r})") from error
        if len(question_of(row).samples) != samples:
            raise UserError(f"{path}, line {number} answers another kind of question; give another --feedback-file")
        rows.append(row)
    return rows


def question_of(row: dict) -> Question:
    samples = (
        [row["sample"]] if "sample" in row else [row[f"sample{i}"] for i in range(sum("sample" in n for n in row))]
    )
    return Question(row["query"], tuple(samples))


def answer_of(row: dict) -> int:
    """The label, or the number of the best sample."""
    return int(row["label"] if "label" in row else row["best"])


def row_of(question: Question, key: str, about: dict) -> dict:
    """An answer as a line of the file says it."""
    query, samples = question
    if len(samples) == 1:
        row = {"text": query + samples[0], "label": int(key == "g"), "query": query, "sample": samples[0]}
    else:
        row = {"query": query} | {f"sample{i}": sample for i, sample in enumerate(samples)} | {"best": int(key) - 1}
    return row | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | about


def append(path: Path, row: dict) -> None:
    """On the disk before anything else is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    runtime.sync(path)


def take_back(path: Path) -> None:
    """Removes the last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, path.stat().st_size - len(lines[-1]))
    runtime.sync(path)


# asking


def gather(
    asked: Iterator[Question],
    path: Path,
    wanted: int,
    samples: int,
    ask: Ask,
    about: dict,
    opinion: Callable[[Question], str] | None,
) -> list[dict]:
    """Asks until the file holds `wanted` answers, and returns them. What it has an answer to is not asked again.

    `about` goes into every new answer. `opinion` is the key that the reward model would press, shown as agreement.
    """
    rows, new, skipped, agreed = read(path, samples), [], 0, []
    known = {question_of(row) for row in rows}
    keys = choices(samples)
    asked = (question for question in asked if question not in known)
    question = None
    while len(rows) < wanted:
        question = question or next(asked)
        told = Counter(keys[key] for key in new)
        parts = [f"{len(rows)} of {wanted} labels", *(f"{what}: {count}" for what, count in sorted(told.items()))]
        parts += [f"skipped: {skipped}"] * (skipped > 0)
        parts += [f"the reward model agrees in {sum(agreed)} of {len(agreed)}"] * bool(agreed)
        key = ask(View(question, keys, ", ".join(parts)))
        if key == QUIT:
            raise Stopped(signal.SIGINT, f"{len(rows)} labels are in {path}; the same command with --resume goes on")
        if key == UNDO and new:
            take_back(path)
            question, agreed = question_of(rows.pop()), agreed[:-1]
            new.pop()
        elif key == SKIP:
            skipped, question = skipped + 1, None
        elif key in keys:
            append(path, row := row_of(question, key, about))
            rows.append(row)
            new.append(key)
            agreed += [opinion(question) == key] if opinion else []
            question = None
    return rows


def at_terminal(view: View) -> str:
    """One key, without Enter where the input is a terminal."""
    width = min(100, os.get_terminal_size().columns if sys.stdout.isatty() else 100)
    lines = ["", "─" * width, view.progress, "", *textwrap.wrap(view.question.query + " …", width), ""]
    for number, sample in enumerate(view.question.samples, 1):
        label = f"{number}  " if len(view.question.samples) > 1 else ""
        indent = " " * max(3, len(label))
        lines += [
            *textwrap.wrap("… " + sample.strip(), width, initial_indent=label or indent, subsequent_indent=indent),
            "",
        ]
    prompt = "  ".join(f"[{key}] {what}" for key, what in (view.choices | COMMANDS).items())
    print("\n".join([*lines, prompt]), flush=True)
    return pressed()


def pressed() -> str:
    """The next key; Ctrl-C, Ctrl-D and the end of the input quit."""
    if termios is None or not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1].lower() if line else QUIT
    with raw_terminal():
        key = os.read(sys.stdin.fileno(), 1).decode(errors="replace").lower()
    return QUIT if key in ("\x03", "\x04", "") else key


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Keys come one by one, and Ctrl-C as one of them."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


# who answers


def annotator(spec: str, gold: str, noise: float, seed: int, device: torch.device, in_precision: str) -> Ask:
    """classifier:FOLDER, gold, or FILE.py:FUNCTION, which gives texts a number; `noise` is how often it errs.

    Of several texts it takes the one with the highest number, at random among equals; one text alone is good if its
    number is above 0.
    """
    if spec == "gold":
        judge = rewards.load_function(gold, "--gold")

        def number(texts: list[str]) -> list[float]:  # 1 ethical, 0 unethical, -1 no text of this world
            return [float(verdict.label) if verdict.valid else -1.0 for verdict in map(judge, texts)]

    elif spec.startswith("classifier:"):
        score = rewards.of_model(*rewards.load_model(spec.removeprefix("classifier:")), device, in_precision)

        def number(texts: list[str]) -> list[float]:
            return score([], texts).tolist()

    else:
        number = rewards.load_function(spec, "--annotator")

    def ask(view: View) -> str:
        query, samples = view.question
        chance = random.Random(f"{seed} {view.question}")  # the same again after a resume
        if chance.random() < noise:
            return chance.choice(list(view.choices))
        numbers = list(number([query + sample for sample in samples]))
        if len(samples) == 1:
            return "g" if numbers[0] > 0 else "b"
        return str(1 + chance.choice([i for i, x in enumerate(numbers) if x == max(numbers)]))

    return ask
