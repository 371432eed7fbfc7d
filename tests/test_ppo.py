"""Every formula of ppo.py against numbers worked out by hand, and the invariants that a correct PPO keeps."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import tensor

import ppo
from rlhf import optim
from rlhf.forward import hidden_states
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect as collect_responses
from rlhf.rollout import evaluate, shuffled_minibatches
from rlhf.sampling import Sampling
from tests.tiny import QUERIES, QUERY_MASK, SETTINGS, STOP, collect, generator, one_update


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
    assert ppo.adapted_kl_coef(0.1, kl, target=6.0, horizon=10_000, episodes=1_000) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "factor"), [(0, 3), (0.25, 2), (0.5, 1), (0.9, 1)])
def test_the_kl_coefficient_falls_to_its_final_value_in_the_middle_of_a_run(progress, factor):
    assert ppo.linear_kl_decay(3, progress) == factor
    assert ppo.linear_kl_decay(1, progress) == 1
    assert ppo.KLSchedule(0.2, 3, None, 1000).coefficient(progress) == 0.2 * factor


def test_an_adaptive_kl_schedule_remembers_what_it_observed():
    schedule = ppo.KLSchedule(0.1, 4.0, target=6.0, horizon=10_000)
    assert schedule.coefficient(0) == 0.1  # no decay
    schedule.observe(6.6, 1000)
    assert schedule.coefficient(0) == pytest.approx(0.101)
    schedule.observe(math.nan, 1000)
    resumed = ppo.KLSchedule(0.1, 4.0, target=6.0, horizon=10_000)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.coefficient(1) == schedule.coefficient(1) == pytest.approx(0.101)
    fixed = ppo.KLSchedule(0.1, 1.0, None, 10_000)
    fixed.observe(60.0, 1000)
    assert fixed.coefficient(0.7) == 0.1


def test_a_token_answers_for_the_kl_after_it():
    assert ppo.next_token_kl(tensor([[1.0, 2.0, 4.0]])).tolist() == [[2.0, 4.0, 0.0]]


@pytest.fixture
def moved_rollout(tiny_model):
    """Of a policy that has moved away from the reference."""
    moved = copy.deepcopy(tiny_model)
    moved.transformer.wte.weight.data *= 1.2
    return collect(PolicyWithValue(moved), tiny_model)


def test_rewards_sum_to_the_score_minus_the_kl_penalty(moved_rollout):
    scores = tensor([1.0, -2.0, 0.5])
    rewards = ppo.rewards(moved_rollout, scores, 0.3, dataclasses.replace(SETTINGS, exact_kl=False))
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * moved_rollout.kl)
    exact = ppo.rewards(moved_rollout, scores, 0.3, SETTINGS)  # the first token's own KL is left to the loss
    torch.testing.assert_close(exact.sum(1), scores - 0.3 * moved_rollout.exact_kl[:, 1:].sum(1))


def test_targets_are_whitened_once_and_the_kl_weight_with_them(moved_rollout):
    mask, scores = moved_rollout.response_mask, tensor([1.0, -2.0, 0.5])
    rewards = ppo.rewards(moved_rollout, scores, 0.3, SETTINGS)
    found = ppo.targets(moved_rollout, rewards, 0.3, SETTINGS)
    still_to_come = rewards.flip(1).cumsum(1).flip(1) * mask  # with lambda and discount 1, and values of 0
    torch.testing.assert_close(found.returns, still_to_come)
    real = found.advantages[mask.bool()]
    assert real.mean().abs() < 1e-6 and real.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert found.kl_weight == pytest.approx(0.3 / still_to_come[mask.bool()].std(correction=0).item(), rel=1e-5)
    assert ppo.targets(moved_rollout, rewards, 0.3, dataclasses.replace(SETTINGS, exact_kl=False)).kl_weight == 0


def test_a_batch_of_equal_rewards_moves_nothing(moved_rollout):
    """Its advantages are rounding errors, which whitening must not blow up, nor the weight of the KL with them."""
    answers, mask = dataclasses.replace(SETTINGS, leave_one_out=3), moved_rollout.response_mask
    rewards = ppo.token_rewards(tensor([0.1, 0.1, 0.1]), torch.zeros(mask.shape), mask, kl_coef=0.3)
    rewards[0, 0] += 1e-6
    found = ppo.targets(moved_rollout, rewards, 0.3, answers)
    assert found.advantages.abs().max() < 1e-3  # 1e-6 / 0.01, where the deviation itself would make it 1
    assert found.kl_weight == pytest.approx(0.3 / 0.01)


def test_whitened_rewards_scale_the_kl_weight_too(moved_rollout):
    """The same objective in other units: the advantages are the same, and so is the KL's weight beside them."""
    rewards = 5 * ppo.rewards(moved_rollout, tensor([1.0, -2.0, 0.5]), 0.3, SETTINGS)
    rewards -= ppo.masked_mean(rewards, moved_rollout.response_mask) * moved_rollout.response_mask  # keeps its mean, 0
    plain = ppo.targets(moved_rollout, rewards, 5 * 0.3, SETTINGS)
    white = ppo.targets(moved_rollout, rewards, 5 * 0.3, dataclasses.replace(SETTINGS, whiten_rewards=True))
    torch.testing.assert_close(white.advantages, plain.advantages, atol=1e-4, rtol=0)
    assert white.kl_weight == pytest.approx(plain.kl_weight, rel=1e-4)


