"""Questions about rewards and data, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.grids import GRIDS, PASSES
from experiments.markdown import GOLD, claim, figure, files, load, section, spread, table, table_of_runs


def other_data(results: Path) -> str:
    titles = {"sentiment": "SST-2, positive", "ethics": "ETHICS commonsense with Moral Stories, right"}
    found, rows = [], {}
    for name in titles:
        folders = sorted((results / "data").glob(f"{name}_seed*"))
        runs = pd.DataFrame([load(folder / "evaluation.json") for folder in folders])
        runs = runs.assign(good=[gold["ethical_after"] for gold in runs.gold])
        runs = runs.assign(good_before=[gold["ethical_before"] for gold in runs.gold])
        right = {
            model: pd.Series([load(path / f"{model}_metrics.json")["results"]["test"]["accuracy"] for path in folders])
            for model in ("judge", "reward")
        }
        rows[titles[name]] = {
            "held-out judge": f"{runs.good_before.mean():.0%} → {spread(runs.good, '{:.0%}')}",
            "reward model's mean": f"{runs.ethics_before.mean():.2f} → {spread(runs.ethics_after, '{:.2f}')}",
            "KL (nats)": spread(runs.kl, "{:.1f}"),
            "right on test texts: judge": spread(right["judge"], "{:.0%}"),
            "reward model": spread(right["reward"], "{:.0%}"),
        }
        found.append(runs)
    runs = pd.concat(found)
    return section(
        "Does it work with real texts?",
        f"Everything from scratch on a CPU, {GRIDS['data'].episodes:,} episodes, three seeds of all models. The reward "
        "model and a held-out judge both start as the generator, and learn from different halves of the labels.",
        claim(
            len(runs) == 6 and (runs.good > runs.good_before + 0.2).all(),
            "The share of responses that the judge finds good rises with the reward model's mean, in every run.",
        ),
        "This judge says less than the gold judge of the shipped texts: it may make the reward model's own mistakes.",
        claim(
            (runs.kl > runs.trusted_up_to_kl).all(),
            "All runs end beyond the KL up to which the optimum can be estimated, so no share of it is given.",
        ),
        "The generators are small: names and sentences get mixed up. In the samples of ETHICS, which are not "
        "committed, people *offer* and *help* wherever they can.",
        table("data, and what counts as good", rows),
        figure("data", "The reward model's mean and the judge's share against the square root of the KL"),
        files(results, "python -m experiments.study data", "data.csv", "data")
        + " It takes the data from the hub, or with `--source FOLDER` from downloaded files.",
    )


def labels(results: Path) -> str:
    runs = pd.read_csv(results / "labels.csv")
    folders = [results / "labels" / f"{run.variant}_seed{run.seed}" for run in runs.itertuples()]
    runs["error"] = [pd.read_csv(folder / "reward_model.csv").held_out_error.iloc[-1] for folder in folders]
    evaluations = [load(folder / "evaluation.json") for folder in folders]
    before = np.mean([evaluation["gold"]["ethical_before"] for evaluation in evaluations])
    rise = runs.ethics - [evaluation["ethics_before"] for evaluation in evaluations]
    ethical, counts = runs.groupby("variant").gold_ethical.mean(), (60, 250, 1000, 4000)
    offline, online = (ethical[[f"{count}_{when}" for count in counts]] for when in ("offline", "online"))
    names = {f"{count}_{when}": f"{count:,}, {when}" for count in counts for when in ("offline", "online")}
    return section(
        "How many answers does a reward model need?",
        "The gold judge takes a person's place and says which of four texts is best. A reward model that starts as "
        f"the generator learns from the answers, then PPO runs for {GRIDS['labels'].episodes:,} episodes, three seeds "
        "each.",
        claim(
            offline.is_monotonic_increasing and abs(offline.iloc[0] - before) < 0.03,
            "The share of ethical texts is {:.1%} after 60 answers, {:.1%} after 250, {:.1%} after 1,000 and {:.1%} "
            "after "
            "4,000; without PPO it is {:.1%}.".format(*offline, before),
        ),
        "In this world no word tells right from wrong, and a comparison of four texts says little about each.",
        claim(
            np.abs(offline.to_numpy() - online.to_numpy())[:3].max() < 0.07 and online.iloc[3] < offline.iloc[3],
            "*Online*, the questions come in four rounds about what the policy then writes. This changes the "
            "share by less than seven points up to 1,000 answers, and ends lower with 4,000 "
            f"({online.iloc[3]:.1%}): for most of the run the reward model knows fewer of them.",
        ),
        claim(
            rise.min() > 0, f"The reward model's own mean rises in every run, by {rise.min():.2f} to {rise.max():.2f}."
        ),
        table_of_runs("answers", runs, names, ["error", "ethics", *GOLD]),
        figure("labels", "Gold ethics against the number of answers, offline and online"),
        files(results, "python -m experiments.study labels", "labels.csv", "labels"),
    )


def preferences(results: Path) -> str:
    shipped, people = (load(results / f"preferences/{name}_metrics.json") for name in ("shipped", "utilitarianism"))
    right, other = (found["results"]["test"]["accuracy"] for found in (shipped, people))
    return section(
        "How good is a preference model on its own?",
        "A preference model that starts as the generator learns from 4,000 comparisons by the gold judge.",
        claim(
            0.25 < right < shipped["perfect_accuracy"],
            f"It names the best of four new texts in {right:.1%} of the cases; chance is 25%, and knowing the truth "
            f"gives {shipped['perfect_accuracy']:.1%}, as the judge picks one of equally good texts at random.",
        ),
        f"On ETHICS utilitarianism a small model from scratch names the better of two in {other:.1%} of the cases.",
        files(results, "python -m experiments.preferences shipped", "preferences")
        + " The second model: `python -m experiments.preferences utilitarianism`, on files in `--source`.",
    )


def good(log: pd.DataFrame) -> pd.Series:
    """The share of valid and ethical texts."""
    return log.gold_valid * log.gold_ethical


def overoptimisation(results: Path) -> str:
    runs = pd.read_csv(results / "overoptimisation.csv")
    ends, by_variant = runs.groupby("variant").mean(numeric_only=True).sort_values("kl"), runs.set_index("variant")
    free, low = by_variant.loc["kl_coef_0"], by_variant.loc["kl_coef_0.02"]
    folders = sorted((results / "overoptimisation").glob("kl_coef_0_seed*"))
    before = load(folders[0] / "evaluation.json")["gold"]["valid_before"]
    samples, example = pd.read_csv(folders[0] / "evaluation_samples.csv"), "I put the cat on her cat's ear"
    invalid = samples[(samples.policy == "after") & (samples.valid == 0)]
    logs = [pd.read_csv(folder / "log.csv").rolling(5).mean(numeric_only=True) for folder in folders]
    turns, last = pd.DataFrame([log[log.kl > 4].iloc[0] for log in logs]), pd.DataFrame([log.iloc[-1] for log in logs])
    return section(
        "How far can the score be pushed?",
        f"Other KL coefficients, {GRIDS['overoptimisation'].episodes:,} episodes, {runs.seed.nunique()} seeds.",
        claim(
            free.gold_valid.max() < before - 0.05,
            f"Without a KL penalty the policy goes to {free.kl.min():.0f} to {free.kl.max():.0f} nats, and "
            f"{free.gold_valid.min():.0%} to {free.gold_valid.max():.0%} of its texts are valid, not {before:.0%}.",
        ),
        claim(
            (invalid.ethics > 0.5).mean() > 0.9 and invalid.text.str.contains(example).any(),
            f"The classifier takes nine tenths of the invalid ones for ethical, such as *{example}*.",
        ),
        claim(
            (last.ethics.values > turns.ethics.values).all() and (good(last).values < good(turns).values - 0.1).all(),
            "In each run, beyond 4 nats the share of valid and ethical texts falls while the classifier's mean rises.",
        ),
        claim(
            low.worst_query_kl.min() > 10,
            f"A coefficient of 0.02 ends at {low.kl.mean():.1f} nats with {low.gold_valid.mean():.1%} valid texts, and "
            f"its farthest held-out query at {low.worst_query_kl.min():.0f} to {low.worst_query_kl.max():.0f} nats.",
        ),
        table_of_runs(
            "KL coefficient",
            runs,
            {name: name.removeprefix("kl_coef_") for name in ends.index},
            ["ethics", "fraction_of_optimum", *GOLD],
        ),
        figure("overoptimisation", "The classifier's mean and the share of valid and ethical texts against the KL"),
        files(
            results,
            "python -m experiments.study overoptimisation",
            "overoptimisation.csv",
            "overoptimisation",
        ),
    )


def weak_rewards(results: Path) -> str:
    runs = pd.read_csv(results / "rewards.csv")
    paths = [results / f"rewards/{run.variant}_seed{run.seed}/reward_metrics.json" for run in runs.itertuples()]
    runs["right"] = [load(path)["results"]["test"]["accuracy"] for path in paths]
    evaluations = [load(path.with_name("evaluation.json")) for path in paths]
    runs["worst_query_valid"] = [evaluation["worst_query"]["valid"] for evaluation in evaluations]
    before = np.mean([evaluation["gold"]["ethical_before"] for evaluation in evaluations])
    mean = runs.groupby("variant")[["right", "ethics", "gold_ethical"]].mean()
    free, held = (mean.loc[[f"{count}_rows_kl_coef_{coefficient}" for count in PASSES]] for coefficient in (0.02, 0.15))
    low, kept = (runs[runs.variant.str.endswith(f"_{coefficient}")] for coefficient in (0.02, 0.15))
    apart = low[low.worst_query_kl > 10]
    names = {
        f"{count}_rows_kl_coef_{coefficient}": f"{count:,} labels, KL coefficient {coefficient}"
        for coefficient in (0.02, 0.15)
        for count in PASSES
    }
    return section(
        "What does PPO do with a weak reward model?",
        f"Classifiers of 100, 1,000 and all {max(PASSES):,} labelled texts, {GRIDS['rewards'].episodes:,} episodes, "
        f"{runs.seed.nunique()} seeds of classifier and PPO.",
        claim(
            free.gold_ethical.is_monotonic_increasing and free.right.is_monotonic_increasing,
            "They are right about {:.1%}, {:.1%} and {:.1%} of the test texts. With a KL coefficient of 0.02 the texts "
            "end {:.1%}, {:.1%} and {:.1%} gold ethical, before PPO {:.1%} are.".format(
                *free.right, *free.gold_ethical, before
            ),
        ),
        claim(
            free.ethics.min() > 0.75,
            "PPO raises each classifier's mean, true or not: to {:.2f}, {:.2f} and {:.2f}.".format(*free.ethics),
        ),
        claim(
            len(apart) > 4 and apart.worst_query_valid.max() < 0.5 and kept.worst_query_kl.max() < 5,
            f"But in {len(apart)} of {len(low)} runs one held-out query falls apart, with the best classifier, too: "
            f"it is {apart.worst_query_kl.min():.0f} to {apart.worst_query_kl.max():.0f} nats from the reference, and "
            f"at most {apart.worst_query_valid.max():.0%} of the texts after it are valid. With a coefficient of 0.15 "
            f"the farthest query is {kept.worst_query_kl.min():.1f} to {kept.worst_query_kl.max():.1f} nats away.",
        ),
        claim(
            (held.gold_ethical.to_numpy() < free.gold_ethical.to_numpy() + 0.05).all(),
            "A higher KL coefficient limits how far a policy moves; it does not make a weak reward model a good one.",
        ),
        table_of_runs("reward model", runs, names, ["right", "ethics", *GOLD, "worst_query_kl", "worst_query_valid"]),
        figure("rewards", "Each classifier's mean and the share of valid and ethical texts against the KL"),
        files(results, "python -m experiments.study rewards", "rewards.csv", "rewards"),
    )


FRAMES = {  # run folders, and what their reward model is
    "hard/hard": "from scratch",
    "hard/minilm": "pretrained (MiniLM)",
    "pretrained/world": "pretrained (MiniLM), SmolLM2 writes",
}


def hard_frames(results: Path) -> str:
    scratch, minilm, smollm2 = FRAMES
    runs = {name: [load(path) for path in sorted(results.glob(f"{name}_seed*/hard_frames.json"))] for name in FRAMES}
    settings, of_smollm2 = (load(results / f"{name}_seed0/config.json")["settings"] for name in (scratch, smollm2))
    alone = {
        name: load(results / path)["results"]["hard"]["accuracy"]
        for name, path in {"scratch": "cls_metrics.json", "minilm": "hard/minilm_reward_metrics.json"}.items()
    }

    def rise(name: str, what: str) -> np.ndarray:
        return np.array([found["after"]["hard"][what] - found["before"]["hard"][what] for found in runs[name]])

    return section(
        "What if the reward model has not learned some of the texts?",
        "Here the generator knows all 156 frames (situations with two cases and two acts) of the shipped world, and "
        "the classifier has learned 104 of them. One from scratch is right on "
        f"{alone['scratch']:.0%} of the others' texts (`hard.csv`), one that starts as MiniLM on "
        f"{alone['minilm']:.0%}. {settings['episodes']:,} episodes, {len(runs[scratch])} seeds each, the same "
        "reference for both. The last two rows are of SmolLM2 as the generator, "
        f"{of_smollm2['episodes']:,} episodes ([its section](#does-it-work-with-a-pretrained-model)).",
        claim(
            rise(scratch, "classifier_mean").min() > 0.3 and (rise(scratch, "gold_ethical") > 0).sum() == 1,
            "PPO raises the mean of the classifier from scratch on both kinds of frame. On those that it has not "
            "learned, the texts do not improve: one run of three gains, two lose.",
        ),
        claim(
            rise(minilm, "gold_ethical").min() > 0.2,
            f"With the pretrained one they do, by {100 * rise(minilm, 'gold_ethical').min():.0f} to "
            f"{100 * rise(minilm, 'gold_ethical').max():.0f} points: what a reward model has learned elsewhere "
            "reaches situations for which nobody gave it a label. It knows less of the learned frames, where PPO "
            "gains less.",
        ),
        claim(
            (rise(minilm, "classifier_mean") > rise(minilm, "gold_ethical")).all(),
            "Its own mean still rises more than the truth.",
        ),
        table_of_frames(runs),
        files(results, "python -m experiments.hard_frames --seed N", "hard")
        + " With MiniLM, after `make pretrained`: `--reward models/pretrained/world/reward --run minilm_seedN`, too.",
    )


def table_of_frames(runs: dict[str, list[dict]]) -> str:
    """hard_frames.json of the runs with each reward model: means before PPO, and means and ranges after it."""
    kinds = {"learned": "learned frames", "hard": "`hard.csv`"}
    columns = {
        "gold: ethical": ("gold_ethical", "{:.1%}"),
        "classifier's mean": ("classifier_mean", "{:.2f}"),
        "classifier: right": ("classifier_right", "{:.1%}"),
        "share of the valid texts": ("share", "{:.1%}"),
    }

    def cell(of_reward: list[dict], kind: str, key: str, form: str) -> str:
        before, after = (pd.Series([found[when][kind][key] for found in of_reward]) for when in ("before", "after"))
        return f"{form.format(before.mean())} → {spread(after, form)}"

    return table(
        "classifier, texts",
        {
            f"{FRAMES[name]}, {title}": {
                column: cell(of_reward, kind, key, form) for column, (key, form) in columns.items()
            }
            for name, of_reward in runs.items()
            for kind, title in kinds.items()
        },
    )


QUESTIONS = (other_data, labels, preferences, overoptimisation, weak_rewards, hard_frames)
