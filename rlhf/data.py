"""Texts and queries: from a folder of this form, a file, or a dataset of the hub."""

import argparse
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from torch import Tensor

from rlhf.errors import UserError
from rlhf.runtime import offline_without_network

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own copy of a dataset whose loading script is refused
SPLIT_NAMES = {"validation": "valid", "dev": "valid", "val": "valid"}


def load_splits(source: str, config: str | None = None, revision: str | None = None) -> dict[str, datasets.Dataset]:
    """A folder of files named after their splits, one file ("train"), or a dataset of the hub."""
    path = Path(source)
    if path.is_dir():
        files = {
            file.stem: file for file in sorted(path.iterdir()) if file.suffix in FORMATS and file.stem != "feedback"
        }
        if not files:
            raise UserError(f"{source} holds no train.csv, train.txt or the like; see the README on --data")
    elif path.is_file():
        files = {"train": path}
    elif path.suffix in FORMATS or source.startswith((".", "/")):
        raise UserError(f"{source}: there is no such file or folder")
    else:
        return with_train(source, _hub_dataset(source, config, revision))
    return with_train(source, {name: load_file(file) for name, file in files.items()})


def with_train(source: str, splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """The splits under our names; one must be "train"."""
    splits = {SPLIT_NAMES.get(name, name): rows for name, rows in splits.items()}
    if "train" not in splits:
        raise UserError(f"{source} has no split called train, only {', '.join(splits)}; see the README on --data")
    return splits


def load_file(path: Path) -> datasets.Dataset:
    kind = FORMATS.get(path.suffix)
    if kind is None:
        raise UserError(f"{path} is not a {' '.join(FORMATS)} file")
    if not path.read_bytes().strip():
        raise UserError(f"{path} is empty")
    if kind != "parquet":
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        options = {"encoding": "utf-8-sig"} if kind != "parquet" else {}  # Windows begins UTF-8 files with a mark
        options |= {"sep": "\t"} if path.suffix == ".tsv" else {}
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{path} has no rows") from error
        raise UserError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
    if not len(rows):
        raise UserError(f"{path} has no rows")
    return rows


def _hub_dataset(name: str, config: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
    offline_without_network()
    try:
        if revision == PARQUET_BRANCH:  # there, a configuration is a folder
            # not load_dataset(name), which does not find a folder's cache again when the network is gone
            folder = snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=f"{config or '*'}/*"
            )
            return dict(datasets.load_dataset(folder, data_dir=config))
        return dict(datasets.load_dataset(name, config, revision=revision))
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no branch {revision} on the hub; download its CSV files as train.csv, valid.csv and test.csv "
            "into a folder and give that, --data FOLDER"
        ) from error
    except Exception as error:
        raise UserError(f"{name} is neither a file or folder here nor a dataset the hub gives: {error}") from error


TEXT_COLUMNS = ("text", "sentence", "input", "content", "prompt")


def texts_of(rows: datasets.Dataset, columns: list[str] | None) -> list[str]:
    """The texts of all rows; "a+b" joins two columns, and several names give several texts a row."""
    columns = columns or [name for name in TEXT_COLUMNS if name in rows.column_names][:1]
    wanted = [name for column in columns for name in column.split("+")]
    missing = [name for name in wanted if name not in rows.column_names]
    if missing or not wanted:
        what = f"no column {missing[0]!r}" if missing else "no column of texts"
        raise UserError(f"the data has {what}, only {', '.join(rows.column_names)}; name one with --text-column")
    texts = []
    for row in rows.select_columns(list(dict.fromkeys(wanted))):
        for column in columns:
            parts = [str(row[name]).strip() for name in column.split("+") if row[name] is not None]
            texts.append(" ".join(part for part in parts if part))
    return texts