def test_without_a_critic_there_are_no_numbers_of_one(tiny_model):
    policy, settings = PolicyWithValue(tiny_model).eval(), dataclasses.replace(SETTINGS, leave_one_out=2)
    rollout = collect(policy, copy.deepcopy(tiny_model), queries=QUERIES[:2], mask=QUERY_MASK[:2])
    rewards = ppo.rewards(rollout, tensor([1.0, 0.0]), 0.0, settings)
    targets = ppo.targets(rollout, rewards, 0.0, settings)
    assert targets.advantages[0, 0] > 0 > targets.advantages[1, 0]  # better and worse than the other
    optimizer = optim.ppo_optimizer(policy, 1e-3, muon=False)
    metrics = ppo.update(policy, tiny_model, optimizer, rollout, targets, settings, generator())
    assert [metrics[name] for name in ("value_loss", "value_clip_fraction", "explained_variance")] == [None] * 3


def test_the_first_minibatch_has_ratio_1_and_clips_nothing(tiny_model):
    policy = PolicyWithValue(tiny_model).eval()
    rollout = collect(policy, copy.deepcopy(tiny_model))
    metrics = one_update(policy, rollout, torch.randn(rollout.values.shape), torch.randn(rollout.values.shape))
    assert metrics["ratio_deviation_first"] < 1e-5
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] < 1e-10


def test_forward_batches_of_a_minibatch_add_up_to_its_gradient(tiny_model):
    advantages, returns = torch.randn(3, 8), torch.randn(3, 8)
    after = []
    for forward_batch in (1, 2, 3):
        policy = PolicyWithValue(copy.deepcopy(tiny_model)).eval()
        rollout = collect(policy, tiny_model)
        width = rollout.values.shape[1]
        one_update(policy, rollout, advantages[:, :width], returns[:, :width], forward_batch=forward_batch, lr=0.01)
        after.append(policy.model.transformer.h[0].mlp.c_fc.weight)
    torch.testing.assert_close(after[1], after[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[2], after[0], atol=1e-5, rtol=0)


def test_a_minibatch_whose_gradient_is_not_finite_never_reaches_the_weights(tiny_model):
    policy = PolicyWithValue(tiny_model).eval()
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


def test_the_gradient_norm_is_that_of_all_weights(tiny_model):
    policy = PolicyWithValue(tiny_model).eval()
    rollout = collect(policy, copy.deepcopy(tiny_model))
    no_advantages, returns = torch.zeros(rollout.values.shape), torch.full(rollout.values.shape, 0.1)
    # only the zero value head learns: d loss / d weight = -value_coef * mean(return * state), d / d bias = -0.1 * 0.1
    ids = torch.cat([rollout.query_ids, rollout.response_ids], 1)
    mask = torch.cat([rollout.query_mask, rollout.response_mask], 1)
    predicting = torch.zeros_like(ids)
    predicting[:, rollout.query_ids.shape[1] - 1 : -1] = rollout.response_mask
    states = hidden_states(policy.model, ids, mask, predicting.flatten().nonzero().squeeze(1)).detach()
    expected = 0.1 * 0.1 * torch.cat([states.mean(0), torch.ones(1)]).norm()
    found = one_update(policy, rollout, no_advantages, returns)["grad_norm"]
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_padding_pays_and_teaches_nothing(tiny_model):
    """Whatever stands in the advantages and returns of padding, the update is the same."""
    after = []
    for filler in (0.0, 1e6):
        policy = PolicyWithValue(copy.deepcopy(tiny_model)).eval()
        rollout = collect(policy, tiny_model)
        padding = rollout.response_mask == 0
        assert padding.any()
        advantages = torch.ones(rollout.values.shape).masked_fill(padding, filler)
        one_update(policy, rollout, advantages, advantages, lr=0.01)
        after.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*after)


