"""What keeps the pretrained model's texts varied, a function a section, as in experiments/report_ppo.py."""

from pathlib import Path

import pandas as pd

from experiments.markdown import claim, files, section, table
from experiments.report_pretrained import evaluation_of, gains
from experiments.report_trials import OURS

ONE_MINIBATCH = [f"pretrained/sentiment/minibatches_1_lr_1e-4_seed{seed}" for seed in range(3)]


def varied(results: Path) -> str:
    """A higher KL coefficient and a bounded score, on the same models as the default's run OURS; for ethics, made
    anew with the same commands."""
    folders = {
        "reviews: the default": [OURS],
        "reviews: KL coefficient 0.15": [f"pretrained/trials/kl_coef_0.15_seed{seed}" for seed in range(3)],
        "reviews: bounded score": [f"pretrained/sentiment/bounded_score_seed{seed}" for seed in range(3)],
        "reviews: one minibatch, learning rate 1e-4": ONE_MINIBATCH,
        "ethics: the default": [f"pretrained/ethics_seed{seed}" for seed in range(3)],
        "ethics: bounded score": ["pretrained/ethics/bounded_score_seed0"],
    }
    runs = {title: pd.DataFrame([evaluation_of(results / name) for name in names]) for title, names in folders.items()}
    default, higher, bounded, whole, stories, bounded_stories = runs.values()
    seeds = {title: f"{title}, {len(of_title)} seed{'s' * (len(of_title) > 1)}" for title, of_title in runs.items()}
    return section(
        "What keeps the texts of the pretrained model varied?",
        "The KL coefficient of the default is 0.1, and its scores are log-odds, which have no end. `--bounded-score` "
        "takes the probability instead, so that a text that is surely good gains nothing by more praise.",
        table("runs", {seeds[title]: gains(of_title) for title, of_title in runs.items()}),
        claim(
            (higher.kl.max() < default.kl.min() - 0.5)
            and (bounded.kl.max() < default.kl.min() - 0.3)
            and min(higher.judge.min(), bounded.judge.min()) > 0.9
            and max(higher.distinct.max(), bounded.distinct.max()) > default.distinct.max() + 0.05,
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
        "What does mend it is below: a policy between the reference and the one that PPO ends at.",
        files(results, "finetuning_nlg.py --bounded-score ...", "pretrained/trials", "pretrained/sentiment")
        + " Two of the bounded runs had the score from a file, which did the same.",
    )


OF_PRETRAINED, SHIPPED = "pretrained/interpolation", "shipped texts: the default, from scratch"
INTERPOLATED = {  # folder of a run before its fraction and with {} for its seed; number of seeds; fractions
    "reviews: the default": (f"{OF_PRETRAINED}/sentiment_seed{{}}", 1, (0.9, 0.8, 0.7)),
    "reviews: one minibatch, learning rate 1e-4": (f"{OF_PRETRAINED}/minibatches_1_lr_1e-4_seed{{}}", 3, (0.8,)),
    "reviews: learning rate 1e-4": (f"{OF_PRETRAINED}/lr_1e-4_seed{{}}", 1, (1, 0.7, 0.6, 0.5)),
    "reviews: the same, KL coefficient 0.05": (f"{OF_PRETRAINED}/lr_1e-4_kl_coef_0.05_seed{{}}", 1, (1, 0.7, 0.6, 0.5)),
    "ethics: bounded score": (f"{OF_PRETRAINED}/ethics_bounded_score_seed{{}}", 1, (0.8,)),
    SHIPPED: ("interpolation/K2_lr_1e-3_seed{}", 1, (1, 0.9, 0.8)),
}
ENDED_AT = {  # where they were evaluated as they ended, in another folder
    "reviews: the default": [OURS],
    "reviews: one minibatch, learning rate 1e-4": ONE_MINIBATCH,
    "ethics: bounded score": ["pretrained/ethics/bounded_score_seed0"],
}


def interpolation(results: Path) -> str:
    """Policies between the reference and the one that a run ends at."""
    runs = {}
    for title, (name, seeds, fractions) in INTERPOLATED.items():
        if title in ENDED_AT:
            runs[title, 1] = [evaluation_of(results / folder) for folder in ENDED_AT[title]]
        for fraction in fractions:
            of_seeds = (f"{name.format(seed)}_interpolate_{fraction:g}" for seed in range(seeds))
            runs[title, fraction] = [evaluation_of(results / run) for run in of_seeds]
    runs = {key: pd.DataFrame(rows) for key, rows in runs.items()}
    ends = {title: runs[title, 1] for title, _ in runs}
    first, whole, *_ = INTERPOLATED
    back, farther = runs[whole, 0.8], runs["reviews: the same, KL coefficient 0.05", 0.5]
    shorter = [(ends[title], of_fraction) for (title, fraction), of_fraction in runs.items() if fraction < 1]
    log = pd.read_csv(results / OURS / "log.csv")
    on_the_way = log.iloc[(log.kl - runs[first, 0.8].kl[0]).abs().argmin()]
    return section(
        "What does a policy between the reference and PPO's gain?",
        "`--interpolate 0.8` writes a policy whose weights lie on the straight line between the two, 0.8 of the way to "
        "the one that PPO ends at (Rame et al. 2024 call it interpolation towards the initialization). Nothing is "
        "trained again. 1 is the policy that PPO ends at.",
        table(
            "run, and fraction",
            {
                f"{title}, {len(rows)} seed{'s' * (len(rows) > 1)}: {fraction:g}": gains(rows)
                for (title, fraction), rows in runs.items()
            },
        ),
        claim(
            all((of_fraction.kl < end.kl).all() for end, of_fraction in shorter)
            and all((of_fraction.distinct > end.distinct).all() for end, of_fraction in shorter),
            "Every policy on the way back has a lower KL and more distinct pairs of words.",
        ),
        claim(
            runs[SHIPPED, 1].fraction_of_optimum[0] > runs[SHIPPED, 0.9].fraction_of_optimum[0] + 0.005
            and runs[SHIPPED, 0.9].fraction_of_optimum[0] > runs[SHIPPED, 0.8].fraction_of_optimum[0] + 0.005,
            "On the shipped texts, where PPO ends near the optimum, it loses more score than the KL is worth, so the "
            "default is 1.",
        ),
        claim(
            back.judge.min() > 0.9 and back.distinct.min() >= 0.8 and back.kl.max() < 3,
            f"With one minibatch, 0.8 of the way, the judge finds {back.judge.min():.1%} to {back.judge.max():.1%} of "
            f"the texts good, at {back.kl.min():.1f} to {back.kl.max():.1f} nats, and at least "
            f"{back.distinct.min():.2f} of the distinct pairs are left in each of three seeds.",
        ),
        claim(
            abs(farther.kl[0] - back.kl.mean()) < 0.1 and farther.judge[0] < back.judge.mean(),
            "To go farther first, with a higher learning rate and a lower KL coefficient, and then half of the way "
            f"back, gains no more: {farther.judge[0]:.1%} at {farther.kl[0]:.1f} nats.",
        ),
        claim(
            runs[first, 0.8]["mean"][0] > on_the_way.ethics + 0.05,
            "It is not the policy that PPO had on its way: when the default's rollouts had "
            f"{on_the_way.kl:.1f} nats, the reward model's mean was {on_the_way.ethics:.2f}, and "
            f"{runs[first, 0.8].kl[0]:.1f} nats away on the line it is {runs[first, 0.8]['mean'][0]:.2f}.",
        ),
        files(
            results,
            "python -m experiments.interpolation --run ... --fractions 0.8",
            OF_PRETRAINED,
            "interpolation",
        ),
    )


QUESTIONS = (varied, interpolation)
