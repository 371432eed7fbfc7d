"""Every formula of ppo.py against numbers worked out by hand, and the invariants that a correct PPO keeps."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

import ppo
from rlhf import optim, sampling
from rlhf.policy import CHUNK_BYTES, logprobs_and_kl, token_logits, token_statistics

STOP = 10
QUERIES = tensor([[0, 0, 1, 2], [3, 4, 5, 6], [0, 7, 8, 9]])
QUERY_MASK = tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def collect(policy, reference, length=8, temperature=0.7, seed=0, queries=QUERIES, mask=QUERY_MASK):
    return ppo.collect(
        policy,
        reference,
        queries,
        mask,
        length=length,
        temperature=temperature,
        stop_id=STOP,
        forward_batch=max(2, len(queries) // 4),
        generator=generator(seed),
    )


def one_update(policy, rollout, advantages, returns, **changes):
    settings = dict(
        epochs=1,
        clip_range=0.2,
        value_clip_range=0.2,
        value_coef=0.1,
        kl_weight=0.0,
        temperature=0.7,
        forward_batch=8,
        generator=generator(),
    )
    optimizers = optim.make_optimizers(policy, changes.pop("lr", 1e-3), muon=False)
    if count := changes.pop("minibatches", 1):
        rollout = dataclasses.replace(rollout, minibatches=ppo.shuffled(len(rollout.response_ids), count, generator()))
    reference = changes.pop("reference", policy.model)
    return ppo.update(policy, reference, optimizers, rollout, advantages, returns, **(settings | changes))


# formulas


def test_masked_mean_counts_real_tokens_only():
    assert ppo.masked_mean(tensor([[1.0, 2.0], [6.0, 100.0]]), tensor([[1, 1], [1, 0]])) == 3.0


def test_whiten_uses_the_biased_variance_of_real_tokens():
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3 = 14 / 3
    x, mask = tensor([[1.0, 2.0], [6.0, 100.0]]), tensor([[1, 1], [1, 0]])
    scale = math.sqrt(3 / 14)
    torch.testing.assert_close(ppo.whiten(x, mask), tensor([[-2.0, -1.0], [3.0, 0.0]]) * scale)
    kept = tensor([[-2 * scale + 3, -1 * scale + 3], [3 * scale + 3, 0.0]])
    torch.testing.assert_close(ppo.whiten(x, mask, shift_mean=False), kept)


def test_the_score_is_paid_on_the_last_real_token_and_kl_on_every_one():
    kl = tensor([[0.5, -0.25, 9.0], [1.0, 2.0, 3.0]])
    rewards = ppo.token_rewards(tensor([2.0, -1.0]), kl, tensor([[1, 1, 0], [1, 1, 1]]), kl_coef=0.1)
    torch.testing.assert_close(rewards, tensor([[-0.05, 2.025, 0.0], [-0.1, -0.2, -1.3]]))


def test_generalised_advantages_by_hand():
    # deltas with discount 0.9: 1 + 0.9*2 - 1 = 1.8; 0 + 0.9*3 - 2 = 0.7; 5 - 3 = 2
    # advantages with lambda 0.5: 2; 0.7 + 0.45*2 = 1.6; 1.8 + 0.45*1.6 = 2.52
    rewards, values = tensor([[1.0, 0.0, 5.0]]), tensor([[1.0, 2.0, 3.0]])
    advantages, returns = ppo.advantages_and_returns(rewards, values, tensor([[1, 1, 1]]), 0.9, 0.5)
    torch.testing.assert_close(advantages, tensor([[2.52, 1.6, 2.0]]))
    torch.testing.assert_close(returns, tensor([[3.52, 3.6, 5.0]]))


def test_leave_one_out_values_are_the_other_answers_returns():
    rewards = tensor([[1.0, 2.0], [4.0, 9.0], [5.0, 1.0], [0.0, 2.0], [2.0, 2.0], [3.0, 0.0]])
    mask = tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]])
    # totals 3, 4, 6 to one query and 2, 4, 3 to the next
    expected = tensor([[5.0, 5.0], [4.5, 0.0], [3.5, 3.5], [3.5, 3.5], [2.5, 2.5], [3.0, 3.0]])
    torch.testing.assert_close(ppo.leave_one_out(rewards, mask, 3), expected)
    advantages, _ = ppo.advantages_and_returns(rewards, expected, mask, 1.0, 1.0)
    assert advantages[:, 0].tolist() == [-2.0, -0.5, 2.5, -1.5, 1.5, 0.0]  # those of the answers to a query sum to 0


def test_with_lambda_1_the_return_is_the_sum_of_what_is_still_to_come():
    rewards, values = tensor([[1.0, 2.0, 4.0, 50.0]]), tensor([[0.3, -0.7, 9.0, 7.0]])
    _, returns = ppo.advantages_and_returns(rewards, values, tensor([[1, 1, 1, 0]]), 1.0, 1.0)
    torch.testing.assert_close(returns, tensor([[7.0, 6.0, 4.0, 0.0]]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.5, 1.0, -1.2),  # a gain counts up to 1 + clip_range
        (1.5, -1.0, 1.5),  # a loss counts in full
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),  # moving further away gains nothing below 1 - clip_range
        (1.1, 2.0, -2.2),
    ],
)
def test_clipped_policy_loss(ratio, advantage, loss):
    new, old = tensor([[math.log(ratio) - 1.0]]), tensor([[-1.0]])
    found, found_ratio = ppo.policy_loss(new, old, tensor([[advantage]]), clip_range=0.2)
    assert found.item() == pytest.approx(loss)
    assert found_ratio.item() == pytest.approx(ratio)


def test_clipped_value_loss():
    # value 1, old 0: clipped to 0.2. Against a return of 1 the clipped error (0.64) is larger than the plain one (0)
    # and against -1 the plain one (4) is larger than the clipped one (1.44).
    loss, clipped = ppo.value_loss(tensor([[1.0, 1.0]]), tensor([[0.0, 0.0]]), tensor([[1.0, -1.0]]), 0.2)
    torch.testing.assert_close(loss, tensor([[0.32, 2.0]]))
    assert clipped.tolist() == [[True, False]]


def test_a_value_within_the_clip_range_is_not_clipped_by_rounding():
    generator = torch.Generator().manual_seed(0)
    old, values = (0.05 * torch.randn(100, 7, generator=generator).clamp(-1.9, 1.9) for _ in range(2))
    loss, clipped = ppo.value_loss(values, old, torch.ones(100, 7), 0.2)
    assert not clipped.any()
    assert torch.equal(loss, 0.5 * (values - 1) ** 2)


def test_explained_variance():
    returns, mask = tensor([[1.0, 3.0, 77.0]]), tensor([[1, 1, 0]])
    assert ppo.explained_variance(returns.clone(), returns, mask) == 1
    assert ppo.explained_variance(tensor([[2.0, 2.0, 0.0]]), returns, mask) == 0
    assert ppo.explained_variance(tensor([[3.0, 1.0, 0.0]]), returns, mask) == pytest.approx(-3)  # errors of 2, not 1


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (0.0, 0.098)])
def test_adaptive_kl_coefficient(kl, expected):
    # target 6: 10% over is 0.1 of error; the error is held in [-0.2, 0.2]; 1,000 of 10,000 episodes pass on a tenth
    assert ppo.next_kl_coef(0.1, kl, target=6.0, horizon=10_000, episodes=1_000) == pytest.approx(expected)


@pytest.mark.parametrize(("done", "expected"), [(0, 0.6), (0.25, 0.4), (0.5, 0.2), (0.9, 0.2)])
def test_the_price_of_kl_falls_to_its_final_value_in_the_middle_of_a_run(done, expected):
    assert ppo.falling_kl_coef(0.2, times=3, done=done) == pytest.approx(expected)
    assert ppo.falling_kl_coef(0.2, times=1, done=done) == 0.2


def test_positions_count_real_tokens():
    assert sampling.position_ids(tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 2, 2],
    ]


def test_real_tokens_end_with_the_first_stop():
    ids = tensor([[1, STOP, STOP, STOP], [1, 2, 3, 4], [STOP, 2, STOP, 3]])
    mask, terminated = sampling.real_tokens(ids, STOP)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert terminated.tolist() == [True, False, True]
    mask, terminated = sampling.real_tokens(ids, STOP, stop_after=2)
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert terminated.tolist() == [True, False, True]


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
    assert found.kl.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert found.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.logprobs.exp().item() == pytest.approx(0.25) and found.ref_logprobs.exp().item() == pytest.approx(0.5)
    assert said(fair, fair, tensor([0])).kl.item() == pytest.approx(0, abs=1e-7)
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
    assert torch.equal(logprobs, found.logprobs) and torch.equal(kl, found.kl)
    ours = torch.autograd.grad((weights[0] * logprobs + weights[1] * kl).sum(), of)
    theirs = torch.autograd.grad((weights[0] * expected[0] + weights[1] * expected[2]).sum(), of)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_token_answers_for_the_kl_after_it():
    assert ppo.kl_to_come(tensor([[1.0, 2.0, 4.0]])).tolist() == [[2.0, 4.0, 0.0]]


def test_draw_follows_the_distribution():
    probabilities = tensor([0.5, 0.0, 0.125, 0.375])
    heights = torch.rand(100_000, generator=generator())
    drawn = sampling.draw(probabilities.log().expand(100_000, 4), heights).bincount(minlength=4) / 100_000
    assert drawn[1] == 0
    torch.testing.assert_close(drawn, probabilities, atol=0.006, rtol=0)  # 4 standard errors


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


# rollouts


def test_left_padding_changes_no_log_probability(tiny_model):
    alone = ppo.hidden_states(tiny_model, tensor([[1, 2, 3, 4, 5]]), torch.ones(1, 5).long(), tensor([1, 2, 3]))
    padded_mask = tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    padded = ppo.hidden_states(tiny_model, tensor([[7, 7, 7, 1, 2, 3, 4, 5]]), padded_mask, tensor([4, 5, 6]))
    padded, alone = (token_logits(tiny_model, x, 0.7).log_softmax(-1) for x in (padded, alone))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_garbage_in_padding_changes_nothing(tiny_model):
    policy = ppo.PolicyWithValue(tiny_model)
    rollout = collect(policy, tiny_model)
    garbage = QUERIES.where(QUERY_MASK.bool(), 9)
    other = collect(policy, tiny_model, queries=garbage)
    assert torch.equal(rollout.response_ids, other.response_ids)
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(rollout, name), getattr(other, name), atol=1e-5, rtol=0)


def test_log_probabilities_are_those_of_a_plain_forward_pass(tiny_model):
    """Row by row, without padding, cache or batch, with nothing but the model and log_softmax."""
    rollout = collect(ppo.PolicyWithValue(tiny_model), tiny_model)
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
    policy, reference = ppo.PolicyWithValue(tiny_model).eval(), copy.deepcopy(tiny_model)
    torch.nn.init.normal_(reference.transformer.wte.weight)
    with torch.no_grad():
        policy.value_head.weight.fill_(0.5)
    rollouts = [
        ppo.collect(
            policy, reference, QUERIES, QUERY_MASK, length=8, temperature=0.7, stop_id=STOP, forward_batch=size,
            generator=generator(),
        )
        for size in (1, 2, 3)
    ]  # fmt: skip
    assert len(set(rollouts[0].response_mask.sum(1).tolist())) > 1
    for other in rollouts[1:]:
        for field in dataclasses.fields(ppo.Rollout)[:-1]:  # all but the minibatches
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
    rollout = collect(ppo.PolicyWithValue(model).eval(), model.eval())
    tensors = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
    assert max(x.numel() for x in tensors) == rollout.response_mask.numel() * 16  # the reference's hidden states


ARCHITECTURES = pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=11, n_layer=2, n_head=2, n_embd=16, n_positions=32, initializer_range=0.3),
        GPTNeoXConfig(
            vocab_size=11, num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32,
            initializer_range=0.3,
        ),
        LlamaConfig(
            vocab_size=11, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
            intermediate_size=32, initializer_range=0.3,
        ),
        MistralConfig(  # its window of 4 tokens has a cache of another kind, which stays as it is
            vocab_size=11, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
            intermediate_size=32, initializer_range=0.3, sliding_window=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip


@ARCHITECTURES
def test_the_sampler_sees_the_states_of_a_plain_forward_pass(config):
    """In float32 they spare the policy a forward pass: with a cache, left padding and rows that ended on the way."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    queries, query_mask = QUERIES.repeat(20, 1), QUERY_MASK.repeat(20, 1)
    responses, states = sampling.sample(
        model, queries, query_mask, length=12, temperature=1.0, stop_id=STOP, generator=generator(1)
    )
    mask, terminated = sampling.real_tokens(responses, STOP)
    assert terminated.any() and not terminated.all()
    ids, full_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, mask], 1)
    predicting = torch.zeros_like(ids)
    predicting[:, queries.shape[1] - 1 : -1] = mask
    plain = ppo.hidden_states(model, ids, full_mask, predicting.flatten().nonzero().squeeze(1))
    torch.testing.assert_close(states[mask.bool()], plain, atol=1e-5, rtol=1e-5)
    chosen = responses[mask.bool()]
    sampled, recomputed = (
        token_statistics(model, x, model, x, chosen, 0.7).logprobs for x in (states[mask.bool()], plain)
    )
    torch.testing.assert_close(sampled, recomputed, atol=1e-5, rtol=0)


