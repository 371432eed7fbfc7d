"""All scripts on a pretend CUDA device: devices are not mixed, resumed runs are bit-identical, the host seldom waits.

These tests do not show what needs a GPU: speed, rounding, and its memory allocator.
"""

import contextlib
import copy
import json
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import ppo
from benchmarks import cases, host_waits
from rlhf import sampling, supervised
from tests import pretend
from tests.conftest import TINY_EVALUATION, TINY_RUN, run
from tests.stress.kill_test import same, small_project

# How often the host may wait for the device. Each wait stops a GPU for some ten microseconds. A rollout may wait every
# few tokens, to see which rows have ended, and twice in every forward batch (two models); an update once in every
# minibatch and forward batch. Beyond that, neither may wait more often for more tokens or texts, nor may scoring.
QUERIES, LENGTH, FORWARD_BATCH, MINIBATCHES = 16, 12, 4, 2
WAITS_OF_A_ROLLOUT, WAITS_OF_A_SCORE, WAITS_OF_AN_UPDATE = 6, 8, 4
SHORT_RUN = [*TINY_RUN, "--response-length", 12]
TIMINGS = ["seconds_rollout", "seconds_score", "seconds_update", "episodes_per_second"]


def run_on_device(script, *flags, home, code=0) -> pretend.Log:
    """Run a script on the pretend device. Returns what the device was asked for."""
    with pretend.cuda() as log:
        run(script, *flags, "--device", "cuda", cwd=home, code=code, cuda=True)
    return log


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def run_log(home, name) -> pd.DataFrame:
    return pd.read_csv(home / "data_results" / name / "log.csv").drop(columns=TIMINGS)


# the scripts


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """The four scripts, one after the other, on the device: their folder, and the log of each."""
    home = tmp_path_factory.mktemp("device")
    small_project(home)
    logs = [
        run_on_device("train_cls", "--epochs", 1, "--lm-epochs", 1, home=home),
        run_on_device("train_nlg", "--epochs", 1, "--samples", 16, home=home),
        run_on_device("finetuning_nlg", *TINY_RUN, home=home),
        run_on_device("evaluate_nlg", *TINY_EVALUATION, home=home),
    ]
    return home, logs


def test_the_scripts_run_on_the_device_and_name_it(on_device):
    home, logs = on_device
    folder = home / "data_results" / "K2_lr_1e-3_seed0"
    for path in ("config.json", "evaluation.json"):
        assert json.loads((folder / path).read_text())["machine"] == "a pretend CUDA device"
    assert all(log.initialized and log.peak > 2**20 for log in logs)
    assert all(log.live == 0 for log in logs)  # no tensor is left on the device


def test_the_first_ratio_is_1_in_low_precision_too(on_device):
    assert (run_log(on_device[0], "K2_lr_1e-3_seed0").ratio_deviation_first < 1e-4).all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--leave-one-out", "--answers", 2],
        ["--kl", "sampled", "--target-kl", 1, "--whiten-rewards", "--separate-value", "--optimizer", "adam"],
        ["--reward", "models/cls", "--reward=-0.5*length.py:short", "--ppo-epochs", 2],
    ],
    ids=["leave one out", "as in [3]", "two rewards"],
)
def test_other_objectives(on_device, flags):
    home, _ = on_device
    (home / "length.py").write_text("def short(queries, responses):\n    return [-len(r) for r in responses]\n")
    run_on_device("finetuning_nlg", *SHORT_RUN, *flags, "--run", "other", "--out", "models/other", home=home)
    log = run_log(home, "other")
    assert np.isfinite(log[["score", "kl", "policy_loss", "grad_norm", "ethics"]]).all(axis=None)
    assert (log.skipped == 0).all()
    shutil.rmtree(home / "data_results" / "other")


