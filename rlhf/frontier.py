"""How much of the possible gain a policy reached at its KL, and how diverse its texts are: pure functions.

Shapes: Q queries, N samples of the reference per query, G KL coefficients. Scores are those that PPO maximizes, in
standard deviations (SD) of the reference's scores; the KL to the reference is in nats per response.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import sacrebleu

# KL coefficients [G] in SD per nat, rising: the optimum at the first is nearly the best sample, at the last nearly the
# reference
BETAS = np.geomspace(1e-4, 1e2, 241)


def optimum(scores: np.ndarray, betas: np.ndarray = BETAS) -> dict[str, np.ndarray]:
    """The best policies at KL coefficients `betas` [G], estimated from scores [Q, N] of the reference's samples.

    At the KL coefficient beta, the policy reference * exp(score / beta) / Z maximizes E[score] - beta * KL ([1],
    equation 3 and Fig. 3). Returns the "weights" [G, Q, N] of the samples under these policies, and, [G, Q] each, the
    "score", the "kl" and the effective sample size "ess", 1 to N.
    """
    logits = scores[None] / betas[:, None, None]
    logits -= logits.max(-1, keepdims=True)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    # log(optimum / reference): a sample has the probability 1 / N under the reference
    log_ratios = np.log(weights * scores.shape[-1], where=weights > 0, out=np.zeros_like(weights))
    return {
        "weights": weights,
        "score": (weights * scores).sum(-1),
        "kl": (weights * log_ratios).sum(-1),
        "ess": 1 / (weights**2).sum(-1),
    }


def best_score(kl: float, frontier_kl: np.ndarray, frontier_score: np.ndarray) -> float:
    """The optimum's score at this KL, by linear interpolation of its KL [G] and score [G] at rising betas."""
    return float(np.interp(kl, frontier_kl[::-1], frontier_score[::-1]))


def fraction_of_optimum(
    score: np.ndarray, kl: np.ndarray, reference_scores: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """(policy's score - reference's score) / (optimum's score at the policy's KL - reference's score), and its 95%
    bootstrap interval over queries. NaN if the optimum is no better than the reference.

    score, kl: means over the policy's responses to a query, [Q] each. reference_scores: [Q, N].
    """
    frontier = optimum(reference_scores)
    mean_reference_scores = reference_scores.mean(1)

    def fraction(queries: np.ndarray) -> float:
        baseline = mean_reference_scores[queries].mean()
        best = best_score(kl[queries].mean(), frontier["kl"][:, queries].mean(1), frontier["score"][:, queries].mean(1))
        return (score[queries].mean() - baseline) / (best - baseline) if best > baseline else np.nan

    queries = np.arange(len(score))
    rng = np.random.default_rng(seed)
    fractions = [fraction(rng.choice(queries, len(queries))) for _ in range(resamples)]
    low, high = np.quantile([x for x in fractions if not np.isnan(x)] or [np.nan], (0.025, 0.975))
    return fraction(queries), (float(low), float(high))


def known_fraction(evaluation: dict) -> float:
    """fraction_of_optimum of an evaluation.json; NaN beyond the KL up to which the optimum can be estimated."""
    return evaluation["fraction_of_optimum"] if evaluation["kl"] <= evaluation["trusted_up_to_kl"] else np.nan


def best_of_n_weights(n: int, samples: int) -> np.ndarray:
    """The probability that the sample of each rank is the best of n drawn without replacement from `samples`.

    [N], the best sample first. This is the mean over all subsets of n samples, so that one set of samples serves
    every n.
    """
    weights = np.zeros(samples)
    weights[0] = n / samples
    for rank in range(1, samples - n + 1):  # the other n - 1 samples all rank lower
        weights[rank] = weights[rank - 1] * (samples - rank - n + 1) / (samples - rank)
    return weights


def best_of_n(scores: np.ndarray, n: int) -> np.ndarray:
    """The weights [Q, N] of samples with scores [Q, N] under the policy that takes the best of n samples."""
    weights = np.empty(scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.put_along_axis(weights, order, best_of_n_weights(n, scores.shape[1])[None], axis=1)
    return weights


def best_of_n_kl_bound(n: int) -> float:
    """An upper bound on the KL of best-of-n to the reference, in nats per response (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


# diversity of texts


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())


def ngrams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of words of all texts, repeated ones included."""
    return [
        gram
        for text in texts
        for tokens in [words(text)]
        for gram in zip(*(tokens[i:] for i in range(n)), strict=False)
    ]


def distinct(texts: Sequence[str], n: int, vocabulary: int) -> float:
    """Distinct n-grams of texts, relative to the number expected in as many uniform draws from `vocabulary` n-grams.

    1: as diverse as uniform draws. Unlike the fraction of distinct n-grams, it does not fall with the amount of text
    (Liu et al. 2022). NaN without n-grams.
    """
    grams = ngrams(texts, n)
    if not (grams and vocabulary):
        return float("nan")
    return len(set(grams)) / (vocabulary * (1 - (1 - 1 / vocabulary) ** len(grams)))


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 (0 to 1) of every text with the others as references: 1 if all texts are equal; NaN of one text."""
    if len(texts) < 2:
        return float("nan")
    metric = sacrebleu.BLEU(effective_order=True, lowercase=True)
    scores = [metric.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores)) / 100
