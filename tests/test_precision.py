"""bfloat16: what it may change, and what it may not, on the CPU and, where there is one, on a GPU."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

import ppo
from rlhf import forward, optim, precision
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect, shuffled_minibatches
from rlhf.sampling import Sampling
from rlhf.vocabulary import logprobs_and_kl, token_logits, token_statistics
from tests.conftest import TINY_RUN, run
from tests.tiny import SETTINGS

LOW = torch.bfloat16
SMALL = {"vocab_size": 60, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
CONFIGS = [
    GPT2Config(**SMALL, n_positions=64, initializer_range=0.1, bos_token_id=0, eos_token_id=0),
    LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=128, initializer_range=0.1, tie_word_embeddings=True),
    GPTNeoXConfig(**SMALL, intermediate_size=128, initializer_range=0.1),
]
EACH_KIND = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def model_of(config, device="cpu"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def roll_out(config, dtype, device="cpu", minibatches=3):
    """A policy, its reference and a rollout with advantages and returns."""
    reference = model_of(config, device)
    policy = PolicyWithValue(copy.deepcopy(reference), precision=dtype).eval()
    precision.freeze(reference, dtype)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(2, 60, (24, 3), generator=generator).to(device)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device).repeat(12, 1)
    batches = {"minibatches": shuffled_minibatches(24, minibatches, generator), "forward_batch": 5}
    rollout = collect(policy, reference, queries, mask, Sampling(10, 0.7, stop_id=0), generator, **batches)
    advantages = torch.randn(24, 10, generator=generator)[:, : rollout.values.shape[1]].to(device)
    return policy, reference, rollout, advantages * rollout.response_mask


def learn(policy, reference, rollout, advantages, optimizer, epochs=1):
    """The metrics of an update, whose returns are the advantages too."""
    settings = dataclasses.replace(SETTINGS, epochs=epochs, forward_batch=5)
    targets = ppo.Targets(advantages, advantages, kl_weight=0.1)
    return ppo.update(policy, reference, optimizer, rollout, targets, settings, torch.Generator().manual_seed(1))


# the update


@DEVICES
@EACH_KIND
def test_at_the_first_minibatch_the_ratio_is_1(config, device):
    policy, reference, rollout, advantages = roll_out(config, LOW, device)
    assert len(set(rollout.lengths.tolist())) > 2  # the slices are not alike
    optimizer = optim.ppo_optimizer(policy, 1e-3, muon=False)
    assert learn(policy, reference, rollout, advantages, optimizer)["ratio_deviation_first"] == 0


@DEVICES
@EACH_KIND
def test_two_epochs_are_two_updates_of_one(config, device):
    found = []
    for calls in ((2,), (1, 1)):
        policy, reference, rollout, advantages = roll_out(config, LOW, device, minibatches=1)
        optimizer = optim.ppo_optimizer(policy, 1e-2, muon=False)
        for epochs in calls:
            learn(policy, reference, rollout, advantages, optimizer, epochs)
        found.append(torch.cat([weight.detach().flatten() for weight in policy.model.parameters()]))
    start = torch.cat([weight.detach().flatten() for weight in model_of(config, device).parameters()])
    assert (found[0] - start).norm() > 0.1  # there is something to compare
    assert (found[0] - found[1]).norm() < 0.02 * (found[0] - start).norm()  # rows in another order round differently


@DEVICES
@EACH_KIND
def test_the_policy_is_seen_to_move_as_far_as_in_float32(config, device):
    """Forward passes that read weights of before an optimizer step fail here."""
    approx_kl = {}
    for dtype in (torch.float32, LOW):
        _, reference, rollout, advantages = roll_out(config, torch.float32, device)
        policy = PolicyWithValue(model_of(config, device), precision=dtype).eval()
        optimizer = optim.ppo_optimizer(policy, 1e-3, muon=False)
        approx_kl[dtype] = learn(policy, reference, rollout, advantages, optimizer, epochs=4)["approx_kl"]
    assert approx_kl[torch.float32] > 0.1
    assert approx_kl[LOW] == pytest.approx(approx_kl[torch.float32], rel=0.15)


def test_the_responses_and_their_numbers_do_not_depend_on_the_slices():
    """Only their rounding does."""
    _, _, one, _ = roll_out(CONFIGS[0], LOW, minibatches=1)
    _, _, other, _ = roll_out(CONFIGS[0], LOW, minibatches=6)
    assert torch.equal(one.query_ids, other.query_ids)
    if torch.equal(one.response_ids, other.response_ids):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=0.05, rtol=0)


# logits and scores


@DEVICES
@EACH_KIND
def test_logits_far_from_0_keep_their_differences(config, device):
    """At -100 bfloat16 has a spacing of a half; sums in float32 leave the rounding of the factors."""
    model = model_of(config, device)
    head = model.get_output_embeddings()
    states = torch.randn(200, 64, device=device)
    away = torch.ones(64, device=device)
    with torch.no_grad():
        head.weight.add_(-100 / 64 * away)
        states += away - states.mean(1, keepdim=True)  # every state has a component of 1 along `away`
        exact = (states.double() @ head.weight.double().T / 0.7).log_softmax(-1)
        assert (states @ head.weight.T).mean().item() == pytest.approx(-100, rel=0.1)
        frozen = precision.freeze(copy.deepcopy(model), LOW)
        low = token_logits(frozen, states, 0.7)
        assert low.dtype == torch.float32
        ids = torch.randint(60, (200,), device=device)
        said = token_statistics(frozen, states, frozen, states, ids, 0.7)
    error = low.log_softmax(-1) - exact
    assert error.std() < 0.05  # rounded to bfloat16 themselves, the logits are off by 0.3
    torch.testing.assert_close(said.logprobs.double(), exact.gather(1, ids[:, None])[:, 0], atol=0.2, rtol=0)


@DEVICES
def test_logits_far_from_0_keep_the_gradient_of_the_kl(device):
    """With the differences of logits at 100 rounded to bfloat16, hardly anything of it is left."""
    model, reference = model_of(CONFIGS[0], device), model_of(CONFIGS[0], device)
    states, ids = torch.randn(40, 64, device=device), torch.zeros(40, dtype=torch.long, device=device)
    with torch.no_grad():
        states += 1 - states.mean(1, keepdim=True)
        for each, scale in ((model, 0.1), (reference, 0.2)):
            weight = each.get_output_embeddings().weight
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * scale - 100 / 64)
    found = []
    for low in (False, True):
        own = states.clone().requires_grad_()
        if low:
            model, reference = (precision.freeze(each, LOW) for each in (model, reference))
        with torch.no_grad():
            totals = token_logits(reference, states, 0.7).logsumexp(1)
        logprobs_and_kl(model, own, reference, states, totals, ids, 0.7)[1].sum().backward()
        found.append(own.grad)
    exact = states.double().requires_grad_()
    logp, ref_logp = (
        (exact if each is model else exact.detach())
        .matmul(each.get_output_embeddings().weight.detach().double().T)
        .div(0.7)
        .log_softmax(1)
        for each in (model, reference)
    )
    (logp.exp() * (logp - ref_logp)).sum().backward()
    for gradient, most in zip(found, (0.005, 0.05), strict=True):
        assert ((gradient - exact.grad).norm() / exact.grad.norm()).item() < most


@DEVICES
@EACH_KIND
def test_gradients_are_those_of_float32_but_for_rounding(config, device):
    gradients = []
    for dtype in (torch.float32, LOW):
        model = model_of(config, device)
        policy = PolicyWithValue(model, precision=dtype).eval()
        ids = torch.arange(2, 20, device=device).view(2, 9)
        states, _ = policy(ids, torch.ones_like(ids), torch.arange(3, 8, device=device))
        reference, totals = model_of(config, device), torch.zeros(5, device=device)
        chosen = policy.in_precision(), states, reference, states.detach(), totals, ids[0, 4:], 0.7
        logprobs, kl = logprobs_and_kl(*chosen)
        (logprobs.sum() + kl.sum()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, exact in gradients[0].items():
        low = gradients[1][name]
        assert low.dtype == torch.float32
        assert (low - exact).norm() < 0.05 * exact.norm() + 1e-4, name


@DEVICES
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_classifier_tells_texts_apart(device, kind):
    config = {
        "gpt2": GPT2Config(**SMALL, n_positions=64, pad_token_id=0),
        "bert": BertConfig(**SMALL, intermediate_size=128, pad_token_id=0),
    }[kind]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval().to(device)
    ids = torch.randint(1, 60, (128, 6), device=device)
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        exact = forward.classifier_logits(model, encoded)
        low = forward.classifier_logits(precision.freeze(model, LOW), encoded)
    assert low.dtype == torch.float32 and len((low[:, 1] - low[:, 0]).unique()) > 120
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0)


# weights


@EACH_KIND
def test_a_policys_copy_holds_its_matrices_and_shares_the_rest(config):
    model = model_of(config)
    low = precision.LowPrecisionCopy(model).refreshed()
    own = {id(weight) for weight in model.parameters()}
    for name, weight in low.base_model.named_parameters():
        is_matrix = weight.dtype == LOW
        assert is_matrix != (id(weight) in own), name
        if "embed" in name or "norm" in name or "wte" in name or "ln_" in name:
            assert not is_matrix, name
    assert sum(weight.dtype == LOW for weight in low.parameters()) >= 2 * 4  # two layers of at least four matrices
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_the_copy_is_renewed_when_a_weight_has_changed_and_only_then():
    model = model_of(CONFIGS[0])
    policy = PolicyWithValue(model, precision=LOW)
    weight, low = (x.transformer.h[0].mlp.c_fc.weight for x in (model, policy.in_precision()))
    version = low._version
    policy.in_precision()
    assert low._version == version  # not copied again
    optimizer = optim.ppo_optimizer(policy, 0.1, muon=True)
    for member in optimizer.members:
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        member.step()
        policy.in_precision()
        assert torch.equal(low, weight.bfloat16())
    assert not torch.equal(weight, model_of(CONFIGS[0]).transformer.h[0].mlp.c_fc.weight)
    policy.load_state_dict(PolicyWithValue(model_of(CONFIGS[0])).state_dict())
    policy.in_precision()
    assert torch.equal(low, weight.bfloat16())


def test_gradients_of_slices_add_up_in_float32():
    """256 and 1 are 256 in bfloat16."""
    model = model_of(CONFIGS[0])
    low, weight = precision.LowPrecisionCopy(model), model.transformer.h[0].mlp.c_fc.weight
    of_low = low.refreshed().transformer.h[0].mlp.c_fc.weight
    for scale in (256.0, 1.0):
        (of_low * scale).sum().backward()
    assert of_low.grad is None
    assert torch.equal(weight.grad, torch.full_like(weight, 257.0))


def test_a_frozen_model_holds_its_matrices_in_bfloat16():
    model = model_of(CONFIGS[1])
    before = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    embedding = model.model.embed_tokens.weight.numel() * 4
    precision.freeze(model, LOW)
    norms = sum(weight.numel() * 4 for name, weight in model.named_parameters() if "norm" in name)
    after = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert after == embedding + norms + (before - embedding - norms) / 2
    assert not any(weight.requires_grad for weight in model.parameters())


def test_in_float32_nothing_is_copied_or_changed():
    model = model_of(CONFIGS[0])
    body = type(model.base_model)
    assert PolicyWithValue(model).in_precision() is model
    assert type(precision.freeze(model, torch.float32).base_model) is body


# the choice


@pytest.mark.parametrize(
    ("known", "fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),  # measured: slower than float32
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"neon": True}, False),
    ],
)
def test_which_cpus_multiply_bfloat16_fast(monkeypatch, known, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert precision.is_fast(torch.device("cpu")) is fast


@pytest.mark.parametrize(
    ("name", "fast", "size", "chosen"),
    [
        ("auto", True, 2 * precision.LARGE_ENOUGH, LOW),
        ("auto", True, 1000, torch.float32),
        ("auto", False, 2 * precision.LARGE_ENOUGH, torch.float32),
        ("bfloat16", False, 1000, LOW),
        ("float32", True, 2 * precision.LARGE_ENOUGH, torch.float32),
    ],
)
def test_which_precision_a_cpu_gets(monkeypatch, name, fast, size, chosen):
    known = {"avx512_bf16": False, "amx_bf16": fast}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    with torch.device("meta"):
        model = nn.Linear(size, 1)
    assert precision.choose(name, torch.device("cpu"), model) == chosen


def test_a_run_says_and_notes_its_precision(chain):
    home = chain[0]
    flags = ["--precision", "bfloat16", "--run", "low", "--out", "models/low"]
    assert "device cpu, matrix products in bfloat16" in run("finetuning_nlg", *TINY_RUN, *flags, cwd=home).stdout
    config = json.loads((home / "data_results" / "low" / "config.json").read_text())
    assert (config["device"], config["precision"]) == ("cpu", "bfloat16")
