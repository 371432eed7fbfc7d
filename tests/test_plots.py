"""What the figures show: means, crosses, broken runs and legends."""

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import grid_plots
from rlhf import plots

RESULTS = Path(__file__).resolve().parent.parent / "data_results"


@pytest.fixture
def axes():
    return Figure().subplots()


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def table_of(rows, *columns):
    return pd.DataFrame(rows, columns=["variant", *columns])


@pytest.mark.parametrize(("seeds", "label"), [(1, "run0, moving average"), (3, "moving average, mean of 3 seeds")])
def test_the_thick_line_is_the_mean_over_seeds(axes, seeds, label):
    logs = {
        f"run{seed}": pd.DataFrame({"episodes": [8, 16], "improvement": [0.0, 1.0], "improvement_ma": [0.0, seed]})
        for seed in range(seeds)
    }
    plots.draw_improvement(axes, logs)
    assert labels_of(axes) == [label]
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    assert line.get_ydata().tolist() == [0.0, (seeds - 1) / 2]


def test_the_frontier_has_every_run_and_one_legend(axes):
    folders = sorted(RESULTS.glob("K2_lr_1e-3_seed*"))
    evaluations = plots.load_evaluations(folders)
    assert list(evaluations) == folders
    plots.draw_frontier(axes, evaluations)
    assert len(labels_of(axes)) == len(set(labels_of(axes))) == 4
    ends = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if line.get_marker() == "o"]
    assert ends == [(evaluation["kl"], evaluation["score_after"]) for evaluation in evaluations.values()]


def test_runs_of_other_methods_stand_beside_those_of_ppo(axes):
    points = [{"kl": 0.0, "score": 0.0}, {"kl": 3.0, "score": 1.0}]
    shared = {"frontier": points, "best_of_n": [{"n": 4, "kl_bound": 0.6, "score": 0.5}], "trusted_up_to_kl": 2.0}
    names = [f"beyond/{name}" for name in ("best_of_4_seed0", "best_of_4_seed1", "reward_weighted_beta_0.2_seed0")]
    names += ["K2_lr_1e-3_seed0", "peers/grpo_K2_lr_1e-4_beta_0.05_seed0"]
    names += ["peers/grpo-unscaled_K2_lr_1e-4_beta_0.05_seed0", "start/reward_weighted_beta_0.2_seed0"]
    ends = {Path("data_results") / name: {"kl": 0.1 * i, "score_after": 0.2 * i} for i, name in enumerate(names)}
    grid_plots.draw_beyond(axes, {folder: shared | end for folder, end in ends.items()})
    dots = [line for line in axes.get_lines() if line.get_marker() in ("o", "D")]
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots]
    assert drawn == [(end["kl"], end["score_after"]) for end in ends.values()]
    colors = [line.get_color() for line in dots]
    assert colors == [plots.GREEN, plots.GREEN, plots.PINK, plots.BLUE, plots.SKY, plots.VIOLET, plots.PINK]
    assert [line.get_marker() for line in dots] == [*"oooooo", "D"]  # what goes on with PPO is a diamond
    kinds = ["best-of-n distilled, by n", "reward-weighted, by beta", "PPO", "TRL: GRPO", "TRL: GRPO, not divided"]
    kinds += ["reward-weighted, then PPO"]
    assert labels_of(axes) == ["optimum (estimate)", "best-of-n (upper bound of KL)", *kinds]
    assert [text.get_text() for text in axes.texts] == ["4", "4", "0.2"]  # best-of-n, and the first seeds


def test_bars_are_means_and_runs_without_a_fraction_are_crosses(axes):
    rows = [("a", 0.2), ("a", 0.4), ("default", 0.9), ("b", None), ("b", None), ("c", 0.5), ("c", None)]
    grid_plots.draw_ablations(axes, table_of(rows, "fraction_of_optimum").astype({"fraction_of_optimum": float}))
    bars = {label.get_text(): bar.get_width() for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)}
    assert list(bars) == ["b", "a", "c", "default"]  # from the bottom
    assert [bars[name] for name in ("a", "c", "default")] == pytest.approx([0.3, 0.5, 0.9])
    crosses = [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "x"]
    assert crosses == [0, 2]  # of b and c
    assert labels_of(axes) == ["failed, or optimum unknown at the run's KL"]


