"""The same updates in float32 and in bfloat16: do they differ by more than seeds do?

    python -m experiments.precision_check --policy FOLDER --reward FOLDER

Runs finetuning_nlg.py with every seed in each precision. Prints means over the last four updates, and writes them to
data_results/precision.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from rlhf import cli, runtime
from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["score", "kl", "approx_kl", "entropy", "ratio_deviation_first", "episodes_per_second"]  # of log.csv
UPDATES = 4  # over which the means are


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--policy", default="models/nlg", help="as in finetuning_nlg.py")
    parser.add_argument("--reward", default="models/cls", help="as in finetuning_nlg.py")
    parser.add_argument("--seeds", type=cli.COUNT, default=3, help="number of seeds: 0, 1, ...")
    parser.add_argument("--flags", default="", help="more flags of finetuning_nlg.py, in one string")
    parser.add_argument("--out", default="data_results/precision.json", help="file to write")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for seed in range(args.seeds):
            for precision in ("float32", "bfloat16"):
                flags = f"--policy {args.policy} --reward {args.reward} --precision {precision} --seed {seed}"
                flags += f" --out {home}/out --results {home}/results --run run {args.flags}"
                command = [sys.executable, str(ROOT / "finetuning_nlg.py"), *flags.split()]
                if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                    raise UserError("finetuning_nlg.py failed; it says why above")
                log = pd.read_csv(Path(home) / "results" / "run" / "log.csv")
                rows.append({"seed": seed, "precision": precision} | log[COLUMNS].tail(UPDATES).mean().to_dict())
                print(json.dumps(rows[-1]), flush=True)
    table = pd.DataFrame(rows).set_index(["precision", "seed"]).sort_index()
    print(table.to_string(float_format="%.4f"))
    print(table.groupby("precision").agg(["mean", "std"]).T.to_string(float_format="%.4f"))
    runtime.write_json(Path(args.out), runtime.provenance(torch.device("cpu")) | {"runs": rows})


if __name__ == "__main__":
    cli.run(main)