@pytest.mark.parametrize("feedback", ["good-bad", "best-of-3"])
def test_feedback_from_people(on_device, feedback):
    home, _ = on_device
    flags = ["--reward", "human", "--annotator", "gold", "--reward-epochs", 1, "--feedback", feedback, "--labels", 20]
    flags += ["--label-rounds", 2, "--feedback-file", f"{feedback}.jsonl", "--run", feedback, "--out", "models/people"]
    run_on_device("finetuning_nlg", *SHORT_RUN, *flags, home=home)
    assert run_log(home, feedback).labels.tolist() == [10, 20]
    few = ["--queries", 2, "--samples", 4, "--reference-samples", 64]
    run_on_device("evaluate_nlg", "--run", f"data_results/{feedback}", *few, home=home)


@pytest.mark.parametrize("name", ["scratch:llama:1x32", "scratch:gpt_neox:1x32"])
def test_other_architectures(on_device, name):
    home, _ = on_device
    nlg, cls, policy = (f"models/{name.split(':')[1]}_{model}" for model in ("nlg", "cls", "ppo"))
    run_on_device("train_nlg", "--model", name, "--epochs", 1, "--samples", 8, "--out", nlg, home=home)
    run_on_device("train_cls", "--model", nlg, "--optimizer", "muon", "--epochs", 1, "--out", cls, home=home)
    flags = ["--policy", nlg, "--reward", cls, "--out", policy, "--run", nlg.replace("/", "_")]
    run_on_device("finetuning_nlg", *SHORT_RUN, *flags, home=home)
    assert (run_log(home, flags[-1]).ratio_deviation_first < 1e-4).all()


def test_a_run_on_the_cpu_leaves_the_device_alone(on_device):
    home, _ = on_device
    with pretend.cuda() as log:
        flags = ["--run", "cpu", "--out", "models/cpu", "--device", "cpu", "--save-every", 1]
        run("finetuning_nlg", *SHORT_RUN, *flags, cwd=home, cuda=True)
    assert not log.initialized


# stopping and resuming


def with_dropout(home) -> str:
    """The generator with dropout, whose numbers come from the device's own generator."""
    folder = home / "models" / "dropout"
    shutil.copytree(home / "models" / "nlg", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1, "attn_pdrop": 0.1}))
    return "models/dropout"


@pytest.mark.parametrize("script", ["finetuning_nlg", "train_nlg", "train_cls"])
def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(on_device, monkeypatch, script):
    home, _ = on_device
    flags = {
        "finetuning_nlg": [*SHORT_RUN, "--episodes", 64, "--ppo-epochs", 2],
        "train_nlg": ["--model", with_dropout(home), "--epochs", 2, "--samples", 4],
        "train_cls": ["--epochs", 2, "--lm-epochs", 1],
    }[script]
    module, name = (ppo, "update") if script == "finetuning_nlg" else (supervised, "take_step")
    step, calls = getattr(module, name), []

    def step_with_a_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    def run_to(folder, *more, code=0):
        names = ["--run", folder] if script == "finetuning_nlg" else ["--results", folder]
        run_on_device(script, *flags, *names, "--out", f"models/{folder}", *more, home=home, code=code)

    run_to("uninterrupted")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, step_with_a_signal)
        run_to("stopped", code=128 + signal.SIGTERM)
    assert not (home / "models" / "stopped").exists()
    run_to("stopped", "--resume")
    assert weights(home / "models" / "stopped") == weights(home / "models" / "uninterrupted")
    if script == "finetuning_nlg":
        pd.testing.assert_frame_equal(run_log(home, "stopped"), run_log(home, "uninterrupted"))
    for folder in ("stopped", "uninterrupted"):
        shutil.rmtree(home / "models" / folder)


