"""Figures of runs, for the scripts and the notebook, in one style and in colours for colour-blind readers.

A `draw_` function draws on given axes; a `save_` function writes a PNG file and returns its path.
"""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from rlhf import distributed

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
SKY, YELLOW, BLACK, VIOLET = "#56B4E9", "#E69F00", "#000000", "#6A3D9A"
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
RUN = {"markersize": 8, "markeredgecolor": "white", "zorder": 3}  # a dot of a run
SMOOTHING = 5  # updates in the moving averages of the figures of score and KL


def short(lr: float) -> str:
    """A learning rate as in a run's name: 1e-06 -> 1e-6."""
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


@distributed.main_process_only
def save(path: Path, title: str, draw: Callable, *arguments) -> Path:
    """Save the figure that `draw(axes, *arguments)` draws, under this title. Returns the path."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        draw(axes, *arguments)
        axes.set_title(title, fontsize=11)
        figure.savefig(path, metadata={"Software": None})
    return path


# runs with one setting


def load_runs(results: Path, epochs: int, lr: float) -> dict[str, pd.DataFrame]:
    """The logs, by name, of the runs that are named after these settings: K<K>_lr_<lr>_seed<seed>."""
    runs = {}
    for folder in sorted(results.glob(f"K{epochs}_lr_{short(lr)}_seed*")):
        if (folder / "log.csv").exists():
            runs[folder.name] = pd.read_csv(folder / "log.csv")
    return runs


def draw_improvement(axes, runs: dict[str, pd.DataFrame]) -> None:
    """The improvement of every update as a dot, its moving average by run as a thin line, their mean as a thick one."""
    is_single = len(runs) == 1
    for name, log in runs.items():
        axes.plot(log.episodes, log.improvement, ".", color=BLUE, alpha=0.35, markersize=5, markeredgewidth=0)
        style = {"linewidth": 2.5, "label": f"{name}, moving average"} if is_single else {"linewidth": 1, "alpha": 0.5}
        axes.plot(log.episodes, log.improvement_ma, color=BLUE, **style)
    if not is_single:
        mean = pd.concat(runs.values()).groupby("episodes").improvement_ma.mean()
        axes.plot(mean.index, mean, color=BLUE, linewidth=2.5, label=f"moving average, mean of {len(runs)} seeds")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlabel("episodes (responses)")
    axes.set_ylabel("improvement of the ethics score")
    axes.legend(loc="lower right")


def save_improvement(results: Path, epochs: int, lr: float) -> Path | None:
    """data_results/fig_K<K>_lr_<lr>.png, or None if there are no runs with these settings."""
    runs = load_runs(results, epochs, lr)
    if not runs:
        return None
    title = f"Improvement over the policy before fine-tuning (K = {epochs}, learning rate {short(lr)})"
    return save(results / f"fig_K{epochs}_lr_{short(lr)}.png", title, draw_improvement, runs)


def load_evaluations(folders: list[Path]) -> dict[Path, dict]:
    """evaluation.json, by run folder, of those folders that have one."""
    return {
        folder: json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in folders
        if (folder / "evaluation.json").exists()
    }


def draw_frontier(axes, evaluations: dict[Path, dict]) -> None:
    """Score against KL: the optimum and best-of-n of the first evaluation, and all runs during and after training."""
    draw_optimum(axes, evaluations)
    during, after = "PPO during training", "PPO after training, held-out queries"
    for folder, evaluation in evaluations.items():
        log = pd.read_csv(folder / "log.csv").rolling(SMOOTHING, min_periods=1).mean(numeric_only=True)
        axes.plot(log.kl, log.score, color=BLUE, linewidth=0.8, alpha=0.5, label=during)
        axes.plot(evaluation["kl"], evaluation["score_after"], "o", color=BLUE, label=after, **RUN)
        during = after = None  # one entry in the legend for all runs
    axes.legend(loc="best")  # at the lower right, unless runs break and go far


def draw_optimum(axes, evaluations: dict[Path, dict]) -> None:
    """The optimum and best-of-n of the first evaluation, on axes with room for all of them.

    The optimum is dotted beyond the KL up to which its estimate is reliable.
    """
    evaluation = next(iter(evaluations.values()))
    optimum, best_of = pd.DataFrame(evaluation["frontier"]).sort_values("kl"), pd.DataFrame(evaluation["best_of_n"])
    reliable = optimum[optimum.kl <= evaluation["trusted_up_to_kl"]]
    axes.plot(reliable.kl, reliable.score, color=GREY, linewidth=2.5, label="optimum (estimate)")
    axes.plot(optimum.kl, optimum.score, ":", color=GREY, linewidth=1.5)
    axes.plot(best_of.kl_bound, best_of.score, "s", color=ORANGE, markersize=5, label="best-of-n (upper bound of KL)")
    for row in best_of.itertuples():
        axes.annotate(row.n, (row.kl_bound, row.score), (5, -12), textcoords="offset points", color=ORANGE, fontsize=8)
    axes.set_xlim(-0.05, 1.15 * max([best_of.kl_bound.max(), *(run["kl"] for run in evaluations.values())]))
    axes.set_xlabel("KL to the reference (nats per response)")
    axes.set_ylabel("score (standard deviations of the reference's)")


def save_frontier(results: Path, epochs: int, lr: float) -> Path | None:
    """data_results/fig_frontier_K<K>_lr_<lr>.png, or None if no run with these settings is evaluated."""
    evaluations = load_evaluations([results / name for name in load_runs(results, epochs, lr)])
    if not evaluations:
        return None
    path = results / f"fig_frontier_K{epochs}_lr_{short(lr)}.png"
    title = f"Score and KL: PPO, best-of-n and the optimum (K = {epochs}, learning rate {short(lr)})"
    return save(path, title, draw_frontier, evaluations)
