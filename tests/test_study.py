"""Grids of runs, with runs of a second."""

import argparse
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from submitit.core.utils import FailedJobError, UncompletedJobError

from experiments import grids, hard_frames, preferences, study
from rlhf.errors import UserError
from tests.conftest import ROOT, SHARED, TINY_RUN, refused, run


@pytest.fixture
def home(chain, tmp_path, monkeypatch):
    """A folder with trained models, and a grid of one variant that works and one that fails."""
    shutil.copytree(chain[0], tmp_path / "home")
    tiny = " ".join(TINY_RUN)
    variants = {"fine": tiny, "broken": f"{tiny} --reward models/nowhere"}
    monkeypatch.setitem(grids.GRIDS, "ablations", grids.Grid(32, variants))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # jobs import study.py, which is __main__ otherwise
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "home"


def test_a_grid_runs_once_and_says_what_failed(home, monkeypatch):
    run_command = study.subprocess.run

    def run_quickly(command, **kwargs):  # an evaluation of the full size takes half a minute
        few = ["--queries", "2", "--samples", "8", "--reference-samples", "64"] if "--run" in command else []
        return run_command([*command, *few], **kwargs)

    monkeypatch.setattr(study.subprocess, "run", run_quickly)
    output = run("experiments.study", "ablations", "--seeds", "1", "--at-once", "2", cwd=home)
    assert "broken_seed0 failed" in output.stderr + output.stdout
    table = pd.read_csv(home / "data_results" / "ablations.csv").set_index(["variant", "seed"])
    assert table.index.tolist() == [("broken", 0), ("fine", 0)]
    assert table.broken["broken"].str.startswith("error: --reward models/nowhere").all()
    assert table.gold_valid.notna().tolist() == [False, True]

    monkeypatch.setattr(study, "run_commands", None)  # finished and failed runs are not run again
    run("experiments.study", "ablations", "--seeds", "1", cwd=home)
    second_table = pd.read_csv(home / "data_results" / "ablations.csv").set_index(["variant", "seed"])
    pd.testing.assert_frame_equal(second_table, table)


def test_what_a_study_needs_is_looked_at_first(home, tmp_path):
    assert "the runs need models/nlg, which is not there" in refused("experiments.study", "ablations", cwd=tmp_path)
    assert not (tmp_path / "data_results").exists()
    flags = "--cluster", "slurm", "--partition", "gpu"
    assert "--cluster slurm: Could not detect" in refused("experiments.study", "ablations", *flags, cwd=home)


def test_ppo_goes_on_from_a_supervised_policy_with_the_other_half_of_the_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(grid="start", only=None, seeds=1, episodes=None, retry=False, source="hub")
    commands = study.commands_to_run(args, tmp_path / "data_results" / "start")
    (ppo,) = commands["reference_seed0"]
    assert "--start-from" not in ppo and value_of("--episodes", ppo) == "28160"
    supervised, ppo = commands["best_of_8_seed0"]
    assert supervised[:4] == ["experiments.without_ppo", "best_of_n", "--answers", "8"]
    assert value_of("--start-from", ppo) == value_of("--out", supervised)
    assert value_of("--episodes", ppo) == value_of("--episodes", supervised)


def value_of(flag, command):
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(
    "name", ["stability", "stability_reviews", "stability_adapters", "overoptimisation", "details", "reviews"]
)
def test_runs_that_may_break_have_no_guard(name):
    grid = grids.GRIDS[name]
    assert all("--no-kl-guard" in f"{grid.shared} {flags}" for flags in grid.variants.values())


