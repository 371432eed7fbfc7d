"""Broken input of many kinds: every case must be accepted, or refused in one line with exit code 2.

    python -m tests.stress.fuzz                # 1,000 cases; prints failures, and writes data_results/fuzz.json

The cases break data files, flags, model folders and checkpoints. Most accepted cases end where training begins, every
tenth runs to its end. A case fails if it ends with another exit code, with more than one line on stderr or a traceback,
takes more than --limit seconds, or is refused and has changed the finished run and model of an earlier run.
"""

import argparse
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
from unittest import mock

import torch

import finetuning_nlg
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
    def exit_process(*_, **__):
        os._exit(0)

    supervised.fit = finetuning_nlg.collect = exit_process


# cases: each writes files to `home`, and returns the script and its flags


def labelled_file(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """A labelled file with some defects, or none."""
    rows = [[f"text {i}", str(i % 2)] for i in range(rng.choice([0, 1, 2, 3, 30, 30, 30]))]
    header = rng.choice([["text", "label"]] * 9 + [["text", "text"], ["label"], ["a", "b"], ["text", "label", "x"], []])
    for _ in range(rng.choice([0, 1, 1, 4])):
        if rows:
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = rng.choice([*WORDS, "x" * 2_000_000, "a\nb", "a,b"])
        if rows and rng.random() < 0.2:
            rng.choice(rows).append("more")
    if rng.random() < 0.2:
        names = rng.sample(WORDS, 2)
        rows = [[text, names[i % 2]] for i, (text, *_) in enumerate(rows)]
    quote = rng.choice([lambda x: x, lambda x: '"' + x.replace('"', '""') + '"'] * 4 + [lambda x: '"' + x])
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    text = end.join(",".join(map(quote, row)) for row in [header, *rows]) + rng.choice([end, "", end * 3])
    suffix = rng.choice(["csv"] * 12 + ["tsv", "jsonl", "json", "parquet", "txt", "xlsx"])
    if suffix in ("json", "jsonl") and rng.random() < 0.8:
        records = [dict(zip(header, row, strict=False)) for row in rows]
        text = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    path = home / f"rows.{suffix}"
    path.write_bytes(encoded(text, rng))
    flags = ["--data", path.name]
    if rng.random() < 0.15:
        flags += ["--positive-label", rng.choice(WORDS)]
    if rng.random() < 0.1:
        flags += ["--text-column", rng.choice(["text", "a", "text+label", "text+", "+", ""])]
    if rng.random() < 0.1:
        flags += ["--label-column", rng.choice(["label", "b", "text", ""])]
    return "train_cls", flags


def encoded(text: str, rng: random.Random) -> bytes:
    """The text in some encoding, sometimes with changed bytes."""
    encoding = rng.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "latin-1"])
    data = bytearray(text.encode(encoding, errors="replace"))
    for _ in range(rng.choice([0] * 8 + [1, 20])):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def unlabelled_file(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """Unlabelled texts, for the generator or for the queries of PPO."""
    lines, words = rng.choice([0, 1, 2, 12, 60, 60]), ["The", "a", "word", "one", rng.choice(WORDS)]
    text = "\n".join(" ".join(rng.choice(words) for _ in range(rng.choice([0, 1, 8, 300])))
                     for _ in range(lines))  # fmt: skip
    path = home / f"texts.{rng.choice(['txt'] * 4 + ['csv', 'jsonl', 'md'])}"
    path.write_bytes(encoded(text, rng))
    return rng.choice(["train_nlg", "finetuning_nlg"]), ["--data", path.name]


def data_folder(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """A data folder in which a split is missing, empty or of another kind."""
    script, source = rng.choice([("train_cls", "data_cls"), ("train_nlg", "data_nlg"), ("finetuning_nlg", "data_nlg")])
    folder = home / "folder"
    shutil.copytree(home / source, folder)
    for _ in range(rng.choice([1, 2])):
        damage_file(rng.choice(sorted(folder.iterdir()) or [folder / "x"]), rng)
    return script, ["--data", "folder"]


def damage_file(path: Path, rng: random.Random) -> None:
    """Cut, empty, rename or remove a file of a data folder, or write a bad file beside it."""
    how = rng.randrange(7)
    if how == 0:
        path.unlink(missing_ok=True)
    elif how == 1 and path.exists():
        path.rename(path.with_suffix(".bak"))
    elif how == 2 and path.exists():
        path.write_bytes(path.read_bytes()[: rng.randrange(500)])
    elif how == 3:
        (path.parent / "test.csv").write_text("text,label\none,5\n")
    elif how == 4:
        (path.parent / "valid.txt").write_text("\n")
    else:
        path.write_text(rng.choice(["", "text,label\n"]))


def odd_flags(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """One or two flags with values that are out of bounds or unusual."""
    script = rng.choice(list(SCRIPTS))
    flags = []
    for _ in range(rng.choice([1, 1, 2])):
        action = rng.choice(flags_of(script))
        flags.append(action.option_strings[0])
        if action.nargs != 0:
            flags.append(rng.choice([*VALUES, *map(str, action.choices or ())]))
    return script, flags


def model_folder(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """A model folder with a file that is missing, cut, changed, or of another model."""
    source, flag, script = rng.choice([
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
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())

    def change_the_config() -> None:
        config = json.loads((folder / "config.json").read_text())
        name = rng.choice(["vocab_size", "n_layer", "n_embd", "n_head", "model_type", "n_positions", "pad_token_id"])
        config[name] = rng.choice([0, 1, 7, 40, -1, None, "x"])
        (folder / "config.json").write_text(json.dumps(config))

    def change_the_tokenizer() -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for name in rng.sample(["eos_token", "pad_token"], rng.choice([1, 2])):
            config.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)

    def change_a_byte() -> None:
        for _ in range(rng.choice([1, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)

    rng.choice([
        path.unlink,
        lambda: path.write_bytes(data[: rng.randrange(len(data))]),
        change_a_byte,
        change_the_config,
        change_the_tokenizer,
        lambda: None,
    ])()  # fmt: skip
    return script, [flag, "broken"]


def checkpoint_file(rng: random.Random, home: Path) -> tuple[str, list[str]]:
    """A checkpoint that is cut, changed, of other flags, of another script, or valid."""
    data = bytearray((home / "valid.checkpoint").read_bytes())
    script = rng.choice(["finetuning_nlg"] * 4 + ["train_nlg", "train_cls"])
    how = rng.randrange(5)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    if how == 1:
        for _ in range(rng.choice([1, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    out = "models/nlg_ppo" if script == "finetuning_nlg" else "models/new"
    (home / f"{out}.checkpoint").write_bytes(data)
    return script, ["--resume"] + (["--lr", "3e-4"] if how == 2 else []) + (["--seed", "3"] if how == 3 else [])


KINDS = {
    "table": (labelled_file, 0.3),
    "texts": (unlabelled_file, 0.1),
    "folder": (data_folder, 0.1),
    "flag": (odd_flags, 0.25),
    "model": (model_folder, 0.15),
    "checkpoint": (checkpoint_file, 0.1),
}


def flags_of(script: str) -> list[argparse.Action]:
    """All flags of a script but --help."""

    class ParserFound(Exception):
        pass

    def parse_args(parser):
        raise ParserFound(parser)

    module = importlib.import_module(script)
    with mock.patch.object(cli.Parser, "parse_args", parse_args):
        try:
            module.parse_args()
        except ParserFound as found:
            (parser,) = found.args
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def finished_run(home: Path) -> dict[Path, bytes]:
    """The files of the finished run and of its model."""
    folders = home / "models" / "nlg_ppo", home / "data_results" / "K2_lr_1e-3_seed0"
    return {path.relative_to(home): path.read_bytes() for folder in folders for path in sorted(folder.iterdir())}


def prepare(home: Path) -> None:
    """Write all models, a finished run, and a checkpoint of an unfinished one."""
    small_project(home)
    for script, out in (("train_nlg", "models/nlg"), ("train_cls", "models/cls"), ("finetuning_nlg", "models/nlg_ppo")):
        child = start(script, home, [*SCRIPTS[script], "--out", out], lambda: None)
        assert ended(child) == 0, output(home)

    def stop_after_one_update() -> None:
        update = ppo.update

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return update(*args, **kwargs)

        ppo.update = interrupted

    child = start("finetuning_nlg", home, SCRIPTS["finetuning_nlg"], stop_after_one_update)
    assert ended(child) == 128 + signal.SIGTERM, output(home)
    (home / "models" / "nlg_ppo.checkpoint").rename(home / "valid.checkpoint")


def output(home: Path) -> str:
    return (home / "output.txt").read_text(encoding="utf-8", errors="replace")


def run_case(script: str, home: Path, flags: list[str], to_its_end: bool, limit: float) -> tuple[int | None, float]:
    """The exit code of a case, None if it took longer than `limit` seconds; and its seconds."""
    start_time = time.perf_counter()
    child = start(script, home, flags, (lambda: None) if to_its_end else stop_where_training_begins)
    while time.perf_counter() - start_time < limit:
        has_ended, status = os.waitpid(child, os.WNOHANG)
        if has_ended:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - start_time
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    ended(child)
    return None, time.perf_counter() - start_time


def defect(code: int | None, text: str, seconds: float) -> str | None:
    """What is wrong with the way a case ended."""
    if code is None:
        return f"took {seconds:.0f} s"
    if "Traceback" in text:
        return "a traceback"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and ("step/s" in text or "update/s" in text):
        return "refused after training began"
    if code == 2 and not (text.startswith("error: ") and len(text.splitlines()) == 1):
        return "not one line"
    return None


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--cases", type=cli.COUNT, default=1000, help="number of cases")
    parser.add_argument("--first", type=cli.number(int, 0), default=0, help="number of the first, to repeat one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cases")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the cases")
    parser.add_argument("--limit", type=cli.POSITIVE, default=60, help="seconds that a case may take")
    parser.add_argument("--out", default="data_results/fuzz.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for script in SCRIPTS:
        importlib.import_module(script)  # once, before the forks
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        template, home = Path(folder) / "template", Path(folder) / "case"
        prepare(template)
        before = finished_run(template)
        for number in range(args.first, args.first + args.cases):
            rng = random.Random(f"{args.seed} {number}")
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(template, home)
            kind = rng.choices(args.kinds, [KINDS[name][1] for name in args.kinds])[0]
            script, flags = KINDS[kind][0](rng, home)
            to_its_end = number % 10 == 0 and kind != "flag"  # a flag can ask for a long run
            code, seconds = run_case(script, home, [*SCRIPTS[script], *flags], to_its_end, args.limit)
            wrong = defect(code, output(home), seconds)
            if not wrong and code == 2 and finished_run(home) != before:
                wrong = "the finished run was changed"
            counts[f"{kind}: " + ("refused" if code == 2 else "accepted")] += 1
            if wrong:
                failures.append({"case": number, "kind": kind, "wrong": wrong, "script": script, "flags": flags})
                print(json.dumps(failures[-1])[:300], output(home)[-1500:], sep="\n", flush=True)
    record = runtime.provenance(torch.device("cpu")) | {"cases": args.cases, "failures": failures}
    runtime.write_json(Path(args.out), record | {"counts": dict(sorted(counts.items()))})
    print(f"{args.cases} cases, {len(failures)} failures: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
