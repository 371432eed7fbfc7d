"""Several processes do what one does: the same update from the same rollouts, one writer, exact resume."""

import argparse
import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import tensor

import ppo
from rlhf import checkpoint, distributed, optim, run_log, supervised
from rlhf.errors import UserError
from rlhf.policy import PolicyWithValue
from rlhf.rollout import Rollout, shuffled_minibatches
from tests import tiny
from tests.conftest import ROOT, TINY_RUN, refused
from tests.stress.kill_test import ended, start

SETTINGS = dataclasses.replace(tiny.SETTINGS, epochs=2, forward_batch=2, gae_lambda=0.95, whiten_rewards=True)
# torchrun has options that begin with --run too, so -- says where its own end
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]


def test_masked_mean_counts_real_tokens_only():
    assert distributed.masked_mean(tensor([[1.0, 2.0], [6.0, 100.0]]), tensor([[1, 1], [1, 0]])) == 3.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_processes(script, home, *flags, change=lambda: None) -> list[int]:
    """The exit codes of a script, after a change to it, in two processes that share its batches."""
    port = free_port()

    def as_torchrun_does(rank):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        change()

    children = [start(script, home, list(flags), functools.partial(as_torchrun_does, rank)) for rank in (0, 1)]
    return [ended(child) for child in children]


