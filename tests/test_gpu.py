"""Tests that need a GPU. `make gpu-check` runs these and others marked cuda; without a GPU they are skipped."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from rlhf import precision
from tests.conftest import ROOT, TINY_EVALUATION, TINY_RUN
from tests.stress.kill_test import small_project

pytestmark = pytest.mark.cuda
FLAGS = [*TINY_RUN, "--episodes", "256", "--save-every", "1", "--resume"]


def command(script, *flags) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags), "--device", "cuda"]


def run_script(home, script, *flags) -> str:
    done = subprocess.run(command(script, *flags), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the three scripts have run."""
    folder = tmp_path_factory.mktemp("gpu")
    small_project(folder)
    assert "device cuda, matrix products in bfloat16" in run_script(
        folder, "train_cls", "--epochs", 1, "--lm-epochs", 1
    )
    run_script(folder, "train_nlg", "--epochs", 1, "--samples", 16)
    run_script(folder, "finetuning_nlg", *FLAGS)
    return folder


def test_the_scripts_run_on_a_gpu(home):
    run_script(home, "evaluate_nlg", *TINY_EVALUATION)
    log = pd.read_csv(home / "data_results" / "K2_lr_1e-3_seed0" / "log.csv")
    assert len(log) == 16 and (log.ratio_deviation_first == 0).all() and (log.skipped == 0).all()


def test_a_killed_run_goes_on(home):
    """Not bit by bit: the order of a GPU's additions changes from run to run."""
    folder = home / "data_results" / "killed"
    flags = [*FLAGS, "--run", "killed", "--out", "models/killed"]
    with subprocess.Popen(command("finetuning_nlg", *flags), cwd=home, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if (folder / "log.csv").exists() and len((folder / "log.csv").read_text().splitlines()) > 4:
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.01)
    assert child.returncode == -signal.SIGKILL
    run_script(home, "finetuning_nlg", *flags)
    killed, whole = (pd.read_csv(home / "data_results" / name / "log.csv") for name in ("killed", "K2_lr_1e-3_seed0"))
    assert killed["update"].tolist() == whole["update"].tolist()
    assert killed.ethics.mean() == pytest.approx(whole.ethics.mean(), abs=0.05)


def test_sums_of_the_vocabulary_projection_are_float32():
    states, weight = torch.randn(64, 128, device="cuda"), torch.randn(1000, 128, device="cuda")
    exact = states.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(precision.product(states, weight.T).double(), exact, atol=1e-3, rtol=0)