class Job:
    """A job that has ended: it returns its result or raises an error, like submitit's."""

    def __init__(self, result, state, stderr=None):
        self._result, self.state, self._stderr = result, state, stderr

    def done(self):
        return True

    def result(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def stderr(self):
        return self._stderr


LOST = UncompletedJobError("Job 7 (task: 0) has not produced any output (state: ...)")
RAISED = FailedJobError("Job (task=0) failed during processing with trace:\n...")
ENDED_JOBS = [
    (Job("", "COMPLETED"), ""),
    (Job("", "FINISHED"), ""),  # what local jobs call it
    (Job("", "RUNNING"), ""),  # it has returned; SLURM was asked for its state before that
    (Job("Traceback\nerror: --lr is too high\n", "COMPLETED"), "error: --lr is too high"),
    (Job(LOST, "TIMEOUT", "12 %\nslurmstepd: DUE TO TIME LIMIT\n"), "TIMEOUT: slurmstepd: DUE TO TIME LIMIT"),
    (Job(LOST, "CANCELLED by 1000"), "CANCELLED by 1000: Job 7 (task: 0) has not produced any output (state: ...)"),
    (Job(LOST, "OUT_OF_MEMORY", "slurmstepd: oom-kill\n"), "OUT_OF_MEMORY: slurmstepd: oom-kill"),
    (Job(LOST, "NODE_FAIL", ""), "NODE_FAIL: Job 7 (task: 0) has not produced any output (state: ...)"),
    (Job(LOST, "INTERRUPTED", "killed\n"), "INTERRUPTED: killed"),  # a local job's state after kill -9
    (Job(RAISED, "FAILED", "Traceback\nOSError: no space\n"), "FAILED: OSError: no space"),
]


@pytest.mark.parametrize(("job", "expected"), ENDED_JOBS, ids=lambda x: getattr(x, "state", ""))
def test_a_job_without_a_result_has_failed(job, expected):
    by_its_own_error = expected.startswith(("error", "Job"))
    assert study.failure(job) == (expected if by_its_own_error or not expected else f"the job ended as {expected}")


def test_a_job_that_slurm_ends_does_not_end_the_study(monkeypatch, tmp_path):
    jobs = {f"run{i}": job for i, (job, _) in enumerate(ENDED_JOBS)}

    class Executor:
        def __init__(self, folder, cluster):
            pass

        def update_parameters(self, **parameters):
            pass

        def submit(self, function, commands, variables):
            return jobs[commands]

    monkeypatch.setattr(study.submitit, "AutoExecutor", Executor)
    args = argparse.Namespace(grid="ablations", cluster="slurm", partition="gpu", at_once=2)
    study.run_all(args, {run: run for run in jobs}, tmp_path)
    failed = {path.parent.name: path.read_text() for path in tmp_path.glob("*/failed.txt")}
    assert failed == {run: study.failure(job) + "\n" for run, job in jobs.items() if study.failure(job)}
    assert len(failed) == 7


def test_an_unknown_variant():
    assert "ablations has no variant 'nothing', only default, constant_kl_coef" in refused(
        "experiments.study", "ablations", "--only", "nothing"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"kl": 21}, "KL above 20 nats"),
        ({"valid": 0.49}, "fewer than half of the texts valid"),
        ({"valid": None}, ""),
        ({"entropy": 0.01}, "entropy under a tenth of the reference's"),
        ({"gains": [0.1, 0.4, 0.19]}, "more than half of the gain lost by the end"),
        ({"gains": [0.01, 0.04, -0.1]}, ""),  # there was none to lose
    ],
)
def test_what_counts_as_broken(change, expected):
    run = {"kl": 1, "valid": 1, "entropy": 0.2, "gains": [0.1, 0.4, 0.21]} | change
    evaluation = {
        "kl": run["kl"],
        "gold": {"valid_after": run["valid"]},
        "diversity": {"before": {"entropy": 0.23}, "after": {"entropy": run["entropy"]}},
    }
    assert study.collapse(pd.DataFrame({"improvement_ma": run["gains"]}), evaluation) == expected