@pytest.mark.parametrize(("stopped_on", "resumed_on"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_stopped_run_resumes_on_another_device(on_device, monkeypatch, stopped_on, resumed_on):
    home, _ = on_device
    flags = [*SHORT_RUN, "--episodes", 64, "--run", f"{stopped_on}_{resumed_on}", "--out", "models/moved", "--resume"]
    update, calls = ppo.update, []

    def update_with_a_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    with monkeypatch.context() as patch, pretend.cuda():
        patch.setattr(ppo, "update", update_with_a_signal)
        run("finetuning_nlg", *flags, "--device", stopped_on, cwd=home, code=128 + signal.SIGTERM, cuda=True)
    with pretend.cuda() as log:
        run("finetuning_nlg", *flags, "--device", resumed_on, cwd=home, cuda=True)
    assert log.initialized == (resumed_on == "cuda")
    log_rows = run_log(home, f"{stopped_on}_{resumed_on}")
    assert log_rows["update"].tolist() == [1, 2, 3, 4] and (log_rows.ratio_deviation_first < 1e-4).all()
    shutil.rmtree(home / "models" / "moved")


# waiting


def test_the_host_seldom_waits_for_the_device(chain):
    home, device = chain[0] / "models", torch.device("cuda")
    queries = ["On Monday my sister", "A man"] * (QUERIES // 2)
    case = cases.Case(QUERIES, 5, LENGTH, MINIBATCHES, (1,), FORWARD_BATCH)
    with pretend.cuda() as log:
        update = cases.Update(case, 1, home / "nlg", home / "cls", device, "bfloat16", queries)
        waits = host_waits.waits_by_stage(log, update)
    host_waits.show(waits)
    batches = QUERIES // FORWARD_BATCH
    assert waits["rollout"].total() <= WAITS_OF_A_ROLLOUT + LENGTH / sampling.LOOK_EVERY + 2 * batches
    assert waits["scoring"].total() <= WAITS_OF_A_SCORE
    assert waits["update"].total() <= WAITS_OF_AN_UPDATE + MINIBATCHES + batches


# the device itself

ON_CPU, ZEROS = torch.tensor([0, 1]), torch.zeros(2, 2)


@pytest.fixture
def device_log():
    with pretend.cuda() as log:
        yield log


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda x: x.index_select(0, ON_CPU), "all tensors to be on the same device"),
        (lambda x: x.masked_scatter(ZEROS == 0, x), "all tensors to be on the same device"),
        (lambda x: nn.functional.embedding(x.long(), ZEROS), "all tensors to be on the same device"),
        (lambda x: torch.cat([x, ZEROS]), "all tensors to be on the same device"),
        (lambda x: x + ZEROS, "all tensors to be on the same device"),
        (lambda x: ZEROS.sum().add_(x.sum()), "all tensors to be on the same device"),
        (lambda x: ZEROS[x.long()], "indices should be either on cpu or on the same device"),
        (lambda x: torch.rand(2, device="cuda", generator=torch.Generator()), "Expected a 'cuda' device type"),
        (lambda x: torch.rand(2, generator=torch.Generator("cuda")), "Expected a 'cpu' device type"),
        (lambda x: x.uniform_(generator=torch.Generator()), "Expected a 'cuda' device type"),
        (lambda x: torch.cuda.set_rng_state(torch.get_rng_state()), "RNG state is wrong size"),
        (lambda x: x.numpy(), "can't convert cuda:0 device type tensor to numpy"),
        (lambda x: np.asarray(x), "can't convert cuda:0 device type tensor to numpy"),
    ],
)
def test_what_cuda_refuses(device_log, mistake, says):
    with pytest.raises((RuntimeError, TypeError), match=says):
        mistake(torch.ones(2, 2, device="cuda"))


