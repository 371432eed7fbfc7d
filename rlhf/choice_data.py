"""Labelled texts and comparisons, from which a reward model learns."""

import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import datasets
import numpy as np

from rlhf import data
from rlhf.errors import UserError

MOST_LISTED = 5  # labels in a message


class Choices(NamedTuple):
    """N rows of labelled texts or of comparisons."""

    candidates: list[list[str]]  # of every row: one text, or the texts that are compared
    chosen: np.ndarray  # [N]: the label of the one text, 1 = positive; or the index of the best candidate

    @property
    def texts(self) -> list[str]:
        """The candidates of all rows, one after the other."""
        return [text for row in self.candidates for text in row]

    def select(self, indices: np.ndarray) -> "Choices":
        """The rows with these indices."""
        return Choices([self.candidates[i] for i in indices], self.chosen[indices])


def load_choices(
    source: str,
    config: str | None = None,
    revision: str | None = None,
    text_columns: list[str] | None = None,
    label_column: str = "label",
    positive_label: str | None = None,
    train_rows: int | None = None,
    seed: int = 0,
) -> dict[str, Choices]:
    """The labels or comparisons of every split, "train" and "valid" first.

    "valid" is a tenth of "train" where the data has none. train_rows: so many rows of "train", or all. Both are drawn
    with `seed`.
    """
    splits = choices_of(data.load_splits(source, config, revision), text_columns, label_column, positive_label)
    train = splits.pop("train")
    if "valid" not in splits:
        train_indices, valid_indices = data.hold_out(len(train.candidates), seed)
        train, valid = train.select(train_indices), train.select(valid_indices)
    else:
        valid = splits.pop("valid")
    if not train.candidates:
        raise UserError(f"{source} holds too few rows: at least one to train on and one to validate with are needed")
    if train_rows:
        train = train.select(np.random.default_rng(seed).permutation(len(train.candidates))[:train_rows])
    return {"train": train, "valid": valid} | splits


def choices_of(
    splits: dict[str, datasets.Dataset], text_columns: list[str] | None, label_column: str, positive_label: str | None
) -> dict[str, Choices]:
    """The comparisons of all splits, or else their labelled texts."""
    compared = {name: comparisons(rows, name) for name, rows in splits.items()}
    kinds = {
        name: "labelled texts" if choices is None else f"comparisons of {len(choices.candidates[0])}"
        for name, choices in compared.items()
    }
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name} holds {kind}" for name, kind in kinds.items())
        raise UserError(f"the splits are not of one kind: {described}; take the others out")
    if compared["train"] is not None:
        of_labels = {"--text-column": text_columns, "--positive-label": positive_label}
        for flag in [flag for flag, value in of_labels.items() if value]:
            raise UserError(f"{flag} is for labelled texts, and these are comparisons; leave it out")
        return compared
    return labelled_splits(splits, text_columns, label_column, positive_label)


def labelled_splits(
    splits: dict[str, datasets.Dataset], text_columns: list[str] | None, label_column: str, positive_label: str | None
) -> dict[str, Choices]:
    """The labelled texts of all splits but those that share no label with "train".

    Many data sets of the hub have a split without labels, in which all are -1.
    """
    flags = (text_columns, label_column, positive_label)
    choices = {"train": labelled(splits["train"], *flags)}
    train_labels = {*labels_of(splits["train"], label_column)}
    for name, rows in splits.items():
        labels = {*labels_of(rows, label_column)} - {None}
        if name != "train" and labels & train_labels:
            choices[name] = labelled(rows, *flags, name, train_labels)
        elif name != "train":
            has = f"the labels {_listed(labels)}" if labels else "no labels"
            print(f"warning: {name} is left out: it has {has}, and train {_listed(train_labels)}", file=sys.stderr)
    return choices


