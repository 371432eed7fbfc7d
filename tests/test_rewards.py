"""Rewards and the gold judge: scores by hand, the flags that make them, and runs with several of them."""

import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from rlhf import flags, gold, models, prompting, rewards, runtime, user_code
from rlhf.errors import UserError
from rlhf.rewards import Part, Reward
from tests.conftest import ROOT, TINY_EVALUATION, TINY_RUN, refused, run

CPU = torch.device("cpu")
FEW_SAMPLES = "--queries 2 --samples 4 --reference-samples 64".split()


# scores by hand


def reward_of(*columns, weights=None, in_log_odds=False, missing_stop_score=-1.0):
    """A reward whose parts give the texts "0", "1", ... the numbers in their columns."""

    def raw_score(column):
        return lambda queries, texts: np.array([column[int(text)] for text in texts], dtype=float)

    weights = weights or [1.0] * len(columns)
    return Reward(
        [
            Part(f"part{i}", weight, raw_score(column), in_log_odds)
            for i, (weight, column) in enumerate(zip(weights, columns, strict=True))
        ],
        missing_stop_score,
    )


def calibrated(*columns, **options):
    """`reward_of`, with mean and standard deviation of the texts "0" and "1"."""
    reward = reward_of(*columns, **options)
    reward.calibrate(["", ""], ["0", "1"])
    return reward


def test_calibration_takes_mean_and_standard_deviation_of_every_part():
    reward = reward_of([1, 3, 99], [0, 4, 99])
    assert (reward.score_mean, reward.score_std, reward.ethics_before) == (None, None, None)
    reward.calibrate(["", ""], ["0", "1"])
    assert reward.score_mean == [2.0, 2.0]
    assert reward.score_std == [1.0, 2.0]  # of the population: sqrt(mean of squares)
    assert reward.ethics_before == 2.0


def test_a_part_that_does_not_vary_keeps_its_unit():
    """A rare event that no sample had: when it comes, it scores 1, not a million."""
    reward = calibrated([5, 5, 6])
    assert reward.score_std == [1.0]
    scores = reward(["", ""], ["0", "2"], torch.tensor([True, True]))
    assert scores.total.tolist() == pytest.approx([0.0, 1.0])


def test_raw_scores_have_a_column_per_part():
    assert reward_of([1, 3], [0, 4]).raw_scores(["", "", ""], ["1", "0", "1"]).tolist() == [[3, 4], [1, 0], [3, 4]]


def test_standardized_scores_are_weighted_and_added():
    reward = calibrated([1, 3], [0, 4], weights=[2.0, -0.5])  # means 2 and 2, deviations 1 and 2
    raw = np.array([[1.0, 0.0], [3.0, 2.0], [2.0, 6.0]])
    assert reward.standardize(raw).tolist() == [[-1, -1], [1, 0], [0, 2]]
    assert reward.combine(raw).tolist() == [-1.5, 2.0, -1.0]
    many = np.stack([raw, raw[::-1]])  # [2, 3, parts], as evaluate_nlg.py has them
    assert reward.combine(many).tolist() == [[-1.5, 2.0, -1.0], [-1.0, 2.0, -1.5]]


@pytest.mark.parametrize("missing_stop_score", [-1.0, 0.0, 7.5])
def test_a_text_that_does_not_end_has_a_score_of_its_own(missing_stop_score):
    reward = calibrated([1, 3, 8], missing_stop_score=missing_stop_score)
    scores = reward(["", "", ""], ["0", "1", "2"], torch.tensor([True, False, False]))
    assert scores.total.tolist() == [-1.0, missing_stop_score, missing_stop_score]
    assert scores.total.dtype == torch.float32 and scores.total.device.type == "cpu"
    assert scores.by_part.tolist() == [[-1], [1], [6]]  # of the texts themselves, whether they end or not
    assert scores.ethics.tolist() == [1, 3, 8]


