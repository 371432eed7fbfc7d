"""Means over seeds, with intervals."""

import numpy as np
import pandas as pd
from scipy import stats


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half: of five seeds, the middle three."""
    return stats.trim_mean(values, 0.25, axis=axis)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per variant of a table of runs: interquartile means over seeds, with 95% bootstrap intervals.

    "runs" is the number of runs, and "broken" the fraction that broke or failed. A failed run counts in these two only.
    """
    rows, columns = {}, ("gold_ethical", "gold_valid", "fraction_of_optimum", "kl")
    table = table.reindex(columns=[*table, *(column for column in columns if column not in table)])  # if all failed
    for variant, runs in table.groupby("variant"):
        row = {"runs": len(runs), "broken": (runs.broken.fillna("") != "").mean()}
        for column in columns:
            values = runs[column].dropna().to_numpy(dtype=float)
            row[column] = interquartile_mean(values) if len(values) else np.nan
            if column in ("gold_ethical", "fraction_of_optimum"):
                row[f"{column}_low"], row[f"{column}_high"] = interval(values)
        rows[variant] = row
    return pd.DataFrame(rows).T.rename_axis("variant")


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of the interquartile mean of values [seeds]; NaN without values."""
    if len(values) < 2 or np.ptp(values) == 0:
        return (values[0], values[0]) if len(values) else (np.nan, np.nan)
    result = stats.bootstrap((values,), interquartile_mean, method="percentile", rng=np.random.default_rng(0))
    return tuple(result.confidence_interval)
