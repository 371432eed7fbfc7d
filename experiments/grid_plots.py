"""Figures of the grids of study.py, for it and for the notebook, in the style of rlhf/plots.py.

`draw_` and `save_` functions as there; `save_<grid>` takes the grid's folder, data_results/<grid>.
"""

from pathlib import Path

import pandas as pd

from rlhf import recipes
from rlhf.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RUN,
    SKY,
    SMOOTHING,
    VIOLET,
    YELLOW,
    draw_optimum,
    load_evaluations,
    save,
    short,
)


def grid_figure(results: Path) -> Path:
    """The figure of a grid of runs: data_results/ablations -> data_results/fig_ablations.png."""
    return results.with_name(f"fig_{results.name}.png")


# score against KL


METHODS = {  # what a run's folder begins with -> its label, colour and marker; of PPO are all others
    "beyond/best_of_": ("best-of-n distilled, by n", GREEN, "o"),
    "beyond/reward_weighted_beta_": ("reward-weighted, by beta", PINK, "o"),
    "start/best_of_": ("best-of-n, then PPO", GREEN, "D"),
    "start/reward_weighted_beta_": ("reward-weighted, then PPO", PINK, "D"),
    "peers/grpo_": ("TRL: GRPO", SKY, "o"),
    "peers/grpo-unscaled_": ("TRL: GRPO, not divided", VIOLET, "o"),
    "peers/rloo_": ("TRL: RLOO", YELLOW, "o"),
    "peers/dpo_": ("TRL: DPO", BLACK, "o"),
}


CROWDED = {"xlim": (0.75, 1.7), "ylim": (0.88, 1.0)}  # where most methods end: KL and score


def draw_beyond(axes, evaluations: dict[Path, dict]) -> None:
    """The optimum, and a dot a run: the runs of the grids `beyond` and `start`, of TRL, and of PPO.

    Where most of them end is drawn a second time, larger.
    """
    inset = axes.inset_axes((0.4, 0.09, 0.57, 0.38), **CROWDED)
    for each in (axes, inset):
        draw_optimum(each, evaluations)
        for folder, evaluation in evaluations.items():
            draw_end(each, folder, (evaluation["kl"], evaluation["score_after"]))
    inset.set(xlabel="", ylabel="", **CROWDED)
    axes.set_ylabel("score (SD of the reference's)")
    axes.indicate_inset_zoom(inset)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=3, fontsize=8, handletextpad=0.3)


def draw_end(axes, folder: Path, end: tuple[float, float]) -> None:
    """Where a run ends, in the colour of its method; the first seeds have their setting beside it."""
    name = f"{folder.parent.name}/{folder.name}"
    method = next((method for method in METHODS if name.startswith(method)), "")
    label, color, marker = METHODS.get(method, ("PPO", BLUE, "o"))
    is_new = label not in axes.get_legend_handles_labels()[1]
    axes.plot(*end, marker, color=color, label=label if is_new else None, **RUN)
    if ", by " in label and name.endswith("_seed0"):
        setting = name.removeprefix(method).removesuffix("_seed0")
        axes.annotate(setting, end, (5, -12), textcoords="offset points", color=color, fontsize=8, annotation_clip=True)


def runs_beyond(results: Path) -> list[Path]:
    """The run folders of the figure, those that are in `results`: all but PPO with half of the texts."""
    name = f"K{recipes.PPO['ppo_epochs'][0]}_lr_{short(recipes.PPO['lr'][0])}_seed*"
    patterns = [name, "beyond/*_seed*", "start/best_of_*_seed*", "start/reward_weighted_*_seed*", "peers/*_seed*"]
    return sorted(folder for pattern in patterns for folder in results.glob(pattern))


def save_beyond(results: Path) -> Path:
    title = "Score and KL of each method, with the same number of sampled texts"
    return save(grid_figure(results), title, draw_beyond, load_evaluations(runs_beyond(results.parent)))


# score and held-out judge against KL


def draw_overoptimisation(axes, results: Path) -> None:
    """The classifier's mean, and the share of valid and ethical responses, of every run in a folder.

    They are drawn against the square root of the KL, as in Gao et al. 2022.
    """
    labels = {"classifier: mean ethics score": BLUE, "gold judge: share that is valid and ethical": ORANGE}
    for path in sorted(results.glob("*/log.csv")):
        log = pd.read_csv(path).rolling(SMOOTHING, min_periods=1).mean(numeric_only=True)
        for (label, color), values in zip(labels.items(), (log.ethics, log.gold_valid * log.gold_ethical), strict=True):
            axes.plot(root_kl(log), values, color=color, linewidth=0.9, alpha=0.7, label=label)
    handles = dict(zip(labels, axes.get_lines(), strict=False))  # one entry in the legend for all runs
    set_kl_axes(axes)
    axes.legend(handles.values(), handles, loc="lower left")