def test_people_read_a_functions_value_and_a_models_probability():
    raw = np.array([[0.0, 9.0], [np.log(3), 9.0], [-np.log(4), 9.0]])
    values, probabilities = (reward_of([0], [0], in_log_odds=in_log_odds).ethics(raw) for in_log_odds in (False, True))
    assert values.tolist() == [0.0, np.log(3), -np.log(4)]  # of the first part
    assert probabilities == pytest.approx([0.5, 0.75, 0.2])


def test_ethics_before_is_a_mean_of_probabilities():
    reward = calibrated([np.log(3), -np.log(4)], in_log_odds=True)
    assert reward.ethics_before == pytest.approx((0.75 + 0.2) / 2)


def test_a_loaded_state_gives_the_same_scores():
    """The state is part of config.json, between other entries."""
    reward = calibrated([1, 4], [0, 0.3], weights=[1.0, 0.7])
    config = json.loads(json.dumps({"settings": {}, **reward.state_dict()}))
    assert set(config) == {"settings", "score_mean", "score_std", "ethics_before"}
    loaded = reward_of([1, 4], [0, 0.3], weights=[1.0, 0.7])
    loaded.load_state_dict(config)
    scores, loaded_scores = (each(["", ""], ["0", "1"], torch.tensor([True, True])) for each in (reward, loaded))
    assert loaded_scores.total.tolist() == scores.total.tolist()
    assert loaded.ethics_before == reward.ethics_before == 2.5


# from the flags


def load(*specs, **options):
    return rewards.load(list(specs), -1.0, CPU, "float32", **{"bounded": False} | options)


def test_functions_of_texts_and_of_queries_and_responses(tmp_path):
    (tmp_path / "own.py").write_text(
        "def texts(texts):\n    return [len(t) for t in texts]\n"
        "def responses(queries, responses, factor=2):\n    return [factor * len(r) for r in responses]\n"
        "def keyword(texts, *, factor=3):\n    return [factor * len(t) for t in texts]\n"
    )
    names = [f"{tmp_path}/own.py:{name}" for name in ("texts", "responses", "keyword")]
    reward = load(names[0], f"0.5*{names[1]}", f"-2e-1*{names[2]}")
    assert [(part.name, part.weight) for part in reward.parts] == [
        ("own.texts", 1.0), ("own.responses", 0.5), ("own.keyword", -0.2)
    ]  # fmt: skip
    assert not any(part.in_log_odds for part in reward.parts)
    assert reward.raw_scores(["ab", "a"], ["abcd", "abc"]).tolist() == [[4, 4, 12], [3, 4, 9]]
    reward.load_state_dict({"score_mean": [3.0, 2.0, 0.0], "score_std": [2.0, 4.0, 1.0], "ethics_before": 3.0})
    assert reward.standardize(np.array([[4, 4, 12], [3, 4, 9]])).tolist() == [[0.5, 0.5, 12], [0.0, 0.5, 9]]
    assert reward.missing_stop_score == -1.0


def test_parts_with_the_same_name_get_numbers(chain):
    cls = str(chain[0] / "models" / "cls")
    reward = load(cls, f"2*{cls}", f"-1*{cls}")
    assert [part.name for part in reward.parts] == ["cls", "cls_2", "cls_3"]
    assert all(part.in_log_odds for part in reward.parts)
    log_odds = rewards.log_odds(*rewards.load_model(cls), ["On Monday she lied."], CPU)
    raw = reward.raw_scores(["On Monday"], ["On Monday she lied."])
    assert raw[0].tolist() == pytest.approx([log_odds[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("spec", ["0*models/cls", "1e999*models/cls"])
def test_a_weight_must_count(spec):
    with pytest.raises(UserError, match="give one that counts"):
        load(spec)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0] * (len(texts) + 1)", r"gave scores of shape \(3,\) for 2 texts"),
        ("return [[1.0]] * len(texts)", r"gave scores of shape \(2, 1\) for 2 texts"),
        ("return [0.0, float('nan')]", "gave nan for the text 'b'"),
        ("return [float('inf'), 0.0]", "gave inf for the text 'a'"),
        ("return 1 / 0", "failed: ZeroDivisionError"),
        ("return ['high', 'low']", "failed: ValueError"),
    ],
)
def test_a_function_that_gives_no_scores(tmp_path, body, message):
    (tmp_path / "own.py").write_text(f"def score(texts):\n    {body}\n")
    with pytest.raises(UserError, match=rf"--reward .*own.py:score {message}"):
        load(f"{tmp_path}/own.py:score").raw_scores(["", ""], ["a", "b"])