def comparisons(rows: datasets.Dataset) -> tuple[list[list[str]], np.ndarray] | None:
    """The candidates of every row and the number of the best, if the columns are those of comparisons.

    They are chosen and rejected, perhaps with a prompt, or query, sample0, sample1, ... and best, as in [3]; a whole
    text is the query with what follows it.
    """
    names = set(rows.column_names)
    if {"chosen", "rejected"} <= names:
        begin, samples, best = "prompt", ["chosen", "rejected"], np.zeros(len(rows), dtype=int)
    elif {"sample0", "best"} <= names:
        begin, samples = "query", sorted((n for n in names if re.fullmatch(r"sample\d+", n)), key=lambda n: int(n[6:]))
        best = np.array([one if isinstance(one, int) else -1 for one in rows["best"]])
        if len(bad := np.flatnonzero((best < 0) | (best >= len(samples)))):
            raise UserError(
                f"row {bad[0] + 1}: best must be a number from 0 to {len(samples) - 1}, the place of a sample"
            )
    else:
        return None
    candidates = []
    for number, row in enumerate(rows, 1):
        whole = [f"{row.get(begin) or ''}{row[name] or ''}" for name in samples]  # an answer itself may be empty
        if any(row[name] is None for name in samples) or not all(text.strip() for text in whole):
            raise UserError(f"row {number} lacks a candidate; give all of {', '.join(samples)}, or take it out")
        candidates.append(whole)
    return candidates, best


def split_off(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled indices of `count` rows in two parts, the second at least one row and `fraction` of all."""
    order = np.random.default_rng(seed).permutation(count)
    cut = count - max(1, round(fraction * count))
    return order[:cut], order[cut:]


def nlg_texts(args: argparse.Namespace) -> dict[str, list[str]]:
    """The unlabelled texts of --data: "train" and "valid" (a tenth of train where there is no valid split)."""
    splits = load_splits(args.data, args.data_config, args.data_revision)
    texts = {name: [t for t in texts_of(rows, args.text_column) if t] for name, rows in splits.items()}
    if "valid" not in texts and texts["train"]:
        train, valid = split_off(len(texts["train"]), 0.1, seed=0)
        texts["valid"] = [texts["train"][i] for i in valid]
        texts["train"] = [texts["train"][i] for i in train]
    if not (texts["train"] and texts.get("valid")):
        raise UserError(
            f"{args.data} holds too few texts: at least one to train on and one to validate with are needed"
        )
    return texts


# queries


def opening(text: str) -> str:
    """What a query is cut from: the first sentence, or the first half of a text that is one sentence."""
    first, _, rest = re.sub(r"([.!?][\"']?)\s+", r"\1\n", text, count=1).partition("\n")
    words = text.split()
    return first if rest else " ".join(words[: (len(words) + 1) // 2])


def split_queries(texts: list[str], tokenizer, length: int) -> tuple[list[str], list[str]]:
    """The queries of these texts, for training and, about a fifth of them, for evaluation only.

    A query is the first tokens of an opening, from half of `length` to `length` of them, as the 32 to 64 of [1]; the
    text's checksum says how many. The query's own checksum says on which side it is, so that equal queries are on
    the same side, in every script and every run.
    """
    shortest = max(1, length // 2)
    rows = tokenizer([opening(text) for text in texts], add_special_tokens=False)["input_ids"]
    kept = [shortest + zlib.crc32(text.encode()) % (length - shortest + 1) for text in texts]
    sides = [], []
    for query in tokenizer.batch_decode([row[:count] for row, count in zip(rows, kept, strict=True)]):
        sides[zlib.crc32(query.encode()) % 5 == 0].append(query)
    if not all(sides):
        raise UserError("the validation texts are too few to hold out queries for evaluation; give more of them")
    return sides


def encode_queries(tokenizer, queries: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries padded on the left: ids and mask, [B, Q] each."""
    ids = tokenizer(queries, add_special_tokens=False)["input_ids"]
    width = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def endless(queries: list[str], batch: int, seed: int) -> Iterator[list[str]]:
    """Batches of queries in a new random order on every pass."""
    order, waiting = random.Random(seed), []
    while True:
        while len(waiting) < batch:
            waiting += order.sample(queries, len(queries))
        yield waiting[:batch]
        del waiting[:batch]
