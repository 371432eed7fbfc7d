"""Every wrong detail is wrong in the way that it says."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import ppo
from experiments import wrong
from rlhf import optim, policy, rewards, sampling
from tests.conftest import refused

PATCHED = [
    (policy.PolicyWithValue, "__init__"),
    (policy.PolicyWithValue, "eval"),
    (policy, "position_ids"),
    (ppo, "token_statistics"),
    (ppo, "logprobs_and_kl"),
    (ppo, "whiten"),
    (ppo, "masked_std"),
    (sampling, "position_ids"),
    (optim.Adam, "EPS"),
    (rewards, "normalised"),
]
MASK = torch.tensor([[0, 1, 1]])


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def new_policy():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    return policy.PolicyWithValue(GPT2LMHeadModel(config)).eval()


def states_and_values(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]]), MASK, torch.tensor([1]))


def entropy(temperature):
    model, reference = new_policy().model, new_policy().model
    states = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    return ppo.token_statistics(model, states, reference, states, torch.tensor([0]), temperature).entropy


def test_the_right_one_is_the_right_one():
    before = states_and_values(new_policy())
    wrong.nothing()
    assert all(torch.equal(*pair) for pair in zip(before, states_and_values(new_policy()), strict=True))


def test_dropout():
    wrong.dropout()
    model = new_policy()
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.1}
    assert not torch.equal(states_and_values(model)[0], states_and_values(model)[0])


def test_temperature():
    of_1, of_half = entropy(1.0), entropy(0.5)
    wrong.temperature()
    assert entropy(0.5) == of_1 != of_half


def test_positions():
    wrong.positions()
    assert sampling.position_ids(MASK).tolist() == policy.position_ids(MASK).tolist() == [[0, 1, 2]]


def test_value_head():
    assert (states_and_values(new_policy())[1] == 0).all()
    wrong.value_head()
    assert (states_and_values(new_policy())[1] != 0).all()


def test_advantages():
    wrong.advantages()
    assert ppo.whiten(torch.tensor([[9.0, 2.0, 4.0]]), MASK).tolist() == [[0, 2, 4]]
    assert ppo.masked_std(torch.tensor([[9.0, 2.0, 4.0]]), MASK).item() == 1


def test_adam_eps_and_score():
    wrong.adam_eps()
    assert optim.Adam.EPS == 1e-8
    wrong.score()
    assert rewards.normalised(5.0, {"score_mean": [1.0], "score_std": [2.0]}) == 5.0


def test_an_unknown_detail():
    assert "is no detail; the first argument is one of nothing, dropout" in refused("experiments.wrong", "luck")