def draw_said_and_true(axes, groups: dict[str, list[pd.DataFrame]]) -> None:
    """The reward model's mean (dashed) and the held-out judge's share (solid), means over the logs of every group.

    The share is that of valid and ethical responses, or of ethical ones if the judge cannot tell which are valid.
    """
    score_lines, judge_lines = [], []
    run_groups = [(name, logs) for name, logs in groups.items() if logs]
    colors = ORANGE, GREEN, BLUE, PINK, SKY, VIOLET, GREY
    for (name, logs), color in zip(run_groups, colors, strict=False):
        mean = pd.concat(logs).groupby("update").mean(numeric_only=True).rolling(SMOOTHING, min_periods=1).mean()
        share = mean.gold_valid.fillna(1) * mean.gold_ethical
        style = {"color": color, "linewidth": 1.5}
        score_lines += axes.plot(root_kl(mean), mean.ethics, "--", label=f"{name}: reward model", **style)
        judge_lines += axes.plot(root_kl(mean), share, color=color, linewidth=2, label="held-out judge")
    set_kl_axes(axes)
    axes.legend(handles=[*score_lines, *judge_lines], loc="lower right", ncols=2, fontsize=9)


def root_kl(log: pd.DataFrame) -> pd.Series:
    return log.kl.clip(lower=0) ** 0.5


def set_kl_axes(axes) -> None:
    axes.set_xlabel("square root of the KL to the reference (KL in nats per response)")
    axes.set_ylabel("mean over responses")
    axes.set_ylim(0, 1.02)


def logs_like(results: Path, pattern: str) -> list[pd.DataFrame]:
    """The logs of all seeds of a variant."""
    return [pd.read_csv(path) for path in sorted(results.glob(f"{pattern}_seed*/log.csv"))]


def save_overoptimisation(results: Path) -> Path:
    title = "Over-optimisation: KL coefficients from 0 to 0.5"
    return save(grid_figure(results), title, draw_overoptimisation, results)


def save_rewards(results: Path) -> Path:
    sizes = sorted({int(path.name.split("_")[0]) for path in results.glob("*_rows_*_seed*")})
    groups = {f"{rows:,} texts": logs_like(results, f"{rows}_rows_kl_coef_0.02") for rows in sizes}
    title = "Reward models of few and of many labelled texts (KL coefficient 0.02)"
    return save(grid_figure(results), title, draw_said_and_true, groups)


REVIEWS = {  # variant of the grid -> its name in the figure
    "default": "3,460 labels, KL coefficient 0.1",
    "no_price": "3,460 labels, no KL penalty",
    "few_labels": "300 labels, KL coefficient 0.1",
    "few_labels_no_price": "300 labels, no KL penalty",
} | {f"answers_{labels}": f"{labels:,} answers" for labels in (60, 250, 1000)}


def save_reviews(results: Path) -> Path:
    groups = {name: logs_like(results, variant) for variant, name in REVIEWS.items()}
    return save(grid_figure(results), "Film reviews: reward model and held-out judge", draw_said_and_true, groups)


def save_data(results: Path) -> Path:
    groups = {name: logs_like(results, name) for name in ("sentiment", "ethics")}
    return save(grid_figure(results), "Other data: reward model and held-out judge", draw_said_and_true, groups)


# policies between the reference and the one that a run ends at


