"""PPO that starts from another policy than the reference."""

import json

import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import models
from tests.conftest import TINY_RUN, refused, run


def test_ppo_goes_on_from_another_policy_and_keeps_the_reference(chain):
    """The policy of a first run has moved; in a second one from there the KL to the generator is above 0 at once."""
    home = chain[0]
    flags = ["--start-from", "models/nlg_ppo", "--run", "second", "--out", "models/second"]
    run("finetuning_nlg", *TINY_RUN, *flags, cwd=home)
    logs = {name: pd.read_csv(home / "data_results" / name / "log.csv") for name in ("K2_lr_1e-3_seed0", "second")}
    assert logs["K2_lr_1e-3_seed0"].kl[0] == pytest.approx(0, abs=1e-5)
    assert logs["second"].kl[0] > 1e-3
    assert (logs["second"].kl_coef == 0.15).all()  # not four times as much at first, which would take the gain back
    configs = [json.loads((home / "data_results" / name / "config.json").read_text()) for name in logs]
    assert configs[0]["score_mean"] == configs[1]["score_mean"]  # that of the reference's texts, in both


def test_without_learning_the_policy_stays_what_it_started_from(chain):
    home = chain[0]
    flags = ["--start-from", "models/nlg_ppo", "--lr", "1e-12", "--run", "still", "--out", "models/still"]
    run("finetuning_nlg", *TINY_RUN, *flags, cwd=home)
    start, still = (models.load_policy(str(home / "models" / name), "")[0] for name in ("nlg_ppo", "still"))
    torch.testing.assert_close(start.state_dict(), still.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-from", "nowhere"], "--start-from nowhere"),
        (["--start-from", "models/other"], "--start-from models/other must be fine-tuned from --policy"),
        (["--start-from", "models/nlg_ppo", "--lora", 4, "--out", "models/x"], "leave out --start-from"),
    ],
)
def test_starts_that_cannot_be(chain, flags, message):
    home = chain[0]
    _, tokenizer = models.load_policy(str(home / "models/nlg"), "")
    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=1, n_embd=16))
    models.save_folder(str(home / "models/other"), other, tokenizer, "Another model.\n")
    assert message in refused("finetuning_nlg", *TINY_RUN, *flags, cwd=home)
