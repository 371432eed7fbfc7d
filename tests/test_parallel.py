"""Several processes do what one does: the same update from the same rollouts, one writer, exact resume."""

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

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import tensor

import ppo
from rlhf import distributed, optim, run_log, supervised
from tests.conftest import ROOT, TINY_RUN, refused
from tests.stress.kill_test import ended, start
from tests.test_ppo import STOP

SETTINGS = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "kl_weight": 0.1, "temperature": 0.7}
# torchrun has options that begin with --run too, so -- says where its own end
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]


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


def part_of(rollout: ppo.Rollout) -> ppo.Rollout:
    """This process's rows."""
    rows = distributed.share(list(range(len(rollout.response_ids))))
    fields = {field.name: getattr(rollout, field.name)[rows] for field in dataclasses.fields(rollout)[:-1]}
    return ppo.Rollout(**fields, minibatches=ppo.shuffled(len(rows), 3, torch.Generator().manual_seed(0)))


def assert_alike(found: dict, expected: dict) -> None:
    """Equal but for rounding, which may put a token on the other side of a clip."""
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.02 if name.endswith("clip_fraction") else 1e-5), name


def learn(model, rollout: ppo.Rollout, scores: torch.Tensor, muon: bool) -> dict:
    """Weights and numbers after an update of two passes over this process's rows in three minibatches."""
    torch.manual_seed(1)
    policy = ppo.PolicyWithValue(copy.deepcopy(model)).eval()
    part, scores = part_of(rollout), tensor(distributed.share(scores.tolist()))
    mask = part.response_mask
    rewards = ppo.whiten(ppo.token_rewards(scores, ppo.kl_to_come(part.exact_kl), mask, 0.2), mask, shift_mean=False)
    advantages, returns = ppo.advantages_and_returns(rewards, part.values, mask, 1.0, 0.95)
    found = ppo.update(
        policy,
        copy.deepcopy(model),
        optim.make_optimizers(policy, 1e-3, muon),
        part,
        ppo.whiten(advantages, mask),
        returns,
        epochs=2,
        forward_batch=2,
        generator=torch.Generator().manual_seed(1),
        **SETTINGS,
    )
    found["variance"] = ppo.explained_variance(part.values, returns, mask)
    found["kl"] = distributed.mean(part.kl).item()
    return {"weights": policy.state_dict(), "found": found}


@pytest.mark.parametrize("muon", [True, False])
def test_two_processes_make_the_update_of_one(tiny_model, tmp_path, muon):
    """Rows are as unlike as can be: responses of 1 to 12 tokens, so that the processes have different token counts."""
    policy = ppo.PolicyWithValue(copy.deepcopy(tiny_model)).eval()
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(tiny_model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    queries = tensor([[1, 2], [3, 4]]).repeat(6, 1)
    rollout = ppo.collect(
        policy,
        reference,
        queries,
        torch.ones_like(queries),
        length=12,
        temperature=0.7,
        stop_id=STOP,
        forward_batch=12,
        generator=torch.Generator().manual_seed(1),
    )
    assert len(set(rollout.response_mask.sum(1).tolist())) > 2
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    one = learn(tiny_model, rollout, scores, muon)
    for other in in_two_processes(lambda: learn(tiny_model, rollout, scores, muon), tmp_path):
        assert_alike(other["found"], one["found"])
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=2e-6, rtol=1e-5, msg=name)
    moved = [not torch.equal(one["weights"][f"model.{name}"], x) for name, x in tiny_model.state_dict().items()]
    assert any(moved)


def test_a_process_without_rows_of_a_minibatch_waits_for_the_others(tiny_model, tmp_path):
    """Two rows in two minibatches: each process has rows in one of them only."""
    policy = ppo.PolicyWithValue(tiny_model).eval()
    queries = tensor([[1, 2], [3, 4]])
    flags = {"length": 3, "temperature": 0.7, "stop_id": STOP, "forward_batch": 2}
    rollout = ppo.collect(
        policy, tiny_model, queries, torch.ones_like(queries), generator=torch.Generator().manual_seed(0), **flags
    )
    scores = tensor([1.0, -1.0])
    one = learn(tiny_model, rollout, scores, False)
    for other in in_two_processes(lambda: learn(tiny_model, rollout, scores, False), tmp_path):
        assert_alike(other["found"], one["found"])


def test_a_process_without_texts_of_a_batch_waits_for_the_others(tiny_model, tmp_path):
    """Three texts in batches of two: of the second batch one process has none."""
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]

    def fit():
        model, device = copy.deepcopy(tiny_model), torch.device("cpu")
        supervised.fit(
            model,
            [len(row) for row in rows],
            lambda batch: supervised.lm_loss(model, *supervised.pad([rows[i] for i in batch], 0, device)),
            lambda: {"loss": 0.0},
            epochs=2,
            batch_size=2,
            lr=1e-2,
            muon=False,
            device=device,
            seed=0,
            decay=1.0,
            label="texts",
            keep=lambda *_: None,
            saved=None,
        )
        return supervised.perplexity(model.eval(), rows, 0, device)["loss"]

    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one, two = fit(), in_two_processes(fit, tmp_path)
    assert two == [pytest.approx(one, rel=1e-4)] * 2


def test_shares(monkeypatch):
    rows = [1, 2, 3, 4, 5]
    monkeypatch.setattr(distributed, "count", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts += [distributed.share(rows)]
    assert parts == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize("script", ["train_cls", "train_nlg", "finetuning_nlg"])
def test_a_batch_that_cannot_be_shared_is_refused(chain, monkeypatch, script):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    extra = ["--minibatches", 1, "--episodes", 15] if script == "finetuning_nlg" else []
    said = refused(script, "--batch-size", 15, *extra, cwd=chain[0])
    assert said == "error: --batch-size 15 cannot be shared evenly among 2 processes; give a multiple of them"


def test_people_are_asked_by_one_process(chain, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
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
        guard = run_log.guard

        def deadly(run, *rest):
            if run["update"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            guard(run, *rest)

        run_log.guard = deadly

    again = [*flags, "--run", "again", "--out", "models/again", "--resume"]
    assert two_processes("finetuning_nlg", home, *again, change=dies_at_the_third_update) == [-9, -9]
    assert "was made with --nproc-per-node 2, not 1" in refused("finetuning_nlg", *again, cwd=home)
    assert two_processes("finetuning_nlg", home, *again) == [0, 0]
    for path in ("models/{}/model.safetensors", "data_results/{}/samples.csv"):
        whole, resumed = ((home / path.format(name)).read_bytes() for name in ("whole", "again"))
        assert whole == resumed, path
