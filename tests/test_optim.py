"""The optimizers: Muon's steps by hand and beside torch's own, and what a step does with any gradient."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn, tensor
from transformers import AutoModelForCausalLM, GPT2Config

import ppo
from rlhf import muon, optim
from rlhf.policy import PolicyWithValue
from tests.tiny import SETTINGS, collect, generator


def quintic(x: float) -> float:
    return 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5


# Muon


@pytest.mark.parametrize("shape", [(2, 2), (2, 5)])
def test_the_quintic_acts_on_each_singular_value_and_on_nothing_else(shape):
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=torch.manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=torch.manual_seed(1)))
    matrix = left @ torch.diag(torch.tensor([3.0, 4.0])) @ right[:2]  # its norm is 5
    expected = left @ torch.diag(torch.tensor([quintic(quintic(x)) for x in (0.6, 0.8)])) @ right[:2]
    torch.testing.assert_close(muon.orthogonalize(matrix[None], steps=2)[0], expected, atol=1e-4, rtol=0)


def test_singular_values_that_differ_by_a_factor_of_five_come_out_alike():
    matrix = torch.diag(torch.linspace(1, 5, 16)) @ torch.linalg.qr(torch.randn(40, 40))[0][:16]
    values = torch.linalg.svdvals(muon.orthogonalize(matrix[None])[0])
    assert values.min() > 0.5 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_a_first_step_is_orthogonal_and_as_large_as_adams(shape):
    weight = nn.Parameter(torch.ones(shape))
    gradient = torch.zeros(shape)
    gradient[0, 0] = 7.0
    weight.grad = gradient.clone()
    muon.Muon([weight], lr=0.1, weight_decay=0.5).step()
    expected = torch.full(shape, 1 - 0.1 * 0.5)
    expected[0, 0] -= 0.1 * 0.2 * math.sqrt(3) * quintic(quintic(quintic(1.0)))
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=0)


def test_it_is_torchs_muon_in_float32():
    shapes = [(8, 24), (8, 8), (32, 8), (8, 24)]
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = [
        muon.Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (one - before).norm()  # bfloat16 has three digits


def test_a_matrix_without_a_gradient_stays():
    weight = nn.Parameter(torch.ones(2, 3))
    muon.Muon([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(2, 3))


# supervised training


def test_muon_takes_the_inner_matrices_and_adamw_the_rest(tiny_model):
    both, adamw = (optim.supervised_optimizer(tiny_model, 1e-3, muon=with_muon) for with_muon in (True, False))
    assert [type(member) for member in both.members] == [muon.Muon, torch.optim.AdamW]
    assert [type(member) for member in adamw.members] == [torch.optim.AdamW]
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    of_muon, of_adamw = ([names[id(x)] for x in member.param_groups[0]["params"]] for member in both.members)
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    kinds = {name.split(".", 3)[-1] for name in of_muon}
    assert kinds == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert {"transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.bias"} <= set(of_adamw)


@pytest.mark.parametrize(("gradient", "clipped"), [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
def test_gradients_are_clipped_to_norm_1_and_their_norm_is_returned(gradient, clipped):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = optim.Optimizer([weight], [torch.optim.SGD([weight], lr=1.0)], max_grad_norm=1.0)
    weight.grad = torch.tensor(gradient)
    assert optimizer.step().item() == pytest.approx(math.hypot(*gradient))
    assert weight.tolist() == pytest.approx([-x for x in clipped], abs=1e-5)
    assert weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model, bad):
    optimizer = optim.supervised_optimizer(tiny_model, 1e-2, muon=True)
    ids = torch.arange(8).view(2, 4)

    def step(factor: float) -> torch.Tensor:
        (tiny_model(ids).logits.square().mean() * factor).backward()
        return optimizer.step()

    assert step(1.0).isfinite()
    weights, state = copy.deepcopy(tiny_model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert not step(bad).isfinite()
    torch.testing.assert_close(tiny_model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert step(1.0).isfinite()  # no gradient of the bad step is left
    assert not torch.equal(tiny_model.transformer.wte.weight, weights["transformer.wte.weight"])


# Adam, and the two of them for PPO


@pytest.mark.parametrize("steps", [1, 3])
def test_adam_is_tensorflows(steps):
    # lr_t = lr * sqrt(1 - b2^t) / (1 - b1^t); x -= lr_t * m / (sqrt(v) + eps), with eps outside the correction
    gradients, x, m, v = [0.5, -2e-4, 1e-5], 1.0, 0.0, 0.0
    parameter = torch.nn.Parameter(tensor([1.0], dtype=torch.float64))
    adam = optim.Adam([parameter], lr=0.1)
    for t in range(1, steps + 1):
        g = gradients[t - 1]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-5)
        parameter.grad = tensor([g], dtype=torch.float64)
        adam.step()
    assert parameter.item() == pytest.approx(x, abs=1e-12)


def test_a_skipped_step_does_not_count_for_adam(tiny_model):
    policy = PolicyWithValue(tiny_model).eval()
    rollout = dataclasses.replace(collect(policy, copy.deepcopy(tiny_model)), minibatches=tensor([0, 1, 2]).split(1))
    advantages = torch.ones(rollout.values.shape)
    advantages[1, 0] = math.nan
    optimizer, targets = optim.ppo_optimizer(policy, 1e-3, muon=False), ppo.Targets(advantages, advantages, 0.0)
    metrics = ppo.update(policy, tiny_model, optimizer, rollout, targets, SETTINGS, generator())
    assert metrics["skipped"] == 1
    (adam,) = optimizer.members
    assert {state["step"].item() for state in adam.state.values()} == {2}
    for group in adam.param_groups:
        assert group["steps"] == 2 and group["eps"] == pytest.approx(1e-5 / math.sqrt(1 - 0.999**2))


def test_without_inner_matrices_there_is_nothing_for_muon():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=11, n_layer=0, n_head=2, n_embd=16))
    (adam,) = optim.ppo_optimizer(PolicyWithValue(model), 1e-3, muon=True).members
    assert isinstance(adam, torch.optim.Adam)


def test_muon_moves_the_inner_matrices_and_adam_the_rest(tiny_model):
    policy = PolicyWithValue(copy.deepcopy(tiny_model)).eval()
    adam, muon = optim.ppo_optimizer(policy, 1e-3, muon=True).members
    of_muon, of_adam = ({id(p) for group in one.param_groups for p in group["params"]} for one in (muon, adam))
    assert of_muon | of_adam == {id(p) for p in policy.parameters()} and not of_muon & of_adam
    names = {name for name, p in policy.named_parameters() if id(p) in of_muon}
    kinds = {name.split(".h.")[1].split(".", 1)[1] for name in names}
    assert kinds == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
