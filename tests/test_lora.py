"""LoRA: one base model for policy and reference, adapters on every linear layer, folders that others read."""

import copy
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, pipeline

import ppo
from rlhf import fast_path, lora, models, optim, precision, recipes
from rlhf.errors import UserError
from rlhf.forward import hidden_states
from rlhf.policy import PolicyWithValue
from tests import tiny
from tests.conftest import TINY_RUN, refused, run
from tests.test_distributed import assert_alike, in_two_processes, learn
from tests.tiny import QUERIES, QUERY_MASK

EACH_KIND = pytest.mark.parametrize("config", tiny.ARCHITECTURES, ids=lambda config: config.model_type)
EACH_PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=precision.dtype_name)
RANK = 2
LAYERS_OF_GPT2 = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def with_adapters(base, moved=False):
    """A model with adapters, which do something where they are `moved`."""
    adapted = lora.with_adapters(base, RANK, "base").eval()
    for name, weight in adapted.named_parameters():
        if moved and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def states_of(model):
    places = torch.tensor([2, 3, 5, 7, 10, 11])
    return hidden_states(model, QUERIES, QUERY_MASK, places)


def update_twice(policy, reference, lr=1e-2):
    """Two updates of the weights; returns the metrics of the first."""
    optimizer, metrics = optim.ppo_optimizer(policy, lr, muon=False), []
    for seed in range(2):
        queries = {"queries": QUERIES.repeat(4, 1), "mask": QUERY_MASK.repeat(4, 1)}
        rollout = tiny.collect(policy, reference, seed=seed, forward_batch=tiny.SETTINGS.forward_batch, **queries)
        advantages = torch.randn(rollout.values.shape, generator=tiny.generator()) * rollout.response_mask
        targets = ppo.Targets(advantages, advantages, kl_weight=0.1)
        metrics.append(ppo.update(policy, reference, optimizer, rollout, targets, tiny.SETTINGS, tiny.generator()))
    return metrics[0]


# the model


@EACH_KIND
def test_every_linear_layer_of_the_body_gets_two_thin_matrices_and_nothing_else_trains(config):
    base = model_of(config)
    adapted = with_adapters(base)
    shapes = {name: tuple(weight.shape) for name, weight in base.base_model.named_parameters()}
    inner = [name for name, shape in shapes.items() if len(shape) == 2 and "wte" not in name and "wpe" not in name]
    inner = [name for name in inner if "embed" not in name]
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(inner) >= 16
    assert sum(map(torch.Tensor.numel, trained)) == sum(RANK * sum(shapes[name]) for name in inner)
    (layer,) = [x for name, x in adapted.base_model.named_modules() if name.endswith("0.mlp")]
    part = next(x for x in layer.children() if hasattr(x, "lora_A"))
    assert part.scaling == {"default": 2.0}  # alpha is twice the rank


@EACH_KIND
def test_adapters_change_nothing_at_first(config):
    base = model_of(config)
    assert torch.equal(states_of(with_adapters(base)), states_of(base))


@EACH_KIND
def test_states_are_those_of_the_merged_model_and_of_transformers(config, monkeypatch):
    """The fast path, which reads weights, must not pass the adapters by."""
    base = model_of(config)
    adapted, unchanged = with_adapters(base, moved=True), states_of(base)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]

    def found():
        states = states_of(adapted)
        return states, torch.autograd.grad(states.pow(3).sum(), weights)

    states, gradients = found()
    assert (states - unchanged).abs().max() > 0.1
    merged = lora.merge(adapted, copy.deepcopy(base))
    torch.testing.assert_close(states, states_of(merged), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(fast_path, "is_supported", lambda body: False)
    plain_states, plain_gradients = found()
    torch.testing.assert_close(states, plain_states, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# one base for two


def distinct_bytes(*modules):
    weights = [weight for module in modules for weight in module.parameters()]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in weights}.values())


@EACH_PRECISION
@EACH_KIND
def test_policy_and_reference_hold_the_base_once(config, dtype):
    reference = precision.freeze(model_of(config), dtype)
    of_base = distinct_bytes(reference)
    policy = PolicyWithValue(lora.with_adapters(reference, RANK, "base"), precision=dtype)
    adapters = [weight for weight in policy.model.parameters() if weight.requires_grad]
    head = 4 * (16 + 1)  # weights and bias of the value head
    copies = 1.5 if dtype == torch.bfloat16 else 1  # the adapters in bfloat16, beside those that train
    expected = of_base + copies * 4 * sum(weight.numel() for weight in adapters) + head
    assert distinct_bytes(reference, policy, policy.in_precision()) == expected
    assert all(weight.dtype == torch.float32 for weight in adapters)


