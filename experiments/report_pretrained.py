"""Questions about pretrained models, a function a section of docs/results.md, as in experiments/report_ppo.py."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.markdown import claim, files, lines, load, section
from rlhf import plots

BEST_OF_2 = 0.56, 0.19  # gain in SD and KL in nats of the better of two samples, if scores are normally distributed


def trials(results: Path) -> str:
    """Runs that look for the settings of `make pretrained`."""
    runs = pd.read_csv(results / "pretrained/trials.csv").set_index("trial")
    logs = {name: pd.read_csv(results / f"pretrained/trials/{name}/log.csv") for name in runs.index}
    right = {
        name: load(results / f"pretrained/sentiment/{name}_metrics.json")["results"]["test"]["accuracy"]
        for name in ("reward", "judge")
    }
    longer = runs[runs.episodes == 10_240]
    fifths = [logs[name].score.groupby(logs[name].index * 5 // len(logs[name])).mean() for name in longer.index]
    strongest, first = runs.score_last_fifth.idxmax(), logs["leave_one_out_kl_coef_0.3_longer_seed0"]
    alone, others = runs.loc["kl_coef_0.3"], runs.loc["leave_one_out_kl_coef_0.3"]
    seed0 = runs.loc["leave_one_out_kl_coef_0.3_longer_seed0"]
    ended = [log.terminated.head(2).mean() for log in logs.values()], runs.terminated_last_fifth
    rows = [
        [
            plots.short(run.lr) + ("" if pd.isna(run.lora_rank) else f", LoRA of rank {run.lora_rank:.0f}"),
            f"{run.kl_coef:g}",
            "leave-one-out, 4 answers" if run.leave_one_out else "none",
            f"{run.episodes:,}",
            str(run.seed),
            f"{run.ethics_last_fifth:.2f}",
            f"{run.score_last_fifth:.2f}",
            f"{run.kl_last_fifth:.2f}",
        ]
        for run in runs.itertuples()
    ]
    return section(
        "Does it work with a pretrained model?",
        "Not well enough yet. SmolLM2-135M continues beginnings of film reviews (SST-2). The reward model is MiniLM, a "
        f"judge SmolLM2 itself, on the other half of the labels; they are right on {right['reward']:.0%} and "
        f"{right['judge']:.0%} of the test sentences. The aim is that the judge finds nine tenths of the texts good at "
        "6 nats or less. These trials look for settings that get there.",
        claim(
            not ((runs.ethics_last_fifth > 0.85) & (runs.kl_last_fifth < 6)).any(),
            "In none of them does the reward model's own mean come near it within 6 nats.",
        ),
        lines(
            [
                "learning rate",
                "KL coefficient",
                "baseline",
                "episodes",
                "seed",
                "reward model's mean",
                "score (SD)",
                "KL (nats)",
            ],
            rows,
        ),
        "Means over the last fifth of the updates.",
        claim(
            (longer.kl_coef == 0.3).all() and all(np.ptp(means.iloc[2:]) < 0.1 for means in fifths),
            "With a KL coefficient of 0.3 the score hardly moves after two fifths of 10,240 episodes.",
        ),
        claim(
            runs.kl_coef.idxmin() == strongest and runs.kl_last_fifth.idxmax() == strongest,
            "The lowest coefficient, with a higher learning rate, gains most and goes furthest.",
        ),
        claim(
            max(ended[0]) < 0.82 and ended[1].min() > 0.87,
            "Part of the gain is the stop token: a text without one scores -1 SD, and a quarter of them lacks it at "
            "first, a tenth or less at the end.",
        ),
        claim(
            seed0.kl_last_fifth > 5 * BEST_OF_2[1] and seed0.score_last_fifth - first.score[:2].mean() < BEST_OF_2[0],
            f"Of normally distributed scores the better of two samples gains {BEST_OF_2[0]} SD at {BEST_OF_2[1]} nats. "
            f"The first of the longer runs takes {seed0.kl_last_fifth:.1f} nats for less than that.",
        ),
        claim(first.kl[5] > 0.3, f"Its first five updates alone cost {first.kl[5]:.1f} nats."),
        claim(
            others.score_last_fifth > alone.score_last_fifth and others.kl_last_fifth < alone.kl_last_fifth,
            f"Leave-one-out ends at the higher score ({others.score_last_fifth:.2f} against "
            f"{alone.score_last_fifth:.2f}) and the lower KL ({others.kl_last_fifth:.2f} against "
            f"{alone.kl_last_fifth:.2f} nats), in one seed. It is the default for pretrained models, unless a flag "
            "asks for a critic.",
        ),
        files(results, "python -m experiments.study recipe --seeds 1", "pretrained/trials.csv", "pretrained/trials")
        + " The command of each trial is in its `config.json`.",
    )


QUESTIONS = (trials,)