@ARCHITECTURES
def test_a_cache_with_room_changes_no_sample(config, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    queries, mask = QUERIES.repeat(20, 1), QUERY_MASK.repeat(20, 1)

    def responses():
        return sampling.sample(model, queries, mask, length=12, temperature=1.0, stop_id=STOP, generator=generator(1))[
            0
        ]

    with_room = responses()
    monkeypatch.setattr(sampling, "make_room", lambda cache, room: None)
    assert torch.equal(with_room, responses())
    assert with_room.shape[1] == 12 and (with_room[:, 3] == STOP).any()  # rows were dropped on the way


def test_samples_follow_the_model_whatever_padding_and_dropped_rows(tiny_model):
    """The second token given the first, over many rows that end at different times, against the exact probabilities."""
    count = 20_000
    ids, mask = QUERIES[:1].expand(count, 4), QUERY_MASK[:1].expand(count, 4)
    responses, _ = sampling.sample(
        tiny_model, ids, mask, length=3, temperature=1.3, stop_id=STOP, generator=generator()
    )
    first = tiny_model(tensor([[1, 2]])).logits[0, -1].div(1.3).softmax(-1)
    torch.testing.assert_close(responses[:, 0].bincount(minlength=11) / count, first, atol=0.015, rtol=0)
    commonest = first[:STOP].argmax()
    after = responses[responses[:, 0] == commonest][:, 1]
    second = tiny_model(tensor([[1, 2, commonest]])).logits[0, -1].div(1.3).softmax(-1)
    torch.testing.assert_close(after.bincount(minlength=11) / len(after), second, atol=0.03, rtol=0)


def test_samples_that_share_their_beginnings_follow_the_model_too(tiny_model):
    count, query = 20_000, tensor([[1, 2]])
    responses = sampling.sample_many(
        tiny_model, query, count, length=3, temperature=1.3, stop_id=STOP, stop_after=1, generator=generator()
    )

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
    mask, terminated = sampling.real_tokens(responses, STOP, stop_after=1)
    assert (responses[mask == 0] == STOP).all() and 0 < terminated.float().mean() < 1
    stopped_too_early = responses[:, 0] == STOP  # with stop_after = 1 that is no stop
    assert stopped_too_early.any() and (mask[stopped_too_early].sum(1) > 1).all()


def test_nothing_but_stops_stands_behind_a_stop(tiny_model):
    responses, _ = sampling.sample(
        tiny_model,
        QUERIES.repeat(100, 1),
        QUERY_MASK.repeat(100, 1),
        length=12,
        temperature=1.0,
        stop_id=STOP,
        generator=generator(),
    )
    mask, terminated = sampling.real_tokens(responses, STOP)
    assert 0 < terminated.float().mean() <= 1
    assert (responses[mask == 0] == STOP).all()
    assert mask.sum(1).max() == responses.shape[1]


def test_a_stop_before_stop_after_does_not_end_a_response(tiny_model):
    responses, _ = sampling.sample(
        tiny_model,
        QUERIES.repeat(100, 1),
        QUERY_MASK.repeat(100, 1),
        length=12,
        temperature=1.0,
        stop_id=STOP,
        stop_after=4,
        generator=generator(),
    )
    mask, _ = sampling.real_tokens(responses, STOP, stop_after=4)
    assert mask.sum(1).min() >= 5
    assert ((responses[:, :4] == STOP).any(1) & (mask.sum(1) > 5)).any()


def test_against_itself_a_policy_has_no_kl_and_no_value(tiny_model):
    rollout = collect(ppo.PolicyWithValue(copy.deepcopy(tiny_model)), tiny_model)
    assert rollout.kl.abs().max() < 1e-5
    assert rollout.exact_kl.abs().max() < 1e-5
    assert (rollout.values == 0).all()


def test_sampled_kl_is_the_exact_one_on_average(tiny_model):
    torch.manual_seed(1)
    other = copy.deepcopy(tiny_model)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rollout = collect(
        ppo.PolicyWithValue(other),
        tiny_model,
        length=3,
        queries=QUERIES.repeat(3000, 1),
        mask=QUERY_MASK.repeat(3000, 1),
    )
    exact = (rollout.exact_kl * rollout.response_mask).sum(1).mean()
    standard_error = rollout.kl.std() / math.sqrt(len(rollout.kl))
    assert exact > 0.05
    assert abs(rollout.kl.mean() - exact) < 4 * standard_error


def test_rewards_sum_to_score_minus_price_of_kl(tiny_model):
    other = copy.deepcopy(tiny_model)
    other.transformer.wte.weight.data *= 1.2
    rollout = collect(ppo.PolicyWithValue(other), tiny_model)
    scores = tensor([1.0, -2.0, 0.5])
    rewards = ppo.token_rewards(scores, rollout.logprobs - rollout.ref_logprobs, rollout.response_mask, 0.3)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * rollout.kl)


