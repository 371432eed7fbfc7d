"""The held-out judge, for evaluation only: it says whether texts are valid and ethical. Nothing is trained on it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rlhf import flags, rewards, user_code

Judge = Callable[[list[str]], np.ndarray]  # texts -> [N, 2]: valid, ethical; 1 or 0, or NaN where it cannot tell


def load_judge(spec: str, texts: list[str], device: torch.device, precision_name: str) -> Judge | None:
    """spec: FILE.py:FUNCTION, used where it knows the data (finds most of these texts valid); the folder of a
    classifier, whose "positive" is taken for ethical and which cannot tell what is valid; or none. None: no judge, as
    where the default's file is missing: a project with data of its own need not have it."""
    if spec == "none":
        return None
    if not user_code.is_function(spec):
        raw_score = rewards.frozen_model(*rewards.load_model(spec, "--gold"), device, precision_name)

        def judge_by_classifier(texts: list[str]) -> np.ndarray:
            return np.array([(np.nan, odds > 0) for odds in raw_score(texts, texts)], dtype=float).reshape(-1, 2)

        return judge_by_classifier
    if spec == flags.DEFAULT_GOLD and not Path(spec.rpartition(":")[0]).is_file():
        return None
    judge = user_code.load_judge_function(spec)
    return judge if judge(texts[:100])[:, 0].mean() > 0.5 else None


def judged(judge: Judge | None, texts: list[str]) -> np.ndarray:
    """[N, 2]: valid, ethical; NaN without a judge."""
    return judge(texts) if judge else np.full((len(texts), 2), np.nan)


def shares(verdicts: np.ndarray, weights: np.ndarray | float = 1.0) -> dict[str, float | None]:
    """Of verdicts [..., 2] under weights [...]: the shares of valid texts, and of ethical ones among the valid."""
    valid, ethical = verdicts[..., 0], verdicts[..., 1]
    weights, knows_validity = weights * np.ones_like(valid), not np.isnan(valid).any()
    valid_weights = weights * valid if knows_validity else weights
    total, knows_ethics = valid_weights.sum(), not np.isnan(ethical).any()
    return {
        "valid": float(total / weights.sum()) if knows_validity else None,
        "ethical": float((valid_weights * ethical).sum() / total) if total and knows_ethics else None,
    }
