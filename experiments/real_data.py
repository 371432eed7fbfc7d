"""Real texts in the project's own formats, for `study.py data`.

    python -m experiments.real_data sentiment --source ../shared/data --out models/data/parts/sentiment/rows
    python -m experiments.real_data ethics --source ../shared/data --out models/data/parts/ethics/rows

sentiment is SST-2, ethics is the short rows of ETHICS commonsense with Moral Stories. Writes --out/reward and
--out/judge, labelled, with half of the training rows each, so that the judge has seen no label of what the reward model
learned from, and both are tested on the same rows; and --out/texts for the generator, whose valid.csv has the queries.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf import cli
from rlhf.errors import UserError


def sentiment(source: Path) -> dict[str, pd.DataFrame]:
    """text, label and group of every row; rows of one group stay together when the training rows are halved."""
    parts = {}
    for name in ("train", "dev", "test"):
        lines = (source / "sentiment" / f"stsa.binary.{name}.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.split(" ", 1) for line in lines]
        parts[name] = pd.DataFrame({"text": [text for _, text in rows], "label": [int(label) for label, _ in rows]})
        parts[name]["group"] = np.arange(len(rows))
    return {"train": parts["train"], "valid": parts["dev"], "test": parts["test"]}


def ethics(source: Path) -> dict[str, pd.DataFrame]:
    """The two actions of a moral story are a group; of ETHICS, whose label 1 means wrong, every row is one."""
    path = source / "moral_stories" / "moral_stories_full_subset.jsonl"
    stories = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"text": f"{story['situation']} {story[action]}", "label": label, "group": f"story {number}"}
        for number, story in enumerate(stories)
        for action, label in (("moral_action", 1), ("immoral_action", 0))
    ]
    parts = split(pd.DataFrame(rows))
    for name, file in (("train", "cm_train_short"), ("test", "cm_test_short")):
        cases = pd.read_csv(source / "ethics" / f"{file}.csv")
        cases = pd.DataFrame(
            {"text": cases.input, "label": 1 - cases.label, "group": [f"case {i}" for i in cases.index]}
        )
        parts[name] = pd.concat([parts[name], cases])
    return parts


def split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Eight tenths of the groups to train on, one to validate with, one to test on."""
    groups = np.random.default_rng(0).permutation(rows.group.unique())
    train, valid, test = np.split(groups, [len(groups) * 8 // 10, len(groups) * 9 // 10])
    return {name: rows[rows.group.isin(part)] for name, part in (("train", train), ("valid", valid), ("test", test))}


def halves(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of half of the groups, and those of the others."""
    groups = np.random.default_rng(0).permutation(rows.group.unique())
    first = rows.group.isin(groups[: len(groups) // 2])
    return rows[first], rows[~first]


SOURCES = {"sentiment": sentiment, "ethics": ethics}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=SOURCES, help="which data")
    parser.add_argument("--source", default="../shared/data", help="folder of the downloaded files")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    try:
        parts = SOURCES[args.name](Path(args.source))
    except FileNotFoundError as error:
        raise UserError(f"--source {args.source} lacks {error.filename}") from error
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    for name, rows in zip(("reward", "judge"), halves(parts["train"]), strict=True):
        write(partial / name, {"train": rows, "valid": parts["valid"], "test": parts["test"]}, ["text", "label"])
    write(partial / "texts", {"train": parts["train"], "valid": pd.concat([parts["valid"], parts["test"]])}, ["text"])
    partial.rename(out)  # what is there is whole


def write(folder: Path, parts: dict[str, pd.DataFrame], columns: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        rows[columns].to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    cli.run(main)
