"""Fine-tuning on samples of the reference: what they are worth, the loss, and a run that evaluate_nlg.py reads."""

import functools
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from experiments import grids, study, without_ppo
from experiments.without_ppo import Row, Weighted
from rlhf import models, prompting, supervised
from rlhf.errors import UserError
from rlhf.sampling import Sampling
from tests import tiny
from tests.conftest import TINY_EVALUATION, refused, run

TINY = "--episodes 64 --answers 4 --reference-samples 32 --batch-size 4 --epochs 2".split()


# what a sample counts


def test_the_best_answer_to_each_query_counts():
    scores = np.array([0.1, 0.9, -1.0, 2.0, 3.0, 3.0])
    assert without_ppo.best_weights(scores, 3).tolist() == [0, 1, 0, 0, 1, 0]  # of equals the first
    assert without_ppo.best_weights(scores, 2).tolist() == [0, 1, 0, 1, 1, 0]


def test_weights_are_relative_to_the_samples_of_the_query():
    """exp(score / 0.5) is 1, 3, 4 and 2. "a" came up twice: its three answers are compared with each other."""
    queries, scores = ["a", "a", "b", "a"], 0.5 * np.log([1.0, 3.0, 4.0, 2.0])
    weights = without_ppo.reward_weights(queries, scores, beta=0.5)
    assert weights == pytest.approx([0.5, 1.5, 1.0, 1.0])
    assert without_ppo.reward_weights(["a", "a"], np.array([0.0, 1000.0]), beta=1e-3).tolist() == [0, 2]


def test_samples_that_hardly_count_are_left_out_and_the_last_ones_validate():
    rows = [Row([i, i, i + 1], 1 + i % 2) for i in range(5)]
    learned, validation = without_ppo.with_weights(rows, np.array([2.0, 1e-4, 0.5, 0.0, 3.0]), training=3)
    assert learned.rows == [rows[0], rows[2]] and learned.weights.tolist() == [2.0, 0.5]
    assert validation.rows == [rows[4]] and validation.weights.tolist() == [3.0]
    assert learned.tokens == 2 * 2 + 0.5 * 2 and validation.tokens == 3 * 2


# samples and loss


def test_a_row_is_a_query_and_its_response_without_padding(chain):
    model, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    prompts, sampling = prompting.Texts(tokenizer), Sampling(12, 0.7, tokenizer.eos_token_id)
    queries = ["I", "On Monday my sister wrote"]
    samples = without_ppo.draw_samples(model, prompts, queries * 2, sampling, tiny.generator())
    assert tokenizer.batch_decode([row.ids[: row.query_length] for row in samples.rows]) == queries * 2
    for row, text, terminated in zip(samples.rows, samples.texts, samples.terminated, strict=True):
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == text
        assert tokenizer.pad_token_id not in row.ids
        assert (row.ids[-1] == tokenizer.eos_token_id) == terminated
        assert len(row.ids) <= row.query_length + 12


def test_the_loss_counts_response_tokens_only(tiny_model):
    """Each response token's -log softmax(logits / 0.7) before it, of rows on their own."""
    rows = [Row([1, 2, 3, 4, tiny.STOP], 2), Row([5, 6, 7, tiny.STOP], 3), Row([8, 9, 1, 2, 3, 4, 5], 1)]
    losses = without_ppo.response_loss(tiny_model, rows, temperature=0.7, pad_id=0)
    for row, loss in zip(rows, losses.tolist(), strict=True):
        logp = (tiny_model(torch.tensor([row.ids])).logits[0] / 0.7).log_softmax(-1)
        expected = sum(-logp[place - 1, row.ids[place]].item() for place in range(row.query_length, len(row.ids)))
        assert loss == pytest.approx(expected, rel=1e-4)


def test_what_is_learned_has_the_weights_whatever_the_lengths(tiny_model):
    """As many samples of a short and of a long response, which count 0.5 and 1.5: probabilities 1/4 and 3/4.

    Batches have responses of one length only, so a mean over each batch's tokens would favour the short one.
    """
    short, long = Row([1, 2, 3, tiny.STOP], 2), Row([1, 2, 4, 5, 6, 7, 8, 9, tiny.STOP], 2)
    learned = Weighted([short] * 8 + [long] * 8, np.array([0.5] * 8 + [1.5] * 8))
    loss = functools.partial(without_ppo.response_loss, tiny_model, temperature=0.7, pad_id=0)
    settings = supervised.FitSettings(epochs=30, batch_size=4, lr=1e-2, muon=False, seed=0)
    history = without_ppo.fit(tiny_model, learned, learned, loss, lambda policy: {}, settings, checkpoints=None)
    with torch.no_grad():
        assert (-loss([short, long])).exp().tolist() == pytest.approx([0.25, 0.75], abs=0.04)
    least = 0.25 * np.log(4) + 0.75 * np.log(4 / 3)  # nats per response: the entropy
    assert history[-1]["loss"] == pytest.approx(least * 16 / learned.tokens, rel=0.05)


