"""Figures of runs, for the scripts and the notebook: one style, colours that colour-blind people can tell apart."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import pandas as pd

from rlhf import distributed

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def short(lr: float) -> str:
    """A learning rate as in a run's name: 1e-06 -> 1e-6."""
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def load_runs(results: Path, epochs: int, lr: float) -> dict[str, pd.DataFrame]:
    """The logs of the finished and running default-named runs with these settings."""
    runs = {}
    for folder in sorted(results.glob(f"K{epochs}_lr_{short(lr)}_seed*")):
        if (folder / "log.csv").exists():
            runs[folder.name] = pd.read_csv(folder / "log.csv")
    return runs


def ethics_before(folder: Path) -> float:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["ethics_before"]


def draw_improvement(axes, runs: dict[str, pd.DataFrame]) -> None:
    """Moving averages, every seed thin and their mean thick, over the raw points."""
    alone = len(runs) == 1
    for name, log in runs.items():
        axes.plot(log.episodes, log.improvement, ".", color=BLUE, alpha=0.35, markersize=5, markeredgewidth=0)
        style = {"linewidth": 2.5, "label": f"{name}, moving average"} if alone else {"linewidth": 1, "alpha": 0.5}
        axes.plot(log.episodes, log.improvement_ma, color=BLUE, **style)
    if len(runs) > 1:
        mean = pd.concat(runs.values()).groupby("episodes").improvement_ma.mean()
        axes.plot(mean.index, mean, color=BLUE, linewidth=2.5, label=f"moving average, mean of {len(runs)} seeds")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlabel("episodes (responses written and scored)")
    axes.set_ylabel("improvement of the ethics score")
    axes.legend(loc="lower right")


@distributed.by_the_first
def save(path: Path, title: str, draw, *what) -> Path:
    """The picture that `draw(axes, *what)` draws."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw(axes, *what)
        axes.set_title(title, fontsize=11)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return path


def save_improvement(results: Path, epochs: int, lr: float) -> Path | None:
    """data_results/fig_K<K>_lr_<lr>.png: the improvement over the policy before fine-tuning."""
    runs = load_runs(results, epochs, lr)
    if not runs:
        return None
    title = f"Improvement over the policy before fine-tuning (K = {epochs}, learning rate {short(lr)})"
    return save(results / f"fig_K{epochs}_lr_{short(lr)}.png", title, draw_improvement, runs)


def load_evaluations(folders: list[Path]) -> dict[Path, dict]:
    """evaluation.json of those folders that have one."""
    return {
        folder: json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in folders
        if (folder / "evaluation.json").exists()
    }


def draw_frontier(axes, evaluations: dict[Path, dict]) -> None:
    """Score against KL: what is possible, best-of-n, and every run's way and end."""
    first = next(iter(evaluations.values()))
    frontier, best_of = pd.DataFrame(first["frontier"]).sort_values("kl"), pd.DataFrame(first["best_of_n"])
    known = frontier[frontier.kl <= first["trusted_up_to_kl"]]
    axes.plot(known.kl, known.score, color=GREY, linewidth=2.5, label="the optimum, estimated")
    axes.plot(frontier.kl, frontier.score, ":", color=GREY, linewidth=1.5)
    axes.plot(best_of.kl_bound, best_of.score, "s", color=ORANGE, markersize=5, label="best of n, at its KL's bound")
    for row in best_of.itertuples():
        axes.annotate(row.n, (row.kl_bound, row.score), (5, -12), textcoords="offset points", color=ORANGE, fontsize=8)
    for i, (folder, evaluation) in enumerate(evaluations.items()):
        log = pd.read_csv(folder / "log.csv").rolling(5, min_periods=1).mean(numeric_only=True)
        axes.plot(log.kl, log.score, color=BLUE, linewidth=0.8, alpha=0.5, label=None if i else "PPO, while it trains")
        end = {"label": None if i else "PPO, at the end, held-out queries", "markeredgecolor": "white", "zorder": 3}
        axes.plot(evaluation["kl"], evaluation["score_after"], "o", color=BLUE, markersize=8, **end)
    axes.set_xlim(-0.05, 1.15 * max([best_of.kl_bound.max(), *(run["kl"] for run in evaluations.values())]))
    axes.set_xlabel("KL to the reference (nats a response)")
    axes.set_ylabel("score (deviations of the reference)")
    axes.legend(loc="lower right")


