"""Questions about other methods than PPO, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from pathlib import Path

import pandas as pd

from experiments.markdown import GOLD, claim, files, load, section, table_of_runs
from rlhf import plots

SAME_MODELS = "K2_lr_1e-3_seed0"  # the run of PPO that TRL's are compared with
TRAINERS = {"grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO"}


def settings_of(run: str) -> pd.Series:
    """grpo_K2_lr_3e-4_beta_0.05_seed0 -> method, lr, beta."""
    method, _, _, lr, _, beta, _ = run.split("_")
    return pd.Series({"method": method, "lr": float(lr), "beta": float(beta)})


def peers(results: Path) -> str:
    runs = pd.read_csv(results / "peers.csv").rename(
        columns={"run": "variant", "fraction_of_optimum": "exact_fraction"}
    )
    search = pd.read_csv(results / "peers_search.csv")
    ours, theirs = runs[runs.variant == SAME_MODELS].iloc[0], runs[runs.variant != SAME_MODELS]
    theirs = theirs.join(theirs.variant.apply(settings_of))
    config = load(results / "peers/ppo" / SAME_MODELS / "config.json")["settings"]
    names = {SAME_MODELS: "this code"}
    for run in theirs.sort_values(["method", "beta"], ascending=False).itertuples():
        names[run.variant] = f"{TRAINERS[run.method]}, learning rate {plots.short(run.lr)}, beta {run.beta:g}"
    tried = search.groupby("method")[["lr", "beta"]].agg(
        lambda column: ", ".join(f"{x:g}" for x in sorted(set(column)))
    )
    return section(
        "How does it compare with TRL's trainers of today?",
        "GRPO, RLOO and DPO of TRL 1.16.0, on the same task: the same reference, reward model, queries and evaluation, "
        f"{config['episodes']:,} sampled texts, batches of {config['batch_size']} in {config['minibatches']} "
        f"minibatches, K = {config['ppo_epochs']}, AdamW; one seed. DPO learns from the best and the worst of two "
        "texts of the reference to a query.",
        "For each of them six short runs, with a quarter of the texts, tried the learning rates "
        f"{tried.lr['grpo']} with the KL coefficients {tried.beta['grpo']} (DPO's beta: {tried.beta['dpo']}). The best "
        "by score - 0.15 KL on queries that the evaluation does not ask is in the table.",
        claim(
            theirs.exact_fraction.max() < ours.exact_fraction,
            "This code ends nearest to the optimum.",
        ),
        table_of_runs("trainer", runs, names, ["exact_fraction", "score", *GOLD, "minutes"]),
        "All on one core beside another program, so the minutes are for comparison only.",
        files(results, "make peers", "peers.csv", "peers_search.csv", "peers"),
    )


def beyond(results: Path) -> str:
    return ""


QUESTIONS = (peers,)