def in_two_processes(function, home) -> list:
    """What function() returns in each of two processes."""
    port, children = free_port(), []
    for rank in (0, 1):
        if child := os.fork():
            children.append(child)
            continue
        try:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
            torch.save(function(), home / f"{rank}.pt")
            dist.barrier()
        except BaseException as error:  # whatever it is, the child must not go on as its parent
            print(f"process {rank}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert [ended(child) for child in children] == [0, 0]
    return [torch.load(home / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def part_of(rollout: Rollout) -> Rollout:
    """This process's rows, in three minibatches."""
    rows = torch.tensor(distributed.shard(list(range(len(rollout.response_ids)))))
    fields = {field.name: getattr(rollout, field.name)[rows] for field in dataclasses.fields(rollout)[:-1]}
    minibatches = shuffled_minibatches(len(rows), 3, torch.Generator().manual_seed(0))
    return Rollout(**fields, minibatches=minibatches)


def assert_alike(found: dict, expected: dict) -> None:
    """Equal but for rounding, which may put a token on the other side of a clip."""
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.02 if name.endswith("clip_fraction") else 1e-5), name


def learn(model, rollout: Rollout, scores: torch.Tensor, muon: bool) -> dict:
    """Weights and metrics after an update of two passes over this process's rows in three minibatches."""
    torch.manual_seed(1)
    policy = PolicyWithValue(copy.deepcopy(model)).eval()
    part, scores = part_of(rollout), tensor(distributed.shard(scores.tolist()))
    rewards = ppo.rewards(part, scores, 0.2, SETTINGS)
    targets = ppo.targets(part, rewards, 0.2, SETTINGS)
    optimizer, rng = optim.ppo_optimizer(policy, 1e-3, muon), torch.Generator().manual_seed(1)
    metrics = ppo.update(policy, copy.deepcopy(model), optimizer, part, targets, SETTINGS, rng)
    metrics["kl"] = distributed.mean(part.kl).item()
    return {"weights": policy.state_dict(), "metrics": metrics}


@pytest.mark.parametrize("muon", [True, False])
def test_two_processes_make_the_update_of_one(tiny_model, tmp_path, muon):
    """Rows are as unlike as can be: responses of 1 to 12 tokens, so that the processes have different token counts."""
    policy = PolicyWithValue(copy.deepcopy(tiny_model)).eval()
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(tiny_model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    queries = tensor([[1, 2], [3, 4]]).repeat(6, 1)
    mask = torch.ones_like(queries)
    rollout = tiny.collect(policy, reference, length=12, seed=1, queries=queries, mask=mask, forward_batch=12)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 2
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    one = learn(tiny_model, rollout, scores, muon)
    for other in in_two_processes(lambda: learn(tiny_model, rollout, scores, muon), tmp_path):
        assert_alike(other["metrics"], one["metrics"])
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=2e-6, rtol=1e-5, msg=name)
    moved = [not torch.equal(one["weights"][f"model.{name}"], x) for name, x in tiny_model.state_dict().items()]
    assert any(moved)


def test_a_process_without_rows_of_a_minibatch_waits_for_the_others(tiny_model, tmp_path):
    """Two rows in two minibatches: each process has rows in one of them only."""
    policy = PolicyWithValue(tiny_model).eval()
    queries = tensor([[1, 2], [3, 4]])
    rollout = tiny.collect(policy, tiny_model, length=3, queries=queries, mask=torch.ones_like(queries))
    scores = tensor([1.0, -1.0])
    one = learn(tiny_model, rollout, scores, False)
    for other in in_two_processes(lambda: learn(tiny_model, rollout, scores, False), tmp_path):
        assert_alike(other["metrics"], one["metrics"])


def test_a_process_without_texts_of_a_batch_waits_for_the_others(tiny_model, tmp_path):
    """Three texts in batches of two: of the second batch one process has none.

    The learning rate is low, because AdamW steps as far for a gradient that is only rounding.
    """
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]

    def fit():
        model, device = copy.deepcopy(tiny_model), torch.device("cpu")
        supervised.fit(
            model,
            [len(row) for row in rows],
            lambda batch: supervised.lm_loss(model, *supervised.pad([rows[i] for i in batch], 0, device)),
            lambda: {"loss": 0.0},
            supervised.FitSettings(epochs=2, batch_size=2, lr=1e-3, muon=False, seed=0),
            stage="texts",
            device=device,
        )
        return supervised.perplexity(model.eval(), rows, 0, device)["loss"]

    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one, two = fit(), in_two_processes(fit, tmp_path)
    assert two == [pytest.approx(one, rel=1e-4)] * 2


def test_shards(monkeypatch):
    rows = [1, 2, 3, 4, 5]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts += [distributed.shard(rows)]
    assert parts == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize("script", ["train_cls", "train_nlg", "finetuning_nlg"])
def test_a_batch_that_cannot_be_shared_is_refused(chain, monkeypatch, script):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    extra = ["--minibatches", 1, "--episodes", 15] if script == "finetuning_nlg" else []
    said = refused(script, "--batch-size", 15, *extra, cwd=chain[0])
    assert said == "error: --batch-size 15 cannot be shared evenly among 2 processes; give a multiple of them"


def test_machines_without_a_common_file_system_are_told_so(tmp_path):
    """Only the first has the checkpoint, and would go on from it while the other began."""
    outs = [str(tmp_path / machine / "policy") for machine in ("first", "second")]
    settings = {"out": outs[0], "resume": True, "nproc_per_node": 2}
    (tmp_path / "first").mkdir()
    checkpoint.save(Path(f"{outs[0]}.checkpoint"), {"format": checkpoint.FORMAT, "settings": settings, "stage": ""})

    def resume():
        args = argparse.Namespace(out=outs[distributed.rank()], resume=True)
        with pytest.raises(UserError, match="need the same file system"), checkpoint.opened(args):
            pass

    in_two_processes(resume, tmp_path)


def test_people_are_asked_by_one_process(chain, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda items: items)
    assert "start it without torchrun" in refused("finetuning_nlg", *TINY_RUN, "--reward", "human", cwd=chain[0])


# the scripts


def history(home, name) -> pd.DataFrame:
    return pd.DataFrame(json.loads((home / "data_results" / f"{name}_metrics.json").read_text("utf-8"))["history"])


@pytest.mark.parametrize(
    ("script", "flags"),
    [("train_nlg", ["--epochs", "1", "--samples", "16"]), ("train_cls", ["--epochs", "1", "--lm-epochs", "1"])],
)
def test_two_processes_learn_what_one_learns(chain, tmp_path, script, flags):
    home, name = tmp_path / "home", script.removeprefix("train_")
    shutil.copytree(chain[0], home)
    one = history(home, name)
    shutil.rmtree(home / "models" / name)
    assert two_processes(script, home, *flags) == [0, 0]
    assert (home / "models" / name / "model.safetensors").exists()
    pd.testing.assert_frame_equal(history(home, name), one, rtol=1e-3)


def test_torchrun(chain, tmp_path):
    """As a user starts it; and again, killed at the third update and resumed, which changes nothing."""
    home = tmp_path / "home"
    shutil.copytree(chain[0], home)
    flags = [*TINY_RUN, "--episodes", "64", "--save-every", "1"]
    command = [*TORCHRUN, str(ROOT / "finetuning_nlg.py"), *flags, "--run", "whole", "--out", "models/whole"]
    said = subprocess.run(command, cwd=home, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.count("policy: models/whole") == 1  # one process speaks
    log = pd.read_csv(home / "data_results" / "whole" / "log.csv")
    assert log["update"].tolist() == [1, 2, 3, 4]
    assert log["ratio_deviation_first"].max() < 1e-4

    def dies_at_the_third_update():
        check = run_log.RunLog.check

        def deadly_check(log, *arguments):
            if log.last_row["update"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            check(log, *arguments)

        run_log.RunLog.check = deadly_check

    again = [*flags, "--run", "again", "--out", "models/again", "--resume"]
    assert two_processes("finetuning_nlg", home, *again, change=dies_at_the_third_update) == [-9, -9]
    assert "was made with --nproc-per-node 2, not 1" in refused("finetuning_nlg", *again, cwd=home)
    assert two_processes("finetuning_nlg", home, *again) == [0, 0]
    for path in ("models/{}/model.safetensors", "data_results/{}/samples.csv"):
        whole, resumed = ((home / path.format(name)).read_bytes() for name in ("whole", "again"))
        assert whole == resumed, path
