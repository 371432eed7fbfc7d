"""What a language model's hidden states say of tokens: log-probabilities, entropy, KL and their gradients."""

import math

import pytest
import torch
from torch import tensor

from rlhf.vocabulary import CHUNK_BYTES, logprobs_and_kl, token_logprobs, token_statistics


class Table(torch.nn.Module):
    """What `token_statistics` needs of a language model: an output layer, here with a row of logits for every state."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.layer = torch.nn.Linear(*logits.shape, bias=False, dtype=logits.dtype)
        self.layer.weight.data = logits.T.contiguous()
        self.base_model = self

    def get_output_embeddings(self):
        return self.layer


def said(logits, ref_logits, ids, temperature=1.0):
    """What a policy and a reference with these logits [N, V] say of ids [N]."""
    states = torch.eye(len(logits), dtype=logits.dtype)
    return token_statistics(Table(logits), states, Table(ref_logits), states, ids, temperature)


def test_kl_divergence_and_entropy_of_two_coins():
    # 3/4 against 1/2: 3/4 ln(3/2) + 1/4 ln(1/2)
    fair, bent = tensor([[0.5, 0.5]]).log(), tensor([[0.75, 0.25]]).log()
    found = said(bent, fair, tensor([1]))
    assert found.exact_kl.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert found.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.logprobs.exp().item() == pytest.approx(0.25) and found.ref_logprobs.exp().item() == pytest.approx(0.5)
    assert said(fair, fair, tensor([0])).exact_kl.item() == pytest.approx(0, abs=1e-7)
    # at temperature 1/2 the odds of 3 to 1 become 9 to 1
    assert said(bent, fair, tensor([0]), temperature=0.5).logprobs.exp().item() == pytest.approx(0.9)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_what_is_said_and_its_gradients_are_those_of_autograd_in_chunks_of_any_size(monkeypatch, chunk):
    torch.manual_seed(0)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk * 4 * 7)
    states, ref_states = torch.randn(2, 5, 3, dtype=torch.float64)
    models = [Table(torch.randn(3, 7, dtype=torch.float64)) for _ in range(2)]
    for model in models:
        model.layer.bias = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    ids, (policy, reference) = torch.randint(7, (5,)), models
    states.requires_grad_()
    found = token_statistics(policy, states, reference, ref_states, ids, 0.7)
    logp, ref_logp = (
        (model.layer(x) / 0.7).log_softmax(-1) for model, x in ((policy, states), (reference, ref_states))
    )
    expected = (
        logp.gather(1, ids[:, None])[:, 0],
        ref_logp.gather(1, ids[:, None])[:, 0],
        (logp.exp() * (logp - ref_logp)).sum(1),
        -(logp.exp() * logp).sum(1),
        (reference.layer(ref_states) / 0.7).logsumexp(1),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    weights = torch.randn(2, 5, dtype=torch.float64)
    of = states, policy.layer.weight, policy.layer.bias
    logprobs, kl = logprobs_and_kl(policy, states, reference, ref_states, found.ref_log_totals, ids, 0.7)
    assert torch.equal(logprobs, found.logprobs) and torch.equal(kl, found.exact_kl)
    alone = token_logprobs(policy, states, ids, 0.7)
    assert torch.equal(alone, logprobs)
    for ours, theirs in [
        (weights[0] * logprobs + weights[1] * kl, weights[0] * expected[0] + weights[1] * expected[2]),
        (weights[0] * alone, weights[0] * expected[0]),
    ]:
        gradients = (torch.autograd.grad(x.sum(), of, retain_graph=True) for x in (ours, theirs))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
