"""docs/results.md, docs/log.md and README's tables are what experiments/report.py makes of the committed files."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from experiments import report
from experiments.report_ppo import default_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data_results"


@pytest.fixture(autouse=True, scope="module")
def as_shipped():
    """Who has called make has numbers of their own, which differ by what another processor rounds."""
    changed = subprocess.run(["git", "status", "--porcelain", "data_results"], cwd=ROOT, capture_output=True, text=True)
    if changed.stdout:
        pytest.skip("data_results/ holds numbers of your own runs")


@pytest.fixture
def results(tmp_path):
    """A copy, whose numbers a test may change."""
    return Path(shutil.copytree(RESULTS, tmp_path / "data_results"))


def test_the_pages_are_current():
    for path, text in report.pages(RESULTS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python -m experiments.report"


def test_every_default_run_passes_its_bar():
    runs = default_runs(RESULTS)
    assert len(runs) == 5
    assert (runs.fraction_of_optimum >= 0.95).all()
    assert (runs.ethical_after >= 0.985).all()
    assert (runs.valid_after >= runs.valid_before - 0.01).all()
    assert (runs.kl <= 1.4).all()
    assert all(worst["kl"] <= 5 and worst["valid"] >= 7 / 8 for worst in runs.worst_query)


@pytest.mark.parametrize(
    "path",
    [
        *sorted({path.name for path in RESULTS.glob("*.csv")} - {"data.csv"}),
        "pretrained/trials/kl_coef_0.3/log.csv",
    ],
)
def test_a_changed_table_is_noticed(results, path):
    table = pd.read_csv(results / path)
    column = "kl_last_8_updates" if path == "trials.csv" else "kl"
    table[column] *= 1.1
    table.to_csv(results / path, index=False)
    assert noticed(results)


@pytest.mark.parametrize(
    "path",
    [
        "K2_lr_1e-3_seed1/evaluation.json",
        "cls_metrics.json",
        "nlg_metrics.json",
        "data/ethics_seed0/evaluation.json",
        "beyond/reward_weighted_beta_0.2_seed1/evaluation.json",
        "hard/hard_seed0/hard_frames.json",
        "hard/minilm_seed2/hard_frames.json",
        "peers/rloo_K2_lr_3e-4_beta_0.15_seed0/evaluation.json",
        "preferences/shipped_metrics.json",
        "pretrained/sentiment/reward_metrics.json",
        "hard/minilm_reward_metrics.json",
        "pretrained/world_seed1/hard_frames.json",
        "pretrained/sentiment_seed0/evaluation.json",
        "rewards/100_rows_kl_coef_0.02_seed0/reward_metrics.json",
    ],
)
def test_a_changed_run_is_noticed(results, path):
    def lowered(value, name=""):
        if isinstance(value, dict):
            return {key: lowered(x, key) for key, x in value.items()}
        return value * 0.9 if isinstance(value, float) and name != "beta" else value

    record = json.loads((results / path).read_text(encoding="utf-8"))
    (results / path).write_text(json.dumps(lowered(record)), encoding="utf-8")
    assert noticed(results)


def noticed(results: Path) -> bool:
    """Whether a page changes, or the command stops at a sentence."""
    try:
        pages = report.pages(results)
    except AssertionError as error:
        assert "sentence" in str(error)
        return True
    return any(path.read_text(encoding="utf-8") != text for path, text in pages.items())


def test_a_sentence_that_no_longer_holds_stops_the_command(results):
    table = pd.read_csv(results / "stability.csv")
    table.loc[table.variant == "K4_lr_1e-3", "broken"] = "KL above 20 nats"
    table.to_csv(results / "stability.csv", index=False)
    with pytest.raises(AssertionError, match="Up to 3e-3 none of"):
        report.pages(results)
