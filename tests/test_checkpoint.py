"""Nothing is lost: what a signal, a kill, a full disk, numbers that are not finite and a second process can do."""

import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import signal

import filelock
import numpy as np
import pandas as pd
import pytest
import torch

import ppo
from rlhf import checkpoint, cli, models, run_log, runtime, supervised
from rlhf.errors import UserError
from rlhf.policy import PolicyWithValue
from tests.conftest import TINY_RUN, refused, run
from tests.stress.kill_test import kill_test
from tests.tiny import collect

SETTINGS = {"lr": 0.1, "resume": False}
FOUR_UPDATES = [*TINY_RUN, "--episodes", "64"]


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# resume


def test_killed_runs_end_as_one_that_was_left_alone(chain, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(chain[0], home)
    chance = random.Random(0)
    for script in ("train_cls", "finetuning_nlg"):  # train_nlg.py is one fit of the two of train_cls.py
        shutil.rmtree(home / "data_results")
        found = kill_test(script, 1, home, chance)
        assert (found["killed_runs"], found["identical"]) == (1, 1), script


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(chain, monkeypatch, number, code):
    home, _ = chain
    name = f"stopped_{code}"
    flags = [*FOUR_UPDATES, "--run", name, "--out", f"models/{name}"]
    update, calls = ppo.update, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", interrupted)
        said = run("finetuning_nlg", *flags, cwd=home, code=code)
    assert "stopped after step 2; the same command with --resume goes on from there" in said.stderr
    assert not (home / "models" / name).exists()
    assert len(pd.read_csv(home / "data_results" / name / "log.csv")) == 2

    assert "go on with --resume" in refused("finetuning_nlg", *flags, cwd=home)
    assert "was made with --lr 0.001, not 0.002" in refused(
        "finetuning_nlg", *flags, "--resume", "--lr", "2e-3", cwd=home
    )
    run("finetuning_nlg", *flags, "--resume", cwd=home)
    assert pd.read_csv(home / "data_results" / name / "log.csv")["update"].tolist() == [1, 2, 3, 4]
    assert not (home / "models" / f"{name}.checkpoint").exists()


def test_without_a_checkpoint_resume_begins(chain):
    home, _ = chain
    run("finetuning_nlg", *TINY_RUN, "--run", "fresh", "--out", "models/fresh", "--resume", cwd=home)
    assert weights(home / "models" / "fresh") == weights(home / "models" / "nlg_ppo")


def test_a_folder_in_use_is_refused(chain):
    home, _ = chain
    (home / "data_results" / ".locks").mkdir(exist_ok=True)
    with filelock.FileLock(home / "data_results" / ".locks" / "busy"):
        said = refused("finetuning_nlg", *TINY_RUN, "--run", "busy", "--out", "models/busy", cwd=home)
    assert "data_results/busy is in use by another process" in said


def test_the_random_numbers_of_a_users_reward_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    states = checkpoint.RandomState()
    draw()  # NumPy keeps the second of two normal numbers for the next call
    checkpoint.save(tmp_path / "x", {"format": checkpoint.FORMAT, "settings": {}, "random": states.state_dict()})
    drawn = draw()
    states.load_state_dict(checkpoint.load(tmp_path / "x", {})["random"])
    assert draw() == drawn


def test_a_file_where_the_run_folder_should_be(chain):
    said = refused("finetuning_nlg", *TINY_RUN, "--run", "cls_metrics.json", "--out", "models/odd", cwd=chain[0])
    assert "--run cls_metrics.json: in --results this is a file, not a run folder" in said


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.checkpoint"
    checkpoint.save(path, {"format": checkpoint.FORMAT, "settings": SETTINGS, "weights": torch.ones(1000)})
    whole = path.read_bytes()
    assert torch.equal(checkpoint.load(path, SETTINGS)["weights"], torch.ones(1000))
    for broken in (b"", b"text", whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="is no checkpoint of this project"):
            checkpoint.load(path, SETTINGS)
    checkpoint.save(path, {"format": 0, "settings": SETTINGS})
    with pytest.raises(UserError, match="has format 0, not 6"):
        checkpoint.load(path, SETTINGS)
    torch.save({"format": checkpoint.FORMAT, "settings": print}, path)  # code in it is not run
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        checkpoint.load(path, SETTINGS)


# the disk


@contextlib.contextmanager
def small_disk():
    """No file of this process can grow beyond 100 kB, not even one that the tests' own output goes to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "x.checkpoint"
    state = {"format": checkpoint.FORMAT, "settings": SETTINGS, "step": 1}
    checkpoint.save(path, state)
    with small_disk(), pytest.raises(UserError, match=r"cannot be written .*the previous one is still there"):
        checkpoint.save(path, state | {"step": 2, "weights": torch.ones(100_000)})
    assert checkpoint.load(path, SETTINGS)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.checkpoint"]


def test_a_full_disk_leaves_the_results_before(tmp_path):
    path = runtime.write_json(tmp_path / "evaluation.json", {"kl": 1.0})
    with small_disk(), pytest.raises(OSError):
        runtime.write_json(path, {"kl": [2.0] * 100_000})
    assert json.loads(path.read_text()) == {"kl": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_full_disk_leaves_the_model_before(chain, tmp_path):
    model, tokenizer = models.load_policy(str(chain[0] / "models" / "nlg"), "--policy")
    (tmp_path / "nlg").mkdir()
    (tmp_path / "nlg" / "model.safetensors").write_text("the one before")
    with small_disk(), pytest.raises(UserError, match=r"cannot be written .*what was there before still is"):
        models.save_folder(tmp_path / "nlg", model, tokenizer, "card")
    assert (tmp_path / "nlg" / "model.safetensors").read_text() == "the one before"
    assert [folder.name for folder in tmp_path.iterdir()] == ["nlg"]


# numbers that are not finite


def test_three_losses_in_a_row_that_are_not_finite_stop_a_fit():
    layer = torch.nn.Linear(2, 1)
    steps = []

    def fit(bad_steps):
        steps.clear()

        def loss_of(batch):
            steps.append(1)
            losses = layer(torch.ones(len(batch), 2)).squeeze(1) * (np.nan if len(steps) in bad_steps else 1.0)
            return losses, torch.ones(len(batch))

        settings = supervised.FitSettings(epochs=1, batch_size=1, lr=0.1, muon=False, seed=0)
        return supervised.fit(
            layer, [1] * 8, loss_of, lambda: {"loss": 0.0}, settings, stage="test", device=torch.device("cpu")
        )

    before = layer.weight.detach().clone()
    fit(bad_steps=(1, 2, 4, 5))
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)
    with pytest.raises(UserError, match="test, step 4: the loss is not finite, 3 times in a row; lower --lr"):
        fit(bad_steps=(2, 3, 4))
    assert layer.weight.isfinite().all()


def test_three_updates_in_a_row_that_are_not_finite_stop_a_run(chain, monkeypatch):
    home, _ = chain
    flags = [*FOUR_UPDATES, "--run", "nan", "--out", "models/nan", "--save-every", "1"]
    rewards, calls = ppo.token_rewards, []

    def from_the_second_on(*args):
        calls.append(1)
        return rewards(*args) * (1.0 if len(calls) == 1 else np.nan)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "token_rewards", from_the_second_on)
        said = run("finetuning_nlg", *flags, cwd=home, code=2)
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("error: update 4: the gradient of the loss is not finite, 3 updates in a row; lower --lr")
    state = torch.load(home / "models" / "nan.checkpoint", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["state"]["policy"].values())
    log = pd.read_csv(home / "data_results" / "nan" / "log.csv")
    assert log["skipped"].tolist() == [0, 4, 4, 4]  # 2 minibatches, K = 2


def test_a_kl_beyond_the_limit_is_said_once(chain):
    flags = "--run limit --out models/limit --kl-limit 1e-9 --lr 1e-2 --no-kl-guard".split()
    said = run("finetuning_nlg", *FOUR_UPDATES, *flags, cwd=chain[0]).stderr
    assert said.count("above --kl-limit") == 1


def test_a_kl_that_stays_negative_is_said_once(tmp_path, capsys):
    settings = {"split": None, "part_names": [], "judge": None, "kl_limit": 20.0, "tensorboard": False}
    log = run_log.RunLog(tmp_path, 40, 16, **settings)
    updates = log.updates()
    for update in range(1, 30):
        next(updates)
        log.last_row = {"update": update, "kl": -0.5}
        log.check(None, update_skipped=False, out="models/x")
        assert capsys.readouterr().err.count("the KL stays negative") == (update == run_log.MOVING_AVERAGE)


def test_a_rollout_says_which_of_its_numbers_is_not_finite(tiny_model):
    policy = PolicyWithValue(tiny_model)

    def not_finite():
        return collect(policy, tiny_model).not_finite

    assert not_finite() is None
    with torch.no_grad():
        policy.value_head.bias.fill_(math.inf)
    assert not_finite() == "values"
    with torch.no_grad():
        tiny_model.transformer.ln_f.bias.fill_(math.nan)
    assert not_finite() == "logprobs"


def test_a_disk_that_is_full_while_a_row_is_written_ends_in_one_line(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "data_results/x/log.csv")

    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "'data_results/x/log.csv'" in said and "--resume" in said
    assert said.count("\n") == 1


# rewards


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0]", "gave scores of shape (1,) for 32 texts"),
        ("return [float('nan')] * len(texts)", "gave nan for the text"),
        ("return [1 / 0]", "failed: ZeroDivisionError"),
        ("return ['good'] * len(texts)", "failed: ValueError"),
        ("return None", "gave scores of shape () for 32 texts"),
    ],
)
def test_a_reward_that_does_not_do_its_job(chain, tmp_path, body, words):
    (tmp_path / "own.py").write_text(f"def score(texts):\n    {body}\n")
    flags = [*TINY_RUN, "--reward", f"{tmp_path}/own.py:score", "--run", "own", "--out", "models/own"]
    assert words in refused("finetuning_nlg", *flags, cwd=chain[0])
    assert not (chain[0] / "data_results" / "own").exists()


def test_out_of_memory_names_the_flags(monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert "lower --batch-size, or --forward-batch of PPO" in capsys.readouterr().err
