"""The same updates in float32 and in bfloat16: do they differ by more than seeds do?

    python -m experiments.precision_check --policy FOLDER --reward FOLDER

Eight updates with each of some seeds in each precision; prints the means of score, KL and approx_kl over the last four,
and writes benchmarks/precision.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from rlhf import runtime

ROOT = Path(__file__).resolve().parents[1]

NUMBERS = ["score", "kl", "approx_kl", "entropy", "ratio_deviation_first", "episodes_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="models/nlg")
    parser.add_argument("--reward", default="models/cls")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--flags", default="", help="more flags of finetuning_nlg.py, in one string")
    parser.add_argument("--out", default="benchmarks/precision.json", help="file to write")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for seed in range(args.seeds):
            for precision in ("float32", "bfloat16"):
                flags = f"--policy {args.policy} --reward {args.reward} --precision {precision} --seed {seed}"
                flags += f" --out {home}/out --results {home}/results --run run {args.flags}"
                command = [sys.executable, str(ROOT / "finetuning_nlg.py"), *flags.split()]
                subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
                log = pd.read_csv(Path(home) / "results" / "run" / "log.csv")
                rows.append({"seed": seed, "precision": precision} | log[NUMBERS].tail(4).mean().to_dict())
                print(json.dumps(rows[-1]), flush=True)
    table = pd.DataFrame(rows).set_index(["precision", "seed"]).sort_index()
    print(table.to_string(float_format="%.4f"))
    print(table.groupby("precision").agg(["mean", "std"]).T.to_string(float_format="%.4f"))
    runtime.write_json(Path(args.out), runtime.provenance(torch.device("cpu")) | {"runs": rows})


if __name__ == "__main__":
    main()
