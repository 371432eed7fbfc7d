"""Grids of PPO runs: each switch against the default, several seeds each.

    python study.py ablations                # every variant with seeds 0, 1, 2; what is finished is not run again
    python study.py overoptimisation         # runs that go too far on purpose

Runs are folders data_results/<grid>/<variant>_seed<seed>; the table of their ends is data_results/<grid>.csv.
The models of train_nlg.py and train_cls.py must be in models/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

import common
import figures
from common import COUNT, UserError

GRIDS = {
    # half the episodes of a default run, so that the grid is done in an hour or two on a laptop
    "ablations": {
        "default": "",
        "adam_lr_5e-4": "--optimizer adam --lr 5e-4",
        "sampled_kl": "--kl sampled",
        "whitened_rewards": "--whiten-rewards",
        "lambda_0.95": "--gae-lambda 0.95",
        "separate_value": "--separate-value",
        "K2": "--ppo-epochs 2",
        "K4": "--ppo-epochs 4",
        "minibatches_1": "--minibatches 1",
        "lr_2e-3": "--lr 2e-3",
        "batch_512": "--batch-size 512",
        "kl_coef_0.1": "--kl-coef 0.1",
        "adaptive_kl": "--kl-coef 1 --target-kl 1 --kl-horizon 2560",
    },
    "overoptimisation": {
        "kl_coef_0": "--kl-coef 0",
        "kl_coef_0.02": "--kl-coef 0.02",
        "kl_coef_0.05": "--kl-coef 0.05",
        "kl_coef_0.1": "--kl-coef 0.1",
        "kl_coef_0.2": "--kl-coef 0.2",
        "kl_coef_0.5": "--kl-coef 0.5",
    },
}
EPISODES = {"ablations": 10_240, "overoptimisation": 20_480}


def parse_args() -> argparse.Namespace:
    parser = common.Parser(__doc__)
    parser.add_argument("grid", choices=GRIDS, help="which grid")
    parser.add_argument("--only", nargs="+", help="variants of it (default: all)")
    parser.add_argument("--seeds", type=COUNT, default=3, help="seeds 0, 1, ... of every variant")
    parser.add_argument("--episodes", type=COUNT, help="responses in a run (default: 10240; overoptimisation: 20480)")
    args = parser.parse_args()
    if unknown := sorted(set(args.only or ()) - set(GRIDS[args.grid])):
        raise UserError(f"--only: {args.grid} has no variant {unknown[0]!r}, only {', '.join(GRIDS[args.grid])}")
    return args


def call(script: str, *flags: str | Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise UserError(f"{script} failed; call study.py again to go on from there")


def main() -> None:
    args = parse_args()
    results = Path("data_results") / args.grid
    variants = {name: GRIDS[args.grid][name] for name in args.only or GRIDS[args.grid]}
    episodes = str(args.episodes or EPISODES[args.grid])
    runs = {f"{name}_seed{seed}": (flags, seed) for seed in range(args.seeds) for name, flags in variants.items()}
    for run, (flags, seed) in runs.items():
        out = Path("models") / args.grid / run
        if not out.exists():  # it comes last
            where = ["--results", results, "--run", run, "--out", out]
            call("finetuning_nlg.py", *where, "--episodes", episodes, "--seed", str(seed), "--resume", *flags.split())
    if new := [results / run for run in runs if not (results / run / "evaluation.json").exists()]:
        call("evaluate_nlg.py", "--run", *new)
    table = pd.DataFrame([row_of(folder) for folder in sorted(results.glob("*_seed*"))])
    table.round(4).to_csv(results.with_suffix(".csv"), index=False, lineterminator="\n")
    print(table.groupby("variant").mean(numeric_only=True).drop(columns="seed").to_string(float_format="%.3f"))
    print(f"table: {results.with_suffix('.csv')}")
    if args.grid == "overoptimisation":
        print(f"figure: {figures.save_overoptimisation(results)}")


def row_of(folder: Path) -> dict:
    """The end of a run."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    variant, _, seed = folder.name.rpartition("_seed")
    log = pd.read_csv(folder / "log.csv")
    return {
        "variant": variant,
        "seed": int(seed),
        "fraction_of_optimum": evaluation["fraction_of_optimum"],
        "score": evaluation["score_after"],
        "kl": evaluation["kl"],
        "ethics": evaluation["ethics_after"],
        "gold_ethical": evaluation["gold"]["ethical_after"],
        "gold_valid": evaluation["gold"]["valid_after"],
        "entropy": evaluation["diversity"]["after"]["entropy"],
        "minutes": log[["seconds_rollout", "seconds_score", "seconds_update"]].to_numpy().sum() / 60,
    }


if __name__ == "__main__":
    common.run(main)
