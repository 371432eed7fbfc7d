"""Rows and texts: from a folder of data files, one file, or a dataset of the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
VALID_FRACTION = 0.1  # of the training rows, where the data has no validation split
# rows, names of columns if any are given, the name of the split -> the texts of the rows
Read = Callable[[datasets.Dataset, list[str] | None, str], list[str]]


# splits of rows


def load_splits(source: str, config: str | None = None, revision: str | None = None) -> dict[str, datasets.Dataset]:
    """The splits of a folder of files named after them, of one file ("train"), or of a dataset of the hub.

    config, revision: the configuration (subset) of a hub dataset, and its branch or commit.
    """
    path = Path(source)
    if path.exists() and (config or revision):
        raise UserError(f"--data-config and --data-revision are of a hub dataset, and {source} is here; leave them out")
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
        if file_format == "csv":
            options |= {"keep_default_na": False, "na_values": [""]}  # None and NA are words
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