# the update


def test_the_first_minibatch_has_ratio_1_and_clips_nothing(tiny_model):
    policy = ppo.PolicyWithValue(tiny_model).eval()
    rollout = collect(policy, copy.deepcopy(tiny_model))
    statistics = one_update(policy, rollout, torch.randn(rollout.values.shape), torch.randn(rollout.values.shape))
    assert statistics["ratio_deviation_first"] < 1e-5
    assert statistics["clip_fraction"] == 0
    assert statistics["approx_kl"] < 1e-10


def test_slices_of_a_minibatch_add_up_to_its_gradient(tiny_model):
    advantages, returns = torch.randn(3, 8), torch.randn(3, 8)
    after = []
    for forward_batch in (1, 2, 3):
        policy = ppo.PolicyWithValue(copy.deepcopy(tiny_model)).eval()
        rollout = collect(policy, tiny_model)
        width = rollout.values.shape[1]
        one_update(policy, rollout, advantages[:, :width], returns[:, :width], forward_batch=forward_batch, lr=0.01)
        after.append(policy.model.transformer.h[0].mlp.c_fc.weight)
    torch.testing.assert_close(after[1], after[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[2], after[0], atol=1e-5, rtol=0)


def test_a_minibatch_whose_gradient_is_not_finite_never_reaches_the_weights(tiny_model):
    policy = ppo.PolicyWithValue(tiny_model).eval()
    rollout = collect(policy, copy.deepcopy(tiny_model))
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    advantages = torch.ones(rollout.values.shape)
    advantages[0, 0] = math.nan
    every = one_update(policy, rollout, advantages, advantages)
    assert every["skipped"] == 1 and math.isnan(every["policy_loss"])
    assert torch.equal(torch.cat([p.detach().flatten() for p in policy.parameters()]), before)
    one_of_three = one_update(policy, rollout, advantages, advantages, minibatches=3)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert one_of_three["skipped"] == 1 and math.isfinite(one_of_three["policy_loss"])
    assert after.isfinite().all() and not torch.equal(after, before)


def test_a_skipped_step_is_none_for_adam(tiny_model):
    policy = ppo.PolicyWithValue(tiny_model).eval()
    rollout = dataclasses.replace(collect(policy, copy.deepcopy(tiny_model)), minibatches=tensor([0, 1, 2]).split(1))
    advantages = torch.ones(rollout.values.shape)
    advantages[1, 0] = math.nan
    (adam,) = optim.make_optimizers(policy, 1e-3, muon=False)
    losses = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "kl_weight": 0.0, "temperature": 0.7}
    settings = losses | {"epochs": 1, "forward_batch": 8, "generator": generator()}
    assert ppo.update(policy, tiny_model, [adam], rollout, advantages, advantages, **settings)["skipped"] == 1
    (group,) = adam.param_groups
    assert group["steps"] == 2 and {state["step"].item() for state in adam.state.values()} == {2}
    assert group["eps"] == pytest.approx(1e-5 / math.sqrt(1 - 0.999**2))


