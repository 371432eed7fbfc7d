"""Samples follow the model's distribution, whatever padding, caches and rows that end early."""

import pytest
import torch
from torch import tensor
from transformers import AutoModelForCausalLM

from rlhf import sampling as sampling_module
from rlhf.forward import hidden_states
from rlhf.sampling import draw, real_tokens, sample, sample_many
from rlhf.vocabulary import token_statistics
from tests.tiny import ARCHITECTURES, QUERIES, QUERY_MASK, STOP, generator, sampling

EVERY_ARCHITECTURE = pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)


def test_real_tokens_end_with_the_first_stop():
    ids = tensor([[1, STOP, STOP, STOP], [1, 2, 3, 4], [STOP, 2, STOP, 3]])
    mask, terminated = real_tokens(ids, sampling())
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert terminated.tolist() == [True, False, True]
    mask, terminated = real_tokens(ids, sampling(stop_after=2))
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert terminated.tolist() == [True, False, True]


def test_draw_follows_the_distribution():
    probabilities = tensor([0.5, 0.0, 0.125, 0.375])
    heights = torch.rand(100_000, generator=generator())
    drawn = draw(probabilities.log().expand(100_000, 4), heights).bincount(minlength=4) / 100_000
    assert drawn[1] == 0
    torch.testing.assert_close(drawn, probabilities, atol=0.006, rtol=0)  # 4 standard errors


@EVERY_ARCHITECTURE
def test_the_sampler_sees_the_states_of_a_plain_forward_pass(config):
    """In float32 they spare the policy a forward pass: with a cache, left padding and rows that ended on the way."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    queries, query_mask = QUERIES.repeat(20, 1), QUERY_MASK.repeat(20, 1)
    responses, states = sample(model, queries, query_mask, sampling(12, 1.0), generator(1))
    mask, terminated = real_tokens(responses, sampling())
    assert terminated.any() and not terminated.all()
    ids, full_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, mask], 1)
    predicting = torch.zeros_like(ids)
    predicting[:, queries.shape[1] - 1 : -1] = mask
    plain = hidden_states(model, ids, full_mask, predicting.flatten().nonzero().squeeze(1))
    torch.testing.assert_close(states[mask.bool()], plain, atol=1e-5, rtol=1e-5)
    chosen = responses[mask.bool()]
    sampled, recomputed = (
        token_statistics(model, x, model, x, chosen, 0.7).logprobs for x in (states[mask.bool()], plain)
    )
    torch.testing.assert_close(sampled, recomputed, atol=1e-5, rtol=0)


@EVERY_ARCHITECTURE
def test_a_cache_with_room_changes_no_sample(config, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    queries, mask = QUERIES.repeat(20, 1), QUERY_MASK.repeat(20, 1)

    def responses():
        return sample(model, queries, mask, sampling(12, 1.0), generator(1))[0]

    with_room = responses()
    monkeypatch.setattr(sampling_module, "make_room", lambda cache, room: None)
    assert torch.equal(with_room, responses())
    assert with_room.shape[1] == 12 and (with_room[:, 3] == STOP).any()  # rows were dropped on the way


def test_samples_follow_the_model_whatever_padding_and_dropped_rows(tiny_model):
    """The second token given the first, over many rows that end at different times, against the exact probabilities."""
    count = 20_000
    ids, mask = QUERIES[:1].expand(count, 4), QUERY_MASK[:1].expand(count, 4)
    responses, _ = sample(tiny_model, ids, mask, sampling(3, 1.3), generator())
    first = tiny_model(tensor([[1, 2]])).logits[0, -1].div(1.3).softmax(-1)
    torch.testing.assert_close(responses[:, 0].bincount(minlength=11) / count, first, atol=0.015, rtol=0)
    commonest = first[:STOP].argmax()
    after = responses[responses[:, 0] == commonest][:, 1]
    second = tiny_model(tensor([[1, 2, commonest]])).logits[0, -1].div(1.3).softmax(-1)
    torch.testing.assert_close(after.bincount(minlength=11) / len(after), second, atol=0.03, rtol=0)


def test_samples_that_share_their_beginnings_follow_the_model_too(tiny_model):
    count, query = 20_000, tensor([[1, 2]])
    responses = sample_many(tiny_model, query, count, sampling(3, 1.3, stop_after=1), generator())

    def probabilities(*tokens):
        return tiny_model(tensor([[1, 2, *tokens]])).logits[0, -1].div(1.3).softmax(-1)

    assert responses.shape == (count, 3)
    torch.testing.assert_close(responses[:, 0].bincount(minlength=11) / count, probabilities(), atol=0.015, rtol=0)
    first = responses[:, 0].bincount(minlength=11)[:STOP].argmax()
    after = responses[responses[:, 0] == first]
    torch.testing.assert_close(after[:, 1].bincount(minlength=11) / len(after), probabilities(first), atol=0.03, rtol=0)
    second = after[:, 1].bincount(minlength=11)[:STOP].argmax()
    last = after[after[:, 1] == second][:, 2]
    torch.testing.assert_close(last.bincount(minlength=11) / len(last), probabilities(first, second), atol=0.08, rtol=0)
    mask, terminated = real_tokens(responses, sampling(stop_after=1))
    assert (responses[mask == 0] == STOP).all() and 0 < terminated.float().mean() < 1
    stopped_too_early = responses[:, 0] == STOP  # with stop_after = 1 that is no stop
    assert stopped_too_early.any() and (mask[stopped_too_early].sum(1) > 1).all()


def test_nothing_but_stops_stands_behind_a_stop(tiny_model):
    responses, _ = sample(tiny_model, QUERIES.repeat(100, 1), QUERY_MASK.repeat(100, 1), sampling(12, 1.0), generator())
    mask, terminated = real_tokens(responses, sampling())
    assert 0 < terminated.float().mean() <= 1
    assert (responses[mask == 0] == STOP).all()
    assert mask.sum(1).max() == responses.shape[1]


def test_a_stop_before_stop_after_does_not_end_a_response(tiny_model):
    responses, _ = sample(
        tiny_model, QUERIES.repeat(100, 1), QUERY_MASK.repeat(100, 1), sampling(12, 1.0, stop_after=4), generator()
    )
    mask, _ = real_tokens(responses, sampling(stop_after=4))
    assert mask.sum(1).min() >= 5
    assert ((responses[:, :4] == STOP).any(1) & (mask.sum(1) > 5)).any()
