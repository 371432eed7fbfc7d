"""People's answers, in a file that is complete after every key.

Every answer is a line of a .jsonl file, which train_cls.py can read: columns text and label, or query, sample0,
sample1, ... and best.
"""

import datetime
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf import runtime
from rlhf.errors import Stopped, UserError
from rlhf.human.questions import QUIT, SKIP, UNDO, Ask, Question, View, answer_keys

MOST_REPEATED = 2000  # questions in a row, before the policy counts as one that has nothing new to say


def read(path: Path, num_samples: int) -> list[dict]:
    """The rows of a file of answers, all to questions with `num_samples` samples; [] if there is no file."""
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"--feedback-file {path} is no file; give the name of a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold what splitlines takes for an end
    except UnicodeDecodeError as error:
        raise UserError(f"--feedback-file {path} is no text in UTF-8: correct it ({error})") from error
    rows = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row = json.loads(line)
            label = label_in(row)
            question = question_in(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is not an answer: correct or remove it ({error!r})") from error
        if len(question.samples) != num_samples:
            raise UserError(f"{path}, line {number} answers another kind of question; give another --feedback-file")
        choices = max(2, num_samples)  # of one sample: good or bad
        if not 0 <= label < choices:
            raise UserError(f"{path}, line {number}: its answer is {label}; correct it to one from 0 to {choices - 1}")
        rows.append(row)
    return rows


def question_in(row: dict) -> Question:
    """The question that a row answers."""
    names = ["sample"] if "sample" in row else [f"sample{i}" for i in range(sum("sample" in name for name in row))]
    query, *samples = texts = [row[name] for name in ("query", *names)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("query and samples are texts")
    return Question(query, tuple(samples))


def label_in(row: dict) -> int:
    """The answer in a row: 1 for good and 0 for bad, or the index of the best sample."""
    return int(row["label"] if "label" in row else row["best"])


def to_row(question: Question, key: str, metadata: dict) -> dict:
    """The row of the file for an answer; metadata: more columns."""
    query, samples = question
    if len(samples) == 1:
        row = {"text": query + samples[0], "label": int(key == "g"), "query": query, "sample": samples[0]}
    else:
        row = {"query": query} | {f"sample{i}": sample for i, sample in enumerate(samples)} | {"best": int(key) - 1}
    return row | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | metadata


def make_folder(path: Path) -> None:
    """The folder of the file of answers, before somebody has answered in vain."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--feedback-file {path}: its folder cannot be made ({error}); give another one") from error


def append(path: Path, row: dict) -> None:
    """Write a row as the last line, and wait until it is on the disk."""
    make_folder(path)
    with open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        between = b"" if file.read() in (b"", b"\n") else b"\n"  # an editor may have left the last line open
        file.write(between + json.dumps(row, ensure_ascii=False).encode() + b"\n")
    runtime.sync(path)


def remove_last(path: Path) -> None:
    """Remove the last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, path.stat().st_size - len(lines[-1]))
    runtime.sync(path)


def collect(
    questions: Iterator[Question],
    path: Path,
    total: int,
    num_samples: int,
    ask: Ask,
    metadata: dict,
    predict_key: Callable[[Question], str] | None,
) -> list[dict]:
    """Ask until the file holds `total` answers, and return its rows. No question is asked twice, but for UNDO.

    metadata: columns that every new row gets. predict_key: the key that the reward model would press, whose agreement
    with the answers is part of the progress that people see; None for no reward model.
    """
    rows = read(path, num_samples)
    unasked = unasked_questions(questions, {question_in(row) for row in rows})
    meanings = answer_keys(num_samples)
    new_keys, agreements, skipped = [], [], 0  # of this session
    question = None
    while len(rows) < total:
        question = question or next(unasked)
        counts = Counter(meanings[key] for key in new_keys)
        key = ask(View(question, meanings, progress_line(len(rows), total, counts, skipped, agreements)))
        if key == QUIT:
            raise Stopped(signal.SIGINT, f"{len(rows)} labels are in {path}; the same command with --resume goes on")
        if key == UNDO and new_keys:
            remove_last(path)
            question = question_in(rows.pop())
            new_keys.pop()
            agreements = agreements[:-1]
        elif key == SKIP:
            skipped, question = skipped + 1, None
        elif key in meanings:
            row = to_row(question, key, metadata)
            append(path, row)
            rows.append(row)
            new_keys.append(key)
            agreements += [predict_key(question) == key] if predict_key else []
            question = None
    return rows


def unasked_questions(questions: Iterator[Question], asked: set[Question]) -> Iterator[Question]:
    """The questions that are not among `asked`, every one of them once.

    A policy that hardly varies runs out of them: it would be sampled forever.
    """
    asked, repeated = {*asked}, 0
    most_repeated = MOST_REPEATED + len(asked)  # a resumed run draws all that were answered before
    for question in questions:
        if question not in asked:
            asked.add(question)
            repeated = 0
            yield question
        elif (repeated := repeated + 1) > most_repeated:
            raise UserError(
                f"the last {repeated} questions were asked before: the policy says too little that is new for so many "
                "--labels; give fewer, or data with more queries"
            )


def progress_line(labels: int, total: int, counts: Counter, skipped: int, agreements: list[bool]) -> str:
    """Such as "3 of 250 labels, bad: 1, good: 2, skipped: 1, the reward model agrees in 2 of 3".

    labels: answers in the file; counts: new answers by their meaning; agreements: with the reward model.
    """
    items = [f"{labels} of {total} labels", *(f"{meaning}: {count}" for meaning, count in sorted(counts.items()))]
    items += [f"skipped: {skipped}"] * (skipped > 0)
    items += [f"the reward model agrees in {sum(agreements)} of {len(agreements)}"] * bool(agreements)
    return ", ".join(items)
