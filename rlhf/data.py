"""Texts, labels and comparisons: from a folder of data files, one file, or a dataset of the hub."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError

from rlhf.errors import UserError
from rlhf.runtime import offline_without_network

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own copy of a dataset whose loading script is refused
SPLIT_NAMES = {"validation": "valid", "dev": "valid", "val": "valid"}
TEXT_COLUMNS = ("text", "sentence", "input", "content", "prompt")  # the first one there is, if the user names none
MOST_LISTED = 5  # labels in a message
VALID_FRACTION = 0.1  # of the training rows, where the data has no validation split
# rows, names of columns if any are given, the name of the split -> the texts of the rows
Read = Callable[[datasets.Dataset, list[str] | None, str], list[str]]


# splits of rows


def load_splits(source: str, config: str | None = None, revision: str | None = None) -> dict[str, datasets.Dataset]:
    """The splits of a folder of files named after them, of one file ("train"), or of a dataset of the hub.

    config, revision: the configuration (subset) of a hub dataset, and its branch or commit.
    """
    path = Path(source)
    if path.is_dir():
        files = {}
        for file in sorted(path.iterdir()):
            if file.suffix in FORMATS and file.stem != "feedback":
                name = SPLIT_NAMES.get(file.stem, file.stem)
                if name in files:
                    raise UserError(f"{source}: {files[name].name} and {file.name} are the same split; remove one")
                files[name] = file
        if not files:
            raise UserError(f"{source} holds no train.csv, train.txt or the like; see docs/adding.md, Data")
    elif path.is_file():
        files = {"train": path}
    elif path.suffix in FORMATS or source.startswith((".", "/")):
        raise UserError(f"{source}: there is no such file or folder")
    else:
        return _named(source, _hub_dataset(source, config, revision))
    return _named(source, {name: load_file(file) for name, file in files.items()})


def _named(source: str, splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """The splits under the names that this project uses. One must be "train"."""
    splits = {SPLIT_NAMES.get(name, name): rows for name, rows in splits.items()}
    if "train" not in splits:
        raise UserError(f"{source} has no split called train, only {', '.join(splits)}; see docs/adding.md, Data")
    return splits


def load_file(path: Path) -> datasets.Dataset:
    """The rows of a data file; a .txt file has a text on every line."""
    file_format = FORMATS.get(path.suffix)
    if file_format is None:
        raise UserError(f"{path} is not a {' '.join(FORMATS)} file")
    if not path.read_bytes().strip():
        raise UserError(f"{path} is empty")
    if file_format != "parquet":
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        # utf-8-sig: Windows begins UTF-8 files with a byte order mark
        options = {"encoding": "utf-8-sig"} if file_format != "parquet" else {}
        options |= {"sep": "\t"} if path.suffix == ".tsv" else {}
        rows = datasets.load_dataset(file_format, data_files=str(path), split="train", **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{path} has no rows") from error
        raise UserError(f"{path} cannot be read as {file_format}: {error.__cause__ or error}") from error
    if not len(rows):
        raise UserError(f"{path} has no rows")
    return rows


def _hub_dataset(name: str, config: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
    offline_without_network()
    try:
        if revision == PARQUET_BRANCH:  # in this branch, a configuration is a folder
            # not load_dataset(name), which does not find a folder's cache again when the network is gone
            folder = snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=f"{config or '*'}/*"
            )
            if config and not Path(folder, config).is_dir():
                files = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
                configs = ", ".join(sorted({file.partition("/")[0] for file in files if "/" in file}))
                raise UserError(f"--data-config {config}: the configurations of {name} are {configs}")
            return dict(datasets.load_dataset(folder, data_dir=config))
        return dict(datasets.load_dataset(name, config, revision=revision))
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no branch {revision} on the hub; download its CSV files as train.csv, valid.csv and test.csv "
            "into a folder and give that, --data FOLDER"
        ) from error
    except UserError:
        raise
    except Exception as error:
        unknown = f"{name} is neither a file or folder here nor a dataset that the hub gives"
        raise UserError(f"{unknown}; check the name, or the network: {error}") from error


def hold_out(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled indices of `count` rows: those to train on, and a tenth, at least one, to validate with."""
    order = np.random.default_rng(seed).permutation(count)
    cut = count - max(1, round(VALID_FRACTION * count))
    return order[:cut], order[cut:]


