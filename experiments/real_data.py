"""Real texts in the project's own formats, for the grid `data` of study.py.

    python -m experiments.real_data sentiment --source ../shared/data --out models/data/inputs/sentiment/rows
    python -m experiments.real_data ethics --source ../shared/data --out models/data/inputs/ethics/rows

sentiment is SST-2; ethics is the short rows of ETHICS commonsense, with Moral Stories. Writes --out/reward and
--out/judge, labelled, with half of the training rows each: the judge has seen no label that the reward model learned
from. Both have the same test rows. --out/texts is for the generator; its valid.csv has the queries.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf import cli
from rlhf.errors import UserError


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=SOURCES, help="the data")
    parser.add_argument("--source", default="../shared/data", help="folder of the downloaded files")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    try:
        splits = SOURCES[args.name](Path(args.source))
    except FileNotFoundError as error:
        raise UserError(f"--source {args.source} lacks {error.filename}") from error
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    for name, rows in zip(("reward", "judge"), halves(splits["train"]), strict=True):
        write(partial / name, splits | {"train": rows}, ["text", "label"])
    write(
        partial / "texts",
        {"train": splits["train"], "valid": pd.concat([splits["valid"], splits["test"]])},
        ["text"],
    )
    partial.rename(out)  # so that --out is complete whenever it exists


def sentiment(source: Path) -> dict[str, pd.DataFrame]:
    """text, label and group of every row. Rows of one group stay together when the training rows are halved."""
    splits = {}
    for name, file in (("train", "train"), ("valid", "dev"), ("test", "test")):
        lines = (source / "sentiment" / f"stsa.binary.{file}.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.split(" ", 1) for line in lines]
        splits[name] = pd.DataFrame({"text": [text for _, text in rows], "label": [int(label) for label, _ in rows]})
        splits[name]["group"] = np.arange(len(rows))
    return splits


def ethics(source: Path) -> dict[str, pd.DataFrame]:
    """The two actions of a moral story are a group; of ETHICS, whose label 1 means wrong, every row is one."""
    path = source / "moral_stories" / "moral_stories_full_subset.jsonl"
    stories = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"text": f"{story['situation']} {story[action]}", "label": label, "group": f"story {number}"}
        for number, story in enumerate(stories)
        for action, label in (("moral_action", 1), ("immoral_action", 0))
    ]
    splits = split(pd.DataFrame(rows))
    for name, file in (("train", "cm_train_short"), ("test", "cm_test_short")):
        cases = pd.read_csv(source / "ethics" / f"{file}.csv")
        cases = pd.DataFrame(
            {"text": cases.input, "label": 1 - cases.label, "group": [f"case {i}" for i in cases.index]}
        )
        splits[name] = pd.concat([splits[name], cases])
    return splits


SOURCES = {"sentiment": sentiment, "ethics": ethics}


def split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Eight tenths of the groups to train on, one to validate with, one to test on."""
    groups = shuffled_groups(rows)
    cuts = [len(groups) * 8 // 10, len(groups) * 9 // 10]
    return {
        name: rows[rows.group.isin(chosen)]
        for name, chosen in zip(("train", "valid", "test"), np.split(groups, cuts), strict=True)
    }


def halves(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of half of the groups, and those of the others."""
    groups = shuffled_groups(rows)
    in_first = rows.group.isin(groups[: len(groups) // 2])
    return rows[in_first], rows[~in_first]


def shuffled_groups(rows: pd.DataFrame) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows.group.unique())


def write(folder: Path, splits: dict[str, pd.DataFrame], columns: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        rows[columns].to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    cli.run(main)