def draw_between(axes, ways: dict[str, pd.DataFrame], column: str, label: str) -> None:
    """A column over the KL, a line a run and a dot a fraction of --interpolate, whose number is beside it.

    ways: name of a run -> a row a fraction, means over seeds, with the columns kl and `column`.
    """
    for (name, way), color in zip(ways.items(), (BLUE, ORANGE, GREEN, PINK, VIOLET, GREY), strict=False):
        axes.plot(way.kl, way[column], "o-", color=color, markersize=5, label=name)
        for fraction, point in way.iterrows():
            axes.annotate(f"{fraction:g}", (point.kl, point[column]), (3, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("KL (nats)")
    axes.set_ylabel(label)
    axes.legend(loc="best", fontsize=8)


# tables of grids


def draw_ablations(axes, table: pd.DataFrame) -> None:
    """The fraction of the optimum by variant, the highest mean on top: bars are means over seeds, dots are runs.

    A cross is a run that failed, or ended beyond the KL up to which the optimum can be estimated.
    """
    means = table.groupby("variant").fraction_of_optimum.mean().sort_values(na_position="first")
    colors = [ORANGE if name in ("default", "nothing") else BLUE for name in means.index]
    axes.barh(means.index, means, color=colors, alpha=0.35)
    for y, name in enumerate(means.index):
        fractions = table[table.variant == name].fraction_of_optimum
        axes.plot(fractions, [y] * len(fractions), "o", color=GREY, markersize=5, markeredgecolor="white")
        if fractions.isna().any():
            label = None if axes.get_legend() else "failed, or optimum unknown at the run's KL"
            axes.plot(0.01, y, "x", color=ORANGE, label=label)
            axes.legend(loc="lower right")
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction of the optimum at the run's KL (one dot per seed)")
    axes.grid(axis="y", visible=False)


def save_ablations(results: Path, title: str = "Ablations: one setting changed at a time") -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    return save(grid_figure(results), title, draw_ablations, table)


def save_details(results: Path) -> Path:
    return save_ablations(results, "One implementation detail wrong at a time")


def save_query_kl(results: Path) -> Path:
    return save_ablations(results, "KL penalty inside queries or not, and the KL coefficient it falls to")


def save_critic(results: Path) -> Path:
    return save_ablations(results, "What helps the critic")


def save_start(results: Path) -> Path:
    return save_ablations(results, "PPO with half of the texts, by its start")


def save_recipe(results: Path) -> Path:
    return save_ablations(results, "SmolLM2-135M on sentiment: one setting changed at a time")


def save_models(results: Path) -> Path:
    return save_ablations(results, "Other generators (layers x width)")


def draw_labels(axes, table: pd.DataFrame, without: float) -> None:
    """The gold judge's share of ethical texts by number of answers ([1], Fig. 2).

    Dots are runs, lines means over seeds. without: the share before PPO.
    """
    table = table.assign(
        labels=table.variant.str.split("_").str[0].astype(int), when=table.variant.str.split("_").str[1]
    )
    for when, color, label in (
        ("offline", ORANGE, "offline: one round, before PPO"),
        ("online", BLUE, "online: four rounds during PPO"),
    ):
        runs = table[table.when == when]
        axes.plot(runs.labels, runs.gold_ethical, "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
        means = runs.groupby("labels").gold_ethical.mean()
        axes.plot(means.index, means, color=color, linewidth=2.5, label=label)
    axes.axhline(without, color=GREY, linewidth=1, linestyle=":", label="generator before PPO")
    axes.set_xscale("log")
    ticks = sorted(set(table.labels))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("answers (each: which of four texts is best)")
    axes.set_ylabel("gold judge: share of ethical texts")
    axes.legend(loc="upper left")


def save_labels(results: Path) -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    title = "Human feedback by a simulated annotator: how many answers are needed"
    return save(grid_figure(results), title, draw_labels, table, without_labels(results))


def without_labels(results: Path) -> float:
    """The gold judge's share of ethical texts before PPO, the mean over the runs of a grid."""
    evaluations = load_evaluations(sorted(results.glob("*_seed*"))).values()
    return sum(evaluation["gold"]["ethical_before"] for evaluation in evaluations) / len(evaluations)


def draw_stability(axes, table: pd.DataFrame) -> None:
    """The share of valid and ethical texts by PPO epochs and learning rate, means over seeds, and the broken runs."""
    settings = table.variant.str.extract(r"K(\d+)_lr_(.+)").set_axis(["K", "lr"], axis=1)
    table = table.assign(K=settings.K.astype(int), lr=settings.lr.astype(float), broken=table.broken.fillna("") != "")
    table["share"] = table.gold_valid.fillna(1) * table.gold_ethical  # a judge of real text cannot tell what is valid
    by_setting = {"index": "K", "columns": "lr", "dropna": False}
    shares = table.pivot_table(values="share", aggfunc="mean", **by_setting)
    broken, runs = (table.pivot_table(values="broken", aggfunc=name, **by_setting) for name in ("sum", "count"))
    image = axes.imshow(shares, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for y, epochs in enumerate(shares.index):
        for x, lr in enumerate(shares.columns):
            share, count = shares.loc[epochs, lr], broken.loc[epochs, lr]
            text = f"{share:.0%}" + (f"\n{count:.0f} of {runs.loc[epochs, lr]:.0f} broken" if count else "")
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if share < 0.6 else "black")
    axes.set_xticks(range(len(shares.columns)), [short(lr) for lr in shares.columns])
    axes.set_yticks(range(len(shares.index)), shares.index)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("K (PPO epochs)")
    axes.grid(visible=False)
    judged = "held-out judge: positive" if table.gold_valid.isna().all() else "gold judge: valid and ethical"
    axes.figure.colorbar(image, label=judged)


def save_stability(results: Path, title: str = "Stability: PPO epochs and learning rate") -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    return save(grid_figure(results), title, draw_stability, table)


def save_stability_reviews(results: Path) -> Path:
    return save_stability(results, "SmolLM2-135M on film reviews: PPO epochs and learning rate")


def save_stability_adapters(results: Path) -> Path:
    return save_stability(results, "The same with adapters (LoRA): PPO epochs and learning rate")