# runs


@pytest.fixture(scope="module")
def home(chain, tmp_path_factory):
    """A folder with trained models, and a run of each method."""
    home = tmp_path_factory.mktemp("without_ppo") / "home"
    shutil.copytree(chain[0], home)
    run("experiments.without_ppo", "best_of_n", *TINY, "--out", "models/best", cwd=home)
    run("experiments.without_ppo", "reward_weighted", *TINY, "--beta", "0.5", "--out", "models/weighted", cwd=home)
    return home


def test_a_run_is_evaluated_like_one_of_ppo(home):
    runs = [home / "data_results" / "beyond" / f"{method}_seed0" for method in without_ppo.METHODS]
    few = TINY_EVALUATION[TINY_EVALUATION.index("--queries") :]
    run("evaluate_nlg", "--run", *runs, home / "data_results" / "K2_lr_1e-3_seed0", *few, cwd=home)
    for folder in runs:
        row = study.row_of(folder)
        assert row["kl"] > 0 and 0 <= row["gold_valid"] <= 1 and row["minutes"] > 0
        log = pd.read_csv(folder / "log.csv")
        assert log["update"].tolist() == [1, 2] and log.episodes.tolist() == [64, 64]
        assert log.valid_loss.gt(0).all() and log.eval_kl.gt(0).all()


def test_scores_are_those_of_ppo_with_the_same_seed(home):
    """The chain's run of PPO standardized them on 32 samples, too."""
    folders = ["K2_lr_1e-3_seed0", "beyond/best_of_n_seed0", "beyond/reward_weighted_seed0"]
    configs = [json.loads((home / "data_results" / name / "config.json").read_text()) for name in folders]
    assert configs[0]["score_mean"] == configs[1]["score_mean"] == configs[2]["score_mean"]
    assert configs[0]["score_std"] == configs[1]["score_std"] == configs[2]["score_std"]


def test_a_stopped_run_goes_on(home, monkeypatch):
    flags = ["reward_weighted", *TINY, "--beta", "0.5", "--out", "models/stopped", "--run", "stopped"]
    measure, calls = without_ppo.evaluation.measure, []

    def fails_at_the_second_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise UserError("out of luck")
        return measure(*args, **kwargs)

    monkeypatch.setattr(without_ppo.evaluation, "measure", fails_at_the_second_epoch)
    assert "out of luck" in run("experiments.without_ppo", *flags, "--save-every", 3, cwd=home, code=2).stderr
    monkeypatch.setattr(without_ppo.evaluation, "measure", measure)
    run("experiments.without_ppo", *flags, "--save-every", 3, "--resume", cwd=home)
    stopped, whole = (load_file(home / "models" / name / "model.safetensors") for name in ("stopped", "weighted"))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[name], whole[name]) for name in whole)


# flags


@pytest.mark.parametrize("variant", grids.GRIDS["beyond"].variants)
def test_the_flags_of_the_grid(variant, monkeypatch):
    flags = grids.GRIDS["beyond"].variants[variant].split()
    monkeypatch.setattr(sys, "argv", ["without_ppo", *flags, "--episodes", str(grids.GRIDS["beyond"].episodes)])
    args = without_ppo.parse_args()
    number = args.beta if args.method == "reward_weighted" else args.answers
    assert variant.endswith(f"_{number}") and args.episodes == 56_320 and args.temperature == 0.7


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("worst_of_n", "invalid choice: 'worst_of_n'"),
        ("best_of_n --beta 0.2", "--beta is for reward_weighted"),
        ("reward_weighted --beta 0", "'0' is not a number above 0"),
        ("best_of_n --answers 1", "--answers 1 leaves nothing to compare"),
        ("best_of_n --episodes 100 --answers 8", "--episodes 100 are not --answers 8"),
        ("reward_weighted --episodes 8 --answers 8", "two queries or more"),
        ("reward_weighted --reward human", "people are asked by finetuning_nlg.py only"),
        ("reward_weighted --policy models/nowhere", "there is no such folder"),
    ],
)
def test_what_is_refused(flags, said, chain, tmp_path):
    assert said in refused("experiments.without_ppo", *flags.split(), "--out", tmp_path / "out", cwd=chain[0])
