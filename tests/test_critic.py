"""The critic first: in a warm-up only the critic learns, and the policy stays as it is, bit by bit."""

import copy
import os
import signal

import pandas as pd
import pytest
import torch

import ppo
from rlhf import lora, optim
from rlhf.policy import PolicyWithValue
from tests import tiny
from tests.conftest import TINY_RUN, refused, run
from tests.test_distributed import in_two_processes
from tests.tiny import generator

FOUR_UPDATES = [*TINY_RUN, "--episodes", "64", "--response-length", "8"]


def parameters_of_policy(policy) -> dict:
    return {name: x.clone() for name, x in policy.state_dict().items() if name.startswith("model.")}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learn(policy, reference, optimizer, rollout) -> dict:
    rewards = torch.randn(rollout.values.shape, generator=generator(5)) * rollout.response_mask
    targets = ppo.targets(rollout, rewards, 0.2, tiny.SETTINGS)
    return ppo.update(policy, reference, optimizer, rollout, targets, tiny.SETTINGS, generator())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_only_the_critic_moves_then_both(tiny_model, separate, muon, precision):
    policy, reference = PolicyWithValue(tiny_model, separate, precision).eval(), copy.deepcopy(tiny_model)
    optimizer = optim.ppo_optimizer(policy, 1e-2, muon)
    trunk, critic = parameters_of_policy(policy), [x.detach().clone() for x in policy.critic_parameters()]
    before = tiny.collect(policy, reference)

    for _ in range(2):  # through a head of zeros nothing reaches a separate value model
        with policy.learning(critic_only=True):
            assert learn(policy, reference, optimizer, before)["skipped"] == 0
    assert same(parameters_of_policy(policy), trunk)
    moved = [not torch.equal(*pair) for pair in zip(policy.critic_parameters(), critic, strict=True)]
    assert all(moved[:2])  # the head
    assert any(moved[2:]) == separate
    after = tiny.collect(policy, reference)
    assert torch.equal(after.logprobs, before.logprobs) and torch.equal(after.response_ids, before.response_ids)
    assert not torch.equal(after.values, before.values)
    assert {id(x) for member in optimizer.members for x in member.state} <= {id(x) for x in policy.critic_parameters()}

    assert all(x.requires_grad for x in policy.parameters())
    with policy.learning(critic_only=False):
        learn(policy, reference, optimizer, after)
    assert not any(torch.equal(x, trunk[name]) for name, x in parameters_of_policy(policy).items() if "weight" in name)
    assert [group["steps"] for group in optimizer.members[0].param_groups] == [1, 3]  # of the trunk, of the critic
    assert not torch.equal(tiny.collect(policy, reference).logprobs, after.logprobs)


def test_weights_that_never_learn_are_not_woken(tiny_model):
    tiny_model.transformer.wpe.weight.requires_grad_(False)
    policy = PolicyWithValue(tiny_model)
    with policy.learning(critic_only=True):
        assert {name for name, x in policy.named_parameters() if x.requires_grad} == {
            "value_head.weight",
            "value_head.bias",
        }
    assert [name for name, x in policy.named_parameters() if not x.requires_grad] == ["model.transformer.wpe.weight"]


