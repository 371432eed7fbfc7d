"""The policy that is written can lie between the reference and what PPO ends at."""

import copy
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from rlhf import lora, models
from rlhf.policy import PolicyWithValue
from tests.conftest import TINY_RUN, refused, run

QUARTER = 0.25
UNTIMED = ["score", "ethics", "kl", "policy_loss", "grad_norm"]


def moved(model):
    """A copy whose weights were changed at random."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    for weight in other.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return other


def test_every_weight_lies_on_the_line_to_the_references(tiny_model):
    policy = PolicyWithValue(moved(tiny_model))
    ended_at = copy.deepcopy(policy.model).state_dict()
    policy.interpolate(tiny_model, QUARTER)
    for name, weight in tiny_model.state_dict().items():
        torch.testing.assert_close(policy.model.state_dict()[name], 0.75 * weight + 0.25 * ended_at[name])


def test_the_whole_way_changes_nothing(tiny_model):
    policy = PolicyWithValue(moved(tiny_model))
    before = copy.deepcopy(policy.model)
    policy.interpolate(tiny_model, 1.0)
    assert all(map(torch.equal, before.parameters(), policy.model.parameters()))


def test_the_copy_that_computes_in_bfloat16_follows(tiny_model):
    policy = PolicyWithValue(moved(tiny_model), precision=torch.bfloat16)
    ids = torch.tensor([[3, 4, 5]])
    before = policy.in_precision()(ids).logits
    policy.interpolate(tiny_model, QUARTER)
    expected = PolicyWithValue(policy.model, precision=torch.bfloat16).in_precision()(ids).logits
    assert torch.equal(policy.in_precision()(ids).logits, expected) and not torch.equal(before, expected)


def test_of_adapters_the_product_that_is_added_to_the_base_is_scaled(tiny_model):
    policy = PolicyWithValue(lora.with_adapters(copy.deepcopy(tiny_model), 2, "base"))
    torch.manual_seed(0)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    whole = lora.merge(policy.model, copy.deepcopy(tiny_model)).state_dict()
    policy.interpolate(tiny_model, QUARTER)
    part = lora.merge(policy.model, copy.deepcopy(tiny_model)).state_dict()
    for name, weight in tiny_model.state_dict().items():
        torch.testing.assert_close(part[name], 0.75 * weight + 0.25 * whole[name], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(whole[name], part[name]) for name in whole)


@pytest.fixture(scope="module")
def runs(chain):
    """The chain's folder with runs of all weights and of adapters, to the end and a quarter of the way."""
    home, said = chain[0], {}
    for kind, flags in (("all", []), ("adapters", ["--lora", "2"])):
        for name, more in ((f"{kind}_whole", []), (f"{kind}_part", ["--interpolate", QUARTER])):
            where = ["--run", name, "--out", f"models/{name}"]
            said[name] = run("finetuning_nlg", *TINY_RUN, *flags, *more, *where, cwd=home).stdout
    return home, said


@pytest.mark.parametrize("kind", ["all", "adapters"])
def test_a_run_differs_in_the_written_policy_only(runs, kind):
    home, said = runs
    names = [f"{kind}_part", f"{kind}_whole"]
    is_said = ["is 0.25 of the way from the reference to PPO's policy" in said[name] for name in names]
    assert is_said == [True, False]
    part, whole, start = (load_file(home / f"models/{name}/model.safetensors") for name in (*names, "nlg"))
    for name, weight in start.items():
        torch.testing.assert_close(part[name], 0.75 * weight + 0.25 * whole[name])
    assert any(not torch.equal(whole[name], start[name]) for name in start)
    first, second = (pd.read_csv(home / f"data_results/{name}/log.csv") for name in names)
    pd.testing.assert_frame_equal(first[UNTIMED], second[UNTIMED])
    card = (home / f"models/{names[0]}/README.md").read_text(encoding="utf-8")
    assert "at 0.25 of the way in weights from the reference" in card
    record = json.loads((home / f"models/{names[0]}" / models.RECORD).read_text(encoding="utf-8"))
    assert record["settings"]["interpolate"] == QUARTER


def test_runs_are_interpolated_afterwards_as_the_flag_would_have(runs):
    home, _ = runs
    few = "--queries 4 --samples 8 --reference-samples 64"
    trained = ["--run", "data_results/all_whole", "--fractions", QUARTER, "--evaluation", few]
    run("experiments.interpolation", *trained, cwd=home)
    name = "all_whole_interpolate_0.25"
    afterwards, at_once = (
        load_file(home / f"models/{x}/model.safetensors") for x in (f"interpolation/{name}", "all_part")
    )
    assert afterwards.keys() == at_once.keys()
    assert all(torch.equal(afterwards[key], at_once[key]) for key in at_once)
    evaluation = json.loads((home / f"data_results/interpolation/{name}/evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["queries"] == 4


def test_a_policy_of_another_run_is_not_interpolated(runs):
    home, _ = runs
    shutil.copytree(home / "data_results/all_whole", home / "data_results/another")
    config = json.loads((home / "data_results/another/config.json").read_text(encoding="utf-8"))
    config["settings"] |= {"run": "another"}  # and the same --out
    (home / "data_results/another/config.json").write_text(json.dumps(config), encoding="utf-8")
    said = refused("experiments.interpolation", "--run", "data_results/another", cwd=home)
    assert "models/all_whole has the model of data_results/all_whole, which is not data_results/another" in said


@pytest.mark.parametrize(
    "name, said",
    [
        ("all_part", "not for a policy that is interpolated already"),
        ("adapters_whole", "or trained with --lora"),
        ("nowhere", "is no run folder"),
    ],
)
def test_runs_that_cannot_be_interpolated_afterwards(runs, name, said):
    assert said in refused("experiments.interpolation", "--run", f"data_results/{name}", cwd=runs[0])


@pytest.mark.parametrize("fraction", ["0", "1.1", "half"])
def test_a_fraction_that_cannot_be(chain, fraction):
    assert "--interpolate" in refused("finetuning_nlg", "--interpolate", fraction, cwd=chain[0])