def test_a_device_out_of_memory_is_no_mistake_of_the_function(tmp_path):
    (tmp_path / "own.py").write_text("import torch\ndef score(texts):\n    raise torch.OutOfMemoryError\n")
    with pytest.raises(torch.OutOfMemoryError):
        load(f"{tmp_path}/own.py:score").raw_scores([""], ["a"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py:score", "there is no file none.py"),
        ("{}/own.py:none", "cannot be loaded: AttributeError"),
        ("none", "there is no file none; give FILE.py:FUNCTION"),
        ("{}/own.py", "own.py: it names no function; give FILE.py:FUNCTION"),
        ("{}/own.py:FIVE", "own.py:FIVE: FIVE is 5, not a function; name one of"),
    ],
)
def test_a_function_that_is_not_there(tmp_path, spec, message):
    (tmp_path / "own.py").write_text("FIVE = 5\ndef score(texts):\n    return [0.0 for _ in texts]\n")
    with pytest.raises(UserError, match=message):
        user_code.load_function(spec.format(tmp_path), "--annotator")


def test_a_missing_file_is_found_before_the_policy_is_loaded(tmp_path):
    flags = "--policy", "models/nowhere", "--reward", "none.py:score"
    assert "there is no file none.py" in refused("finetuning_nlg", *flags, cwd=tmp_path)


def test_a_functions_file_may_define_a_dataclass(tmp_path):
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "@dataclass", "class A:"]
    lines += ["  a: int", "def score(texts):", "  return [A(1).a for _ in texts]"]
    (tmp_path / "own.py").write_text("\n".join(lines))
    assert user_code.load_function(f"{tmp_path}/own.py:score", "--reward")(["x"]) == [1]


def test_a_function_without_a_signature_gets_the_texts():
    assert (
        rewards.user_function(max, prompting.Texts.split)(["a"], ["1", "2"]).tolist() == 2
    )  # which checks would refuse


def test_texts_that_are_longer_than_the_model_reads_are_told_once(chain, capsys):
    model, tokenizer = rewards.load_model(str(chain[0] / "models" / "cls"))
    tokenizer.model_max_length = 8
    runtime.warn_once.cache_clear()
    for texts in (["He ran."], ["He ran.", "He ran" + " and ran" * 4 + "."], ["He ran" + " and ran" * 9 + "."]):
        rewards.score_texts(model, tokenizer, texts, texts)
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("warning: ") and "reads 8 tokens, and some texts have more" in said


def test_people_among_the_rewards():
    assert rewards.includes_people(["models/cls", "human"]) and rewards.includes_people(["0.5*human"])
    assert not rewards.includes_people(["models/human", "models/cls"])
    specs = ["human", "0.5*human", "models/human", "human_model", "2*models/cls"]
    assert rewards.with_saved_human_model(["2*human"], "7b") == ["2*7b_reward"]
    assert rewards.with_saved_human_model(specs, "models/ppo") == [
        "models/ppo_reward", "0.5*models/ppo_reward", "models/human", "human_model", "2*models/cls"
    ]  # fmt: skip


def test_the_model_of_peoples_answers_is_scored_as_it_is_then(chain):
    model, tokenizer = rewards.load_model(str(chain[0] / "models" / "cls"))
    reward, texts = load("human", human=(model, tokenizer)), ["On Monday she lied.", "A man ran."]
    assert [(part.name, part.in_log_odds) for part in reward.parts] == [("human", True)]
    before = reward.raw_scores(["", ""], texts)
    with torch.no_grad():
        model.score.weight.mul_(2)
    assert reward.raw_scores(["", ""], texts) == pytest.approx(2 * before, abs=1e-5)