def test_the_gradient_norm_is_that_of_all_weights(tiny_model):
    policy = ppo.PolicyWithValue(tiny_model).eval()
    rollout = collect(policy, copy.deepcopy(tiny_model))
    nothing, returns = torch.zeros(rollout.values.shape), torch.full(rollout.values.shape, 0.1)
    # only the zero value head learns: d loss / d weight = -value_coef * mean(return * state), d / d bias = -0.1 * 0.1
    ids = torch.cat([rollout.query_ids, rollout.response_ids], 1)
    mask = torch.cat([rollout.query_mask, rollout.response_mask], 1)
    predicting = torch.zeros_like(ids)
    predicting[:, rollout.query_ids.shape[1] - 1 : -1] = rollout.response_mask
    states = ppo.hidden_states(policy.model, ids, mask, predicting.flatten().nonzero().squeeze(1)).detach()
    wanted = 0.1 * 0.1 * torch.cat([states.mean(0), torch.ones(1)]).norm()
    found = one_update(policy, rollout, nothing, returns)["grad_norm"]
    assert found == pytest.approx(wanted.item(), rel=1e-4)


def test_padding_pays_and_teaches_nothing(tiny_model):
    """Whatever stands in the advantages and returns of padding, the update is the same."""
    after = []
    for filler in (0.0, 1e6):
        policy = ppo.PolicyWithValue(copy.deepcopy(tiny_model)).eval()
        rollout = collect(policy, tiny_model)
        padding = rollout.response_mask == 0
        assert padding.any()
        advantages = torch.ones(rollout.values.shape).masked_fill(padding, filler)
        one_update(policy, rollout, advantages, advantages, lr=0.01)
        after.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*after)


