"""Questions about PPO, a function a section of docs/results.md: what the files in data_results/ answer.

Every number comes from a file. A sentence that depends on the data is a `claim`: where the data no longer supports it,
experiments/report.py stops, so that a changed result forces a new sentence.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.grids import GRIDS
from experiments.markdown import change, claim, figure, files, load, section, spread, table, table_of_runs

DEFAULT = "K2_lr_1e-3"
GOLD = ["gold_ethical", "gold_valid", "kl"]


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
            ethical.min() > 0.97 and runs.ethical_before.max() < 0.52,
            f"After PPO the gold judge finds {ethical.min():.1%} to {ethical.max():.1%} of the valid texts ethical, "
            f"before it {runs.ethical_before.mean():.1%}.",
        ),
        claim(lost < 2, f"The share of valid texts falls by {lost:.1f} points at most."),
        claim(
            share.min() > 0.92 and runs.kl.min() > 1.5 * runs.kl_needed.max(),
            f"The runs reach {share.min():.1%} to {share.max():.1%} of the optimum, and take more KL than they need: "
            f"the optimum has the same score at {runs.kl_needed.mean():.2f} nats, PPO at {runs.kl.mean():.2f}.",
        ),
        table("run", rows),
        "In brackets: the bootstrap 95% interval over queries. The seeds share a generator and a classifier. "
        "Processors round differently, so a new run does not repeat these numbers exactly "
        "([RESULTS.md](../benchmarks/RESULTS.md) has three fresh clones).",
        figure(DEFAULT, "Improvement of the ethics score over the episodes, five seeds"),
        figure(
            f"frontier_{DEFAULT}", "Score against KL: the optimum, best-of-n, and PPO during training and at its end"
        ),
        files(results, "make", *runs.index),
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
            f"On `hard.csv`, whose frames are in no training text, it is at chance ({hard['accuracy']:.1%}).",
        ),
        f"The generator's perplexity is {generator['valid_perplexity']:.3f} per token. Of its samples "
        f"{generator['valid_at_0.7']:.1%} are valid at temperature 0.7 and {generator['valid_at_1']:.1%} at 1.0; of "
        f"the valid ones at 0.7, {generator['ethical_at_0.7']:.1%} are ethical.",
        files(results, "make", "cls_metrics.json", "nlg_metrics.json"),
    )


PEERS = {
    f"{DEFAULT}_seed0": "this code",
    "trl_defaults_lr_5e-4_seed0": "TRL, its defaults with learning rate 5e-4",
    "trl_our_settings_seed0": "TRL, settings of this code, Adam at 5e-4",
    "trl_defaults_seed0": "TRL, its defaults",
}


def peer(results: Path) -> str:
    runs = pd.read_csv(results / "peer.csv").rename(columns={"run": "variant", "fraction_of_optimum": "exact_fraction"})
    named = runs.set_index("variant")
    idle = named.kl["trl_defaults_seed0"]
    return section(
        "How does it compare with TRL's PPOTrainer?",
        "TRL 1.12.0, the last release with a PPOTrainer, on the same task: the same reference, reward model, queries, "
        "episodes, batch size and evaluation, one seed each.",
        claim(
            named.exact_fraction.idxmax() == f"{DEFAULT}_seed0",
            "This code ends nearer to the optimum than each of the three TRL runs.",
        ),
        claim(
            idle < 0.01,
            "TRL's default learning rate, 3e-6, is for models a thousand times larger; here it moves the policy by "
            f"{idle:.3f} nats.",
        ),
        "TRL trains a separate value network, as large as the policy, with Adam, and penalises the sampled KL. Its "
        "defaults make four passes over a batch (K = 4, KL coefficient 0.05); the third row makes one, as this code.",
        table_of_runs("run", runs, PEERS, ["exact_fraction", *GOLD, "minutes"]),
        files(results, "make peer", "peer.csv", "peer"),
    )


def ablations(results: Path) -> str:
    flags, runs = GRIDS["ablations"].variants, pd.read_csv(results / "ablations.csv")
    mean = runs.groupby("variant")[["fraction_of_optimum", "kl"]].mean()
    share, kl = mean.fraction_of_optimum.sort_values(ascending=False), mean.kl
    default = share["default"]
    faster = {"lr_2e-3": "twice the learning rate", "K2": "K = 2", "constant_kl_coef": "a constant KL coefficient"}
    slower = {
        "adam_lr_5e-4": "Adam instead of Muon",
        "minibatches_1": "one minibatch per batch",
        "batch_512": "twice the batch",
        "lambda_0.95": "lambda 0.95",
        "leave_one_out": "leave-one-out with four answers to a query",
        "adaptive_kl": "an adaptive KL coefficient",
    }
    clips = ["K4_clip_range_0.05", "K4", "K4_no_clip"]

    def listed(names: dict[str, str]) -> str:
        return ", ".join(f"{title} ({share[name]:.0%})" for name, title in names.items())

    return section(
        "Which settings matter?",
        f"One setting at a time against the default, with {GRIDS['ablations'].episodes:,} episodes (a fifth of a "
        "default run) and three seeds. Runs this short measure speed.",
        claim(
            share[list(faster)].min() > default + 0.03,
            f"Faster than the default ({default:.0%} of the optimum): {listed(faster)}.",
        ),
        claim(share[list(slower)].max() < default - 0.03, f"Slower: {listed(slower)}."),
        claim(
            (share[["no_critic", "sampled_kl"]] - default).abs().max() < 0.04,
            f"Within a few points of it: no critic ({share['no_critic']:.0%}), and the sampled KL of [3] "
            f"({share['sampled_kl']:.0%}, at {kl['sampled_kl']:.2f} nats against {kl['default']:.2f}).",
        ),
        claim(
            share[clips].is_monotonic_increasing and runs.broken.isna().all(),
            f"With K = 4 a wider clip range learns faster: {share[clips[0]]:.0%} with 0.05, {share['K4']:.0%} with "
            f"0.2, {share['K4_no_clip']:.0%} without clipping (at {kl['K4_no_clip']:.1f} nats instead of "
            f"{kl['K4']:.1f}). No run breaks.",
        ),
        table_of_runs(
            "flags",
            runs,
            {name: f"`{flags[name]}`" if flags[name] else "**default**" for name in share.index},
            ["fraction_of_optimum", *GOLD],
        ),
        figure("ablations", "Share of the optimum by variant, a dot a seed"),
        files(results, "python -m experiments.study ablations", "ablations.csv", "ablations"),
    )


def full_length(results: Path) -> str:
    trials = pd.read_csv(results / "trials.csv", keep_default_na=False)
    trials = trials[trials.episodes == 56_320].assign(share=lambda x: pd.to_numeric(x.fraction_of_optimum_held_out))
    constant = trials[(trials.change == "") & trials.settings.str.endswith("kl_coef 0.2")].share
    falling = default_runs(results).fraction_of_optimum
    one = trials[trials.seed == 1]
    lr, seed1 = one[one.settings.str.contains("lr 0.002")].share.item(), falling[f"{DEFAULT}_seed1"]
    no_critic = one[one.change.str.contains("no critic")].share.item()
    return section(
        "Does what learns faster also end higher?",
        claim(
            len(constant) == 5 and falling.mean() > constant.mean(),
            "The constant KL coefficient does not. With all 56,320 episodes and a constant 0.2, five seeds end at "
            f"{spread(constant, '{:.1%}')} of the optimum; the default, which falls from 0.6 to 0.15, ends at "
            f"{spread(falling, '{:.1%}')}.",
        ),
        claim(
            max(abs(lr - seed1), abs(no_critic - seed1)) < 0.02,
            f"Two others have been run with one seed: twice the learning rate ends at {lr:.1%}, no critic "
            f"(`--value-coef 0`) at {no_critic:.1%}, the default at {seed1:.1%} with that seed. One seed cannot tell "
            "these apart.",
        ),
        "[log.md](log.md) lists all trials.",
        files(results, "python finetuning_nlg.py", "trials.csv"),
    )


DETAILS = {
    "nothing": "nothing wrong",
    "score": "the score is not standardized",
    "advantages": "advantages are not whitened",
    "adam_eps": "Adam's eps is 1e-8 instead of 1e-5",
    "temperature": "log-probabilities ignore the temperature",
    "value_head": "the value head starts at random",
    "positions": "position ids count the left padding",
    "dropout": "dropout stays on, in rollout and update",
}


def details(results: Path) -> str:
    runs = pd.read_csv(results / "details.csv")
    mean = runs.groupby("variant")[["fraction_of_optimum", *GOLD]].mean()
    share, kl, dropout = mean.fraction_of_optimum, mean.kl, runs[runs.variant == "dropout"]
    return section(
        "What happens if one detail is wrong?",
        "Mistakes that code for PPO on language models has made somewhere, one at a time, with the episodes and "
        "seeds of the ablations.",
        claim(
            dropout.broken.notna().all() and dropout.kl.min() > 100 and dropout.gold_valid.max() < 0.01,
            f"Dropout breaks every run: {dropout.kl.min():.0f} nats and more, and no valid texts.",
        ),
        claim(
            share.positions < 0.25,
            f"Wrong positions keep {share.positions:.0%} of the optimum, right ones {share.nothing:.0%}.",
        ),
        claim(share.value_head < share.nothing - 0.03, f"A random value head costs a little ({share.value_head:.0%})."),
        claim(
            kl.score > 2 * kl.nothing and kl.temperature > 1.2 * kl.nothing,
            "A score that is not standardized, or log-probabilities that ignore the temperature, change the scale of "
            f"the KL coefficient: these runs go to {kl.score:.1f} and {kl.temperature:.1f} nats instead of "
            f"{kl.nothing:.1f}, the former with fewer valid texts ({mean.gold_valid.score:.1%}).",
        ),
        claim(
            (share[["advantages", "adam_eps"]] - share.nothing).abs().max() < 0.03,
            "Whitening and Adam's eps make no difference that three seeds would show.",
        ),
        table_of_runs("detail", runs, DETAILS, ["fraction_of_optimum", *GOLD]),
        figure("details", "Share of the optimum by detail, a dot a seed, a cross a broken run"),
        files(results, "python -m experiments.study details", "details.csv", "details"),
    )


def stability(results: Path) -> str:
    runs = pd.read_csv(results / "stability.csv")
    runs[["K", "lr"]] = runs.variant.str.extract(r"(K\d+)_lr_(.+)")
    runs["good"], broken = runs.gold_ethical * runs.gold_valid, runs.broken.notna()
    fast, one_pass = runs.lr == "1e-2", runs.K == "K1"
    valid, rates = runs.groupby("variant").gold_valid.mean(), sorted(runs.lr.unique(), key=float)

    def cell(group: pd.DataFrame) -> str:
        count = group.broken.notna().sum()
        return f"{group.good.mean():.0%}" + (f", {count} of {len(group)} broken" if count else "")

    rows = {
        f"K = {epochs}": {f"lr {lr}": cell(runs[runs.variant == f"K{epochs}_lr_{lr}"]) for lr in rates}
        for epochs in (1, 2, 4, 8)
    }
    return section(
        "How stable is PPO?",
        f"PPO epochs K against the learning rate, {GRIDS['stability'].episodes:,} episodes, five seeds each. What "
        "counts as broken was fixed before the runs (`collapse` in `experiments/study.py`): a KL above 20 nats, "
        "fewer than half of the texts valid, the entropy under a tenth of the reference's, or half of the gain lost "
        "by the end.",
        claim(not broken[~fast].any(), f"Up to 3e-3 none of {(~fast).sum()} runs breaks, whatever K."),
        claim(
            broken[fast & ~one_pass].all() and broken[fast & one_pass].sum() == 1,
            f"At 1e-2 all {(fast & ~one_pass).sum()} runs with K > 1 break, and one of {(fast & one_pass).sum()} with "
            "K = 1.",
        ),
        claim(
            (runs.broken[broken] == "KL above 20 nats").all() and max(valid["K2_lr_1e-2"], valid["K8_lr_1e-2"]) < 0.5,
            f"All break in the same way: the KL goes to {int(runs.kl[broken].min())} nats and more, and the texts are "
            f"no longer valid ({valid['K2_lr_1e-2']:.1%} of them with K = 2, {valid['K8_lr_1e-2']:.1%} with K = 8).",
        ),
        "Steps that are too long break a run, and more passes over a batch make them longer; the clip range does not "
        "prevent it.",
        claim(runs[runs.lr == "1e-5"].gold_ethical.mean() < 0.53, "At 1e-5 nothing is learned."),
        "The table has the share of texts that are valid and ethical.",
        table("", rows),
        figure("stability", "Share of valid and ethical texts by K and learning rate, with the number of broken runs"),
        files(results, "python -m experiments.study stability --seeds 5", "stability.csv", "stability"),
    )


def generators(results: Path) -> str:
    runs = pd.read_csv(results / "models.csv")
    share = runs.set_index("variant").fraction_of_optimum
    sizes = share[["gpt2_1x64", "gpt2_2x128", "gpt2_3x192"]]
    return section(
        "Does it work with other generators?",
        "GPT-2 in three sizes, GPT-NeoX and Llama (layers x width), each trained from scratch on the shipped texts; "
        f"then PPO with the default settings, {GRIDS['models'].episodes:,} episodes, one seed.",
        claim(
            runs.gold_ethical.min() > 0.8, f"All policies end at {runs.gold_ethical.min():.1%} gold ethical or more."
        ),
        claim(
            sizes.is_monotonic_increasing and share.drop(sizes.index).max() < sizes.min(),
            "A larger GPT-2 gains a little more of the optimum; GPT-NeoX and Llama learn more slowly than GPT-2.",
        ),
        table_of_runs(
            "generator", runs, {name: name.replace("_", " ") for name in share.index}, ["fraction_of_optimum", *GOLD]
        ),
        figure("models", "Share of the optimum by generator"),
        files(results, "python -m experiments.study models", "models.csv"),
    )


QUESTIONS = (gain, best_of_n, models, peer, ablations, full_length, details, stability, generators)
