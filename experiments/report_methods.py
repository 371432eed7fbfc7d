"""Questions about other methods than PPO, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from experiments.grids import GRIDS
from experiments.markdown import GOLD, claim, figure, files, load, section, table_of_runs
from experiments.report_ppo import default_runs
from rlhf import frontier, plots

SAME_MODELS = "K2_lr_1e-3"  # the runs of PPO that TRL's are compared with
SEEDS = 3  # of a variant, unless the table says otherwise
TRAINERS = {"grpo": "GRPO", "grpo-unscaled": "GRPO without the division", "rloo": "RLOO", "dpo": "DPO"}
IN_README = {  # title of a row -> folder of run folders, and which of these
    "reward-weighted fine-tuning, no PPO, 3 seeds": (
        "beyond",
        "reward_weighted_beta_0.2_seed*",
    ),
    "TRL's RLOO, 3 seeds": ("peers", "rloo_*_seed*"),
    "TRL's GRPO, beta 0.15, 3 seeds": ("peers", "grpo_*_beta_0.15_seed*"),
    "TRL's DPO, 3 seeds": ("peers", "dpo_*_seed*"),
}


def settings_of(variant: str) -> pd.Series:
    """grpo_K2_lr_3e-4_beta_0.05 -> method, lr, beta."""
    method, _, _, lr, _, beta = variant.split("_")
    return pd.Series({"method": method, "lr": float(lr), "beta": float(beta)})


def too_few(seeds: int) -> str:
    """What a table adds to the name of a variant with fewer seeds than the others."""
    return f" ({seeds} seed{'s' if seeds > 1 else ''})" if seeds < SEEDS else ""


def ends(folders: Iterable[Path]) -> pd.DataFrame:
    """What evaluate_nlg.py found of runs, a row each, in the columns that a grid's table has."""
    found = [load(folder / "evaluation.json") for folder in sorted(folders)]
    return pd.DataFrame(
        {
            "fraction_of_optimum": [frontier.known_fraction(run) for run in found],
            "ethics": [run["ethics_after"] for run in found],
            "kl": [run["kl"] for run in found],
            "gold_ethical": [run["gold"]["ethical_after"] for run in found],
            "gold_valid": [run["gold"]["valid_after"] for run in found],
        },
        dtype=float,
    )


