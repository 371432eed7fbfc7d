"""What keeps the pretrained model's texts varied, a function a section, as in experiments/report_ppo.py."""

from pathlib import Path

import pandas as pd

from experiments.markdown import claim, files, section, table
from experiments.report_pretrained import WHOLE_WAY, evaluation_of, gains
from experiments.report_trials import OURS

ONE_MINIBATCH = [f"pretrained/sentiment/minibatches_1_lr_1e-4_seed{seed}" for seed in range(3)]


def with_seeds(title: str, runs: pd.DataFrame) -> str:
    return f"{title}, {len(runs)} seed{'s' * (len(runs) > 1)}"


def varied(results: Path) -> str:
    """What was tried against repetition, on the models of OURS; for ethics, made anew with the same commands."""
    folders = {
        "reviews: the default": [OURS],
        "reviews: KL coefficient 0.15": [f"pretrained/trials/kl_coef_0.15_seed{seed}" for seed in range(3)],
        "reviews: bounded score": [f"pretrained/sentiment/bounded_score_seed{seed}" for seed in range(3)],
        "reviews: one minibatch, learning rate 1e-4": ONE_MINIBATCH,
        "ethics: the default": WHOLE_WAY["ethics"],
        "ethics: bounded score": ["pretrained/ethics/bounded_score_seed0"],
    }
    runs = {title: pd.DataFrame([evaluation_of(results / name) for name in names]) for title, names in folders.items()}
    first, higher, bounded, whole, stories, bounded_stories = runs.values()
    return section(
        "What keeps the texts of the pretrained model varied?",
        "Where PPO ends with a pretrained model the texts repeat themselves. The KL coefficient of the default is 0.1, "
        "and its scores are log-odds, which have no end. `--bounded-score` takes the probability instead, so that a "
        "text that is surely good gains nothing by more praise. All of these are with `--interpolate 1`.",
        table("runs", {with_seeds(title, of_title): gains(of_title) for title, of_title in runs.items()}),
        claim(
            (higher.kl.max() < first.kl.min() - 0.5)
            and (bounded.kl.max() < first.kl.min() - 0.3)
            and min(higher.judge.min(), bounded.judge.min()) > 0.9
            and max(higher.distinct.max(), bounded.distinct.max()) > first.distinct.max() + 0.05,
            "On film reviews both go less far than the default, and most of their runs keep more of the distinct "
            "pairs of words, at some points less of the judge's share.",
        ),
        claim(
            all((of_title.distinct < 0.8).sum() == 1 for of_title in (higher, bounded, whole)),
            "But neither rules out that the policy repeats itself, nor do a quarter of the optimizer steps, each on a "
            "whole batch and twice as long: one run of three does with each of them, and it is no farther from the "
            "reference than the others. *A good* is what has become frequent in the samples of one.",
        ),
        claim(
            bounded_stories.kl.max() < stories.kl.min() - 1 and bounded_stories.distinct.min() > stories.distinct.max(),
            f"On moral stories, in one run, the bounded score costs {bounded_stories.kl[0]:.1f} nats instead of "
            f"{stories.kl.min():.1f} and more, for a judge's share of {bounded_stories.judge[0]:.0%} instead of "
            f"{stories.judge.mean():.0%}.",
        ),
        "What helps most is below: a policy between the reference and the one that PPO ends at.",
        files(results, "finetuning_nlg.py --bounded-score ...", "pretrained/trials", "pretrained/sentiment")
        + " Two of the bounded runs had the score from a file, which did the same.",
    )


def at_fractions(run: str, seeds: int, *fractions: float) -> dict[float, list[str]]:
    """Fraction -> the folders that experiments/interpolation.py wrote for these seeds of a run."""
    return {fraction: [f"{run}_seed{seed}_interpolate_{fraction:g}" for seed in range(seeds)] for fraction in fractions}


BETWEEN = "pretrained/interpolation"
WORLD, SHIPPED = "world: an earlier generator", "shipped texts: the default, from scratch"
DEFAULT, OF_ONE, FARTHER = (
    "reviews: the default",
    "reviews: one minibatch, learning rate 1e-4",
    "reviews: learning rate 1e-4, KL coefficient 0.05",
)
SLOW = "pretrained/world/minibatches_1_lr_1e-4_seed0"
INTERPOLATED = {  # runs -> fraction -> folders, a seed each
    DEFAULT: {1: [OURS]}
    | at_fractions(f"{BETWEEN}/sentiment", 1, 0.9)
    | {0.8: [f"pretrained/sentiment_seed{seed}" for seed in range(3)]}
    | at_fractions(f"{BETWEEN}/sentiment", 1, 0.7),
    OF_ONE: {1: ONE_MINIBATCH} | at_fractions(f"{BETWEEN}/minibatches_1_lr_1e-4", 3, 0.8),
    "reviews: learning rate 1e-4": at_fractions(f"{BETWEEN}/lr_1e-4", 1, 1, 0.7, 0.6, 0.5),
    FARTHER: at_fractions(f"{BETWEEN}/lr_1e-4_kl_coef_0.05", 1, 1, 0.7, 0.6, 0.5),
    "ethics: bounded score": {1: ["pretrained/ethics/bounded_score_seed0"]}
    | at_fractions(f"{BETWEEN}/ethics_bounded_score", 1, 0.8),
    WORLD: {1: WHOLE_WAY["world"]} | at_fractions(f"{BETWEEN}/world", 3, 0.8),
    SHIPPED: at_fractions("interpolation/K2_lr_1e-3", 1, 1, 0.9, 0.8),
}


