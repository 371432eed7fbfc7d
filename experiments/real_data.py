"""Real texts in the project's own formats, for the grid `data` of study.py and for pretrained.py.

    python -m experiments.real_data sentiment --source FOLDER --out models/data/inputs/sentiment/rows
    python -m experiments.real_data ethics --source hub --out models/data/inputs/ethics/rows

sentiment is SST-2; ethics is the short rows of ETHICS commonsense, with Moral Stories. Writes --out/reward and
--out/judge, labelled, with half of the training rows each: the judge has seen no label that the reward model learned
from. Both have the same test rows. --out/texts is for a generator of such texts. --out/continued has those of them that
answer queries, for a generator that is pretrained: sentences of SST-2; situations of Moral Stories, each with one of
its two actions, drawn at random. --out/queries has texts whose openings are queries, and on which no model has trained:
test sentences of SST-2, situations of Moral Stories.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf import cli, data
from rlhf.errors import UserError

LONG = 500  # characters; the longest short row of ETHICS has fewer


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=SOURCES, help="the data")
    parser.add_argument("--source", default="hub", help="folder of downloaded files, or hub")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    try:
        splits = SOURCES[args.name](None if args.source == "hub" else Path(args.source))
    except FileNotFoundError as error:
        raise UserError(f"--source {args.source} lacks {error.filename}") from error
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    for name, rows in zip(("reward", "judge"), halves(splits["train"]), strict=True):
        write(partial / name, splits | {"train": rows}, ["text", "label"])
    for_generator = {"train": splits["train"], "valid": pd.concat([splits["valid"], splits["test"]])}
    write(partial / "texts", for_generator, ["text"])
    continued = {name: rows.query("is_continued") for name, rows in for_generator.items()}
    write(partial / "continued", continued, ["text"])
    queries = for_generator["valid"].query("is_query")
    write(partial / "queries", dict(zip(("train", "valid"), halves(queries), strict=True)), ["text"])
    partial.rename(out)  # so that --out is complete whenever it exists


# the rows of every split: text, label, group, is_query, is_continued. Rows of one group stay together when rows are
# halved.


def sentiment(source: Path | None) -> dict[str, pd.DataFrame]:
    """source: a folder of files, or None for the hub."""
    splits = {name: sst2(source, name) for name in ("train", "valid", "test")}
    for name, rows in splits.items():
        rows["group"], rows["is_query"], rows["is_continued"] = np.arange(len(rows)), name == "test", True
    return splits


def sst2(source: Path | None, name: str) -> pd.DataFrame:
    if source is None:
        return data.load_splits("SetFit/sst2")[name].to_pandas()[["text", "label"]]
    file = source / "sentiment" / f"stsa.binary.{'dev' if name == 'valid' else name}.txt"
    rows = [line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return pd.DataFrame({"text": [text for _, text in rows], "label": [int(label) for label, _ in rows]})


def ethics(source: Path | None) -> dict[str, pd.DataFrame]:
    """The two actions of a moral story are a group; of ETHICS, whose label 1 means wrong, every row is one.

    source: a folder of files, or None for the hub.
    """
    stories = moral_stories(source)
    drawn = np.random.default_rng(0).integers(2, size=len(stories))
    rows = [
        {
            "text": f"{story['situation']} {story[action]}",
            "label": label,
            "group": f"story {number}",
            "is_query": label == 1,  # once a story
            "is_continued": label == drawn[number],
        }
        for number, story in enumerate(stories)
        for action, label in (("moral_action", 1), ("immoral_action", 0))
    ]
    splits = split(pd.DataFrame(rows))
    for name in ("train", "test"):
        cases = commonsense(source, name)
        cases = pd.DataFrame({"text": cases.input, "label": 1 - cases.label, "is_query": False})
        cases["is_continued"] = False
        cases["group"] = [f"case {i}" for i in cases.index]
        splits[name] = pd.concat([splits[name], cases])
    return splits


def moral_stories(source: Path | None) -> list[dict]:
    if source is None:
        return data.load_splits("demelin/moral_stories", "full", data.PARQUET_BRANCH)["train"].to_list()
    path = source / "moral_stories" / "moral_stories_full_subset.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commonsense(source: Path | None, name: str) -> pd.DataFrame:
    """The short rows of ETHICS commonsense; in the long ones people ask who is to blame."""
    if source is None:
        rows = data.load_splits("hendrycks/ethics", "commonsense", data.PARQUET_BRANCH)[name].to_pandas()
        return rows[rows.input.str.len() < LONG].reset_index(drop=True)
    return pd.read_csv(source / "ethics" / f"cm_{name}_short.csv")


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
