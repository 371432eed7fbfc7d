"""Speed on a quiet machine and beside one busy process, with what the project does about it and without.

    python -m benchmarks.busy            # after make; half an hour on two cores; writes benchmarks/busy.json

OpenMP's threads may spin for a bounded time (rlhf/environment.py), and their number follows what other programs leave
(rlhf/threads.py). Generator training in steps a second, PPO and the evaluation in responses a second, each as the
median of some runs of the scripts. All other processes should rest meanwhile.
"""

import contextlib
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from experiments import commands
from rlhf import cli, environment, runtime

ROOT = Path(__file__).resolve().parents[1]
BUSY = "while True: pass"
TEXTS, BATCH = 3200, 32


@contextlib.contextmanager
def neighbour(is_busy: bool) -> Iterator[None]:
    """One process that does nothing as fast as it can, if asked for."""
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if is_busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def script(variables: dict[str, str], *command: str) -> str:
    """Run a script with these of OpenMP's variables, and return its progress bars."""
    others = {name: x for name, x in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=others | variables, capture_output=True, text=True, check=True
    )
    return done.stderr


def rates(variables: dict[str, str], folder: Path) -> dict[str, float]:
    """Steps, responses and responses a second of training, PPO and the evaluation."""
    out = ["--out", str(folder / "out"), "--results", str(folder)]
    bars = script(
        variables, "train_nlg.py", "--data", str(folder / "texts.txt"), "--epochs", "1", "--samples", "1", *out
    )
    steps = [float(x) for x in re.findall(r"([\d.]+)step/s", bars)]
    script(variables, "finetuning_nlg.py", "--episodes", "5120", "--reference-samples", "256", "--run", "run", *out)
    updates = pd.read_csv(folder / "run" / "log.csv").episodes_per_second[2:]
    start = time.perf_counter()
    few = ["--queries", "16", "--samples", "8", "--reference-samples", "256"]
    script(variables, "evaluate_nlg.py", "--run", str(folder / "run"), *few)
    responses = 16 * (256 + 2 * 8)
    return {
        "training": steps[-1],
        "ppo": statistics.harmonic_mean(updates),
        "evaluation": responses / (time.perf_counter() - start),
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=cli.COUNT, default=3, help="runs of each, in turn")
    parser.add_argument("--out", default="benchmarks/busy.json", help="file to write")
    args = parser.parse_args()
    all_threads = {"OMP_NUM_THREADS": str(commands.cores())}
    bounded = {"GOMP_SPINCOUNT": str(environment.SPIN_COUNT)}
    variants = {"OpenMP's own": all_threads, "bounded spinning": all_threads | bounded, "number follows too": {}}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = (ROOT / "data_nlg" / "train.txt").read_text(encoding="utf-8").splitlines()
        (Path(folder) / "texts.txt").write_text("\n".join(lines[:TEXTS]), encoding="utf-8")
        for repeat, (name, variables), is_busy in itertools.product(
            range(args.repeats), variants.items(), (False, True)
        ):
            with neighbour(is_busy):
                found = rates(variables, Path(folder))
            measured.setdefault((name, is_busy), []).append(found)
            print(repeat, name, "busy" if is_busy else "quiet", found, flush=True)
    rows = [
        {"threads": name, "neighbour": is_busy}
        | {rate: statistics.median(run[rate] for run in runs) for rate in runs[0]}
        for (name, is_busy), runs in measured.items()
    ]
    runtime.write_json(
        Path(args.out), runtime.provenance(torch.device("cpu")) | {"repeats": args.repeats, "rates": rows}
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.1f"))


if __name__ == "__main__":
    cli.run(main)
