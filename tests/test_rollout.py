"""A rollout says of every token what a plain forward pass says, however its rows are batched."""

import copy
import dataclasses
import math

import torch
from torch import tensor
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf.policy import PolicyWithValue
from rlhf.rollout import Responses, Rollout, evaluate, forward_batches, shuffled_minibatches
from rlhf.vocabulary import token_logits
from tests.tiny import QUERIES, QUERY_MASK, collect, generator


def test_garbage_in_padding_changes_nothing(tiny_model):
    policy = PolicyWithValue(tiny_model)
    rollout = collect(policy, tiny_model)
    garbage = QUERIES.where(QUERY_MASK.bool(), 9)
    other = collect(policy, tiny_model, queries=garbage)
    assert torch.equal(rollout.response_ids, other.response_ids)
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(rollout, name), getattr(other, name), atol=1e-5, rtol=0)


def test_log_probabilities_are_those_of_a_plain_forward_pass(tiny_model):
    """Row by row, without padding, cache or batch, with nothing but the model and log_softmax."""
    rollout = collect(PolicyWithValue(tiny_model), tiny_model)
    assert 1 < rollout.response_mask.sum(1).float().mean() < 8  # some rows end early, or this shows little
    for i in range(len(QUERIES)):
        query = QUERIES[i][QUERY_MASK[i].bool()]
        response = rollout.response_ids[i][rollout.response_mask[i].bool()]
        logits = tiny_model(torch.cat([query, response])[None]).logits[0] / 0.7
        logprobs = logits.log_softmax(-1)[len(query) - 1 : -1]
        chosen = logprobs[torch.arange(len(response)), response]
        torch.testing.assert_close(rollout.logprobs[i][: len(response)], chosen, atol=1e-5, rtol=0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(rollout.entropy[i][: len(response)], entropy, atol=1e-5, rtol=0)


def test_a_rollout_does_not_depend_on_how_its_rows_are_sliced(tiny_model):
    """Rows go through the models in order of their length, without the padding that all of a slice have."""
    policy, reference = PolicyWithValue(tiny_model).eval(), copy.deepcopy(tiny_model)
    torch.nn.init.normal_(reference.transformer.wte.weight)
    with torch.no_grad():
        policy.value_head.weight.fill_(0.5)
    rollouts = [collect(policy, reference, forward_batch=size) for size in (1, 2, 3)]
    assert len(set(rollouts[0].response_mask.sum(1).tolist())) > 1
    for other in rollouts[1:]:
        for field in dataclasses.fields(Rollout)[:-1]:  # all but the minibatches
            torch.testing.assert_close(
                getattr(other, field.name), getattr(rollouts[0], field.name), atol=1e-5, rtol=1e-5
            )
    real = rollouts[0].response_mask.bool()
    logp = token_logits(reference, rollouts[0].ref_states[real], 0.7).log_softmax(-1)
    torch.testing.assert_close(
        logp.gather(1, rollouts[0].response_ids[real][:, None])[:, 0], rollouts[0].ref_logprobs[real]
    )


def test_a_rollout_keeps_nothing_as_large_as_its_tokens_times_the_vocabulary():
    """2.5 GB for a batch of [3] with GPT-2."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=400, n_layer=1, n_head=2, n_embd=16, n_positions=32))
    rollout = collect(PolicyWithValue(model).eval(), model.eval())
    tensors = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
    assert max(x.numel() for x in tensors) == rollout.response_mask.numel() * 16  # the reference's hidden states


def test_against_itself_a_policy_has_no_kl_and_no_value(tiny_model):
    rollout = collect(PolicyWithValue(copy.deepcopy(tiny_model)), tiny_model)
    assert rollout.kl.abs().max() < 1e-5
    assert rollout.exact_kl.abs().max() < 1e-5
    assert (rollout.values == 0).all()


def test_sampled_kl_is_the_exact_one_on_average(tiny_model):
    torch.manual_seed(1)
    other = copy.deepcopy(tiny_model)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rollout = collect(
        PolicyWithValue(other),
        tiny_model,
        length=3,
        queries=QUERIES.repeat(3000, 1),
        mask=QUERY_MASK.repeat(3000, 1),
    )
    exact = (rollout.exact_kl * rollout.response_mask).sum(1).mean()
    standard_error = rollout.kl.std() / math.sqrt(len(rollout.kl))
    assert exact > 0.05
    assert abs(rollout.kl.mean() - exact) < 4 * standard_error


def test_selected_rows_are_cut_to_their_longest_response(tiny_model):
    rollout = collect(
        PolicyWithValue(tiny_model).eval(), tiny_model, queries=QUERIES.repeat(4, 1), mask=QUERY_MASK.repeat(4, 1)
    )
    order = rollout.lengths.argsort()
    rows = order[:2]
    width = int(rollout.lengths[rows].max())
    assert width < rollout.response_ids.shape[1]
    part, doubled = rollout.select(rows, 2 * rollout.logprobs)
    assert torch.equal(part.query_ids, rollout.query_ids[rows]) and torch.equal(part.lengths, rollout.lengths[rows])
    for name in ("response_ids", "response_mask", "logprobs", "ref_states"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows, :width]), name
    assert torch.equal(doubled, 2 * part.logprobs)
    assert type(part) is Rollout and part.minibatches == ()


def test_packed_are_the_real_tokens_and_unpacked_the_padding_is_0():
    lengths, ids = tensor([1, 3]), tensor([[1, 9, 9], [2, 3, 4]])
    mask = tensor([[1, 0, 0], [1, 1, 1]])
    responses = Responses(tensor([[7], [8]]), tensor([[1], [1]]), ids, mask, lengths, prefixes=tensor([0, 0]))
    assert responses.pack(ids).tolist() == [1, 2, 3, 4]
    assert responses.unpack(tensor([1, 2, 3, 4])).tolist() == [[1, 0, 0], [2, 3, 4]]
    # the tokens before them, in rows of 1 query token and 3 of response: 7; 8, 2, 3
    assert responses.ids.flatten()[responses.predicting].tolist() == [7, 8, 2, 3]


def test_what_is_evaluated_inside_the_queries():
    """Queries 5 6 and 6 7 8: a shorter one could have ended after 5, after 6, and after 6 7."""
    queries, mask = tensor([[0, 5, 6], [6, 7, 8]]), tensor([[0, 1, 1], [1, 1, 1]])
    ids, lengths = tensor([[1, 9], [2, 3]]), tensor([1, 2])
    responses = Responses(queries, mask, ids, tensor([[1, 0], [1, 1]]), lengths, prefixes=tensor([1, 2]))
    assert responses.ids.flatten()[responses.predicting].tolist() == [6, 8, 2, 5, 6, 7]
    assert responses.predicted.tolist() == [1, 2, 3, 6, 7, 8]
    assert responses.pack_queries(queries).tolist() == [5, 6, 7]
    assert responses.unpack_queries(tensor([1, 2, 3])).tolist() == [[0, 1, 0], [2, 3, 0]]


def test_the_kl_inside_queries_is_that_of_a_plain_forward_pass(tiny_model):
    """QUERIES have 2, 4 and 3 tokens: with 2 in the shortest, nothing, what comes after 2 and 3 tokens, and after 2."""
    moved = copy.deepcopy(tiny_model)
    moved.transformer.wte.weight.data *= 1.2
    policy = PolicyWithValue(moved).eval()
    rollout = collect(policy, tiny_model, shortest_query=2)
    assert rollout.prefixes.tolist() == [0, 2, 1]
    expected = []
    for row, length in ((1, 2), (1, 3), (2, 2)):
        beginning = QUERIES[row][QUERY_MASK[row].bool()][:length][None]
        logp, ref_logp = ((model(beginning).logits[0, -1] / 0.7).log_softmax(-1) for model in (moved, tiny_model))
        expected.append((logp.exp() * (logp - ref_logp)).sum())
    *of_responses, inside = evaluate(policy, tiny_model, rollout, 0.7)
    torch.testing.assert_close(inside, torch.stack(expected), atol=1e-5, rtol=1e-5)
    *without, nothing = evaluate(policy, tiny_model, collect(policy, tiny_model), 0.7)
    assert len(nothing) == 0
    torch.testing.assert_close(of_responses, without, atol=1e-5, rtol=1e-5)


def test_a_pass_has_every_row_once_and_forward_batches_have_rows_of_similar_length():
    minibatches = shuffled_minibatches(10, 3, generator())
    assert sorted(torch.cat(minibatches).tolist()) == list(range(10)) and [len(x) for x in minibatches] == [4, 4, 2]
    batches = list(forward_batches(tensor([0, 1, 2, 3]), tensor([5, 1, 4, 2]), 2))
    assert [x.tolist() for x in batches] == [[1, 3], [2, 0]]
    assert not list(forward_batches(tensor([], dtype=torch.long), tensor([5]), 2))