@pytest.mark.parametrize("name", ["length", "descriptive"])
def test_examples(name):
    reward = load(f"{ROOT}/examples/{name}.py:score")
    plain, rich = "He ran.", "The old dog slept in the warm kitchen of a small quiet house."
    scores = reward.raw_scores(["", ""], [plain, rich])[:, 0]
    assert scores[1] > scores[0]
    if name == "length":
        assert scores.tolist() == [2 - 12, 0 - 1]


# the gold judge


def test_shares_of_verdicts():
    verdicts = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=float)
    assert gold.shares(verdicts) == {"valid": 3 / 4, "ethical": 2 / 3}
    assert gold.shares(verdicts, np.array([0, 0.5, 0.25, 0.25])) == {"valid": 0.75, "ethical": 1 / 3}
    only_ethics = np.stack([np.full(4, np.nan), verdicts[:, 1]], 1)
    assert gold.shares(only_ethics) == {"valid": None, "ethical": 1 / 2}
    assert gold.shares(gold.judged(None, ["a", "b"])) == {"valid": None, "ethical": None}
    assert gold.shares(np.zeros((3, 2))) == {"valid": 0.0, "ethical": None}


def test_shares_over_queries_and_samples():
    """Of verdicts [queries, samples, 2] and weights [queries, samples]."""
    verdicts = np.array([[[1, 1], [1, 0]], [[0, 0], [1, 1]]], dtype=float)
    weights = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert gold.shares(verdicts, weights) == {"valid": 1.75 / 2, "ethical": 1.25 / 1.75}


def test_a_judge_is_used_where_it_knows_the_data(tmp_path):
    (tmp_path / "judge.py").write_text(
        "def judge(text):\n    return (True, int('good' in text)) if 'Anna' in text else (False, None)\n"
    )
    spec = f"{tmp_path}/judge.py:judge"
    judge = gold.load_judge(spec, ["Anna is good.", "Anna left.", "Nothing."], CPU, "float32")
    assert judge(["Anna is good.", "Anna left.", "Nothing."]).tolist() == [[1, 1], [1, 0], [0, 0]]
    assert judge([]).shape == (0, 2)
    assert gold.judged(judge, ["Anna left."]).tolist() == [[1, 0]]
    assert gold.load_judge(spec, ["Anna left.", "Nothing."], CPU, "float32") is None  # half is not most
    assert np.isnan(gold.judged(None, ["a", "b", "c"])).all() and gold.judged(None, ["a", "b", "c"]).shape == (3, 2)


def test_only_the_file_of_the_default_judge_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    flags.add_gold_flag(parser)
    assert gold.load_judge(parser.get_default("gold"), ["Anna left."], CPU, "float32") is None
    with pytest.raises(UserError, match=r"--gold my_jduge.py:judge: there is no file my_jduge.py"):
        gold.load_judge("my_jduge.py:judge", ["Anna left."], CPU, "float32")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"failed: ZeroDivisionError\('division by zero'\)"),
        ("return 'Anna' in text", r"gave True for the text 'Anna left.'; it must return \(valid, label\)"),
        ("return (True, 1, 1)", r"gave \(True, 1, 1\) for the text"),
        ("return (True, 'good')", r"gave \(True, 'good'\) for the text"),
        ("return (True, float('nan'))", r"gave \(True, nan\) for the text"),
    ],
)
def test_a_judge_that_gives_no_verdicts(tmp_path, body, message):
    (tmp_path / "own.py").write_text(f"def judge(text):\n    {body}\n")
    with pytest.raises(UserError, match=rf"--gold .*own.py:judge {message}"):
        gold.load_judge(f"{tmp_path}/own.py:judge", ["Anna left."], CPU, "float32")


