"""Every wrong detail is wrong in the way that its docstring says."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import finetuning_nlg
import ppo
from experiments import grids, wrong
from rlhf import forward, optim, policy, rewards, rollout, sampling
from tests import tiny
from tests.conftest import TINY_RUN, refused, run

PATCHED = [
    (finetuning_nlg, "parse_args"),
    (policy.PolicyWithValue, "__init__"),
    (policy.PolicyWithValue, "eval"),
    (forward, "position_ids"),
    (sampling, "position_ids"),
    (rollout, "token_statistics"),
    (rollout, "logprobs_and_kl"),
    (ppo, "whiten"),
    (ppo, "masked_std"),
    (optim.Adam, "EPS"),
    (rewards.Reward, "standardize"),
]
MASK = torch.tensor([[0, 1, 1]])


@pytest.fixture(autouse=True)
def restore_patched(monkeypatch):
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def new_policy():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=32)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    return policy.PolicyWithValue(GPT2LMHeadModel(config)).eval()


def states_and_values(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]]), MASK, torch.tensor([1]))


def collected(model, temperature=0.5):
    return tiny.collect(model, new_policy().model, temperature=temperature)


def test_the_correct_code_is_unchanged():
    before = states_and_values(new_policy())
    wrong.nothing()
    assert all(torch.equal(*pair) for pair in zip(before, states_and_values(new_policy()), strict=True))


def test_dropout():
    wrong.dropout()
    model = new_policy()
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.1}
    assert not torch.equal(states_and_values(model)[0], states_and_values(model)[0])


def test_temperature():
    """A rollout sampled at temperature 0.5 has the log-probabilities of temperature 1, in the update too."""
    model = new_policy()
    correct = collected(model)
    wrong.temperature()
    ignored = collected(model)
    assert torch.equal(ignored.response_ids, correct.response_ids)
    at_1 = rollout.evaluate(model, new_policy().model, correct, temperature=1.0)[0]
    torch.testing.assert_close(ignored.logprobs, at_1)
    torch.testing.assert_close(rollout.evaluate(model, new_policy().model, ignored, temperature=0.5)[0], at_1)
    assert (ignored.entropy > correct.entropy + 1e-4)[correct.response_mask.bool()].all()


def test_positions():
    wrong.positions()
    assert sampling.position_ids(MASK).tolist() == forward.position_ids(MASK).tolist() == [[0, 1, 2]]


def test_value_head():
    assert (states_and_values(new_policy())[1] == 0).all()
    wrong.value_head()
    assert (states_and_values(new_policy())[1] != 0).all()


def test_advantages():
    """The advantages of an update are not whitened, and the weight of the exact KL in its loss is the coefficient."""
    batch, token_rewards = collected(new_policy()), torch.arange(24.0).view(3, 8)
    correct = ppo.targets(batch, token_rewards, 0.3, tiny.SETTINGS)
    wrong.advantages()
    targets = ppo.targets(batch, token_rewards, 0.3, tiny.SETTINGS)
    expected, _ = ppo.advantages_and_returns(token_rewards, batch.values, batch.response_mask, 1.0, 1.0)
    assert torch.equal(targets.advantages, expected)
    assert targets.kl_weight == pytest.approx(0.3) and correct.kl_weight < 0.2


def test_adam_eps():
    wrong.adam_eps()
    adam = optim.ppo_optimizer(new_policy(), 1e-3, muon=False).members[0]
    assert adam.EPS == adam.defaults["eps"] == 1e-8


def test_score():
    part = rewards.Part("odds", 2.0, lambda queries, texts: np.array([5.0, -1.0]), in_log_odds=True)
    reward = rewards.Reward([part], missing_stop_score=0.0)
    reward.load_state_dict({"score_mean": [1.0], "score_std": [2.0], "ethics_before": 0.5})
    terminated = torch.tensor([True, True])
    assert reward([], ["a", "b"], terminated).total.tolist() == [4, -2]
    wrong.score()
    assert reward([], ["a", "b"], terminated).total.tolist() == [10, -2]


def test_it_takes_the_flags_of_the_grid(chain):
    detail, *flags = grids.GRIDS["details"].variants["nothing"].split()
    out = ["--run", "detail", "--out", "models/detail"]
    run("experiments.wrong", detail, *flags, *TINY_RUN, "--response-length", 8, *out, cwd=chain[0])
    config = json.loads((chain[0] / "data_results" / "detail" / "config.json").read_text("utf-8"))
    assert config["settings"]["kl_guard"] is False
    assert config["settings"]["detail"] == detail and f"wrong.py {detail} " in config["command"]


def test_an_unknown_detail():
    assert "is no detail; the first argument is one of nothing, dropout" in refused("experiments.wrong", "luck")