def between(results: Path) -> dict[tuple[str, float], pd.DataFrame]:
    """(runs, fraction) -> a row a seed."""
    return {
        (title, fraction): pd.DataFrame([evaluation_of(results / folder) for folder in folders])
        for title, of_title in INTERPOLATED.items()
        for fraction, folders in of_title.items()
    }


def interpolation(results: Path) -> str:
    """Policies between the reference and the one that a run ends at."""
    runs = between(results)
    back, farther, first = runs[OF_ONE, 0.8], runs[FARTHER, 0.5], runs[DEFAULT, 0.8]
    world, ends_of_world = runs[WORLD, 0.8], runs[WORLD, 1]
    shorter = [(runs[title, 1], of_fraction) for (title, fraction), of_fraction in runs.items() if fraction < 1]
    slow, fast = (pd.read_csv(results / folder / "log.csv") for folder in (SLOW, WHOLE_WAY["world"][0]))
    fast = fast.head(len(slow))
    log = pd.read_csv(results / OURS / "log.csv")
    on_the_way = log.iloc[(log.kl - first.kl[0]).abs().argmin()]
    return section(
        "What does a policy between the reference and PPO's gain?",
        "`--interpolate 0.8` writes a policy whose weights lie on the straight line between the two, 0.8 of the way to "
        "the one that PPO ends at (Rame et al. 2024 call it interpolation towards the initialization). Nothing is "
        "trained again. 1 is the policy that PPO ends at.",
        table(
            "run, and fraction",
            {f"{with_seeds(title, rows)}: {fraction:g}": gains(rows) for (title, fraction), rows in runs.items()},
        ),
        claim(
            all(of_fraction.kl.mean() < end.kl.mean() for end, of_fraction in shorter)
            and all(of_fraction.distinct.mean() > end.distinct.mean() for end, of_fraction in shorter),
            "On the way back the KL is lower, and there are more distinct pairs of words.",
        ),
        claim(
            runs[SHIPPED, 1].fraction_of_optimum[0] > runs[SHIPPED, 0.9].fraction_of_optimum[0] + 0.005
            and runs[SHIPPED, 0.9].fraction_of_optimum[0] > runs[SHIPPED, 0.8].fraction_of_optimum[0] + 0.005,
            "On the shipped texts, where PPO ends near the optimum, it loses more score than the KL is worth: from "
            "scratch the default is 1.",
        ),
        claim(
            first.judge.min() > 0.9 and first.kl.max() < 3 and first.distinct.mean() > 0.8,
            f"With the default, 0.8, the judge finds {first.judge.min():.1%} to {first.judge.max():.1%} of the reviews "
            f"good, at {first.kl.min():.1f} to {first.kl.max():.1f} nats, and {first.distinct.min():.2f} to "
            f"{first.distinct.max():.2f} of the distinct pairs are left.",
        ),
        claim(
            world.judge.mean() < ends_of_world.judge.mean() and world.kl.mean() < ends_of_world.kl.mean(),
            f"SmolLM2 on the shipped texts, whose run is short, ends at {world.judge.mean():.0%} instead of "
            f"{ends_of_world.judge.mean():.0%} ethical.",
        ),
        claim(
            back.judge.min() > 0.9 and back.distinct.min() >= 0.8 and back.kl.max() < 3,
            f"With one minibatch, 0.8 of the way, the judge finds {back.judge.min():.1%} to {back.judge.max():.1%} "
            f"of them good, at {back.kl.min():.1f} to {back.kl.max():.1f} nats, and at least "
            f"{back.distinct.min():.2f} of the pairs are left with each seed.",
        ),
        claim(
            0.4 < slow.score.tail(8).mean() / fast.score.tail(8).mean() < 0.65,
            f"But a run with it on the shipped texts, stopped after {len(slow)} updates, had gained a score of "
            f"{slow.score.tail(8).mean():.2f} by then, the default {fast.score.tail(8).mean():.2f}. So the default has "
            "four.",
        ),
        claim(
            abs(farther.kl[0] - back.kl.mean()) < 0.1 and farther.judge[0] < back.judge.mean(),
            "To go farther first, with a higher learning rate and a lower KL coefficient, and then half of the way "
            f"back, gains no more: {farther.judge[0]:.1%} at {farther.kl[0]:.1f} nats.",
        ),
        claim(
            first["mean"][0] > on_the_way.ethics + 0.05,
            "It is not the policy that PPO had on its way: when the default's rollouts had "
            f"{on_the_way.kl:.1f} nats, the reward model's mean was {on_the_way.ethics:.2f}, and "
            f"{first.kl[0]:.1f} nats away on the line it is {first['mean'][0]:.2f}.",
        ),
        files(
            results,
            "python -m experiments.interpolation --run ... --fractions 0.8",
            BETWEEN,
            "interpolation",
        ),
    )


QUESTIONS = (varied, interpolation)
