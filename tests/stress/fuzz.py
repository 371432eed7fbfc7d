"""What a user can hand over, broken in many ways: every case must end in a run, or in one line and exit code 2.

    python -m tests.stress.fuzz                # 1,000 cases; those that fail are printed, and the counts written

Data files, flags, model folders and checkpoints. Most accepted cases end where training begins, every tenth runs to
its end. Any other exit code, more than one line on stderr, a traceback, more than --limit seconds, or a change to the
finished run and model that stand in the way is a failure.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import ppo
from rlhf import cli, runtime, supervised
from tests.stress.kill_test import ended, small_project, start

SCRIPTS = {
    "train_cls": ["--epochs", "1", "--lm-epochs", "0", "--out", "models/new"],
    "train_nlg": ["--epochs", "1", "--samples", "4", "--out", "models/new"],
    "finetuning_nlg": "--episodes 16 --batch-size 8 --reference-samples 8 --response-length 8".split(),
}
WORDS = ["good", "bad", "yes", "no", "1.0", "0.0", "True", "", " ", "NA", "2", "-1", "é", "'", '"', "\x00", "0", "1"]
VALUES = ["0", "-1", "1", "2", "0.5", "1e308", "1e-308", "-0.0", "nan", "inf", "-inf", "9" * 25, "abc", "", " ", "1,5"]


def stop_where_training_begins() -> None:
    def began(*_, **__):
        os._exit(0)

    supervised.fit = ppo.collect = began


# cases: (script, flags), after what they need was written to `home`


def a_table(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """A labelled file, with one or two things wrong with it, or none."""
    rows = [[f"text {i}", str(i % 2)] for i in range(chance.choice([0, 1, 2, 3, 30, 30, 30]))]
    header = chance.choice(
        [["text", "label"]] * 9 + [["text", "text"], ["label"], ["a", "b"], ["text", "label", "x"], []]
    )
    for _ in range(chance.choice([0, 1, 1, 4])):
        if rows:
            row = chance.choice(rows)
            row[chance.randrange(len(row))] = chance.choice([*WORDS, "x" * 2_000_000, "a\nb", "a,b"])
        if rows and chance.random() < 0.2:
            chance.choice(rows).append("more")
    if chance.random() < 0.2:
        names = chance.sample(WORDS, 2)
        rows = [[text, names[i % 2]] for i, (text, *_) in enumerate(rows)]
    quote = chance.choice([lambda x: x, lambda x: '"' + x.replace('"', '""') + '"'] * 4 + [lambda x: '"' + x])
    end = chance.choice(["\n", "\n", "\r\n", "\r"])
    text = end.join(",".join(map(quote, row)) for row in [header, *rows]) + chance.choice([end, "", end * 3])
    suffix = chance.choice(["csv"] * 12 + ["tsv", "jsonl", "json", "parquet", "txt", "xlsx"])
    if suffix in ("json", "jsonl") and chance.random() < 0.8:
        records = [dict(zip(header, row, strict=False)) for row in rows]
        text = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    path = home / f"rows.{suffix}"
    path.write_bytes(in_bytes(text, chance))
    flags = ["--data", path.name]
    if chance.random() < 0.15:
        flags += ["--positive-label", chance.choice(WORDS)]
    if chance.random() < 0.1:
        flags += ["--text-column", chance.choice(["text", "a", "text+label", "text+", "+", ""])]
    if chance.random() < 0.1:
        flags += ["--label-column", chance.choice(["label", "b", "text", ""])]
    return "train_cls", flags


def in_bytes(text: str, chance: random.Random) -> bytes:
    encoding = chance.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "latin-1"])
    data = bytearray(text.encode(encoding, errors="replace"))
    for _ in range(chance.choice([0] * 8 + [1, 20])):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def texts(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """Unlabelled texts, for the generator or for the queries of PPO."""
    lines, words = chance.choice([0, 1, 2, 12, 60, 60]), ["The", "a", "word", "one", chance.choice(WORDS)]
    text = "\n".join(" ".join(chance.choice(words) for _ in range(chance.choice([0, 1, 8, 300])))
                     for _ in range(lines))  # fmt: skip
    path = home / f"texts.{chance.choice(['txt'] * 4 + ['csv', 'jsonl', 'md'])}"
    path.write_bytes(in_bytes(text, chance))
    return chance.choice(["train_nlg", "finetuning_nlg"]), ["--data", path.name]


def a_folder(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """A data folder in which a split is missing, empty or of another kind."""
    script, source = chance.choice(
        [("train_cls", "data_cls"), ("train_nlg", "data_nlg"), ("finetuning_nlg", "data_nlg")]
    )
    folder = home / "folder"
    shutil.copytree(home / source, folder)
    for _ in range(chance.choice([1, 2])):
        damage(chance.choice(sorted(folder.iterdir()) or [folder / "x"]), chance)
    return script, ["--data", "folder"]


def damage(path: Path, chance: random.Random) -> None:
    """One of the files of a data folder is cut, emptied, renamed or gone, or gets a strange neighbour."""
    how = chance.randrange(7)
    if how == 0:
        path.unlink(missing_ok=True)
    elif how == 1 and path.exists():
        path.rename(path.with_suffix(".bak"))
    elif how == 2 and path.exists():
        path.write_bytes(path.read_bytes()[: chance.randrange(500)])
    elif how == 3:
        (path.parent / "test.csv").write_text("text,label\none,5\n")
    elif how == 4:
        (path.parent / "valid.txt").write_text("\n")
    else:
        path.write_text(chance.choice(["", "text,label\n"]))


def a_flag(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """One flag or two with values that are out of bounds, or just strange."""
    script = chance.choice(list(SCRIPTS))
    flags = []
    for _ in range(chance.choice([1, 1, 2])):
        action = chance.choice(FLAGS[script])
        flags.append(action.option_strings[0])
        if action.nargs != 0:
            flags.append(chance.choice([*VALUES, *map(str, action.choices or ())]))
    return script, flags


def a_model(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """A model folder with a file that is missing, cut, changed, or of another model."""
    source, flag, script = chance.choice([
        ("nlg", "--policy", "finetuning_nlg"),
        ("cls", "--reward", "finetuning_nlg"),
        ("cls", "--policy", "finetuning_nlg"),
        ("nlg", "--reward", "finetuning_nlg"),
        ("nlg", "--model", "train_nlg"),
        ("cls", "--model", "train_cls"),
        ("nlg", "--model", "train_cls"),
    ])  # fmt: skip
    folder = home / "broken"
    shutil.copytree(home / "models" / source, folder)
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())

    def change_the_config() -> None:
        config = json.loads((folder / "config.json").read_text())
        name = chance.choice(["vocab_size", "n_layer", "n_embd", "n_head", "model_type", "n_positions", "pad_token_id"])
        config[name] = chance.choice([0, 1, 7, 40, -1, None, "x"])
        (folder / "config.json").write_text(json.dumps(config))

    def change_the_tokenizer() -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for name in chance.sample(["eos_token", "pad_token"], chance.choice([1, 2])):
            config.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)

    def change_a_byte() -> None:
        for _ in range(chance.choice([1, 50])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)

    chance.choice([
        path.unlink,
        lambda: path.write_bytes(data[: chance.randrange(len(data))]),
        change_a_byte,
        change_the_config,
        change_the_tokenizer,
        lambda: None,
    ])()  # fmt: skip
    return script, [flag, "broken"]


def a_checkpoint(chance: random.Random, home: Path) -> tuple[str, list[str]]:
    """A checkpoint that is cut, changed, of other flags, of another script, or whole."""
    whole = (home / "whole.checkpoint").read_bytes()
    data = bytearray(whole)
    script = chance.choice(["finetuning_nlg"] * 4 + ["train_nlg", "train_cls"])
    how = chance.randrange(5)
    if how == 0:
        data = data[: chance.randrange(len(data))]
    if how == 1:
        for _ in range(chance.choice([1, 30])):
            data[chance.randrange(len(data))] = chance.randrange(256)
    out = "models/nlg_ppo" if script == "finetuning_nlg" else "models/new"
    (home / f"{out}.checkpoint").write_bytes(data)
    return script, ["--resume"] + (["--lr", "3e-4"] if how == 2 else []) + (["--seed", "3"] if how == 3 else [])


KINDS = {
    "table": (a_table, 0.3),
    "texts": (texts, 0.1),
    "folder": (a_folder, 0.1),
    "flag": (a_flag, 0.25),
    "model": (a_model, 0.15),
    "checkpoint": (a_checkpoint, 0.1),
}


def flags_of(script: str) -> list[argparse.Action]:
    """All flags of a script but --help."""
    caught = []

    class Found(Exception):
        pass

    def parse_args(parser):
        caught.append(parser)
        raise Found

    module, before = importlib.import_module(script), cli.Parser.parse_args
    cli.Parser.parse_args = parse_args
    with contextlib.suppress(Found):
        module.parse_args()
    cli.Parser.parse_args = before
    return [action for action in caught[0]._actions if action.option_strings and action.dest != "help"]


FLAGS = {}


def contents(home: Path) -> dict[Path, bytes]:
    """Of the finished run and of its model."""
    folders = home / "models" / "nlg_ppo", home / "data_results" / "K1_lr_1e-3_seed0"
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.iterdir())}


def prepared(home: Path) -> None:
    """All models, a finished run, and a checkpoint of one that is not."""
    small_project(home)
    flags = {name: SCRIPTS[name] for name in SCRIPTS}
    for script, out in (("train_nlg", "models/nlg"), ("train_cls", "models/cls"), ("finetuning_nlg", "models/nlg_ppo")):
        child = start(script, home, [*flags[script], "--out", out], lambda: None)
        assert ended(child) == 0, (home / "output.txt").read_text()

    def stop_after_one() -> None:
        update = ppo.update

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return update(*args, **kwargs)

        ppo.update = interrupted

    child = start("finetuning_nlg", home, SCRIPTS["finetuning_nlg"], stop_after_one)
    assert ended(child) == 143, (home / "output.txt").read_text()
    (home / "models" / "nlg_ppo.checkpoint").rename(home / "whole.checkpoint")


def problem(code: int, said: str, seconds: float, limit: float) -> str | None:
    """What is wrong with how a case ended."""
    if seconds > limit:
        return f"took {seconds:.0f} s"
    if "Traceback" in said:
        return "a traceback"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and ("step/s" in said or "update/s" in said):
        return "refused after training began"
    if code == 2 and not (said.startswith("error: ") and len(said.splitlines()) == 1):
        return "not one line"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to see one again")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--limit", type=float, default=60, help="seconds a case may take")
    parser.add_argument("--out", default="benchmarks/fuzz.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = Counter(), []
    for script in SCRIPTS:
        FLAGS[script] = flags_of(script)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        prepared(first)
        before = {path.relative_to(first): data for path, data in contents(first).items()}
        for number in range(args.first, args.first + args.cases):
            chance = random.Random(f"{args.seed} {number}")
            home = Path(folder) / "case"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(first, home)
            kind = chance.choices(args.kinds, [KINDS[name][1] for name in args.kinds])[0]
            script, flags = KINDS[kind][0](chance, home)
            full = number % 10 == 0 and kind != "flag"  # a flag can ask for a long run
            began = time.perf_counter()
            child = start(
                script, home, [*SCRIPTS[script], *flags], (lambda: None) if full else stop_where_training_begins
            )
            while not (finished := os.waitpid(child, os.WNOHANG))[0] and time.perf_counter() - began < args.limit:
                time.sleep(0.005)
            if not finished[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            seconds = time.perf_counter() - began
            code = os.waitstatus_to_exitcode(finished[1]) if finished[0] else -1
            said = (home / "output.txt").read_text(encoding="utf-8", errors="replace")
            wrong = problem(code, said, seconds, args.limit)
            if not wrong and code == 2 and {p.relative_to(home): d for p, d in contents(home).items()} != before:
                wrong = "the finished run was changed"
            counts[f"{kind}: " + ("refused" if code == 2 else "accepted")] += 1
            if wrong:
                failures.append({"case": number, "kind": kind, "wrong": wrong, "script": script, "flags": flags})
                print(json.dumps(failures[-1])[:300], said[-1500:], sep="\n", flush=True)
    record = runtime.provenance(torch.device("cpu")) | {"cases": args.cases, "failures": failures}
    runtime.write_json(Path(args.out), record | {"counts": dict(sorted(counts.items()))})
    print(f"{args.cases} cases, {len(failures)} failures: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
