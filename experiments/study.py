"""Grids of PPO runs: each setting against the default, several seeds each.

    python -m experiments.study ablations              # every variant with seeds 0 to 2; skips finished runs
    python -m experiments.study overoptimisation       # KL coefficients so low that runs go too far
    python -m experiments.study rewards                # classifiers trained on fewer labelled texts
    python -m experiments.study labels                 # reward models that learn from simulated people's answers
    python -m experiments.study stability --seeds 5    # PPO epochs and learning rates, up to those that break a run
    python -m experiments.study details                # one detail of PPO wrong
    python -m experiments.study models                 # generators of other sizes and architectures
    python -m experiments.study query_kl               # the KL penalty inside queries, with all the episodes
    python -m experiments.study critic                 # the critic first, and with a learning rate of its own
    python -m experiments.study beyond                 # best-of-n distilled and reward-weighted fine-tuning, no PPO
    python -m experiments.study start                  # PPO with half of the texts, from those policies
    python -m experiments.study recipe --seeds 1       # settings for pretrained models
    python -m experiments.study stability_reviews --seeds 2    # K and learning rates for them; stability_adapters: LoRA
    python -m experiments.study reviews --seeds 1      # ... and with few labels, no KL penalty, or people's answers
    python -m experiments.study data                   # sentiment and ethics, from the hub, or files of --source
    python -m experiments.study ablations --cluster slurm --partition gpu

A run's folder is data_results/<grid>/<variant>_seed<seed>. The results of all runs, failed ones included, are in
data_results/<grid>.csv. The models of train_nlg.py and train_cls.py must be in models/.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import pandas as pd
import submitit
import torch
from submitit.core.utils import FailedJobError, UncompletedJobError
from tqdm import tqdm

from experiments import grid_plots
from experiments.commands import cores, is_done, start
from experiments.grids import GRIDS
from rlhf import cli, environment, frontier, seeds
from rlhf.cli import COUNT
from rlhf.errors import UserError

FAILED = "failed.txt"  # in the folder of a run that failed: the reason, in one line


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("grid", choices=GRIDS, help="the grid to run")
    parser.add_argument("--only", nargs="+", help="variants to run (default: all)")
    parser.add_argument("--seeds", type=COUNT, default=3, help="number of seeds of every variant: 0, 1, ...")
    parser.add_argument("--episodes", type=COUNT, help="responses in a run (default: as the grid says)")
    parser.add_argument("--source", default="hub", help="of the grid `data`: a folder of downloaded files, or hub")
    parser.add_argument("--retry", action="store_true", help="run failed runs again, too")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="where to run")
    parser.add_argument("--partition", help="partition of the SLURM cluster")
    parser.add_argument("--at-once", type=COUNT, help="runs at the same time (default: one per GPU, or one per core)")
    args = parser.parse_args()
    if unknown := sorted(set(args.only or ()) - set(GRIDS[args.grid].variants)):
        known = ", ".join(GRIDS[args.grid].variants)
        raise UserError(f"--only: {args.grid} has no variant {unknown[0]!r}, only {known}")
    return args


def main() -> None:
    args = parse_args()
    results = Path("data_results") / args.grid
    commands = commands_to_run(args, results)
    refuse_without_models(commands)
    run_all(args, commands, results)
    evaluate(GRIDS[args.grid].evaluation, results)
    table = pd.DataFrame([row_of(folder) for folder in sorted(results.glob("*_seed*")) if has_a_row(folder)])
    table.round(6).to_csv(results.with_suffix(".csv"), index=False, lineterminator="\n")
    print(seeds.summary(table).to_string(float_format="%.3f"))
    print(f"table: {results.with_suffix('.csv')}")
    print(f"figure: {getattr(grid_plots, f'save_{args.grid}')(results)}")


# running


def commands_to_run(args: argparse.Namespace, results: Path) -> dict[str, list[list[str]]]:
    """The commands of every run that has neither finished nor, without --retry, failed."""
    grid, commands = GRIDS[args.grid], {}
    for seed in range(args.seeds):
        for variant in args.only or grid.variants:
            run = f"{variant}_seed{seed}"
            model, failed = Path("models") / args.grid / run, results / run / FAILED
            if args.retry:
                failed.unlink(missing_ok=True)
            if model.exists() or failed.exists():  # a script writes its model last
                continue
            output = f"--results {results} --run {run} --out {model} --episodes {args.episodes or grid.episodes}"
            train = f"{grid.script} {grid.shared} {grid.variants[variant]} {output} --seed {seed} --resume"
            values = {"run": run, "seed": seed, "source": args.source}
            commands[run] = [
                [word.format(**values) for word in command.split()] for command in (*grid.setup(variant), train)
            ]
    return commands


def refuse_without_models(commands: dict[str, list[list[str]]]) -> None:
    """The models that `make` trains must be there; without them all runs would count as failed."""
    for flag, default in (("--policy", "models/nlg"), ("--reward", "models/cls")):
        if not Path(default).exists() and any(flag not in last for *_, last in commands.values()):
            raise UserError(f"the runs need {default}, which is not there: make the models first (make)")


def visible_gpus() -> list[str]:
    """The names of the GPUs that the study may use: all, or those that the user made visible."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if chosen is None else [x for x in chosen.split(",") if x]