@EACH_PRECISION
@EACH_KIND
def test_updates_leave_the_reference_as_it_is_bit_for_bit(config, dtype):
    alone = precision.freeze(model_of(config), dtype)
    reference = precision.freeze(model_of(config), dtype)
    policy = PolicyWithValue(lora.with_adapters(reference, RANK, "base"), precision=dtype).eval()

    def logprobs(model):
        return tiny.collect(policy, model, seed=9).ref_logprobs

    metrics = update_twice(policy, reference)
    assert metrics["ratio_deviation_first"] < (1e-5 if dtype == torch.float32 else 1e-30)
    moved = tiny.collect(policy, reference, seed=9)
    assert moved.exact_kl.sum() > 0.01
    assert torch.equal(moved.ref_logprobs, logprobs(alone))
    assert policy.value_head.weight.abs().min() > 0  # it trains in full


def test_a_state_holds_what_trains():
    policy = PolicyWithValue(with_adapters(model_of(tiny.ARCHITECTURES[0])))
    state = lora.TrainedWeights(policy).state_dict()
    assert len(state) == 16 + 2 and all("lora_" in name or "value_head" in name for name in state)
    other = PolicyWithValue(with_adapters(model_of(tiny.ARCHITECTURES[0]), moved=True))
    lora.TrainedWeights(other).load_state_dict(state)
    assert all(torch.equal(x, state[name]) for name, x in lora.TrainedWeights(other).state_dict().items())
    with pytest.raises(ValueError, match="another model"):
        lora.TrainedWeights(other).load_state_dict(dict(list(state.items())[1:]))


def test_without_adapters_a_state_is_all_there_is(tiny_model):
    state = lora.TrainedWeights(tiny_model).state_dict()
    assert state.keys() == tiny_model.state_dict().keys()


def test_two_processes_make_the_update_of_one(tmp_path):
    adapted = with_adapters(model_of(tiny.ARCHITECTURES[0]), moved=True)
    policy = PolicyWithValue(adapted).eval()
    queries = QUERIES[1:2, :2].repeat(12, 1)
    mask = torch.ones_like(queries)
    rollout = tiny.collect(policy, adapted, length=12, seed=1, queries=queries, mask=mask, forward_batch=12)
    scores = torch.randn(12, generator=tiny.generator())
    one = learn(adapted, rollout, scores, False)
    for other in in_two_processes(lambda: learn(adapted, rollout, scores, False), tmp_path):
        assert_alike(other["metrics"], one["metrics"])
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=2e-6, rtol=1e-5, msg=name)


# folders


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_classifiers_head_and_pooler_train_in_full(kind, tmp_path):
    small = {"vocab_size": 11, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
    config = GPT2Config(**small) if kind == "gpt2" else BertConfig(**small, intermediate_size=32)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    adapted = lora.with_adapters(precision.freeze(copy.deepcopy(base), torch.bfloat16), RANK, "base").eval()
    whole = [name for name, x in adapted.named_parameters() if x.requires_grad and "lora_" not in name]
    heads = {"gpt2": ["score"], "bert": ["bert.pooler.dense", "classifier"]}[kind]
    assert sorted({name.replace(".modules_to_save.default", "").rpartition(".")[0] for name in whole}) == heads
    for weight in adapted.parameters():
        if weight.requires_grad:
            assert weight.dtype == torch.float32
            torch.nn.init.normal_(weight, std=0.1)
    lora.save_adapters(adapted, tmp_path / "adapter")
    merged = lora.merge(adapted, copy.deepcopy(base))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(merged(ids).logits, theirs(ids).logits)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 0.01


@pytest.fixture(scope="module")
def lora_run(chain, tmp_path_factory):
    """The chain's folder with a run of finetuning_nlg.py, stopped and resumed; and its checkpoint's content."""
    home = tmp_path_factory.mktemp("lora") / "home"
    shutil.copytree(chain[0], home)
    flags = [*TINY_RUN, "--response-length", 8, "--lora", RANK]
    whole = run("finetuning_nlg", *flags, "--run", "whole", "--out", "models/whole", cwd=home)
    update, calls, flags = ppo.update, [], [*flags, "--run", "stopped", "--out", "models/stopped"]

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", interrupted)
        run("finetuning_nlg", *flags, cwd=home, code=143)
    content = torch.load(home / "models" / "stopped.checkpoint", weights_only=True)
    run("finetuning_nlg", *flags, "--resume", cwd=home)
    return SimpleNamespace(home=home, said=whole.stdout, checkpoint=content["state"])


def test_adapters_on_adapters_are_refused_before_the_run(lora_run):
    flags = [*TINY_RUN, "--policy", "models/whole/adapter", "--lora", RANK, "--out", "models/twice"]
    assert "models/whole/adapter is adapters: give it merged" in refused("finetuning_nlg", *flags, cwd=lora_run.home)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(lora_run):
    folder = lora_run.home / "models"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / "whole" / file).read_bytes() == (folder / "stopped" / file).read_bytes()
    assert (folder / "whole" / "model.safetensors").read_bytes() != (folder / "nlg" / "model.safetensors").read_bytes()


def test_a_checkpoint_holds_adapters_and_value_head_but_not_the_base(lora_run):
    state = lora_run.checkpoint["policy"]
    assert {name for name in state if "lora_" not in name} == {"value_head.weight", "value_head.bias"}
    in_moments = sum(len(member["state"]) for member in lora_run.checkpoint["optimizer"])
    assert in_moments == len(state) == 2 * 4 * 2 + 2  # GPT-2 has four linear layers in each of two


