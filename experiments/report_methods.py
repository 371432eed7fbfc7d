"""Questions about other methods than PPO, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from pathlib import Path

import pandas as pd

from experiments.grids import GRIDS
from experiments.markdown import GOLD, claim, figure, files, load, section, table_of_runs
from experiments.report_ppo import default_runs
from rlhf import plots

SAME_MODELS = "K2_lr_1e-3_seed0"  # the run of PPO that TRL's are compared with
SEEDS = 3  # of a variant, unless the table says otherwise
TRAINERS = {"grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO"}
IN_README = {  # title of a row -> folder of run folders, and which of these
    "no PPO: its own texts, by exp(score / 0.2), 3 seeds": (
        "beyond",
        "reward_weighted_beta_0.2_seed*",
    ),
    "TRL's RLOO": ("peers", "rloo_*_seed0"),
    "TRL's GRPO, the better of two": ("peers", "grpo_*_beta_0.15_seed0"),
    "TRL's DPO": ("peers", "dpo_*_seed0"),
}


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
    by_setting = theirs.set_index(["method", "beta"])
    config = load(results / "peers/ppo" / SAME_MODELS / "config.json")["settings"]
    names = {SAME_MODELS: "this code"}
    for run in theirs.sort_values(["method", "beta"], ascending=False).itertuples():
        names[run.variant] = f"{TRAINERS[run.method]}, learning rate {plots.short(run.lr)}, beta {run.beta:g}"
    slow_dpo = search[(search.method == "dpo") & (search.lr == 1e-4)]
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
            ours.exact_fraction > theirs.exact_fraction.max() and ours.kl < theirs.kl.min(),
            "This code ends nearest to the optimum, at the lowest KL, in half of the time. RLOO comes next.",
        ),
        claim(
            by_setting.loc["grpo"].kl.min() > 4,
            f"GRPO goes to {by_setting.loc['grpo', 0.05].kl:.1f} nats with the beta of its best short run, to "
            f"{by_setting.loc['grpo', 0.15].kl:.1f} with that of the second best, so no share of the optimum is known: "
            "it divides the scores of a query's texts by their deviation, and the more alike they become, the less the "
            "KL counts.",
        ),
        claim(
            by_setting.loc["dpo", 0.3].gold_valid < 0.8,
            "DPO, whose texts are all the reference's, goes far and leaves many texts that are not valid; its short "
            f"runs at 1e-4 hardly moved ({slow_dpo.kl.min():.2f} and {slow_dpo.kl.max():.2f} nats, a score of "
            f"{slow_dpo.score.max():.2f} at most).",
        ),
        table_of_runs("trainer", runs, names, ["exact_fraction", "score", *GOLD, "minutes"]),
        "Each had one core of a busy machine: the minutes are for comparison only.",
        files(results, "make peers", "peers.csv", "peers_search.csv", "peers"),
    )


def beyond(results: Path) -> str:
    runs = pd.read_csv(results / "beyond.csv").assign(exact_fraction=lambda table: table.fraction_of_optimum)
    seeds = runs.groupby("variant").seed.nunique()
    names = {
        variant: (
            f"best of {variant.removeprefix('best_of_')}, distilled"
            if variant.startswith("best_of_")
            else f"weights exp(score / {variant.rpartition('_')[2]})"
        )
        + (f" ({seeds[variant]} seed{'s' * int(seeds[variant] > 1)})" if seeds[variant] < SEEDS else "")
        for variant in runs.groupby("variant").exact_fraction.mean().sort_values(ascending=False).index
    }
    ppo = default_runs(results)
    best = runs[runs.variant == next(iter(names))]
    return section(
        "What is possible without PPO?",
        "The optimum is known: reference * exp(score / beta) / Z. Here the generator learns from as many of its own "
        f"texts as PPO samples, {GRIDS['beyond'].episodes:,}, without a policy gradient: only the best of n to every "
        f"query, or all of them, each with the weight exp(score / beta). {SEEDS} seeds, four passes over the texts "
        "([without-ppo.md](without-ppo.md)).",
        claim(
            best.exact_fraction.min() > 0.95
            and best.exact_fraction.max() < ppo.fraction_of_optimum.max()
            and best.gold_valid.max() < ppo.valid_after.min(),
            f"The best weights come within a point or two of PPO ({ppo.fraction_of_optimum.min():.1%} to "
            f"{ppo.fraction_of_optimum.max():.1%}), without a tuned setting; but they lose more valid texts (PPO: "
            f"{ppo.valid_after.min():.1%} and more), and their KL differs more from seed to seed: nothing holds the "
            "policy where nobody has sampled.",
        ),
        claim(
            runs[runs.variant.str.startswith("best_of_")].exact_fraction.max() < best.exact_fraction.min() - 0.1,
            "Best-of-n distilled stays behind: it learns from one text of n, and a large n leaves few to learn from.",
        ),
        "The loss still falls when the four passes end. This world favours the weights: half of the reference's texts "
        "are right, so the optimum is among what it writes anyway.",
        table_of_runs("texts count by", runs, names, ["exact_fraction", "score", *GOLD]),
        figure("beyond", "Score against KL: the optimum, and a dot a run of every method"),
        files(results, "python -m experiments.study beyond", "beyond.csv", "beyond"),
    )


QUESTIONS = (peers, beyond)
