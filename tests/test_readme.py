"""The README's numbers are those of the files it names, as they were shipped."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def as_shipped():
    """Who has called make has numbers of their own, which differ by what another processor rounds."""
    changed = subprocess.run(["git", "status", "--porcelain", "data_results"], cwd=ROOT, capture_output=True, text=True)
    if changed.stdout:
        pytest.skip("data_results/ holds numbers of your own runs")


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


def test_the_trials_with_a_constant_price():
    trials = pd.read_csv(ROOT / "data_results" / "trials.csv")
    found = trials[trials.change.isna() & (trials.episodes == 56320)].fraction_of_optimum_held_out
    assert len(found) == 5
    said = f"With a constant price of KL, 0.2, five seeds end at {found.min():.1%} to {found.max():.1%} of the optimum"
    assert said in re.sub(r"\s+", " ", README)


def test_every_default_run_passes_its_bar():
    for folder in (ROOT / "data_results").glob("K1_lr_1e-3_seed*"):
        found = load(f"{folder.name}/evaluation.json")
        assert found["fraction_of_optimum"] >= 0.92
        assert found["gold"]["ethical_after"] >= 0.97
        assert found["gold"]["valid_after"] >= found["gold"]["valid_before"] - 0.02


def test_the_ablations():
    share = pd.read_csv(ROOT / "data_results" / "ablations.csv").groupby("variant").fraction_of_optimum.mean()
    said = (
        f"twice the learning rate ends at {share['lr_2e-3']:.0%} of the optimum, K = 2 at {share['K2']:.0%}, the "
        f"default at {share['default']:.0%}, no critic at {share['no_critic']:.0%}, leave-one-out (four answers to a "
        f"query, in place of the critic) at {share['leave_one_out']:.0%}, Adam in place of Muon at "
        f"{share['adam_lr_5e-4']:.0%}"
    )
    assert said in re.sub(r"\s+", " ", README)
    kl = pd.read_csv(ROOT / "data_results" / "ablations.csv").groupby("variant").kl.mean()
    said = (
        f"{share['K4_clip_range_0.05']:.0%} with 0.05, {share['K4']:.0%} with 0.2, {share['K4_no_clip']:.0%} without a "
        f"clip, at {kl['K4_no_clip']:.1f} nats in place of {kl['K4']:.1f}"
    )
    assert said in re.sub(r"\s+", " ", README)


def test_the_trials_of_one_seed():
    trials = pd.read_csv(ROOT / "data_results" / "trials.csv", keep_default_na=False)
    trials = trials[(trials.episodes == 56320) & (trials.seed == 1)]
    share = trials.fraction_of_optimum_held_out.astype(float)
    faster = share[trials.settings.str.contains("lr 0.002, lambda 1, kl_coef 0.15")].item()
    no_critic = share[trials.change.str.contains("no critic")].item()
    default = load("K1_lr_1e-3_seed1/evaluation.json")["fraction_of_optimum"]
    said = (
        f"whose default ends at {default:.1%}, twice the learning rate ends at {faster:.1%}, and no critic at all "
        f"(`--value-coef 0`) at {no_critic:.1%}"
    )
    assert said in re.sub(r"\s+", " ", README)


def test_the_peer():
    table = pd.read_csv(ROOT / "data_results" / "peer.csv")
    said = [
        f"| {run.fraction_of_optimum:.1%} | {run.gold_ethical:.1%} | {run.gold_valid:.1%} | {run.kl:.2f} |"
        for run in table.itertuples()
    ]
    part = README.split("<!-- peer -->")[1].split("<!-- /peer -->")[0]
    assert [row[row.index(" | ") + 1 :] for row in part.splitlines() if row.startswith(("| this", "| TRL"))] == said
    minutes = table.set_index("run").minutes
    took = f"took {minutes['trl_our_settings_seed0']:.1f} minutes, ours {minutes['K1_lr_1e-3_seed0']:.1f}"
    assert took in re.sub(r"\s+", " ", part)
    for run in table.itertuples():
        folder = run.run if run.run.startswith("K1") else f"peer/{run.run}"
        assert load(f"{folder}/evaluation.json")["fraction_of_optimum"] == pytest.approx(
            run.fraction_of_optimum, abs=1e-4
        )


def test_how_far_a_score_can_be_pushed():
    runs = pd.read_csv(ROOT / "data_results" / "overoptimisation.csv").set_index("variant")
    free, cheap = runs.loc["kl_coef_0"], runs.loc["kl_coef_0.02"]
    folder = ROOT / "data_results" / "overoptimisation" / "kl_coef_0_seed0"
    before = json.loads((folder / "evaluation.json").read_text())["gold"]["valid_before"]
    for said in (
        f"the policy goes to {free.kl:.1f} nats and fools the classifier: {free.gold_valid:.1%} of its texts are valid "
        f"in place of {before:.1%}",
        f"At {cheap.kl:.1f} nats (`--kl-coef 0.02`) {cheap.gold_valid:.1%} are valid.",
    ):
        assert said in re.sub(r"\s+", " ", README)
    samples = pd.read_csv(folder / "evaluation_samples.csv")
    invalid = samples[(samples.policy == "after") & (samples.valid == 0)]
    assert (invalid.ethics > 0.5).mean() > 0.9
    assert invalid.text.str.contains("I made Paul work and gave Paul the days off").any()
    log = pd.read_csv(folder / "log.csv").rolling(5).mean(numeric_only=True)
    turn = log[log.kl > 4].iloc[0]
    assert log.ethics.iloc[-1] > turn.ethics and log.gold_valid.iloc[-1] < turn.gold_valid


def test_stability():
    runs = pd.read_csv(ROOT / "data_results" / "stability.csv")
    broken, fast = runs.broken.notna(), runs.variant.str.endswith("1e-2")
    text = re.sub(r"\s+", " ", README)
    one_pass = runs.variant.str.startswith("K1")
    assert not broken[~fast].any() and (~fast).sum() == 80
    assert broken[fast & ~one_pass].all() and (fast & ~one_pass).sum() == 15 and broken[one_pass].sum() == 1
    assert f"the KL goes to {int(runs[broken].kl.min())} nats and more" in text
    valid = runs.groupby("variant").gold_valid.mean()
    assert f"({valid['K2_lr_1e-2']:.1%} of them with K = 2, {valid['K8_lr_1e-2']:.1%} with K = 8)" in text


def test_what_answers_are_worth():
    ethical = pd.read_csv(ROOT / "data_results" / "labels.csv").groupby("variant").gold_ethical.mean()
    text = re.sub(r"\s+", " ", README)
    offline = {labels: f"{ethical[f'{labels}_offline']:.1%}" for labels in (60, 250, 1000, 4000)}
    assert f"With 60 answers the texts are {offline[60]} ethical, as without any;" in text
    assert f"with 250 it is {offline[250]}, with 1,000 {offline[1000]}, with 4,000 {offline[4000]}." in text
    assert f"ends lower with 4,000 ({ethical['4000_online']:.1%})" in text


def test_models_of_preferences():
    found = {name: load(f"preferences/{name}_metrics.json") for name in ("shipped", "utilitarianism")}
    right = {name: metrics["results"]["test"]["accuracy"] for name, metrics in found.items()}
    text = re.sub(r"\s+", " ", README)
    assert (
        f"four new texts in {right['shipped']:.1%} of the cases, where chance is 25% and one who knows the truth"
        in text
    )
    assert f"reaches {found['shipped']['perfect_accuracy']:.1%}, as equals are common" in text
    assert f"tells the better of two in {right['utilitarianism']:.1%}" in text


def test_other_data():
    for name, said in (
        ("sentiment", "finds positive goes from {before:.1%} to {after:.1%} at a KL of {kl:.1f} nats"),
        ("ethics", "finds right goes from {before:.1%} to {after:.1%} at {kl:.1f} nats"),
    ):
        found = load(f"data/{name}_seed0/evaluation.json")
        gold = {when: found["gold"][f"ethical_{when}"] for when in ("before", "after")}
        assert said.format(**gold, kl=found["kl"]) in re.sub(r"\s+", " ", README)
    right = [
        load(f"data/{name}_seed0/judge_metrics.json")["results"]["test"]["accuracy"] for name in ("sentiment", "ethics")
    ]
    assert "judges are right about {:.1%} and {:.1%} of the test texts".format(*right) in re.sub(r"\s+", " ", README)


def test_one_detail_wrong():
    runs = pd.read_csv(ROOT / "data_results" / "details.csv")
    mean = runs.groupby("variant")[["fraction_of_optimum", "kl"]].mean()
    share, kl = mean.fraction_of_optimum, mean.kl
    dropout = runs[runs.variant == "dropout"]
    assert dropout.broken.notna().all() and dropout.kl.min() > 100
    text = re.sub(r"\s+", " ", README)
    assert f"padding keep {share.positions:.0%} of the optimum in place of {share.nothing:.0%}" in text
    assert f"starts at random ends at {share.value_head:.0%}" in text
    assert f"normalised goes to {kl.score:.1f} nats in place of {kl.nothing:.1f}" in text
    for detail in ("advantages", "adam_eps"):
        assert abs(share[detail] - share.nothing) < 0.03


def test_other_generators():
    runs = pd.read_csv(ROOT / "data_results" / "models.csv")
    share = runs.groupby("variant").fraction_of_optimum.mean()
    text = re.sub(r"\s+", " ", README)
    gpt2 = [f"{share[f'gpt2_{size}']:.0%}" for size in ("1x64", "2x128", "3x192")]
    assert "end at {}, {} and {} of the optimum, ".format(*gpt2) in text
    others = f"of 2 x 128 at {share['gpt_neox_2x128']:.0%} and {share['llama_2x128']:.0%}, all from about half to"
    assert f"{others} {int(100 * runs.gold_ethical.min())}% and more gold ethical" in text


def test_hard_frames():
    found = load("hard/hard_seed0/hard_frames.json")
    (learned, learned_after), (hard, hard_after) = (
        [found[when][name]["gold_ethical"] for when in ("before", "after")] for name in ("learned", "hard")
    )
    said = f"frames from {learned:.1%} to {learned_after:.1%} gold ethical, texts about the others from {hard:.1%} to "
    text = re.sub(r"\s+", " ", README)
    assert f"{said}{hard_after:.1%}, while" in text
    means = [found[when]["hard"]["classifier_mean"] for when in ("before", "after")]
    assert "over the latter goes from {:.2f} to {:.2f}".format(*means) in text


def test_weak_reward_models():
    runs = pd.read_csv(ROOT / "data_results" / "rewards.csv").groupby("variant")[["gold_ethical", "kl"]].mean()
    runs = [runs.loc[f"{rows}_rows_kl_coef_0.02"] for rows in (100, 1000, 9360)]
    right = []
    for rows in (100, 1000, 9360):
        of_seeds = (ROOT / "data_results" / "rewards").glob(f"{rows}_rows_kl_coef_0.02_seed*/reward_metrics.json")
        right.append(
            pd.Series([json.loads(path.read_text())["results"]["test"]["accuracy"] for path in of_seeds]).mean()
        )
    text = re.sub(r"\s+", " ", README)
    assert "right about {:.1%}, {:.1%} and {:.1%} of the test texts".format(*right) in text
    assert "end at {:.1%}, {:.1%} and {:.1%} gold ethical".format(*(run.gold_ethical for run in runs)) in text
    assert "and at {:.1f}, {:.1f} and {:.1f} nats".format(*(run.kl for run in runs)) in text


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
