"""Grids of runs, with runs of a second."""

import shutil

import pandas as pd
import pytest
from conftest import ROOT, TINY_RUN, refused, run

import study


@pytest.fixture
def home(chain, tmp_path, monkeypatch):
    """A folder with trained models, and a grid of one variant that works and one that fails."""
    shutil.copytree(chain[0], tmp_path / "home")
    tiny = " ".join(TINY_RUN)
    variants = {"fine": tiny, "broken": f"{tiny} --reward models/nowhere"}
    monkeypatch.setitem(study.GRIDS, "ablations", study.Grid(32, variants))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # jobs import study.py, which is __main__ otherwise
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "home"


def test_a_grid_runs_once_and_says_what_failed(home, monkeypatch):
    real = study.subprocess.run

    def quick(command, **kwargs):  # an evaluation of the full size takes half a minute
        few = ["--queries", "2", "--samples", "8", "--reference-samples", "64"] if "--run" in command else []
        return real([*command, *few], **kwargs)

    monkeypatch.setattr(study.subprocess, "run", quick)
    said = run("study", "ablations", "--seeds", "1", "--at-once", "2", cwd=home)
    assert "broken_seed0 failed" in said.stderr + said.stdout
    table = pd.read_csv(home / "data_results" / "ablations.csv").set_index(["variant", "seed"])
    assert table.index.tolist() == [("broken", 0), ("fine", 0)]
    assert table.failed["broken"].str.startswith("error: --reward models/nowhere").all()
    assert table.gold_valid.notna().tolist() == [False, True]

    monkeypatch.setattr(study, "run_one", None)  # what is finished or has failed is not run again
    run("study", "ablations", "--seeds", "1", cwd=home)
    again = pd.read_csv(home / "data_results" / "ablations.csv").set_index(["variant", "seed"])
    pd.testing.assert_frame_equal(again, table)


def test_an_unknown_variant():
    assert "ablations has no variant 'nothing', only default, constant_kl_coef" in refused(
        "study", "ablations", "--only", "nothing"
    )