def test_a_judge_that_fails_later_ends_in_one_line(tmp_path):
    """It is called at every evaluation of a run, on texts that nobody has seen before."""
    (tmp_path / "own.py").write_text("def judge(text):\n    return (True, int(text))\n")
    judge = gold.load_judge(f"{tmp_path}/own.py:judge", ["1", "0"], CPU, "float32")
    with pytest.raises(UserError, match=r"own\.py:judge failed: ValueError"):
        gold.judged(judge, ["1", "Anna left."])


def test_the_shipped_judge_knows_the_shipped_texts():
    spec, texts = f"{ROOT}/data_cls/scenarios.py:judge", (ROOT / "data_nlg" / "valid.txt").read_text().splitlines()
    verdicts = gold.load_judge(spec, texts, CPU, "float32")(texts[:200])
    assert (verdicts[:, 0] == 1).all() and 0.4 < verdicts[:, 1].mean() < 0.6
    assert gold.load_judge(spec, ["A text of another world.", "And another."], CPU, "float32") is None


def test_a_classifier_as_the_judge_cannot_tell_what_is_valid(chain):
    cls, texts = str(chain[0] / "models" / "cls"), ["On Monday she lied.", "A man ran.", "He helped."]
    verdicts = gold.load_judge(cls, texts, CPU, "float32")(texts)
    assert np.isnan(verdicts[:, 0]).all()
    log_odds = rewards.log_odds(*rewards.load_model(cls), texts, CPU)
    assert verdicts[:, 1].tolist() == (log_odds > 0).tolist()


# runs


def test_any_function_can_be_the_reward(chain, tmp_path):
    (tmp_path / "long.py").write_text("def score(texts):\n    return [len(text.split()) for text in texts]\n")
    run(
        "finetuning_nlg", *TINY_RUN, "--reward", f"{tmp_path}/long.py:score", "--run", "long",
        "--out", tmp_path / "out", "--kl", "sampled", "--target-kl", 1,
        "--whiten-rewards", "--separate-value", "--query-length", 4, cwd=chain[0],
    )  # fmt: skip
    log = pd.read_csv(chain[0] / "data_results" / "long" / "log.csv")
    assert log.ethics.min() > 1  # words, read as they are
    assert log.kl_coef[1] != log.kl_coef[0]


def test_several_rewards_are_standardized_weighted_and_added(chain, tmp_path):
    home, _ = chain
    (tmp_path / "own.py").write_text("def short(queries, responses):\n    return [-len(r) for r in responses]\n")
    flags = ["--reward", "models/cls", f"--reward=-0.5*{tmp_path}/own.py:short"]
    flags += ["--stop", ".", "--response-length", 200]  # so that all responses end
    run("finetuning_nlg", *TINY_RUN, *flags, "--run", "two", "--out", "models/two", cwd=home)
    log = pd.read_csv(home / "data_results" / "two" / "log.csv")
    assert log.terminated.tolist() == [1, 1]  # a response without an end has a score of its own
    total = log["score_cls"] - 0.5 * log["score_own.short"]
    assert total.tolist() == pytest.approx(log.score.tolist(), abs=1e-4)
    run("evaluate_nlg", "--run", "data_results/two", *FEW_SAMPLES, cwd=home)


def test_a_second_classifier_may_be_the_gold_judge(chain, tmp_path):
    shutil.copytree(chain[0], tmp_path / "home")
    home, judge = tmp_path / "home", ["--gold", "models/cls"]  # here it is the reward model itself
    run("finetuning_nlg", *TINY_RUN, *judge, "--run", "judged", "--out", "models/judged", cwd=home)
    log = pd.read_csv(home / "data_results" / "judged" / "log.csv")
    assert log.gold_valid.isna().all()  # it cannot tell
    assert log.gold_ethical.between(0, 1).all()
    run("evaluate_nlg", "--run", "data_results/judged", *TINY_EVALUATION[2:], *judge, cwd=home)
    shares = json.loads((home / "data_results" / "judged" / "evaluation.json").read_text())["gold"]
    assert {shares[f"valid_{when}"] for when in ("before", "after", "optimum")} == {None}
    samples = pd.read_csv(home / "data_results" / "judged" / "evaluation_samples.csv")
    clear = samples[(samples.ethics - 0.5).abs() > 1e-4]  # it is written with four decimals
    assert len(clear) and ((clear.ethics > 0.5) == (clear.ethical == 1)).all()
    assert "--gold models/nowhere: there is no such folder" in refused(
        "finetuning_nlg", "--gold", "models/nowhere", cwd=home
    )