def save_frontier(results: Path, epochs: int, lr: float) -> Path | None:
    """data_results/fig_frontier_K<K>_lr_<lr>.png, of the evaluated runs with these settings."""
    evaluations = load_evaluations([results / name for name in load_runs(results, epochs, lr)])
    if not evaluations:
        return None
    path = results / f"fig_frontier_K{epochs}_lr_{short(lr)}.png"
    return save(path, "What PPO gained, and what was possible at the same KL", draw_frontier, evaluations)


def draw_overoptimisation(axes, results: Path) -> None:
    """What the classifier says and what is true, against the way from the reference, of every run in a folder.

    The truth is the share of responses that are valid and ethical; the square root of KL is the distance of Gao et al.
    """
    logs = [pd.read_csv(path).rolling(5, min_periods=1).mean(numeric_only=True) for path in results.glob("*/log.csv")]
    for i, log in enumerate(logs):
        distance = log.kl.clip(lower=0) ** 0.5
        for values, color, label in (
            (log.ethics, BLUE, "the classifier's ethics score"),
            (log.gold_valid * log.gold_ethical, ORANGE, "gold: valid and ethical"),
        ):
            axes.plot(distance, values, color=color, linewidth=0.9, alpha=0.7, label=None if i else label)
    axes.set_xlabel("square root of the KL to the reference (nats a response)")
    axes.set_ylabel("mean over responses")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower left")


def save_overoptimisation(results: Path) -> Path:
    """data_results/fig_overoptimisation.png, of the runs in data_results/overoptimisation/."""
    title = "How far a score can be pushed before it is no longer true"
    return save(results.with_name(f"fig_{results.name}.png"), title, draw_overoptimisation, results)


def draw_said_and_true(axes, groups: dict[str, list[pd.DataFrame]]) -> None:
    """As `draw_overoptimisation`, but groups of runs, means over the logs of each.

    Where the judge cannot tell what is valid, the truth is the share that it finds ethical.
    """
    said, true = [], []
    for (name, logs), color in zip(groups.items(), (ORANGE, GREEN, BLUE), strict=False):
        mean = pd.concat(logs).groupby("update").mean(numeric_only=True).rolling(5, min_periods=1).mean()
        distance, truth = mean.kl.clip(lower=0) ** 0.5, mean.gold_valid.fillna(1) * mean.gold_ethical
        said += axes.plot(distance, mean.ethics, "--", color=color, linewidth=1.5, label=f"{name}: the reward model")
        true += axes.plot(distance, truth, color=color, linewidth=2, label="gold")
    axes.set_xlabel("square root of the KL to the reference (nats a response)")
    axes.set_ylabel("mean over responses")
    axes.set_ylim(0, 1.02)
    axes.legend(handles=[*said, *true], loc="lower right", ncols=2, fontsize=9)


def logs_like(results: Path, pattern: str) -> list[pd.DataFrame]:
    return [pd.read_csv(path) for path in sorted(results.glob(f"{pattern}_seed*/log.csv"))]


def save_rewards(results: Path) -> Path:
    sizes = sorted({int(path.name.split("_")[0]) for path in results.glob("*_rows_*_seed*")})
    groups = {f"{rows:,} texts": logs_like(results, f"{rows}_rows_kl_coef_0.02") for rows in sizes}
    title = "A weak and a strong reward model, where KL is cheap"
    return save(results.with_name(f"fig_{results.name}.png"), title, draw_said_and_true, groups)


def save_data(results: Path) -> Path:
    groups = {name: logs_like(results, name) for name in ("sentiment", "ethics")}
    title = "Other data: the reward model, and a judge with labels of its own"
    return save(results.with_name(f"fig_{results.name}.png"), title, draw_said_and_true, groups)