def test_a_separate_value_network_leaves_the_policy_alone(tiny_model):
    policy = ppo.PolicyWithValue(copy.deepcopy(tiny_model), separate_value=True).eval()
    rollout = collect(policy, tiny_model)
    before = copy.deepcopy(policy.state_dict())
    nothing, returns = torch.zeros(rollout.values.shape), torch.ones(rollout.values.shape)
    for _ in range(2):  # the first step moves the zero head, the second what is below it
        one_update(policy, rollout, nothing, returns)
    changed = {name for name, x in policy.state_dict().items() if not torch.equal(x, before[name])}
    assert not any(name.startswith("model.") for name in changed)
    assert any(name.startswith("value_model.") for name in changed)


def test_without_inner_matrices_there_is_nothing_for_muon():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=11, n_layer=0, n_head=2, n_embd=16))
    (adam,) = optim.make_optimizers(ppo.PolicyWithValue(model), 1e-3, muon=True)
    assert isinstance(adam, torch.optim.Adam)


def test_muon_moves_the_inner_matrices_and_adam_the_rest(tiny_model):
    policy = ppo.PolicyWithValue(copy.deepcopy(tiny_model)).eval()
    adam, muon = optim.make_optimizers(policy, 1e-3, muon=True)
    of_muon, of_adam = ({id(p) for group in one.param_groups for p in group["params"]} for one in (muon, adam))
    assert of_muon | of_adam == {id(p) for p in policy.parameters()} and not of_muon & of_adam
    names = {name for name, p in policy.named_parameters() if id(p) in of_muon}
    kinds = {name.split(".h.")[1].split(".", 1)[1] for name in names}
    assert kinds == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


