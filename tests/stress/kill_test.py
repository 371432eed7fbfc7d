"""Runs that are killed at random moments, and resumed until they are done, must end as one that never was.

    python -m tests.stress.kill_test           # 12 runs of each of the three scripts, on a few rows of the shipped data

Every run is killed with SIGKILL one to three times, every second time as soon as a checkpoint is being written.
Weights, optimiser state, random states, log.csv (but for its timings) and samples.csv must be the same, bit by bit.
"""

import argparse
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf import cli, runtime

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = {
    "train_nlg": "--epochs 1 --samples 8",
    "train_cls": "--epochs 1 --lm-epochs 1",
    "finetuning_nlg": "--episodes 128 --batch-size 16 --minibatches 2 --reference-samples 32 --target-kl 1",
}
FILES = (
    ("data_cls", "train.csv", 201),
    ("data_cls", "test.csv", 101),
    ("data_nlg", "train.txt", 200),
    ("data_nlg", "valid.txt", 200),
)


def small_project(home: Path) -> None:
    """The first rows of the shipped data."""
    for folder, name, rows in FILES:
        (home / folder).mkdir(parents=True, exist_ok=True)
        lines = (ROOT / folder / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (home / folder / name).write_text("".join(lines), encoding="utf-8")
    shutil.copy(ROOT / "data_cls" / "scenarios.py", home / "data_cls")


def start(script: str, home: Path, flags: list[str], change: Callable[[], None]) -> int:
    """A process that runs a script in `home` after a change to what it imports; returns its number.

    It is a fork of this one, which spares the imports. What it says is in output.txt.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(home)
        said = os.open(home / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)  # threads do not survive a fork
        sys.argv = [f"{script}.py", *flags]
        change()
        cli.run(importlib.import_module(script).main)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException:  # whatever it is, the child must not go on as its parent
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def keep_the_last_checkpoint() -> None:
    """For comparison; a run that is done removes it."""
    unlink = Path.unlink

    def rename(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".checkpoint":
            path.rename(path.with_suffix(".last"))
        else:
            unlink(path, missing_ok)

    Path.unlink = rename


def ended(child: int) -> int:
    """Waits for a process; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, after: float, home: Path, while_saving: bool) -> bool:
    """Kills a process after so many seconds, or at the next checkpoint being written; False if it was done before."""
    moment = time.perf_counter() + after
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert status == 0, (home / "output.txt").read_text(encoding="utf-8")[-2000:]
            return False
        due = time.perf_counter() > moment
        if due and (not while_saving or any((home / "models").glob("*.checkpoint.new"))):
            os.kill(child, signal.SIGKILL)
            ended(child)
            return True
        time.sleep(0.001)


def outcome(home: Path, out: str) -> dict:
    """All that must be the same."""
    state = torch.load(home / f"{out}.last", weights_only=True)
    row = state.get("run", {}).get("row", {})
    for name in [name for name in row if name.startswith("seconds_") or name == "episodes_per_second"]:
        del row[name]
    state.pop("settings"), state.pop("sizes", None)
    found = {"weights": (home / out / "model.safetensors").read_bytes(), "checkpoint": state}
    for path in sorted((home / "data_results").glob("*/*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found[path.name] = [
            {k: v for k, v in r.items() if not k.startswith("seconds_") and k != "episodes_per_second"} for r in rows
        ]
    return found


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # NaN is itself here


def kill_test(script: str, runs: int, home: Path, chance: random.Random) -> dict:
    """`runs` killed runs of a script against one that was left alone; `home` has the data and the models it needs."""
    out = {"train_nlg": "models/nlg", "train_cls": "models/cls", "finetuning_nlg": "models/nlg_ppo"}[script]
    flags = [*SCRIPTS[script].split(), "--save-every", "1", "--resume"]
    began = time.perf_counter()
    assert ended(start(script, home, flags, keep_the_last_checkpoint)) == 0, (home / "output.txt").read_text(
        encoding="utf-8"
    )[-2000:]
    seconds, wanted = time.perf_counter() - began, outcome(home, out)
    identical, kills, while_saving = 0, [], 0
    while len(kills) < runs:
        shutil.rmtree(home / out)
        shutil.rmtree(home / "data_results", ignore_errors=True)
        (home / f"{out}.last").unlink()
        count = 0
        for _ in range(chance.randint(1, 3)):
            saving = (len(kills) + count) % 2 == 0
            if not killed(
                start(script, home, flags, keep_the_last_checkpoint), chance.uniform(0.05, 0.7) * seconds, home, saving
            ):
                break
            count += 1
            while_saving += saving
        if not (home / f"{out}.last").exists():
            assert ended(start(script, home, flags, keep_the_last_checkpoint)) == 0, (home / "output.txt").read_text(
                encoding="utf-8"
            )[-2000:]
        if count:  # otherwise it was done before its moment came
            kills.append(count)
            identical += same(wanted, outcome(home, out))
    return {
        "killed_runs": runs,
        "identical": identical,
        "kills": sum(kills),
        "kills_while_a_checkpoint_was_written": while_saving,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12, help="of each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="benchmarks/kill_test.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        small_project(Path(folder))
        found = {script: kill_test(script, args.runs, Path(folder), chance) for script in SCRIPTS}
    record = runtime.provenance(torch.device("cpu")) | {"scripts": found}
    runtime.write_json(Path(args.out), record)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    for name in SCRIPTS:
        importlib.import_module(name)
    main()