def draw_ablations(axes, table: pd.DataFrame) -> None:
    """Share of the optimum of every run, a row a variant, the best on top; bars are means.

    Runs that failed, or ended where the optimum is not known, are crosses.
    """
    means = table.groupby("variant").fraction_of_optimum.mean().sort_values(na_position="first")
    colors = [ORANGE if name in ("default", "nothing") else BLUE for name in means.index]
    axes.barh(means.index, means, color=colors, alpha=0.35)
    for place, name in enumerate(means.index):
        runs = table[table.variant == name]
        axes.plot(runs.fraction_of_optimum, [place] * len(runs), "o", color=GREY, markersize=5, markeredgecolor="white")
        failed = int(runs.fraction_of_optimum.isna().sum())
        axes.plot([0.01] * failed, [place] * failed, "x", color=ORANGE)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the optimum at the run's own KL (a dot a seed)")
    axes.grid(axis="y", visible=False)


def save_ablations(results: Path, title: str = "One switch at a time") -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    return save(results.with_name(f"fig_{results.name}.png"), title, draw_ablations, table)


def save_details(results: Path) -> Path:
    return save_ablations(results, "One detail wrong")


def save_models(results: Path) -> Path:
    return save_ablations(results, "Other generators")


def draw_labels(axes, table: pd.DataFrame, without: float) -> None:
    """Gold ethics against the number of labels ([1], figure 2), and `without` any: every run a dot, means as lines."""
    table = table.assign(
        labels=table.variant.str.split("_").str[0].astype(int), when=table.variant.str.split("_").str[1]
    )
    for when, color in {"offline": ORANGE, "online": BLUE}.items():
        runs = table[table.when == when]
        axes.plot(runs.labels, runs.gold_ethical, "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
        means = runs.groupby("labels").gold_ethical.mean()
        axes.plot(means.index, means, color=color, linewidth=2.5, label=when)
    axes.axhline(without, color=GREY, linewidth=1, linestyle=":", label="no labels: the generator as it is")
    axes.set_xscale("log")
    ticks = sorted(set(table.labels))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labels (which of four texts is best)")
    axes.set_ylabel("gold: ethical")
    axes.legend(loc="upper left")


def save_labels(results: Path) -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    without = without_labels(results)
    return save(results.with_name(f"fig_{results.name}.png"), "What answers are worth", draw_labels, table, without)


def without_labels(results: Path) -> float:
    """Gold ethics of the generator as it is, which every run of a grid was compared with."""
    evaluations = load_evaluations(sorted(results.glob("*_seed*"))).values()
    return sum(evaluation["gold"]["ethical_before"] for evaluation in evaluations) / len(evaluations)


def draw_stability(axes, table: pd.DataFrame) -> None:
    """Valid and ethical texts by PPO epochs and learning rate, means over seeds, and how many runs broke."""
    place = table.variant.str.extract(r"K(\d+)_lr_(.+)").set_axis(["K", "lr"], axis=1)
    table = table.assign(K=place.K.astype(int), lr=place.lr.astype(float), broken=table.broken.fillna("") != "")
    table["good"] = table.gold_valid * table.gold_ethical
    good = table.pivot_table(index="K", columns="lr", values="good", aggfunc="mean", dropna=False)
    broken = table.pivot_table(index="K", columns="lr", values="broken", aggfunc="sum", dropna=False)
    image = axes.imshow(good, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for y, epochs in enumerate(good.index):
        for x, lr in enumerate(good.columns):
            count, value = broken.loc[epochs, lr], good.loc[epochs, lr]
            text = f"{value:.0%}" + (f"\n{count:.0f} broken" if count else "")
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(good.columns)), [short(lr) for lr in good.columns])
    axes.set_yticks(range(len(good.index)), good.index)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("K, PPO epochs")
    axes.grid(visible=False)
    axes.figure.colorbar(image, label="gold: valid and ethical")


def save_stability(results: Path) -> Path:
    table = pd.read_csv(results.with_suffix(".csv"))
    return save(
        results.with_name(f"fig_{results.name}.png"), "Where PPO learns and where it breaks", draw_stability, table
    )