def test_a_cell_has_the_mean_share_and_the_broken_runs(axes):
    rows = [("K1_lr_1e-3", 1.0, 0.8, None), ("K1_lr_1e-3", 0.5, 0.8, None)]
    rows += [("K2_lr_1e-2", 0.1, 1.0, "KL above 20 nats"), ("K2_lr_1e-2", 0.3, 1.0, None)]
    rows += [("K1_lr_1e-2", 0.5, 0.5, None), ("K2_lr_1e-3", None, None, "error: no memory")]
    grid_plots.draw_stability(axes, table_of(rows, "gold_valid", "gold_ethical", "broken"))
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[0, 0] == "60%" and cells[1, 0] == "25%"
    assert cells[1, 1] == "20%\n1 of 2 broken"
    assert cells[0, 1].endswith("1 of 1 broken")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "1e-2"]


def test_a_way_is_a_line_whose_dots_are_fractions(axes):
    rows = {1.0: {"kl": 4.0, "judge": 0.95}, 0.5: {"kl": 1.0, "judge": 0.7}}
    grid_plots.draw_between(axes, {"reviews": pd.DataFrame(rows).T}, "judge", "share")
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[4.0, 0.95], [1.0, 0.7]]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("1", (4.0, 0.95)), ("0.5", (1.0, 0.7))]
    assert labels_of(axes) == ["reviews"] and axes.get_ylabel() == "share"


def test_the_judges_share_is_that_of_valid_and_ethical_texts(axes):
    log = pd.DataFrame({"update": [1, 2], "kl": [-0.1, 4.0], "ethics": [0.5, 0.7], "gold_ethical": [0.5, 0.5]})
    grid_plots.draw_said_and_true(axes, {"a": [log.assign(gold_valid=0.4)], "b": [log.assign(gold_valid=float("nan"))]})
    curves = [(line.get_linestyle(), line.get_xdata().tolist(), line.get_ydata()[0]) for line in axes.get_lines()]
    root = [0.0, ((4.0 - 0.1) / 2) ** 0.5]  # of the moving average of the KL
    assert [(style, pytest.approx(y)) for style, _, y in curves] == [("--", 0.5), ("-", 0.2), ("--", 0.5), ("-", 0.5)]
    assert all(x == pytest.approx(root) for _, x, _ in curves)
    assert labels_of(axes) == ["a: reward model", "b: reward model", "held-out judge", "held-out judge"]


def test_what_is_saved(tmp_path):
    """A figure per grid, beside the grid's folder; none for runs that are not there or not evaluated."""
    assert plots.save_improvement(tmp_path, 1, 1e-3) is None and plots.save_frontier(tmp_path, 1, 1e-3) is None
    run = tmp_path / "K1_lr_1e-3_seed0"
    run.mkdir()
    log = pd.DataFrame({"episodes": [8], "improvement": [0.1], "improvement_ma": [0.1]})
    log.to_csv(run / "log.csv", index=False)
    assert plots.save_improvement(tmp_path, 1, 1e-3) == tmp_path / "fig_K1_lr_1e-3.png"
    assert plots.save_frontier(tmp_path, 1, 1e-3) is None
    table_of([("default", 0.5)], "fraction_of_optimum").to_csv(tmp_path / "ablations.csv", index=False)
    for path in (grid_plots.save_ablations(tmp_path / "ablations"), tmp_path / "fig_K1_lr_1e-3.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert path.parent == tmp_path and (tmp_path / "fig_ablations.png").exists()


def test_the_line_without_labels_is_a_mean_over_runs(tmp_path):
    for seed, share in enumerate((0.4, 0.6)):
        folder = tmp_path / f"60_online_seed{seed}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"gold": {"ethical_before": share}}))
    assert grid_plots.without_labels(tmp_path) == 0.5