# texts


def texts_of(rows: datasets.Dataset, text_columns: list[str] | None, split: str = "train") -> list[str]:
    """The texts of all rows. "a+b" joins two columns to one text; several names give several texts per row.

    split: its name, for what is said of its rows.
    """
    text_columns = text_columns or [name for name in TEXT_COLUMNS if name in rows.column_names][:1]
    names = [name for column in text_columns for name in column.split("+")]
    missing = [name for name in names if name not in rows.column_names]
    if missing or not names:
        what = f"no column {missing[0]!r}" if missing else "no column of texts"
        raise UserError(f"{split} has {what}, only {', '.join(rows.column_names)}; name one with --text-column")
    texts = []
    for number, row in enumerate(rows.select_columns(list(dict.fromkeys(names))), 1):
        for column in text_columns:
            cells = [cell_text(row[name], name, f"{split}, row {number}").strip() for name in column.split("+")]
            texts.append(" ".join(cell for cell in cells if cell))
    return texts


def cell_text(cell: Any, column: str, where: str) -> str:
    """What a cell says: "" where it is missing, and a number's digits.

    A list, such as the messages of a conversation, is refused: no model should learn how Python writes it.
    """
    if isinstance(cell, (list, dict)):
        raise UserError(f"{where}: {column} holds a {type(cell).__name__}, not a text; write what it says as one text")
    return "" if cell is None else str(cell)


def load_texts(
    source: str,
    config: str | None = None,
    revision: str | None = None,
    text_columns: list[str] | None = None,
    read: Read = texts_of,
) -> dict[str, list[str]]:
    """The texts of every split, without labels; "valid" is a tenth of "train" where the data has none."""
    splits = load_splits(source, config, revision)
    texts = {name: [text for text in read(rows, text_columns, name) if text] for name, rows in splits.items()}
    if "valid" not in texts and texts["train"]:
        train, valid = hold_out(len(texts["train"]), seed=0)
        texts["valid"] = [texts["train"][i] for i in valid]
        texts["train"] = [texts["train"][i] for i in train]
    if not (texts["train"] and texts.get("valid")):
        raise UserError(f"{source} holds too few texts: at least one to train on and one to validate with are needed")
    return texts


# choices, from which a reward model learns


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
    splits = choices_of(load_splits(source, config, revision), text_columns, label_column, positive_label)
    train = splits.pop("train")
    if "valid" not in splits:
        train_indices, valid_indices = hold_out(len(train.candidates), seed)
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
    texts, labels = texts_of(rows, text_columns, split), labels_of(rows, label_column)
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
        best = np.array([index if isinstance(index, int) else -1 for index in rows["best"]])
        if len(bad := np.flatnonzero((best < 0) | (best >= len(samples)))):
            raise UserError(
                f"{split}, row {bad[0] + 1}: best must be a number from 0 to {len(samples) - 1}, the place of a sample"
            )
    else:
        return None
    candidates = []
    for number, row in enumerate(rows, 1):
        where = f"{split}, row {number}"
        query = cell_text(row.get(prompt), prompt, where)
        texts = [query + cell_text(row[name], name, where) for name in samples]  # a sample itself may be empty
        if any(row[name] is None for name in samples) or not all(text.strip() for text in texts):
            raise UserError(f"{where} lacks a candidate; give all of {', '.join(samples)}, or take it out")
        candidates.append(texts)
    return Choices(candidates, best)
