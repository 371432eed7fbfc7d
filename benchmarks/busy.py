"""Speed on a quiet machine and beside one busy process, by how long OpenMP's threads may spin (rlhf/environment.py).

    python -m benchmarks.busy            # after make; a quarter of an hour on two cores; writes benchmarks/busy.json

Generator training in steps a second, PPO in responses a second, the evaluation in responses a second, each as the
median of some runs of the scripts. All other processes should rest meanwhile.
"""

import contextlib
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


def script(spin_count: str, *command: str) -> str:
    """Run a script with this spin count ("unset": OpenMP's own), and return its progress bars."""
    variables = {name: x for name, x in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    variables |= {"OMP_DYNAMIC": "false"} if spin_count == "unset" else {"GOMP_SPINCOUNT": spin_count}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return done.stderr


def rates(spin_count: str, folder: Path) -> dict[str, float]:
    """Steps, responses and responses a second of training, PPO and the evaluation."""
    out = ["--out", str(folder / "out"), "--results", str(folder)]
    bars = script(
        spin_count, "train_nlg.py", "--data", str(folder / "texts.txt"), "--epochs", "1", "--samples", "1", *out
    )
    steps = [float(x) for x in re.findall(r"([\d.]+)step/s", bars)]
    script(spin_count, "finetuning_nlg.py", "--episodes", "1536", "--reference-samples", "256", "--run", "run", *out)
    updates = pd.read_csv(folder / "run" / "log.csv").episodes_per_second[2:]
    start = time.perf_counter()
    few = ["--queries", "16", "--samples", "8", "--reference-samples", "256"]
    script(spin_count, "evaluate_nlg.py", "--run", str(folder / "run"), *few)
    responses = 16 * (256 + 2 * 8)
    return {
        "training": steps[-1],
        "ppo": float(updates.median()),
        "evaluation": responses / (time.perf_counter() - start),
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--spin-counts", nargs="+", default=["unset", "1000", str(environment.SPIN_COUNT), "20000"])
    parser.add_argument("--repeats", type=cli.COUNT, default=3, help="runs of each, in turn")
    parser.add_argument("--out", default="benchmarks/busy.json", help="file to write")
    args = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = (ROOT / "data_nlg" / "train.txt").read_text(encoding="utf-8").splitlines()
        (Path(folder) / "texts.txt").write_text("\n".join(lines[:TEXTS]), encoding="utf-8")
        for repeat in range(args.repeats):
            for spin_count in args.spin_counts:
                for is_busy in (False, True):
                    with neighbour(is_busy):
                        found = rates(spin_count, Path(folder))
                    measured.setdefault((spin_count, is_busy), []).append(found)
                    print(repeat, spin_count, "busy" if is_busy else "quiet", found, flush=True)
    rows = []
    for (spin_count, is_busy), runs in measured.items():
        medians = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        rows.append({"spin_count": spin_count, "neighbour": is_busy, **medians})
    runtime.write_json(Path(args.out), runtime.provenance(torch.device("cpu")) | {"rates": rows})
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.1f"))


if __name__ == "__main__":
    cli.run(main)
