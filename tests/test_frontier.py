"""The optimum at a KL, best-of-n, diversity and means over seeds, by hand and from first principles."""

import math

import numpy as np
import pytest

from rlhf import frontier


def test_the_optimum_of_a_coin():
    """Half the samples score 1, half 0: the best policy takes the good ones with odds exp(1 / beta)."""
    scores, beta = np.array([[1.0, 0.0] * 500]), 0.5
    best = frontier.optimum(scores, np.array([beta]))
    good = math.exp(1 / beta) / (1 + math.exp(1 / beta))
    assert best["score"] == pytest.approx(good)
    assert best["kl"] == pytest.approx(good * math.log(2 * good) + (1 - good) * math.log(2 * (1 - good)))
    weights = np.array([good, 1 - good]) / 500  # of a sample that scores 1, and of one that scores 0
    assert best["ess"] == pytest.approx(1 / (500 * weights**2).sum())
    assert np.unique(best["weights"]) == pytest.approx(np.sort(weights))
    assert best["weights"].sum() == pytest.approx(1)


def test_the_optimum_at_the_ends():
    scores = np.random.default_rng(0).normal(size=(3, 64))
    best = frontier.optimum(scores, np.array([1e-6, 1e6]))
    assert best["score"][0] == pytest.approx(scores.max(1)) and best["kl"][0] == pytest.approx(math.log(64))
    assert best["score"][1] == pytest.approx(scores.mean(1), abs=1e-4)
    assert best["kl"][1] == pytest.approx(0, abs=1e-9) and best["ess"][1] == pytest.approx(64)


def test_the_optimum_of_normal_scores_is_the_shifted_normal():
    """For scores N(0, 1) the best policy is N(1 / beta, 1): score 1 / beta, KL 1 / (2 beta^2)."""
    scores = np.random.default_rng(0).normal(size=(1, 400_000))
    best = frontier.optimum(scores, np.array([1.0, 2.0]))
    assert best["score"][:, 0] == pytest.approx([1, 0.5], abs=0.02)
    assert best["kl"][:, 0] == pytest.approx([0.5, 0.125], abs=0.02)


def test_a_policy_on_the_frontier_has_all_of_the_optimum():
    scores = np.random.default_rng(1).normal(size=(20, 256))
    best = frontier.optimum(scores, frontier.BETAS[[160]])
    fraction, (low, high) = frontier.fraction_of_optimum(best["score"][0], best["kl"][0], scores)
    assert fraction == pytest.approx(1, abs=1e-3)
    assert low <= fraction <= high + 1e-3 and high - low < 0.05


def test_the_frontier_goes_on_where_scores_are_nearly_all_or_nothing():
    """Good texts score 1 and bad ones 0, but for a hundredth. To choose a good one takes log 2 nats; PPO takes more."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, size=(8, 1024)) + rng.normal(scale=0.01, size=(8, 1024))
    kl = frontier.optimum(scores)["kl"].mean(1)
    assert (kl > 2).any() and (np.diff(kl) < 0).all()


def test_half_the_gain_is_half_the_optimum():
    scores = np.random.default_rng(1).normal(size=(20, 256))
    best, before = frontier.optimum(scores, frontier.BETAS[[160]]), scores.mean(1)
    halfway = (best["score"][0] + before) / 2
    fraction, (low, high) = frontier.fraction_of_optimum(halfway, best["kl"][0], scores)
    assert fraction == pytest.approx(0.5, abs=1e-3) and low < 0.5 < high


def test_without_a_possible_gain_there_is_no_fraction():
    fraction, interval = frontier.fraction_of_optimum(np.ones(3), np.zeros(3), np.ones((3, 8)), resamples=10)
    assert math.isnan(fraction) and all(map(math.isnan, interval))


def test_the_score_between_two_points_of_the_frontier_is_interpolated():
    kl, score = np.array([2.0, 1.0, 0.0]), np.array([1.5, 1.0, 0.0])  # in the order of rising betas
    assert [frontier.best_score(x, kl, score) for x in (0.0, 0.5, 1.5, 2.0, 9.0)] == [0.0, 0.5, 1.25, 1.5, 1.5]


def test_best_of_n_of_three_samples():
    # 2 of 3 samples are drawn: the best is in 2 of the 3 subsets, and the second is the best of the third subset
    assert frontier.best_of_n_weights(2, 3) == pytest.approx([2 / 3, 1 / 3, 0])
    assert frontier.best_of_n(np.array([[5.0, 9.0, 7.0]]), 2)[0] == pytest.approx([0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_best_of_n_of_uniform_scores(n):
    """The best of n uniform numbers has the mean n / (n + 1)."""
    scores = np.random.default_rng(0).uniform(size=(40, 1024))
    weights = frontier.best_of_n(scores, n)
    assert weights.sum(1) == pytest.approx(1)
    assert (weights * scores).sum(1).mean() == pytest.approx(n / (n + 1), abs=0.01)


def test_bound_on_the_kl_of_best_of_n():
    assert frontier.best_of_n_kl_bound(1) == 0
    assert frontier.best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_words_and_ngrams():
    assert frontier.words("Anna's dog, the OLD one.") == ["anna's", "dog", ",", "the", "old", "one", "."]
    assert frontier.ngrams(["a b c", "a b"], 2) == [("a", "b"), ("b", "c"), ("a", "b")]


def test_a_share_of_an_optimum_that_is_not_known_is_none():
    run = {"fraction_of_optimum": 0.9, "kl": 2.0}
    assert frontier.known_fraction(run | {"trusted_up_to_kl": 2.0}) == 0.9
    assert np.isnan(frontier.known_fraction(run | {"trusted_up_to_kl": 1.9}))


def test_distinct_words():
    # 3 distinct words of 4; 4 uniform draws from 10 words give 10 (1 - 0.9^4) = 3.439 distinct words
    assert frontier.distinct(["a b", "b c"], 1, 10) == pytest.approx(3 / 3.439)
    assert frontier.distinct(["a b", "a b"], 2, 10) == pytest.approx(1 / (10 * (1 - 0.9**2)))


def test_diversity_is_unknown_where_there_is_nothing_to_compare():
    """One text, or answers of one word: evaluate_nlg.py writes null."""
    assert np.isnan(frontier.self_bleu(["a b"])) and np.isnan(frontier.self_bleu([]))
    assert np.isnan(frontier.distinct(["Yes", "No"], 2, 0)) and np.isnan(frontier.distinct([""], 1, 10))


def test_distinct_does_not_fall_with_the_amount_of_text():
    rng = np.random.default_rng(0)
    few, many = (["".join(f" w{i}" for i in rng.integers(0, 500, count))] for count in (200, 5000))
    assert frontier.distinct(few, 1, 500) == pytest.approx(1, abs=0.1)
    assert frontier.distinct(many, 1, 500) == pytest.approx(1, abs=0.1)


def test_self_bleu():
    same, different = ["Anna kept the money."] * 3, ["Anna kept the money.", "we sang all day long", "his dog ran off"]
    assert frontier.self_bleu(same) == pytest.approx(1)
    assert frontier.self_bleu(different) < 0.1
