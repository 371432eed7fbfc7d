"""Activation checkpointing and the gradient through a large vocabulary: the same numbers from less memory."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config

from rlhf import activations, lora, supervised, vocabulary
from rlhf.errors import UserError
from rlhf.forward import hidden_states
from rlhf.policy import PolicyWithValue
from rlhf.sampling import sample
from rlhf.vocabulary import HeadGradient, logprobs_and_kl, token_logprobs
from tests import tiny
from tests.conftest import TINY_RUN, run

EACH_KIND = pytest.mark.parametrize("config", tiny.ARCHITECTURES, ids=lambda config: config.model_type)
PRECISIONS = [torch.float32, torch.bfloat16]
QUERIES, MASK = tiny.QUERIES, tiny.QUERY_MASK
PLACES = torch.tensor([2, 3, 5, 7, 10, 11])


def two_models(config, changes=None):
    """A model, and the same with activation checkpointing."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.update(changes or {})
    plain = AutoModelForCausalLM.from_config(config).eval()
    checkpointed = copy.deepcopy(plain)
    activations.checkpoint_layers(checkpointed)
    return plain, checkpointed


def saved_bytes(function) -> int:
    """What a forward pass keeps for the backward pass, without the weights."""
    kept = {}

    def note(x):
        if not isinstance(x, torch.nn.Parameter) and x.untyped_storage().data_ptr() not in kept:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        out = function()
    assert out.requires_grad
    return sum(kept.values())


@EACH_KIND
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_states_and_gradients_are_the_same_bit_for_bit(config, dtype):
    found = []
    for model in two_models(config):
        computing = PolicyWithValue(model, precision=dtype).eval()
        states = hidden_states(computing.in_precision(), QUERIES, MASK, PLACES)
        states.pow(2).sum().backward()
        found.append([states, *(weight.grad for weight in model.base_model.parameters())])
    assert any(x is not None and x.abs().sum() > 0 for x in found[0])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@EACH_KIND
def test_of_a_deep_model_less_than_half_is_kept(config):
    plain, checkpointed = two_models(config, {"num_hidden_layers": 8})
    ids = QUERIES.repeat(8, 4)
    mask, places = torch.ones_like(ids), torch.arange(ids.numel())
    sizes = [saved_bytes(lambda m=m: hidden_states(m, ids, mask, places)) for m in (plain, checkpointed)]
    assert sizes[1] < sizes[0] / 2