def labelled(
    rows: datasets.Dataset,
    text_columns: list[str] | None,
    label_column: str,
    positive_label: str | None,
    split: str = "train",
    train_labels: set[str] | None = None,
) -> Choices:
    """The labelled texts of a split. Without `positive_label`, the labels must be 1, which is positive, and 0.

    train_labels: those of "train", of which this split may have one kind only. None: this is "train", and has two.
    """
    if label_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"{split} has no column {label_column!r}, only {columns}; name it with --label-column")
    texts, labels = data.texts_of(rows, text_columns, split), labels_of(rows, label_column)
    if None in labels:
        raise UserError(f"{split}, row {labels.index(None) + 1} has no label; give it one, or take it out")
    if len(texts) != len(labels):
        raise UserError("a labelled row has one text: give --text-column one name")
    if train_labels is None:
        _check_two_kinds(labels, positive_label)
    elif unknown := [label for label in labels if label not in train_labels]:
        where, known = f"{split}, row {labels.index(unknown[0]) + 1}", _listed(train_labels)
        raise UserError(f"{where}: label {unknown[0]!r} is none of train's, {known}; correct it, or take it out")
    positive = positive_label or "1"
    return Choices([[text] for text in texts], np.array([label == positive for label in labels], dtype=int))


def _check_two_kinds(labels: list[str], positive_label: str | None) -> None:
    """Refuse labels of "train" that do not tell what is positive and what is not."""
    names = sorted(set(labels))
    if positive_label is None and (others := [name for name in names if name not in ("0", "1")]):
        row = labels.index(others[0]) + 1
        raise UserError(
            f"train, row {row}: label {others[0]!r} is neither 0 nor 1; say what is positive with --positive-label"
        )
    positive = positive_label or "1"
    if len(names) != 2 or positive not in names:
        raise UserError(f"two kinds of label are needed, {positive!r} and another; train has {_listed(names)}")


def _listed(labels: Iterable[str]) -> str:
    """The first few of these labels; a column of numbers may hold thousands."""
    names = sorted(labels)
    return ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")


def labels_of(rows: datasets.Dataset, label_column: str) -> list[str | None]:
    """The labels of all rows, None where one is missing; [] without that column."""
    cells = rows[label_column] if label_column in rows.column_names else []
    return [None if cell is None else label_name(cell) for cell in cells]


def label_name(cell: Any) -> str:
    """A label as text; 1.0, as some files write it, is 1."""
    is_whole = isinstance(cell, float) and cell.is_integer()
    return str(int(cell) if is_whole else cell).strip()


def comparisons(rows: datasets.Dataset, split: str = "train") -> Choices | None:
    """The comparisons of a split, or None if its columns are not those of comparisons.

    The columns are chosen and rejected, and prompt or not; or query, sample0, sample1, ... and best, as in [3]. A
    candidate is the prompt or query with what follows it.
    """
    names = set(rows.column_names)
    if {"chosen", "rejected"} <= names:
        prompt, samples, best = "prompt", ["chosen", "rejected"], np.zeros(len(rows), dtype=int)
    elif {"sample0", "best"} <= names:
        prompt, samples = "query", [name for name in names if re.fullmatch(r"sample\d+", name)]
        samples.sort(key=lambda name: int(name.removeprefix("sample")))
        best = np.array([int(name) if (name := label_name(cell)).isdecimal() else -1 for cell in rows["best"]])
        if len(bad := np.flatnonzero((best < 0) | (best >= len(samples)))):
            raise UserError(
                f"{split}, row {bad[0] + 1}: best must be a number from 0 to {len(samples) - 1}, the place of a sample"
            )
    else:
        return None
    candidates = []
    for number, row in enumerate(rows, 1):
        where = f"{split}, row {number}"
        query = data.cell_text(row.get(prompt), prompt, where)
        texts = [query + data.cell_text(row[name], name, where) for name in samples]  # a sample itself may be empty
        if any(row[name] is None for name in samples) or not all(text.strip() for text in texts):
            raise UserError(f"{where} lacks a candidate; give all of {', '.join(samples)}, or take it out")
        candidates.append(texts)
    return Choices(candidates, best)