@pytest.mark.parametrize(
    ("allowed", "waits_for"),
    [
        (lambda x: x + torch.tensor(1.0), []),
        (lambda x: x.where(x > torch.tensor(0.0), torch.tensor(0.0)), []),
        (lambda x: x.masked_fill(x > 0, torch.tensor(0.0)), []),
        (lambda x: x @ x + x.new_tensor(2.0, device="cpu"), []),
        (lambda x: x[0, 1:], []),
        (lambda x: x[[1, 0]], ["copy to the device"]),
        (lambda x: x[ON_CPU], ["copy to the device"]),
        (lambda x: x + torch.tensor([1.0, 2.0], device="cuda"), ["copy to the device"]),
        (lambda x: x + ZEROS.to("cuda", non_blocking=True), []),
        (lambda x: x[x > 0], ["boolean index"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x.masked_select(x > 0), ["masked_select"]),
        (lambda x: x * bool(x.any()), ["item"]),
        (lambda x: x * x[0].tolist()[1], ["copy to the host"]),
        (lambda x: x * x.cpu().sum(), ["copy to the host"]),
        (lambda x: torch.mm(x.bfloat16(), x.bfloat16(), out_dtype=torch.float32), []),
        (lambda x: nn.functional.one_hot(x.long(), 2), []),
    ],
)
def test_what_cuda_allows_and_what_the_host_waits_for(device_log, allowed, waits_for):
    x = torch.ones(2, 2, device="cuda")
    assert allowed(x).device == torch.device("cuda", 0)
    assert [what for what, line in device_log.waits.elements() if line.startswith("test_cuda.py:")] == waits_for


def test_autocast_has_the_precision_of_cuda(device_log):
    x, layer = torch.ones(2, 4, device="cuda"), nn.Linear(4, 4).to("cuda")
    heads = x.view(1, 1, 2, 4).expand(2, 2, 2, 4)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        low = layer(x)
        attended = [
            nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True, dropout_p=p)
            for p in (0.0, 0.1)
        ]
        assert {y.dtype for y in (low, x @ x.T, *attended)} == {torch.bfloat16}
        wide = [low.softmax(-1), low.sum(), low.cumsum(0), low.exp(), nn.functional.layer_norm(low, (4,))]
        assert {y.dtype for y in wide} == {torch.float32}
        assert low.relu().dtype == torch.bfloat16
        wide[-1].sum().backward()
    assert (layer.weight.grad.dtype, layer.weight.grad.device.type) == (torch.float32, "cuda")
    assert layer(x).dtype == torch.float32


def test_models_are_moved_copied_saved_and_loaded(device_log, tiny_model, tmp_path):
    tiny_model.to("cuda")
    clone, half = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model).to(torch.bfloat16)
    for model in (tiny_model, clone, half):
        assert model.lm_head.weight is model.transformer.wte.weight  # tied, as they were
        assert isinstance(model.lm_head.weight, nn.Parameter) and model.lm_head.weight.is_cuda
    ids, updated = torch.tensor([[1, 2, 3]], device="cuda"), []
    for parameter in clone.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: updated.append(parameter.grad.device.type))
    adam = torch.optim.Adam(clone.parameters(), fused=True)
    torch.func.functional_call(clone, dict(clone.named_parameters()), (ids,)).logits.sum().backward()
    adam.step()
    assert updated == ["cuda"] * len(list(clone.parameters()))
    torch.save([clone.state_dict(), adam.state_dict()], tmp_path / "saved")
    of_model, of_adam = torch.load(tmp_path / "saved", map_location="cpu", weights_only=True)
    tiny_model.load_state_dict(of_model)
    adam.load_state_dict(of_adam)
    assert torch.equal(tiny_model(ids).logits, clone(ids).logits)
    assert {x.device.type for state in adam.state.values() for x in state.values()} == {"cuda"}
    assert same(of_model, tiny_model.cpu().state_dict())


def test_the_device_draws_from_its_own_generator(device_log):
    torch.manual_seed(0)
    assert not torch.cuda.is_initialized()
    of_cpu, of_device = torch.get_rng_state(), torch.cuda.get_rng_state()
    drawn = torch.rand(3, device="cuda")
    assert torch.cuda.is_initialized() and torch.equal(torch.get_rng_state(), of_cpu)
    torch.cuda.set_rng_state(of_device)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_bytes_are_counted_once_and_until_they_are_freed(device_log):
    x = torch.zeros(1000, device="cuda")
    views = x[:10], x.view(10, 100)
    assert (device_log.live, torch.cuda.max_memory_allocated()) == (4000, 4000)
    (x + 1).sum()
    assert (device_log.live, device_log.peak) == (4000, 8004)
    del x, views
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0


def test_the_device_is_gone_after_its_block():
    with contextlib.suppress(ValueError), pretend.cuda():
        assert torch.cuda.is_available()
        raise ValueError
    assert not torch.cuda.is_available() and not torch.cuda.is_initialized()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
