"""Means over seeds."""

import numpy as np
import pandas as pd
import pytest

from rlhf import seeds


def test_the_interquartile_mean_of_five_is_that_of_the_middle_three():
    assert seeds.interquartile_mean(np.array([0.0, 0.5, 0.6, 0.7, 100.0])) == pytest.approx(0.6)


def test_a_summary_counts_broken_and_failed_runs_and_averages_the_finished_ones():
    runs = [("a", "", 0.9), ("a", "KL above 20 nats", 0.7), ("a", "error: no memory", np.nan), ("b", np.nan, 0.8)]
    table = pd.DataFrame(
        [
            {"variant": name, "broken": why, "gold_ethical": x, "gold_valid": x, "fraction_of_optimum": x, "kl": 1.0}
            for name, why, x in runs
        ]
    )
    summary = seeds.summary(table)
    assert summary.broken.tolist() == [pytest.approx(2 / 3), 0]
    assert summary.gold_ethical.tolist() == pytest.approx([0.8, 0.8])
    assert summary.gold_ethical_low["a"] == pytest.approx(0.7) and summary.gold_ethical_high["a"] == pytest.approx(0.9)
    assert summary.gold_ethical_low["b"] == summary.gold_ethical_high["b"] == 0.8