@pytest.mark.parametrize(("kl", "muon"), [("exact", True), ("exact", False), ("sampled", False)])
def test_ppo_finds_the_best_policy_at_a_price(tiny_model, kl, muon):
    """A score that depends on two tokens: the best policy is reference * exp(score / kl_coef) / Z, known exactly."""
    kl_coef, temperature = 0.5, 1.0
    policy, reference = ppo.PolicyWithValue(copy.deepcopy(tiny_model)).eval(), copy.deepcopy(tiny_model)
    optimizers, draws = optim.make_optimizers(policy, 1e-3, muon), generator()
    queries, mask = tensor([[1, 2]]).repeat(256, 1), torch.ones(256, 2).long()
    steps = 60
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 3e-3 * (1 - step / steps)
        rollout = ppo.collect(
            policy,
            reference,
            queries,
            mask,
            length=2,
            temperature=temperature,
            stop_id=STOP,
            stop_after=2,  # never: all responses have two tokens
            minibatches=ppo.shuffled(256, 2, draws),
            forward_batch=256,
            generator=draws,
        )
        first, second = rollout.response_ids.T
        scores = ((first + second) % 3 == 0).float()
        sampled = rollout.logprobs - rollout.ref_logprobs
        penalty = ppo.kl_to_come(rollout.exact_kl) if kl == "exact" else sampled
        rewards = ppo.token_rewards(scores, penalty, rollout.response_mask, kl_coef)
        advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, rollout.response_mask, 1.0, 1.0)
        scale = ppo.masked_std(advantages, rollout.response_mask)
        ppo.update(
            policy,
            reference,
            optimizers,
            rollout,
            ppo.whiten(advantages, rollout.response_mask),
            returns,
            epochs=2,
            clip_range=0.2,
            value_clip_range=0.2,
            value_coef=0.1,
            kl_weight=float(kl_coef / scale) if kl == "exact" else 0.0,
            temperature=temperature,
            forward_batch=256,
            generator=draws,
        )

    def joint(model):  # [V, V], log-probabilities of both tokens
        pairs = tensor([[1, 2, token] for token in range(11)])
        logp = model(pairs).logits.log_softmax(-1)
        return logp[0, 1].unsqueeze(1) + logp[:, 2]

    with torch.no_grad():
        score = ((torch.arange(11).unsqueeze(1) + torch.arange(11)) % 3 == 0).float()
        best = (joint(reference) + score / kl_coef).flatten().log_softmax(0).exp()
        before = joint(reference).flatten().exp()
        after = joint(policy.model).flatten().exp()

    def objective(p):
        return (p * score.flatten()).sum() - kl_coef * (p * (p / before).log()).sum()

    assert objective(best) > objective(before) + 0.1  # there is something to gain
    gained = (objective(after) - objective(before)) / (objective(best) - objective(before))
    assert 0.9 < gained <= 1 + 1e-4
