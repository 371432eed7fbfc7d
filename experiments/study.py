"""Grids of PPO runs: each switch against the default, several seeds each.

    python -m experiments.study ablations              # every variant with seeds 0 to 2; finished runs stay
    python -m experiments.study overoptimisation       # runs that go too far on purpose
    python -m experiments.study rewards                # the same with classifiers of fewer labelled texts
    python -m experiments.study labels                 # what so many answers of simulated people are worth
    python -m experiments.study stability --seeds 5    # PPO epochs and learning rates, from idle to broken
    python -m experiments.study details                # one detail of PPO wrong
    python -m experiments.study models                 # generators of other sizes and architectures
    python -m experiments.study data                   # sentiment and ethics, from the files of --source
    python -m experiments.study ablations --cluster slurm --partition gpu

Runs are folders data_results/<grid>/<variant>_seed<seed>; the table of their ends is data_results/<grid>.csv, where
failed runs are said to have failed. The models of train_nlg.py and train_cls.py must be in models/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import submitit
import torch
from tqdm import tqdm

from experiments.grids import GRIDS
from rlhf import cli, frontier, plots
from rlhf.cli import COUNT
from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

FAILED = "failed.txt"  # in a run folder: what the run said last


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("grid", choices=GRIDS, help="which grid")
    parser.add_argument("--only", nargs="+", help="variants of it (default: all)")
    parser.add_argument("--seeds", type=COUNT, default=3, help="seeds 0, 1, ... of every variant")
    parser.add_argument("--episodes", type=COUNT, help="responses in a run (default: the grid's own)")
    parser.add_argument("--source", default="../shared/data", help="folder of the files that the grid `data` reads")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="where the runs go")
    parser.add_argument("--partition", help="of the SLURM cluster")
    parser.add_argument("--at-once", type=COUNT, help="runs at the same time (default: one a GPU, or one a core)")
    args = parser.parse_args()
    if unknown := sorted(set(args.only or ()) - set(GRIDS[args.grid].variants)):
        known = ", ".join(GRIDS[args.grid].variants)
        raise UserError(f"--only: {args.grid} has no variant {unknown[0]!r}, only {known}")
    return args


def main() -> None:
    args = parse_args()
    results, grid = Path("data_results") / args.grid, GRIDS[args.grid]
    waiting = {}
    for seed in range(args.seeds):
        for name in args.only or grid.variants:
            run = f"{name}_seed{seed}"
            out, failed = Path("models") / args.grid / run, results / run / FAILED
            if args.retry:
                failed.unlink(missing_ok=True)
            if not out.exists() and not failed.exists():  # the model comes last
                where = f"--results {results} --run {run} --out {out} --episodes {args.episodes or grid.episodes}"
                last = f"{grid.script} {grid.variants[name]} {where} --seed {seed} --resume"
                names = {"run": run, "seed": seed, "source": args.source}
                waiting[run] = [
                    [word.format(**names) for word in command.split()] for command in (*grid.before(name), last)
                ]
    run_all(args, waiting, results)

    finished = [folder for folder in sorted(results.glob("*_seed*")) if not (folder / FAILED).exists()]
    if new := [folder for folder in finished if not (folder / "evaluation.json").exists()]:
        for group in groups(new):
            flags = grid.evaluation.format(run=group[0].name).split()
            command = [sys.executable, ROOT / "evaluate_nlg.py", *flags, "--run", *group]
            if subprocess.run(command).returncode:
                raise UserError("evaluate_nlg.py failed; call study.py again to go on from there")
    table = pd.DataFrame([row_of(folder) for folder in sorted(results.glob("*_seed*"))])
    table.round(4).to_csv(results.with_suffix(".csv"), index=False, lineterminator="\n")
    print(frontier.summary(table).to_string(float_format="%.3f"))
    print(f"table: {results.with_suffix('.csv')}")
    print(f"figure: {getattr(plots, f'save_{args.grid}')(results)}")


def visible_gpus() -> list[str]:
    """The names of the GPUs that the study may use: all, or those that the user made visible."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if chosen is None else [x for x in chosen.split(",") if x]