@pytest.mark.parametrize(
    ("set_by_the_user", "expected"),
    [(None, ["0", "1", "2"]), ("2", ["2"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), ("", [])],
)
def test_a_study_uses_the_gpus_that_the_user_allows(monkeypatch, set_by_the_user, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if set_by_the_user is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", set_by_the_user)
    assert study.visible_gpus() == expected


def test_the_models_that_a_run_needs_are_trained_first(home, monkeypatch):
    tiny = f"{' '.join(TINY_RUN)} --policy models/ablations/inputs/{{run}}/nlg"
    setup = "train_nlg.py --out models/ablations/inputs/{run}/nlg --results data_results/ablations/{run} --epochs 1"
    setup += " --data texts --samples 16 --seed {seed} --model scratch:gpt2:1x64"
    monkeypatch.setitem(
        grids.GRIDS, "ablations", grids.Grid(32, {"small_generator": tiny}, setup=lambda variant: [setup])
    )
    (home / "texts").mkdir()
    lines = (ROOT / "data_nlg" / "valid.txt").read_text(encoding="utf-8").splitlines()
    for name in ("train", "valid"):
        (home / "texts" / f"{name}.txt").write_text("\n".join(lines[:100]), encoding="utf-8")
    monkeypatch.setattr(
        study, "row_of", lambda folder: {"variant": "small_generator", "broken": "", "gold_ethical": 1.0}
    )
    monkeypatch.setattr(study.seeds, "summary", lambda table: table)
    monkeypatch.setattr(study, "groups", lambda folders: [])  # without an evaluation
    monkeypatch.setattr(study.grid_plots, "save_ablations", lambda results: None)
    run("experiments.study", "ablations", "--seeds", "1", cwd=home)
    folder = home / "data_results" / "ablations" / "small_generator_seed0"
    assert {"nlg_metrics.json", "config.json", "log.csv"} <= {path.name for path in folder.iterdir()}
    assert (home / "models" / "ablations" / "small_generator_seed0" / "model.safetensors").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the downloaded data is not there")
@pytest.mark.parametrize("name", ["sentiment", "ethics"])
def test_judge_and_reward_model_share_no_rows(name, tmp_path):
    tmp_path = tmp_path / "rows"
    run("experiments.real_data", name, "--source", SHARED, "--out", tmp_path)
    assert "is there already" in refused("experiments.real_data", name, "--source", SHARED, "--out", tmp_path)
    reward, judge = (pd.read_csv(tmp_path / who / "train.csv") for who in ("reward", "judge"))
    assert len(reward) == pytest.approx(len(judge), rel=0.01) and reward.label.mean() == pytest.approx(
        judge.label.mean(), abs=0.03
    )
    assert len(set(reward.text) & set(judge.text)) < 0.01 * len(reward)  # a few sentences are there twice
    tests = [pd.read_csv(tmp_path / who / "test.csv") for who in ("reward", "judge")]
    pd.testing.assert_frame_equal(*tests)
    texts, continued, queries = (
        set(pd.read_csv(tmp_path / folder / "train.csv").text) for folder in ("texts", "continued", "queries")
    )
    assert not set(tests[0].text) & texts or name == "sentiment"
    assert not queries & texts or name == "sentiment"
    labels = dict(pd.concat([reward, judge])[["text", "label"]].itertuples(index=False))
    if name == "ethics":  # one action a story, good ones and bad ones
        assert len(continued) == pytest.approx(0.8 * 6912, abs=2) and continued < texts
        assert np.mean([labels[text] for text in continued]) == pytest.approx(0.5, abs=0.02)
    else:
        assert continued == texts


def test_real_data_that_is_not_there(tmp_path):
    error = refused("experiments.real_data", "sentiment", "--source", tmp_path, "--out", tmp_path / "rows")
    assert f"--source {tmp_path} lacks" in error


def test_the_gold_judges_comparisons_are_learned_from_and_tested_on_other_queries(home, monkeypatch):
    flags = "--model models/nlg --optimizer muon --epochs 1"
    monkeypatch.setitem(preferences.FLAGS, "shipped", flags)
    run("experiments.preferences", "shipped", "--comparisons", 40, cwd=home)
    rows = {
        name: pd.read_json(home / f"models/preferences/shipped/rows/{name}.jsonl", lines=True)
        for name in ("train", "test")
    }
    assert [len(rows["train"]), len(rows["test"])] == [40, 10]
    assert not set(rows["train"]["query"]) & set(rows["test"]["query"])
    metrics = json.loads((home / "data_results/preferences/shipped_metrics.json").read_text())
    assert metrics["results"]["test"]["rows"] == 10 and 0 <= metrics["results"]["test"]["pairwise_accuracy"] <= 1
    assert 1 / 4 <= metrics["perfect_accuracy"] <= 1


def test_no_model_predicts_the_choice_between_equal_texts(tmp_path):
    texts = pd.read_csv(ROOT / "data_cls" / "test.csv")
    good, bad = (texts[texts.label == label].text.tolist() for label in (1, 0))
    rows = [
        [good[0], bad[0], bad[1], good[1]],
        [bad[0], bad[1], good[0], bad[2]],
    ]  # predictable half of the time, and always
    lines = [json.dumps({"query": ""} | {f"sample{i}": text for i, text in enumerate(row)}) for row in rows]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    assert preferences.perfect_accuracy(tmp_path) == 0.75


def test_another_run_on_hard_frames_does_not_pass_for_this_one(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {"reward": ["models/cls"], "episodes": 8, "seed": 0}}')
    hard_frames.refuse_another(tmp_path, argparse.Namespace(reward="models/cls", episodes=8, seed=0))
    for reward, seed in (("models/other", 0), ("models/cls", 1)):
        with pytest.raises(UserError, match="is of --reward models/cls --episodes 8 --seed 0; give another --run"):
            hard_frames.refuse_another(tmp_path, argparse.Namespace(reward=reward, episodes=8, seed=seed))


def test_the_hard_frames_are_told_from_the_others(tmp_path):
    hard_frames.write_texts(tmp_path / "few", every=4)
    hard_frames.write_texts(tmp_path)
    openings = hard_frames.hard_openings()

    def share(texts):
        return sum(any(opening.match(text) for opening in openings) for text in texts) / len(texts)

    known = {name: pd.read_csv(ROOT / "data_cls" / f"{name}.csv").text for name in ("test", "hard")}
    assert share(known["test"]) == 0 and share(known["hard"]) == 1
    for name in ("train", "valid"):  # 52 of 156 frames, and as many texts of every frame
        lines = (tmp_path / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert share(lines) == pytest.approx(1 / 3)
        assert len(set(lines)) == len(lines)
        assert all(hard_frames.scenarios.judge(line).valid for line in lines[:200])
        assert (tmp_path / "few" / f"{name}.txt").read_text(encoding="utf-8").splitlines() == lines[::4]


def test_the_measures_of_both_kinds_of_frames(chain, monkeypatch):
    """Of 6 learned texts, 2 hard ones and 2 that are invalid; the classifier finds every text ethical."""
    monkeypatch.chdir(chain[0])
    known = {name: pd.read_csv(ROOT / "data_cls" / f"{name}.csv") for name in ("test", "hard")}
    learned = [text for label in (1, 1, 0, 0, 0, 0) for text in known["test"].text[known["test"].label == label][:1]]
    hard = [known["hard"].text[known["hard"].label == label].iloc[0] for label in (0, 1)]
    texts = [*learned, *hard, "Nonsense.", "More of it."]
    monkeypatch.setattr(hard_frames.models, "continuations", lambda model, tokenizer, queries, *_: texts)
    monkeypatch.setattr(hard_frames.rewards, "log_odds", lambda model, tokenizer, texts, device: np.ones(len(texts)))
    of_reward = {"missing_stop_score": -1.0, "reward": ["models/cls"], "bounded_score": False}
    settings = {"response_length": 8, "temperature": 0.7} | of_reward
    measures = hard_frames.measure("models/nlg", ["A", "The"] * 5, settings, torch.device("cpu"))
    assert measures["all"] == {"texts": 10, "valid": 0.8}
    mean = {"classifier_mean": 1 / (1 + np.exp(-1))}
    of_learned = {"share": 0.75, "gold_ethical": 1 / 3, "classifier_right": 1 / 3} | mean
    of_hard = {"share": 0.25, "gold_ethical": 0.5, "classifier_right": 0.5} | mean
    assert measures["learned"] == pytest.approx(of_learned) and measures["hard"] == pytest.approx(of_hard)
