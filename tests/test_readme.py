"""The README's numbers are those of the files it names."""

import json
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(name: str) -> dict:
    return json.loads((ROOT / "data_results" / name).read_text(encoding="utf-8"))


def test_the_table_of_runs():
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `K")]
    assert {row[0].strip("`") for row in rows} == {path.name for path in (ROOT / "data_results").glob("K1_lr_1e-3_*")}
    for name, *cells in rows:
        found = load(f"{name.strip('`')}/evaluation.json")
        gold, (low, high) = found["gold"], found["fraction_of_optimum_interval"]
        assert cells == [
            f"{found['ethics_before']:.3f} → {found['ethics_after']:.3f}",
            f"{gold['ethical_before']:.1%} → **{gold['ethical_after']:.1%}**",
            f"{gold['valid_before']:.1%} → {gold['valid_after']:.1%}",
            f"{found['kl']:.2f}",
            f"{found['fraction_of_optimum']:.1%} ({low:.0%} to {high:.0%})",
        ]


def test_the_long_run():
    found = load("long_seed0/evaluation.json")
    gold, (low, high) = found["gold"], found["fraction_of_optimum_interval"]
    said = (
        f"seed 0 ends at {gold['ethical_after']:.1%} gold ethical, {gold['valid_after']:.1%} valid, and "
        f"{found['fraction_of_optimum']:.1%} ({low:.0%} to {high:.0%}) of the optimum at {found['kl']:.2f} nats"
    )
    assert said in re.sub(r"\s+", " ", README)


def test_the_trials_with_smoothed_labels():
    trials = pd.read_csv(ROOT / "data_results" / "trials.csv")
    found = trials[trials.classifier.str.contains("12 epochs, smoothing 0.05") & (trials.episodes == 53760)]
    assert len(found) == 3
    share, gold = found.fraction_of_optimum_held_out, found.gold_ethical_held_out
    text = re.sub(r"\s+", " ", README)
    assert f"at {share.min():.1%} to {share.max():.1%} of the optimum and {gold.min():.1%} to {gold.max():.1%}" in text


def test_the_models():
    text = re.sub(r"\s+", " ", README)
    test, generator = load("cls_metrics.json")["results"]["test"], load("nlg_metrics.json")["results"]
    assert f"reaches {test['accuracy']:.1%} on `test.csv` (ROC-AUC {test['roc_auc']:.4f}" in text
    assert f"perplexity is {generator['valid_perplexity']:.3f} a token" in text
    assert f"{generator['valid_at_0.7']:.1%} are valid at temperature 0.7" in text
    assert f"and {generator['valid_at_1']:.1%} at 1.0, {generator['ethical_at_0.7']:.1%} of them ethical" in text


def test_every_picture_and_file_it_names_is_there():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`([\w/]+\.(?:py|json|csv|ipynb|md))`", README)
    of_runs = {"config.json", "log.csv", "samples.csv", "evaluation.json", "train.csv", "test.csv", "hard.csv"}
    missing = [name for name in named if "://" not in name and name not in of_runs and not (ROOT / name).exists()]
    assert missing == ["scenarios.py"]  # in data_cls/
