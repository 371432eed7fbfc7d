"""The benchmarks of speed, with cases of a second."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks import bfloat16, cases, optimizer_speed, speed
from rlhf import rollout
from tests.conftest import run

TINY = cases.gpt2_config(1, 16, 2, 64)


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
    case = cases.Case(8, 4, 6, 1, (1, 2), 8, ("float32",), TINY, TINY)
    monkeypatch.setitem(cases.CASES, "cpu", {"tiny": case})
    sample = rollout.sample
    output = run(
        "benchmarks.speed", "--repeats", "1", "--updates", "1", "--device", "cpu", "--out", tmp_path / "x.json"
    )
    assert rollout.sample is sample  # only timed while the benchmark runs
    records = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert [(record["case"], record["K"]) for record in records] == [("tiny", 1), ("tiny", 2)]
    for record in records:
        assert record["seconds"] == pytest.approx(sum(stage["seconds"] for stage in record["stages"].values()))
        assert record["episodes_per_second"] == pytest.approx(8 / record["seconds"])
        assert all(0 < stage["floor"] < stage["seconds"] for stage in record["stages"].values())
        assert f"tiny, K = {record['K']}, float32: {record['seconds']:.2f} s" in output.stdout
    k1, k2 = (record["stages"]["update"]["floor"] * record["operations_per_second"] for record in records)
    assert k2 == pytest.approx(2 * k1, rel=0.2)  # operations; the responses differ in length


def test_updates_are_timed_in_both_precisions(monkeypatch):
    monkeypatch.setattr(bfloat16, "SIZES", {"1 x 16": (1, 16, 2, 64)})
    (result,) = bfloat16.sizes().values()
    assert result["millions"] == pytest.approx(AutoModelForCausalLM.from_config(TINY).num_parameters() / 1e6)
    assert result["float32"] > 0 and result["bfloat16"] > 0


def test_the_passes_of_a_minibatch_are_timed(monkeypatch):
    small = LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=64)
    monkeypatch.setattr(cases, "SMOLLM2", small)
    passes = bfloat16.passes()
    assert passes["float32"].keys() == passes["bfloat16"].keys() and len(passes["float32"]) == 6
    assert all(seconds > 0 for of_precision in passes.values() for seconds in of_precision.values())


def test_the_optimizers_step_on_the_default_models_matrices():
    shapes = sorted(tuple(matrix.shape) for matrix in optimizer_speed.matrices())
    assert shapes == sorted(2 * [(128, 384), (128, 128), (128, 512), (512, 128)])
