"""The benchmark of speed, with a case of a second."""

import json

import pytest
import torch
from transformers import GPT2Config

import ppo
from benchmarks import cases, speed
from tests.conftest import run


def test_the_operations_of_a_forward_pass_by_hand():
    config = GPT2Config(n_layer=2, n_embd=2, n_head=1)
    # two tokens meet 12 * 2^2 weights in the first layer, and 3 * 2^2 in the last, where one meets the other 9 * 2^2;
    # in both layers half of 2 x 2 pairs are attended to, to score and to sum
    linear, attention = 2 * (2 * 48 + 2 * 12 + 1 * 36), 2 * 2 * 2 * 2 * 2
    assert speed.body_operations(config, torch.tensor([2]), 1) == linear + attention


def test_the_reward_model_reads_every_word_that_the_policy_writes():
    tokenizer = cases.words_tokenizer(64)
    assert tokenizer(tokenizer.decode([5, 60, 7]))["input_ids"] == [5, 60, 7]


def test_a_benchmark_from_end_to_end(tmp_path, monkeypatch):
    case = cases.Case(8, 4, 6, 1, (1, 2), 8, ("float32",), *2 * [cases.gpt2_config(1, 16, 2, 64)])
    monkeypatch.setitem(cases.CASES, "cpu", {"tiny": case})
    monkeypatch.setattr(ppo, "sample", ppo.sample)  # it is timed from then on; this puts it back
    run("benchmarks.speed", "--repeats", "1", "--updates", "1", "--device", "cpu", "--out", tmp_path / "speed.json")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [(one["case"], one["K"]) for one in found["cases"]] == [("tiny", 1), ("tiny", 2)]
    for one in found["cases"]:
        assert one["seconds"] == pytest.approx(sum(stage["seconds"] for stage in one["stages"].values()))
        assert one["episodes_per_second"] == pytest.approx(8 / one["seconds"])
        assert all(0 < stage["floor"] < stage["seconds"] for stage in one["stages"].values())
    k1, k2 = (one["stages"]["update"]["floor"] * one["operations_per_second"] for one in found["cases"])
    assert k2 == pytest.approx(2 * k1, rel=0.2)  # operations; the responses differ in length