def peers(results: Path) -> str:
    runs = pd.read_csv(results / "peers.csv").rename(columns={"fraction_of_optimum": "exact_fraction"})
    runs["variant"] = runs.run.str.rpartition("_seed")[0]
    search = pd.read_csv(results / "peers_search.csv")
    ours, theirs = runs[runs.variant == SAME_MODELS], runs[runs.variant != SAME_MODELS]
    theirs = theirs.join(theirs.variant.apply(settings_of))
    by_setting = theirs.set_index(["method", "beta"]).sort_index()
    config = load(results / "peers/ppo" / f"{SAME_MODELS}_seed0" / "config.json")["settings"]
    seeds = runs.variant.value_counts()
    names = {SAME_MODELS: f"this code{too_few(seeds[SAME_MODELS])}"}
    for run in theirs.sort_values(["method", "beta"], ascending=False).itertuples():
        setting = f"{TRAINERS[run.method]}, learning rate {plots.short(run.lr)}, beta {run.beta:g}"
        names[run.variant] = setting + too_few(seeds[run.variant])
    grpo, undivided = by_setting.loc["grpo"], by_setting.loc[("grpo-unscaled", 0.15)].squeeze()
    first = runs[runs.run.str.endswith("_seed0")].set_index("variant")
    first = first.drop(undivided.variant)  # which ran another day
    slow_dpo = search[(search.method == "dpo") & (search.lr == 1e-4)]
    tried = search.groupby("method")[["lr", "beta"]].agg(
        lambda column: ", ".join(f"{x:g}" for x in sorted(set(column)))
    )
    return section(
        "How does it compare with TRL's trainers of today?",
        "GRPO, RLOO and DPO of TRL 1.16.0, on the same task: the same reference, reward model, queries and evaluation, "
        f"{config['episodes']:,} sampled texts, batches of {config['batch_size']} in {config['minibatches']} "
        f"minibatches, K = {config['ppo_epochs']}, AdamW; {SEEDS} seeds, unless the table says otherwise. DPO learns "
        "from the best and the worst of two texts of the reference to a query. GRPO has 8 texts to a query, RLOO 2, "
        "this code 1.",
        "For each of them six short runs, with a quarter of the texts, tried the learning rates "
        f"{tried.lr['grpo']} with the KL coefficients {tried.beta['grpo']} (DPO's beta: {tried.beta['dpo']}). The best "
        "by score - 0.15 KL on queries that the evaluation does not ask is in the table, and of GRPO the second best, "
        "which ends better.",
        claim(
            ours.exact_fraction.min() > theirs.exact_fraction.max() and ours.kl.max() < theirs.kl.min(),
            "This code ends nearest to the optimum with each seed, at the lowest KL. RLOO comes next.",
        ),
        claim(
            grpo.exact_fraction.isna().all() and grpo.kl.min() > 3 and undivided.kl < 1.5,
            f"GRPO goes to {grpo.loc[0.05].kl.mean():.1f} nats with the beta of its best short run, and to "
            f"{grpo.loc[0.15].kl.mean():.1f} with that of the second best: no share of the optimum is known there. It "
            "divides the scores of a query's texts by their deviation: the more alike they become, the less the KL "
            'counts. Without this division (`scale_rewards="none"`, one seed, the same settings, models made anew) it '
            f"ends at {undivided.kl:.1f} nats and {undivided.exact_fraction:.0%} of the optimum.",
        ),
        claim(
            by_setting.loc[("dpo", 0.3)].gold_valid.max() < 0.9,
            "DPO, whose texts are all the reference's, goes far, not equally far with each seed, and leaves many texts "
            "that are not valid; its short "
            f"runs at 1e-4 hardly moved ({slow_dpo.kl.min():.2f} and {slow_dpo.kl.max():.2f} nats, a score of "
            f"{slow_dpo.score.max():.2f} at most). TRL's DPO has no temperature: it fits log-probabilities at 1, while "
            "texts are sampled and the KL is measured at 0.7, which may be a part of this.",
        ),
        table_of_runs("trainer", runs, names, ["exact_fraction", "score", *GOLD]),
        claim(
            first.minutes[SAME_MODELS] < 0.6 * first.minutes.drop(SAME_MODELS).min(),
            f"With seed 0 each had one core of a busy machine: {first.minutes[SAME_MODELS]:.1f} minutes for this code, "
            f"{first.minutes.drop(SAME_MODELS).min():.1f} to {first.minutes.max():.1f} for TRL's.",
        ),
        files(results, "make peers", "peers.csv", "peers_search.csv", "peers")
        + " It makes the searches, and seed 0 with the settings that they find; the command of every other row, GRPO's "
        "with beta 0.15 among them, is in its `config.json`.",
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
        + too_few(seeds[variant])
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


STARTS = {
    "reference": "the reference",
    "best_of_8": "best of 8, distilled",
    "reward_weighted_beta_0.2": "weights exp(score / 0.2)",
}


def started(results: Path) -> str:
    runs = pd.read_csv(results / "start.csv").assign(exact_fraction=lambda table: table.fraction_of_optimum)
    for i, run in runs.iterrows():
        path = results / f"start/inputs/{run.variant}_seed{run.seed}/log.csv"
        kept = {"eval_score": 0.0, "eval_kl": 0.0}  # of the reference
        if path.exists():
            kept = pd.read_csv(path).sort_values("valid_loss").iloc[0]
        runs.loc[i, ["start_score", "start_kl"]] = kept["eval_score"], kept["eval_kl"]
    mean = runs.groupby("variant").mean(numeric_only=True)
    best_of, weighted = mean.loc["best_of_8"], mean.loc["reward_weighted_beta_0.2"]
    return section(
        "Does PPO gain from a policy that has learned before?",
        f"Half of the texts, {GRIDS['start'].episodes:,}, teach the reference without PPO, as above; then PPO goes on "
        "from there with the other half, its KL measured to the reference (`--start-from`). The first row is PPO with "
        "half of the texts, from the reference.",
        claim(
            best_of.start_score < 0.6 and best_of.score > mean.score["reference"] + 0.03,
            f"After best of 8, PPO takes the score from {best_of.start_score:.2f} to {best_of.score:.2f}, further than "
            f"from the reference ({mean.score['reference']:.2f}).",
        ),
        claim(
            0.9 < weighted.start_score < weighted.score < weighted.start_score + 0.05
            and weighted.exact_fraction > 0.96,
            f"The weighted texts reach {weighted.start_score:.2f} themselves; PPO adds next to nothing, and ends where "
            "it does from the reference with all of the texts.",
        ),
        claim(
            (mean.gold_valid.drop("reference") < mean.gold_valid["reference"]).all(),
            "Both starts end with fewer valid texts than the reference as the start.",
        ),
        table_of_runs("PPO starts from", runs, STARTS, ["start_score", "start_kl", "exact_fraction", "score", *GOLD]),
        figure("start", "The share of the optimum of PPO with half of the texts, a bar a start"),
        files(results, "python -m experiments.study start", "start.csv", "start"),
    )


QUESTIONS = (peers, beyond, started)
