"""A GGUF file as --model, --policy or --reward: its weights become float32, which can be trained and saved."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf import models, recipes
from rlhf.errors import UserError


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else name)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="a GGUF file needs the package accelerate; pip install accelerate"):
        models.load_policy(str(tmp_path / "model.gguf"), "--policy")


@pytest.fixture
def packages():
    for name in models.GGUF_PACKAGES:
        pytest.importorskip(name)


def test_bad_files_are_refused(packages, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        models.load_policy(str(tmp_path / "model.gguf"), "--policy")
    (tmp_path / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(UserError, match=r"--policy .*model\.gguf cannot be loaded"):
        models.load_policy(str(tmp_path / "model.gguf"), "--policy")


def test_a_file_is_a_policy_that_saves_and_loads_again_bit_for_bit(smollm2, smollm2_file, tmp_path):
    model, tokenizer = smollm2
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert recipes.kind_of(smollm2_file) == recipes.PRETRAINED
    models.save_folder(tmp_path / "saved", model, tokenizer, "a card")
    again, _ = models.load_policy(str(tmp_path / "saved"), "--policy")
    state = again.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_a_file_is_a_classifier_with_a_new_head_but_no_finished_one(smollm2_file):
    options = {"auto_class": AutoModelForSequenceClassification, "name": smollm2_file, "num_labels": 2}
    model, _ = models.load_pretrained(flag="--model", new_head=True, **options)
    assert model.score.weight.shape == (2, model.config.hidden_size)
    with pytest.raises(UserError, match=r"its weights lack score\.weight"):
        models.load_pretrained(flag="--reward", **options)