def test_adapters_wait_for_the_critic_too(tiny_model):
    reference = tiny_model.requires_grad_(False)
    policy = PolicyWithValue(lora.with_adapters(reference, 2, "base")).eval()
    optimizer = optim.ppo_optimizer(policy, 1e-2, muon=False)
    before, rollout = parameters_of_policy(policy), tiny.collect(policy, reference)
    with policy.learning(critic_only=True):
        learn(policy, reference, optimizer, rollout)
    assert same(parameters_of_policy(policy), before) and policy.value_head.weight.abs().max() > 0
    learn(policy, reference, optimizer, rollout)
    moved = {name for name, x in parameters_of_policy(policy).items() if not torch.equal(x, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("separate", [True, False])
def test_the_critics_learning_rate_is_its_own_and_falls_too(tiny_model, separate):
    policy = PolicyWithValue(tiny_model, separate)
    optimizer = optim.ppo_optimizer(policy, 1e-3, muon=True, value_lr=5e-3)
    assert optimizer.set_lr(5e-4) == 5e-4  # half of --lr, as in the middle of a run
    rates = {id(x): group["lr"] for one in optimizer.members for group in one.param_groups for x in group["params"]}
    assert len(rates) == len(list(policy.parameters()))
    for name, x in policy.named_parameters():
        assert rates[id(x)] == pytest.approx(5e-4 if name.startswith("model.") else 2.5e-3), name


def test_two_processes_leave_the_policy_alone_too(tiny_model, tmp_path):
    def warmed_up():
        policy, reference = PolicyWithValue(copy.deepcopy(tiny_model)).eval(), copy.deepcopy(tiny_model)
        optimizer = optim.ppo_optimizer(policy, 1e-2, muon=True)
        with policy.learning(critic_only=True):
            learn(policy, reference, optimizer, tiny.collect(policy, reference))
        is_unmoved = same(parameters_of_policy(policy), parameters_of_policy(PolicyWithValue(tiny_model)))
        return is_unmoved, sum(len(member.state) for member in optimizer.members), policy.value_head.weight.detach()

    for is_unmoved, states, head in in_two_processes(warmed_up, tmp_path):
        assert is_unmoved and states == 2 and head.abs().max() > 1e-3  # the head's weight and bias


def test_a_run_with_a_warm_up_stopped_inside_it_and_resumed(chain, monkeypatch):
    """The policy of the first three rollouts is the reference; the adaptive coefficient waits; resuming is exact; the
    checkpoint has the critic."""
    home = chain[0]
    flags = [*FOUR_UPDATES, "--critic-warmup", 2, "--value-lr", "1e-2", "--separate-value"]
    flags += ["--target-kl", 1, "--kl-horizon", 160]

    def named(name):
        return [*flags, "--run", name, "--out", f"models/{name}"]

    run("finetuning_nlg", *named("warm"), cwd=home)
    log = pd.read_csv(home / "data_results" / "warm" / "log.csv")
    assert log.kl[:3].abs().max() < 1e-3 < abs(log.kl[3])
    assert log.approx_kl[:2].max() < 1e-9 < log.approx_kl[2] and (log.value_loss > 0).all()
    # far below the target a coefficient falls by 0.2 * 16 / 160 an update, after the warm-up only
    assert (log.kl_coef / log.kl_coef[0]).tolist() == pytest.approx([1, 1, 1, 0.98], abs=1e-4)

    update, path = ppo.update, home / "models" / "stopped.checkpoint"

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", interrupted)
        run("finetuning_nlg", *named("stopped"), cwd=home, code=130)
    saved = torch.load(path, weights_only=True)["state"]["policy"]
    assert saved["value_head.weight"].abs().max() > 0
    assert any(not torch.equal(x, saved[f"value_{name}"]) for name, x in saved.items() if name.startswith("model."))
    run("finetuning_nlg", *named("stopped"), "--resume", cwd=home)
    one, other = (home / "models" / name / "model.safetensors" for name in ("warm", "stopped"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--critic-warmup", 1, "--leave-one-out", "--answers", 2], "--critic-warmup is for the critic"),
        (["--critic-warmup", 1, "--value-coef", 0], "--value-coef 0 teaches nothing"),
        (["--value-coef", 0.5, "--leave-one-out", "--answers", 2], "--value-coef is for the critic"),
        (["--value-lr", "1e-3", "--leave-one-out", "--answers", 2], "--value-lr is for the critic"),
        (["--value-lr", "1e-3", "--value-coef", 0], "--value-coef 0 teaches nothing"),
        (["--critic-warmup", 2], "leaves none of the 2 updates"),
        (["--separate-value", "--leave-one-out", "--answers", 2], "--separate-value is for the critic"),
        (["--separate-value", "--value-coef", 0], "--value-coef 0 teaches nothing"),
        (["--target-kl", 1, "--kl-coef", 0], "--kl-coef 0 stays 0"),
        (["--target-kl", 1, "--kl-horizon", 15], "--kl-horizon 15 is less than --batch-size 16"),
        (["--stop-after", 8, "--response-length", 8], "no response of --response-length 8 ends"),
        (["--critic-warmup", "-1"], "--critic-warmup"),
        (["--value-lr", 0], "--value-lr"),
    ],
)
def test_flags(chain, flags, words):
    assert words in refused("finetuning_nlg", *TINY_RUN, *flags, cwd=chain[0])