def test_the_ratio_is_1_at_first_and_the_run_says_its_settings(lora_run):
    log = pd.read_csv(lora_run.home / "data_results" / "whole" / "log.csv")
    assert log["ratio_deviation_first"].max() < 1e-4 and log["kl"].iloc[-1] != 0
    assert "--optimizer adam" in lora_run.said
    assert "lora" in json.loads((lora_run.home / "data_results" / "whole" / "config.json").read_text())["settings"]


def test_the_policy_is_the_base_with_its_adapters_merged_as_peft_does_it(lora_run):
    folder = lora_run.home / "models"
    base = AutoModelForCausalLM.from_pretrained(folder / "nlg")
    config = json.loads((folder / "whole" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("models/nlg", RANK, 2 * RANK)
    theirs = peft.PeftModel.from_pretrained(base, folder / "whole" / "adapter").merge_and_unload().state_dict()
    ours = load_file(folder / "whole" / "model.safetensors")
    assert ours and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_transformers_needs_no_peft_for_the_policy(lora_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    said = pipeline("text-generation", str(lora_run.home / "models" / "whole"))("I", max_new_tokens=3)
    assert said[0]["generated_text"].startswith("I")


def test_an_evaluation_reads_the_adapters_too(lora_run):
    found = []
    for policy in ("models/whole", "models/whole/adapter"):
        flags = ["--run", "data_results/whole", "--queries", 2, "--samples", 4, "--reference-samples", 64]
        run("evaluate_nlg", *flags, "--policy", policy, cwd=lora_run.home)
        evaluation = json.loads((lora_run.home / "data_results" / "whole" / "evaluation.json").read_text())
        found.append((evaluation["kl"], evaluation["ethics_after"]))
    assert found[0] == found[1] and found[0][0] != 0


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "names no base model"), ('{"base_model_name_or_path": "models/nlg"}', "cannot be loaded")],
)
def test_a_broken_folder_of_adapters(lora_run, monkeypatch, content, said):
    folder = lora_run.home / "models" / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(content)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"--policy models/broken.*{said}"):
        patch.chdir(lora_run.home)
        models.load_policy("models/broken", "--policy")


def test_generator_and_classifier_learn_through_adapters(chain, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(chain[0], home)
    before = load_file(home / "models" / "nlg" / "model.safetensors")
    flags = ["--model", "models/nlg", "--lora", RANK, "--epochs", 1, "--lr", 1e-2]
    run("train_nlg", *flags, "--samples", 4, "--out", "models/a", cwd=home)
    run("train_cls", *flags, "--lm-epochs", 1, "--out", "models/b", cwd=home)
    for name in "ab":
        after = load_file(home / "models" / name / "model.safetensors")
        same = {weight for weight in before if weight in after and torch.equal(before[weight], after[weight])}
        changed = before.keys() & after.keys() - same
        assert len(changed) == 8 and all(weight.endswith(LAYERS_OF_GPT2) for weight in changed)
        assert len(same) > 15
    metrics = json.loads((home / "data_results" / "a_metrics.json").read_text())
    old = json.loads((home / "data_results" / "nlg_metrics.json").read_text())
    assert metrics["results"]["valid_perplexity"] < old["results"]["valid_perplexity"]
    saved = load_file(home / "models" / "b" / "adapter" / "adapter_model.safetensors")
    head = load_file(home / "models" / "b" / "model.safetensors")["score.weight"]
    assert torch.equal(saved["base_model.model.score.weight"], head)


# settings


def test_learning_rates_are_ten_times_those_of_adam():
    with_lora = recipes.with_lora(recipes.PPO, 8)
    assert with_lora["optimizer"] == ("adam", "adam")
    assert with_lora["lr"] == (3.3e-3, 5e-4)  # Muon's 1e-3 is three times Adam's
    assert recipes.with_lora(recipes.GENERATOR, 8)["lr"][1] == 5e-4
    assert recipes.with_lora(recipes.PPO, None) is recipes.PPO


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("finetuning_nlg", ["--lora", 0], "'0' is not a whole number at least 1"),
        ("finetuning_nlg", ["--lora", 4, "--optimizer", "muon"], "leave out --optimizer muon"),
        ("finetuning_nlg", ["--lora", 4, "--separate-value"], "--lora with --separate-value"),
        (
            "finetuning_nlg",
            ["--lora", 4, "--out", "models/../models/nlg"],
            "give an --out other than --policy models/nlg",
        ),
        ("train_nlg", ["--lora", 4], "--model scratch has not; train it first"),
        ("train_cls", ["--lora", 4], "--model scratch has not; train it first"),
        ("train_nlg", ["--lora", 4, "--model", "m", "--out", "m"], "give an --out other than --model m"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(tmp_path, script, flags, said):
    assert said in refused(script, *flags, cwd=tmp_path)