def run_all(args: argparse.Namespace, commands: dict[str, list[list[str]]], results: Path) -> None:
    """Run the commands of every run, some runs at a time. A run that fails leaves the reason in its folder."""
    try:
        executor = submitit.AutoExecutor(Path("models") / args.grid / "jobs", cluster=args.cluster)
    except RuntimeError as error:
        raise UserError(f"--cluster {args.cluster}: {error}") from error
    gpus = visible_gpus()
    free_slots = list(range(args.at_once or len(gpus) or cores()))
    threads = max(1, cores() // len(free_slots))
    executor.update_parameters(timeout_min=24 * 60, cpus_per_task=threads)
    if args.cluster == "slurm":
        executor.update_parameters(slurm_partition=args.partition, slurm_gpus_per_node=1 if gpus else 0)
    queue, running = list(commands), {}
    bar = tqdm(total=len(queue), desc=args.grid, unit="run", dynamic_ncols=True)
    while queue or running:
        while queue and free_slots:
            run, slot = queue.pop(0), free_slots.pop()
            variables = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(environment.SPIN_COUNT)}
            if gpus and args.cluster == "local":
                variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
            running[run] = executor.submit(run_commands, commands[run], variables), slot
        for run in [run for run, (job, _) in running.items() if job.done()]:
            job, slot = running.pop(run)
            if reason := failure(job):
                (results / run).mkdir(parents=True, exist_ok=True)
                (results / run / FAILED).write_text(reason + "\n", encoding="utf-8")
                bar.write(f"{run} failed: see {results / run / FAILED}")
            free_slots.append(slot)
            bar.update()
        time.sleep(0.2)
    bar.close()


def run_commands(commands: list[list[str]], variables: dict[str, str]) -> str:
    """In a job: run commands with these environment variables. Returns the output of one that fails, or ""."""
    for script, *flags in commands:
        if is_done(flags):
            continue
        done = start(script, flags, variables, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            return done.stderr or f"exit code {done.returncode}"
    return ""


def failure(job: submitit.Job) -> str:
    """Why a job that has ended failed, in one line; "" if it did not.

    SLURM may end a job before it returns (TIMEOUT, CANCELLED, OUT_OF_MEMORY, ...). Whether there is a result decides:
    the state of a job that has returned may be minutes old.
    """
    try:
        return last_line(job.result())
    except (UncompletedJobError, FailedJobError) as error:
        return f"the job ended as {job.state}: {last_line(job.stderr() or str(error))}"


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


# evaluating


def evaluate(flags: str, results: Path) -> None:
    """Evaluate the finished runs, those with a model, that have not been evaluated."""
    new = [folder for folder in sorted(results.glob("*_seed*")) if not has_a_row(folder)]
    for folders in groups([folder for folder in new if (Path("models") / results.name / folder.name).exists()]):
        filled_in = flags.format(run=folders[0].name).split()
        if start("evaluate_nlg.py", [*filled_in, "--run", *folders]).returncode:
            raise UserError("evaluate_nlg.py failed; the same command goes on from there")


def has_a_row(folder: Path) -> bool:
    """Whether a run has failed, or has been evaluated."""
    return any((folder / name).exists() for name in (FAILED, "evaluation.json"))


def groups(folders: list[Path]) -> list[list[Path]]:
    """Runs in groups with the same reference and reward, which one call of evaluate_nlg.py takes.

    A run whose reward people taught is a group of its own.
    """
    by_models = {}
    for folder in folders:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
        taught = str(folder) if "human" in settings["reward"] else ""
        by_models.setdefault((settings["policy"], *settings["reward"], taught), []).append(folder)
    return list(by_models.values())


def collapse(log: pd.DataFrame, evaluation: dict) -> str:
    """Why a finished run counts as broken, or "". The criteria were fixed before any run of the stability grid."""
    entropy = {when: measures["entropy"] for when, measures in evaluation["diversity"].items()}
    gain, valid = log.improvement_ma, evaluation["gold"]["valid_after"]
    reasons = {
        "KL above 20 nats": evaluation["kl"] > 20,
        "fewer than half of the texts valid": valid is not None and valid < 0.5,
        "entropy under a tenth of the reference's": entropy["after"] < 0.1 * entropy["before"],
        "more than half of the gain lost by the end": gain.max() > 0.05 and gain.iloc[-1] < 0.5 * gain.max(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def row_of(folder: Path) -> dict:
    """A run's row of the table."""
    variant, _, seed = folder.name.rpartition("_seed")
    row = {"variant": variant, "seed": int(seed)}
    if (folder / FAILED).exists():
        return row | {"broken": (folder / FAILED).read_text(encoding="utf-8").strip()}
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    log = pd.read_csv(folder / "log.csv")
    return row | {
        "broken": collapse(log, evaluation),
        "fraction_of_optimum": frontier.known_fraction(evaluation),
        "score": evaluation["score_after"],
        "kl": evaluation["kl"],
        "ethics": evaluation["ethics_after"],
        "gold_ethical": evaluation["gold"]["ethical_after"],
        "gold_valid": evaluation["gold"]["valid_after"],
        "worst_query_kl": evaluation.get("worst_query", {}).get("kl"),  # older evaluations lack it
        "entropy": evaluation["diversity"]["after"]["entropy"],
        "perplexity": evaluation.get("perplexity_under_reference"),
        "minutes": log[["seconds_rollout", "seconds_score", "seconds_update"]].to_numpy().sum() / 60,
    }


if __name__ == "__main__":
    cli.run(main)