def test_no_judge_if_the_user_wants_none():
    assert gold.load_judge("none", ["a text"], torch.device("cpu"), "float32") is None


def test_a_texts_score_does_not_depend_on_its_neighbours(chain):
    """Where the tokenizer pads on the left, too: positions count from the left."""
    model, tokenizer = rewards.load_model(str(chain[0] / "models" / "cls"))
    tokenizer.padding_side = "left"
    short, long = "I kept my promise.", "On Monday my sister asked me for help, and I said that I had no time for it."
    alone, beside = (rewards.log_odds(model, tokenizer, texts, CPU)[0] for texts in ([short], [short, long]))
    assert alone == pytest.approx(beside, abs=1e-4)


def test_a_classifier_reads_as_much_of_a_text_as_it_was_trained_on(chain, tmp_path):
    run(
        "train_cls", "--epochs", 1, "--max-length", 12, "--out", tmp_path / "short", "--results", tmp_path, cwd=chain[0]
    )
    model, tokenizer = rewards.load_model(str(tmp_path / "short"))
    text = "On Monday my sister asked me for help with her homework"
    assert len(tokenizer(text)["input_ids"]) > 13
    whole, longer = rewards.log_odds(model, tokenizer, [text, text + " and more"], CPU)
    assert whole == pytest.approx(longer, abs=1e-6)


def test_positions_that_roberta_keeps_for_padding_hold_no_token():
    config = RobertaConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    length = models.max_length(model, SimpleNamespace(model_max_length=10**9))
    assert length == 18
    model(torch.full((1, length), 5))
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(torch.full((1, length + 1), 5))


TEXTS = ["Alice helped Carlos to carry the wood.", "Oscar stole the bread."]


def test_a_bounded_score_is_the_probability_of_positive(chain):
    cls = str(chain[0] / "models" / "cls")
    model, tokenizer = rewards.load_model(cls)
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in TEXTS]
    reward = load(cls, bounded=True)
    raw = reward.raw_scores(["", ""], TEXTS)
    assert raw[:, 0] == pytest.approx(expected, abs=1e-5)
    assert reward.ethics(raw) == pytest.approx(expected, abs=1e-5)


def test_the_score_of_a_preference_model_stays_as_it_is_with_bounded_score(chain, tmp_path):
    model, tokenizer = rewards.load_model(str(chain[0] / "models" / "cls"))
    model.config.num_labels = 1
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "preferences")
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in TEXTS]
    raw = load(str(tmp_path / "preferences"), bounded=True).raw_scores(["", ""], TEXTS)
    assert raw[:, 0] == pytest.approx(expected, abs=1e-5)


def test_a_run_with_a_bounded_score_is_evaluated_with_it(chain):
    home, _ = chain
    run("finetuning_nlg", *TINY_RUN, "--bounded-score", "--run", "bounded", "--out", "models/bounded", cwd=home)
    config = json.loads((home / "data_results" / "bounded" / "config.json").read_text())
    assert config["score_mean"] == pytest.approx([config["ethics_before"]])  # both are the mean probability
    assert 0 < config["score_std"][0] <= 0.5  # of what lies between 0 and 1
    run("evaluate_nlg", "--run", "data_results/bounded", *FEW_SAMPLES, cwd=home)
    samples = pd.read_csv(home / "data_results" / "bounded" / "evaluation_samples.csv")
    assert samples.raw_cls.tolist() == samples.ethics.tolist()  # both are the probability
    assert samples.ethics.between(0, 1).all() and samples.ethics.nunique() > 1
