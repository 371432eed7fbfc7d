"""Runs that are killed at random moments and resumed must end like a run that was not killed.

    python -m tests.stress.kill_test           # 12 runs of each of the three scripts, on a few rows of the shipped data

Every run is killed with SIGKILL one to three times, every second time while a checkpoint is written. Weights, optimizer
states, random states, log.csv (but for its timings) and samples.csv must be the same, bit by bit. Writes
data_results/kill_test.json.
"""

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
OUT = {"train_nlg": "models/nlg", "train_cls": "models/cls", "finetuning_nlg": "models/nlg_ppo"}
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
    """Write the first rows of the shipped data to `home`."""
    for folder, name, rows in FILES:
        (home / folder).mkdir(parents=True, exist_ok=True)
        lines = (ROOT / folder / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (home / folder / name).write_text("".join(lines), encoding="utf-8")
    shutil.copy(ROOT / "data_cls" / "scenarios.py", home / "data_cls")


def start(script: str, home: Path, flags: list[str], change: Callable[[], None]) -> int:
    """Start a process that calls `change`, which may patch modules, and runs a script in `home`. Returns its id.

    It is a fork of this one, which spares the imports. Its output is in output.txt.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(home)
        output = os.open(home / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)  # threads do not survive a fork
        sys.argv = [f"{script}.py", *flags]
        change()
        cli.run(importlib.import_module(script).main)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException:  # of any kind: the child must not go on with the code of its parent
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def keep_last_checkpoint() -> None:
    """Keep the checkpoint of a run that is done, as OUT.last, for comparison."""
    unlink = Path.unlink

    def rename(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".checkpoint":
            path.rename(path.with_suffix(".last"))
        else:
            unlink(path, missing_ok)

    Path.unlink = rename


def ended(child: int) -> int:
    """Wait for a process. Returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, after: float, home: Path, while_saving: bool) -> bool:
    """Kill a process after so many seconds, or when it then writes a checkpoint. False if it was done before."""
    kill_time = time.perf_counter() + after
    while True:
        has_ended, status = os.waitpid(child, os.WNOHANG)
        if has_ended:
            assert status == 0, output_tail(home)
            return False
        is_due = time.perf_counter() > kill_time
        if is_due and (not while_saving or any((home / "models").glob("*.checkpoint.new"))):
            os.kill(child, signal.SIGKILL)
            ended(child)
            return True
        time.sleep(0.001)


def output_tail(home: Path) -> str:
    return (home / "output.txt").read_text(encoding="utf-8")[-2000:]


def outcome(home: Path, out: str) -> dict:
    """Everything that must be the same after every run: weights, the last training state, the run folder's rows."""
    checkpoint = torch.load(home / f"{out}.last", weights_only=True)
    state = checkpoint["state"]
    if "log" in state:
        del state["log"]["sizes"]  # in bytes; timings are not equally long
        state["log"]["last_row"] = without_timings(state["log"]["last_row"])
    results = {"weights": (home / out / "model.safetensors").read_bytes(), "state": state, "stage": checkpoint["stage"]}
    for path in sorted((home / "data_results").glob("*/*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            results[path.name] = [without_timings(row) for row in csv.DictReader(file)]
    return results


def without_timings(row: dict) -> dict:
    return {
        name: value for name, value in row.items() if not name.startswith("seconds_") and name != "episodes_per_second"
    }


def same(one, other) -> bool:
    """Whether two nested values are equal, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # NaN equals NaN in this comparison


def kill_test(script: str, runs: int, home: Path, rng: random.Random) -> dict[str, int]:
    """Compare killed runs of a script with one that is not killed. `home` has the data and the models it needs."""
    out = OUT[script]
    flags = [*SCRIPTS[script].split(), "--save-every", "1", "--resume"]

    def start_run() -> int:
        return start(script, home, flags, keep_last_checkpoint)

    start_time = time.perf_counter()
    assert ended(start_run()) == 0, output_tail(home)
    seconds, baseline = time.perf_counter() - start_time, outcome(home, out)
    identical, kills, kills_while_saving = 0, [], 0
    while len(kills) < runs:
        shutil.rmtree(home / out)
        shutil.rmtree(home / "data_results", ignore_errors=True)
        (home / f"{out}.last").unlink()
        count = 0
        for _ in range(rng.randint(1, 3)):
            while_saving = (len(kills) + count) % 2 == 0
            if not killed(start_run(), rng.uniform(0.05, 0.7) * seconds, home, while_saving):
                break
            count += 1
            kills_while_saving += while_saving
        if not (home / f"{out}.last").exists():
            assert ended(start_run()) == 0, output_tail(home)
        if count:  # a run that was done before its first kill does not count
            kills.append(count)
            identical += same(baseline, outcome(home, out))
    return {
        "killed_runs": runs,
        "identical": identical,
        "kills": sum(kills),
        "kills_while_a_checkpoint_was_written": kills_while_saving,
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs", type=cli.COUNT, default=12, help="killed runs of each script")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the moments of the kills")
    parser.add_argument("--out", default="data_results/kill_test.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        small_project(Path(folder))
        results = {script: kill_test(script, args.runs, Path(folder), rng) for script in SCRIPTS}
    record = runtime.provenance(torch.device("cpu")) | {"scripts": results}
    runtime.write_json(Path(args.out), record)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    for name in SCRIPTS:
        importlib.import_module(name)  # once, before the forks
    main()