@EACH_KIND
def test_sampling_uses_the_cache_as_ever(config):
    passes, found = [], []
    for model in two_models(config):
        layer = next(x for x in model.modules() if isinstance(x, activations.GradientCheckpointingLayer))
        layer.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
        found.append(sample(model, QUERIES, MASK, tiny.sampling(), tiny.generator()))
    assert set(passes) <= {4, 1}  # the queries, and, outside the fast path, a token at a time
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@EACH_KIND
def test_supervised_losses_and_their_gradients_are_the_same(config):
    """In training mode, where transformers makes a cache, and dropout must fall on the same places again."""
    found = []
    changes = {"attention_dropout": 0.3, "resid_pdrop": 0.3, "hidden_dropout": 0.3}
    for model in two_models(config, changes):
        torch.manual_seed(1)
        losses, _ = supervised.lm_loss(model.train(), QUERIES, torch.ones_like(QUERIES))
        losses.sum().backward()
        found.append([losses, *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_classifier_learns_the_same(kind):
    small = {"vocab_size": 11, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
    config = GPT2Config(**small) if kind == "gpt2" else BertConfig(**small, intermediate_size=32)
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config).train()
    checkpointed, found = copy.deepcopy(plain), []
    activations.checkpoint_layers(checkpointed)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        losses, _ = supervised.choice_loss(model, [[[1, 2, 3]], [[4, 5]]], torch.tensor([0, 1]), pad_id=0)
        losses.sum().backward()
        found.append([losses, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_model_without_layers_is_refused():
    layer = torch.nn.Linear(2, 2)
    layer.base_model = torch.nn.Identity()
    with pytest.raises(UserError, match="--activation-checkpointing knows no layers in a Linear"):
        activations.checkpoint_layers(layer)


def test_runs_end_alike(chain):
    """With adapters too."""
    home, _ = chain
    weights = []
    for name, flags in (("kept", []), ("made_again", ["--activation-checkpointing"])):
        flags = [*TINY_RUN, "--lora", 2, "--response-length", 8, "--reference-samples", 16, *flags]
        run("finetuning_nlg", *flags, "--run", name, "--out", f"models/{name}", cwd=home)
        weights.append((home / "models" / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# a large vocabulary

VOCABULARY, TOKENS = 300, 40


def vocabulary_case(dtype=torch.float32, frozen_head=False, with_kl=True):
    """The log-probabilities' and KL's gradients of a model, as a function."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_layer=1, n_embd=16, n_head=2, n_positions=8, initializer_range=0.3)
    model, reference = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    if frozen_head:
        model = lora.with_adapters(model, 2, "base")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY), requires_grad=not frozen_head)
    computing = PolicyWithValue(model, precision=dtype).eval().in_precision()
    states, ref_states = torch.randn(2, TOKENS, 16)
    ids = torch.randint(VOCABULARY, (TOKENS,))
    totals = reference.lm_head(ref_states / 0.7).logsumexp(1).detach()
    weights = torch.randn(2, TOKENS)

    def loss(x):
        if not with_kl:
            return (weights[0] * token_logprobs(computing, x, ids, 0.7)).sum()
        logprobs, kl = logprobs_and_kl(computing, x, reference, ref_states, totals, ids, 0.7)
        return (weights[0] * logprobs + weights[1] * kl).sum()

    def gradients():
        x = states.clone().requires_grad_()
        loss(x).backward()
        found = [x.grad, model.lm_head.weight.grad, model.lm_head.bias.grad]
        model.zero_grad()
        return found

    return loss, gradients, states


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("with_kl, kept_rows", [(True, 0), (True, 7), (True, 15), (False, 0)])
def test_gradients_are_the_same_when_nothing_of_the_vocabularys_size_is_kept(
    monkeypatch, dtype, frozen_head, with_kl, kept_rows
):
    monkeypatch.setitem(vocabulary.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 3)  # three rows at a time
    loss, gradients, states = vocabulary_case(dtype, frozen_head, with_kl)
    before = gradients()
    of_vocabulary = 4 * VOCABULARY * TOKENS
    assert saved_bytes(lambda: loss(states.clone().requires_grad_())) > of_vocabulary / 2
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", 8 * VOCABULARY * kept_rows)
    assert saved_bytes(lambda: loss(states.clone().requires_grad_())) < of_vocabulary / 2
    after = gradients()
    assert [x is None for x in before] == [False, frozen_head, frozen_head]
    for one, other in zip(before, after, strict=True):
        if one is not None:
            tolerance = 1e-6 if dtype == torch.float32 else 0.02
            assert (one - other).norm() <= tolerance * one.norm()


def test_a_small_vocabulary_is_kept():
    """The default model's forward batch: 64 responses of 40 tokens, a vocabulary of 4,096."""
    assert vocabulary.KEPT_BYTES / 2 > 2 * 64 * 40 * 4096 * 4


def test_the_gradient_of_a_layer_is_a_sum_over_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", 2 * 4 * 5 * 4)  # four rows of five wait
    torch.manual_seed(0)
    states, gradient = torch.randn(10, 3), torch.randn(10, 5)
    of_head = HeadGradient(states, torch.float32, True, True)
    for chunk in gradient.split(2):
        of_head.add(chunk)
    weight, bias = of_head.total()
    torch.testing.assert_close(weight, gradient.T @ states)
    torch.testing.assert_close(bias, gradient.sum(0))
