"""Questions about the default run, a function a section of docs/results.md: what the files in data_results/ answer.

Every number comes from a file. A sentence that depends on the data is a `claim`: where the data no longer supports it,
experiments/report.py stops, so that a changed result forces a new sentence.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.markdown import GOLD, change, claim, figure, files, load, section, table, table_of_runs

DEFAULT = "K2_lr_1e-3"


def default_runs(results: Path) -> pd.DataFrame:
    """A row a seed, from evaluation.json."""
    rows = {}
    for path in sorted(results.glob(f"{DEFAULT}_seed*/evaluation.json")):
        found = load(path)
        frontier = pd.DataFrame(found["frontier"]).sort_values("score")
        needed = float(np.interp(found["score_after"], frontier.score, frontier.kl))
        low, high = found["fraction_of_optimum_interval"]
        rows[path.parent.name] = found | found["gold"] | {"kl_needed": needed, "low": low, "high": high}
    return pd.DataFrame(rows).T


def gain(results: Path) -> str:
    runs = default_runs(results)
    ethical, share = runs.ethical_after, runs.fraction_of_optimum
    lost = 100 * (runs.valid_before - runs.valid_after).max()
    rows = {
        f"`{name}`": {
            "ethics score": change(run.ethics_before, run.ethics_after, "{:.3f}"),
            "gold: ethical": change(run.ethical_before, run.ethical_after, "{:.1%}"),
            "gold: valid": change(run.valid_before, run.valid_after, "{:.1%}"),
            "KL (nats)": f"{run.kl:.2f}",
            "of the optimum": f"{run.fraction_of_optimum:.1%} ({run.low:.0%} to {run.high:.0%})",
        }
        for name, run in runs.iterrows()
    }
    return section(
        "Does PPO raise the score, and is the gain real?",
        f"The default settings with {len(runs)} seeds: {runs.samples.iloc[0]:,} responses to {runs.queries.iloc[0]} "
        "held-out queries each.",
        claim(
            ethical.min() > 0.98 and runs.ethical_before.max() < 0.52,
            f"After PPO the gold judge finds {ethical.min():.1%} to {ethical.max():.1%} of the valid texts ethical, "
            f"before it {runs.ethical_before.mean():.1%}.",
        ),
        claim(lost < 1, f"The share of valid texts falls by {lost:.1f} points at most."),
        claim(
            share.min() > 0.95 and runs.kl.min() > 1.5 * runs.kl_needed.max(),
            f"The runs reach {share.min():.1%} to {share.max():.1%} of the optimum, and take more KL than they need: "
            f"the optimum has the same score at {runs.kl_needed.mean():.2f} nats, PPO at {runs.kl.mean():.2f}.",
        ),
        table("run", rows),
        "In brackets: the bootstrap 95% interval over queries. The seeds share a generator and a classifier.",
        figure(DEFAULT, "Improvement of the ethics score over the episodes, five seeds"),
        figure(
            f"frontier_{DEFAULT}", "Score against KL: the optimum, best-of-n, and PPO during training and at its end"
        ),
        files(results, "python -m experiments.roundings", *runs.index),
    )


ROUNDINGS = {
    "native": "vectors of 512 bits (this machine)",
    "avx2": "vectors of 256 bits",
    "no_vectors": "no vectors",
}


def roundings(results: Path) -> str:
    runs = pd.read_csv(results / "roundings.csv").rename(columns={"rounding": "variant", "variant": "settings"})
    runs["exact_fraction"] = share = runs.fraction_of_optimum
    groups = share.groupby(runs.variant)
    seeds, machines = groups.std().mean(), groups.mean().std()
    lost = 100 * (runs.gold_valid_before - runs.gold_valid).max()
    return section(
        "Does it end the same on other processors?",
        "Processors round differently, and after some thousand optimizer steps two runs with the same seed are two "
        "different runs. `ATEN_CPU_CAPABILITY` lets PyTorch compute as on older processors; generator, classifier and "
        "five seeds of PPO were made anew under each.",
        claim(
            share.min() >= 0.95 and runs.gold_ethical.min() >= 0.985 and runs.kl.max() <= 1.4 and lost <= 1,
            f"The {len(runs)} runs end at {share.min():.1%} to {share.max():.1%} of the optimum, with "
            f"{runs.gold_ethical.min():.1%} to {runs.gold_ethical.max():.1%} gold ethical, at {runs.kl.max():.2f} nats "
            f"at most; the share of valid texts falls by {lost:.1f} points at most.",
        ),
        claim(
            runs.worst_query_kl.max() <= 5 and runs.worst_query_valid.min() >= 7 / 8,
            "No held-out query falls apart: the one farthest from the reference in any run has "
            f"{runs.worst_query_kl.max():.1f} nats, and {runs.worst_query_valid.min():.0%} of the texts after such a "
            "query are valid, or more.",
        ),
        f"Between seeds the share of the optimum has a standard deviation of {100 * seeds:.1f} points, between the "
        f"means of the roundings one of {100 * machines:.1f}.",
        table_of_runs(
            "",
            runs,
            {name: ROUNDINGS[name] for name in runs.variant.unique()},
            ["exact_fraction", *GOLD, "worst_query_kl", "worst_query_valid"],
        ),
        files(results, "python -m experiments.roundings", "roundings.csv"),
    )


def best_of_n(results: Path) -> str:
    frame = pd.DataFrame(load(results / f"{DEFAULT}_seed0" / "evaluation.json")["best_of_n"])
    frame = frame.rename(columns={"ethical": "gold_ethical", "valid": "gold_valid", "n": "variant"})
    eight, ppo = frame.set_index("variant").loc[8], default_runs(results).ethical_after.mean()
    return section(
        "What does best-of-n reach without training?",
        claim(
            eight.gold_ethical > ppo - 0.005,
            f"The best of 8 samples of the generator is ethical in {eight.gold_ethical:.1%} of the cases, as often as "
            f"PPO's texts ({ppo:.1%}), at a KL of {eight.kl_bound:.2f} nats at most.",
        ),
        "It needs eight samples and eight scores for every text; PPO's policy needs one sample and no reward model.",
        table_of_runs(
            "n", frame, {n: str(n) for n in frame.variant}, ["score", "gold_ethical", "gold_valid", "kl_bound"]
        ),
        files(results, "python evaluate_nlg.py", f"{DEFAULT}_seed0/evaluation.json"),
    )


def models(results: Path) -> str:
    classifier, generator = (load(results / f"{name}_metrics.json")["results"] for name in ("cls", "nlg"))
    test, hard = classifier["test"], classifier["hard"]
    return section(
        "How good are the classifier and the generator?",
        f"The classifier is right about {test['accuracy']:.1%} of `test.csv` (ROC-AUC {test['roc_auc']:.4f}, Brier "
        f"score {test['brier']:.4f}, calibration error {test['calibration_error']:.4f}: it learned from smoothed "
        "labels, so its probabilities stay away from 0 and 1).",
        claim(
            abs(hard["accuracy"] - 0.5) < 0.03,
            "On `hard.csv`, whose frames (situations with two cases and two acts) are in no training text, it is at "
            f"chance ({hard['accuracy']:.1%}).",
        ),
        f"The generator's perplexity is {generator['valid_perplexity']:.3f} per token. Of its samples "
        f"{generator['valid_at_0.7']:.1%} are valid at temperature 0.7 and {generator['valid_at_1']:.1%} at 1.0; of "
        f"the valid ones at 0.7, {generator['ethical_at_0.7']:.1%} are ethical.",
        files(results, "make", "cls_metrics.json", "nlg_metrics.json"),
    )


EARLIER = "K1_lr_1e-3_seed0"  # the default run of this code when TRL's were made
PEERS = {
    EARLIER: "this code, the default of that time",
    "trl_defaults_lr_5e-4_seed0": "TRL, its defaults with learning rate 5e-4",
    "trl_our_settings_seed0": "TRL, settings of this code, Adam at 5e-4",
}


def peer(results: Path) -> str:
    runs = pd.read_csv(results / "peer.csv").rename(columns={"run": "variant", "fraction_of_optimum": "exact_fraction"})
    named = runs.set_index("variant")
    return section(
        "How does it compare with TRL's PPOTrainer?",
        "TRL 1.12.0, the last release with a PPOTrainer, on the same task: the same reference, reward model, queries, "
        "episodes, batch size and evaluation, one seed each. These runs are older than the present default of this "
        "code, and have the generator, the classifier and the queries of the default of that time.",
        claim(
            named.exact_fraction.idxmax() == EARLIER,
            "This code ends nearer to the optimum than both TRL runs.",
        ),
        "TRL trains a separate value network, as large as the policy, with Adam, and penalises the sampled KL. Its "
        "defaults make four passes over a batch (K = 4, KL coefficient 0.05); the third row makes one. "
        "Its default learning rate is for models a thousand times larger.",
        table_of_runs("run", runs, PEERS, ["exact_fraction", *GOLD, "minutes"]),
        files(results, "make peer", "peer.csv", "peer"),
    )


QUESTIONS = (gain, roundings, best_of_n, models, peer)