def run_all(args: argparse.Namespace, waiting: dict[str, list[list[str]]], results: Path) -> None:
    """Runs what is waiting, so many at a time; a run that fails says why in its folder."""
    executor = submitit.AutoExecutor(Path("models") / args.grid / "jobs", cluster=args.cluster)
    gpus = visible_gpus()
    places = list(range(args.at_once or len(gpus) or os.cpu_count()))
    threads = max(1, os.cpu_count() // len(places))
    executor.update_parameters(timeout_min=24 * 60, cpus_per_task=threads)
    if args.cluster == "slurm":
        executor.update_parameters(slurm_partition=args.partition, slurm_gpus_per_node=1 if gpus else 0)
    running, waiting = {}, dict(waiting)
    bar = tqdm(total=len(waiting), desc=args.grid, unit="run", dynamic_ncols=True)
    while waiting or running:
        while waiting and places:
            run, place = next(iter(waiting)), places.pop()
            own = {"OMP_NUM_THREADS": str(threads)}
            if gpus and args.cluster == "local":
                own["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
            running[run] = executor.submit(run_one, waiting.pop(run), own), place
        for run in [run for run, (job, _) in running.items() if job.done()]:
            job, place = running.pop(run)
            said = job.result() if job.state != "FAILED" else f"the job failed: {job.stderr()}"
            if said:
                (results / run).mkdir(parents=True, exist_ok=True)
                (results / run / FAILED).write_text(said.strip().splitlines()[-1] + "\n", encoding="utf-8")
                bar.write(f"{run} failed: see {results / run / FAILED}")
            places.append(place)
            bar.update()
        time.sleep(0.2)
    bar.close()


def run_one(commands: list[list[str]], own: dict[str, str]) -> str:
    """In a job: one run with environment variables of its own. Returns nothing, or what it said when it failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | own  # with the path for `python -m`
    for script, *flags in commands:
        if Path(flags[flags.index("--out") + 1]).exists():  # made before; every script writes it last
            continue
        program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
        command = [sys.executable, *program, *flags]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            return done.stderr or f"exit code {done.returncode}"
    return ""


def groups(folders: list[Path]) -> list[list[Path]]:
    """Runs that evaluate_nlg.py takes together, as they share reference and reward; people's answers make one alone."""
    alike = {}
    for folder in folders:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
        own = str(folder) if "human" in settings["reward"] else ""
        alike.setdefault((settings["policy"], *settings["reward"], own), []).append(folder)
    return list(alike.values())


def collapse(log: pd.DataFrame, evaluation: dict) -> str:
    """Why a finished run counts as broken, or nothing. Written down before any run of the stability grid."""
    entropy = {when: found["entropy"] for when, found in evaluation["diversity"].items()}
    gain, valid = log.improvement_ma, evaluation["gold"]["valid_after"]
    reasons = {
        "KL above 20 nats": evaluation["kl"] > 20,
        "fewer than half of the texts valid": valid is not None and valid < 0.5,
        "entropy under a tenth of the reference's": entropy["after"] < 0.1 * entropy["before"],
        "more than half of the gain lost by the end": gain.max() > 0.05 and gain.iloc[-1] < 0.5 * gain.max(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def row_of(folder: Path) -> dict:
    """The end of a run."""
    variant, _, seed = folder.name.rpartition("_seed")
    row = {"variant": variant, "seed": int(seed)}
    if (folder / FAILED).exists():
        return row | {"broken": (folder / FAILED).read_text(encoding="utf-8").strip()}
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    known = evaluation["kl"] <= evaluation["trusted_up_to_kl"]
    log = pd.read_csv(folder / "log.csv")
    return row | {
        "broken": collapse(log, evaluation),
        "fraction_of_optimum": evaluation["fraction_of_optimum"] if known else None,
        "score": evaluation["score_after"],
        "kl": evaluation["kl"],
        "ethics": evaluation["ethics_after"],
        "gold_ethical": evaluation["gold"]["ethical_after"],
        "gold_valid": evaluation["gold"]["valid_after"],
        "entropy": evaluation["diversity"]["after"]["entropy"],
        "minutes": log[["seconds_rollout", "seconds_score", "seconds_update"]].to_numpy().sum() / 60,
    }


if __name__ == "__main__":
    cli.run(main)
