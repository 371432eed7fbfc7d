"""What a policy gained over its reference, against what could be gained: pure functions over arrays.

Shapes: Q queries, N samples of the reference to each, G points of a grid. Scores are those that PPO sees; KL is in nats
a response.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import sacrebleu
from scipy import stats

BETAS = np.geomspace(1e-2, 1e2, 161)  # prices of a nat, from nearly best-of-N to nearly the reference


def optimum(scores: np.ndarray, betas: np.ndarray = BETAS) -> dict[str, np.ndarray]:
    """Scores [Q, N] of reference samples -> the best policies at prices `betas`: weights [G, Q, N], and [G, Q] each
    of score, KL to the reference, and effective sample size.

    The best policy at the price beta is reference * exp(score / beta) / Z ([1], equation 3 and Fig. 3).
    """
    logits = scores[None] / betas[:, None, None]
    logits -= logits.max(-1, keepdims=True)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    logs = np.log(weights * scores.shape[-1], where=weights > 0, out=np.zeros_like(weights))  # of the density ratio
    return {
        "weights": weights,
        "score": (weights * scores).sum(-1),
        "kl": (weights * logs).sum(-1),
        "ess": 1 / (weights**2).sum(-1),
    }


def best_score(kl: float, frontier_kl: np.ndarray, frontier_score: np.ndarray) -> float:
    """The best score at a KL, between the points [G] of a frontier in the order of rising `betas`."""
    return float(np.interp(kl, frontier_kl[::-1], frontier_score[::-1]))


def fraction_of_optimum(
    score: np.ndarray, kl: np.ndarray, reference_scores: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """(score of the policy - of the reference) / (best score at the policy's own KL - of the reference), and its
    bootstrap 95 % interval over queries. NaN where nothing can be gained.

    score, kl [Q]: the policy's means by query; reference_scores [Q, N].
    """
    frontier = optimum(reference_scores)
    before = reference_scores.mean(1)

    def fraction(rows: np.ndarray) -> float:
        base = before[rows].mean()
        best = best_score(kl[rows].mean(), frontier["kl"][:, rows].mean(1), frontier["score"][:, rows].mean(1))
        return (score[rows].mean() - base) / (best - base) if best > base else np.nan

    every = np.arange(len(score))
    chance = np.random.default_rng(seed)
    again = [fraction(chance.choice(every, len(every))) for _ in range(resamples)]
    low, high = np.quantile([x for x in again if not np.isnan(x)] or [np.nan], (0.025, 0.975))
    return fraction(every), (float(low), float(high))


def best_of_n_weights(n: int, samples: int) -> np.ndarray:
    """[N] in the order of falling score: the chance that a sample is the best of n drawn from them without replacement.

    The mean over all choices of n, so that one set of samples serves every n.
    """
    ranks = np.arange(samples)
    weights = np.zeros(samples)
    weights[0] = n / samples
    for rank in ranks[1 : samples - n + 1]:  # the best n - 1 others all stand behind it
        weights[rank] = weights[rank - 1] * (samples - rank - n + 1) / (samples - rank)
    return weights


def best_of_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Weights [Q, N] of samples with scores [Q, N] under the policy that takes the best of n."""
    weights = np.empty(scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.put_along_axis(weights, order, best_of_n_weights(n, scores.shape[1])[None], axis=1)
    return weights


def best_of_n_kl_bound(n: int) -> float:
    """An upper bound on the KL of best-of-n to the reference, in nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())


def ngrams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [
        gram
        for text in texts
        for tokens in [words(text)]
        for gram in zip(*(tokens[i:] for i in range(n)), strict=False)
    ]


def distinct(texts: Sequence[str], n: int, vocabulary: int) -> float:
    """Distinct n-grams of texts over the number expected in as many drawn evenly from a vocabulary of n-grams.

    The plain share of distinct n-grams falls with the amount of text; this does not (Liu et al. 2022).
    """
    grams = ngrams(texts, n)
    return len(set(grams)) / (vocabulary * (1 - (1 - 1 / vocabulary) ** len(grams)))


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 (0 to 1) of every text against the others: 1 where all are the same."""
    metric = sacrebleu.BLEU(effective_order=True, lowercase=True)
    scores = [metric.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores)) / 100


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half: of five seeds, the middle three."""
    return stats.trim_mean(values, 0.25, axis=axis)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table of runs, a row a variant: interquartile means over seeds with bootstrap 95% intervals.

    The share of broken runs counts those that failed and have no numbers, too.
    """
    rows = {}
    for variant, runs in table.groupby("variant"):
        row = {"runs": len(runs), "broken": (runs.broken.fillna("") != "").mean()}
        for column in ("gold_ethical", "gold_valid", "fraction_of_optimum", "kl"):
            values = runs[column].dropna().to_numpy(dtype=float)
            row[column] = interquartile_mean(values) if len(values) else np.nan
            if column in ("gold_ethical", "fraction_of_optimum"):
                row[f"{column}_low"], row[f"{column}_high"] = interval(values)
        rows[variant] = row
    return pd.DataFrame(rows).T.rename_axis("variant")


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of the interquartile mean of values [N]."""
    if len(values) < 2 or np.ptp(values) == 0:
        return (values[0], values[0]) if len(values) else (np.nan, np.nan)
    found = stats.bootstrap((values,), interquartile_mean, method="percentile", rng=np.random.default_rng(0))
    return tuple(found.confidence_interval)