def test_the_kl_inside_queries_costs_what_the_kl_of_a_response_costs(tiny_model):
    moved = copy.deepcopy(tiny_model)
    moved.transformer.wte.weight.data *= 1.2
    policy = PolicyWithValue(moved).eval()
    inside, without = (collect(policy, tiny_model, shortest_query=shortest) for shortest in (2, None))
    nothing = torch.zeros(inside.values.shape)
    found, expected = (
        ppo.losses(policy, tiny_model, rollout, nothing, nothing, 0.3, SETTINGS)[0] for rollout in (inside, without)
    )
    *_, query_kl = evaluate(policy, tiny_model, inside, SETTINGS.temperature)
    assert (query_kl > 0.01).all() and len(query_kl) == 3
    torch.testing.assert_close(found - expected, 0.3 * query_kl.sum(), atol=1e-4, rtol=1e-4)


def test_a_separate_value_network_leaves_the_policy_alone(tiny_model):
    policy = PolicyWithValue(copy.deepcopy(tiny_model), separate_value=True).eval()
    rollout = collect(policy, tiny_model)
    before = copy.deepcopy(policy.state_dict())
    no_advantages, returns = torch.zeros(rollout.values.shape), torch.ones(rollout.values.shape)
    for _ in range(2):  # the first step moves the zero head, the second what is below it
        one_update(policy, rollout, no_advantages, returns)
    changed = {name for name, x in policy.state_dict().items() if not torch.equal(x, before[name])}
    assert not any(name.startswith("model.") for name in changed)
    assert any(name.startswith("value_model.") for name in changed)


@pytest.mark.parametrize(("exact_kl", "muon"), [(True, True), (True, False), (False, False)])
def test_ppo_finds_the_best_policy_for_a_kl_coefficient(tiny_model, exact_kl, muon):
    """A score that depends on two tokens: the best policy is reference * exp(score / kl_coef) / Z, known exactly."""
    kl_coef, rng, steps = 0.5, generator(), 60
    settings = dataclasses.replace(SETTINGS, epochs=2, forward_batch=256, temperature=1.0, exact_kl=exact_kl)
    sampling = Sampling(length=2, temperature=1.0, stop_id=STOP, stop_after=2)  # all responses have two tokens
    policy, reference = PolicyWithValue(copy.deepcopy(tiny_model)).eval(), copy.deepcopy(tiny_model)
    optimizer = optim.ppo_optimizer(policy, 1e-3, muon)
    queries, mask = tensor([[1, 2]]).repeat(256, 1), torch.ones(256, 2).long()
    for step in range(steps):
        optimizer.set_lr(3e-3 * (1 - step / steps))
        batches = {"forward_batch": 256, "minibatches": shuffled_minibatches(256, 2, rng)}
        rollout = collect_responses(policy, reference, queries, mask, sampling, rng, **batches)
        first, second = rollout.response_ids.T
        scores = ((first + second) % 3 == 0).float()
        rewards = ppo.rewards(rollout, scores, kl_coef, settings)
        targets = ppo.targets(rollout, rewards, kl_coef, settings)
        ppo.update(policy, reference, optimizer, rollout, targets, settings, rng)

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
