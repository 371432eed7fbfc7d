"""The estimate of a run's memory: numbers that can be counted by hand, what flags change, and the flag itself."""

import dataclasses
import re

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, ViTConfig

from rlhf import memory, models
from tests.conftest import refused, run

H, LAYERS, V, POSITIONS = 64, 3, 500, 32
CONFIG = GPT2Config(n_layer=LAYERS, n_embd=H, n_head=4, vocab_size=V, n_positions=POSITIONS)
BODY = LAYERS * (12 * H * H + 13 * H) + 2 * H + POSITIONS * H  # matrices with biases, norms, the last norm, positions
WEIGHTS, VALUE_HEAD = BODY + V * H, H + 1
SETTINGS = memory.Settings(
    device="cpu",
    precision="float32",
    batch_size=64,
    minibatches=2,
    forward_batch=16,
    query_length=8,
    response_length=16,
    optimizer="adam",
    lora=None,
    activation_checkpointing=False,
    separate_value=False,
)


def estimated(config=CONFIG, rewards=(), **changes):
    return memory.estimate(config, rewards, dataclasses.replace(SETTINGS, **changes))


def test_weights_gradients_and_adams_moments_of_policy_and_reference():
    found = estimated()
    assert found.weights == 4 * (2 * WEIGHTS + VALUE_HEAD)
    assert (found.gradients, found.optimizer) == (4 * (WEIGHTS + VALUE_HEAD), 8 * (WEIGHTS + VALUE_HEAD))
    assert found.peak > found.weights + found.optimizer + found.activations


def test_muon_keeps_one_number_of_a_matrix():
    assert estimated(optimizer="muon").optimizer == 8 * (WEIGHTS + VALUE_HEAD) - 4 * LAYERS * 12 * H * H


def test_adapters_share_the_base():
    rank, found = 4, estimated(lora=4)
    adapters = LAYERS * rank * ((H + 3 * H) + (H + H) + (H + 4 * H) + (4 * H + H))
    assert found.weights == 4 * (WEIGHTS + adapters + VALUE_HEAD)
    assert found.gradients == 4 * (adapters + VALUE_HEAD) and found.optimizer == 2 * found.gradients
    assert found.peak < estimated().peak


def test_in_bfloat16_the_matrices_of_the_reference_and_of_the_policys_copy_take_half():
    matrices = LAYERS * (12 * H * H + 9 * H)  # biases of linear layers too
    others = WEIGHTS - matrices
    found = estimated(precision="bfloat16")
    assert found.weights == 4 * (WEIGHTS + VALUE_HEAD) + 2 * matrices + (4 * others + 2 * matrices)


def test_on_cuda_the_output_layers_are_in_bfloat16_too():
    on_cpu, layer = estimated(precision="bfloat16").weights, 2 * V * H
    assert estimated(device="cuda").weights == estimated().weights  # in float32
    for precision in ("bfloat16", *(["auto"] if not torch.cuda.is_available() else [])):
        assert estimated(device="cuda", precision=precision).weights == on_cpu + 2 * layer  # the reference, the copy
    adapted = estimated(precision="bfloat16", lora=4).weights
    assert estimated(device="cuda", precision="bfloat16", lora=4).weights == adapted + layer
    untied = GPT2Config(**CONFIG.to_dict() | {"tie_word_embeddings": False})
    on_both = [estimated(untied, device=device, precision="bfloat16").weights for device in ("cpu", "cuda")]
    assert on_both[0] == on_both[1]  # half of the reference's own, and as much for the copy


def test_a_model_is_loaded_in_float32_whatever_it_was_saved_in():
    assert estimated(GPT2Config(**CONFIG.to_dict() | {"dtype": "bfloat16"})) == estimated()


def test_a_value_network_and_reward_models_count():
    found = estimated(separate_value=True)
    assert found.weights == 4 * (3 * WEIGHTS + VALUE_HEAD)
    assert found.activations > 1.5 * estimated().activations
    assert estimated(rewards=[CONFIG]).weights == estimated().weights + 4 * (WEIGHTS + 2 * H)  # a head of two classes


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LlamaConfig(num_hidden_layers=3, hidden_size=H, intermediate_size=128, num_attention_heads=4, vocab_size=V),
        GPTNeoXConfig(num_hidden_layers=3, hidden_size=H, intermediate_size=128, num_attention_heads=4, vocab_size=V),
    ],
    ids=lambda config: config.model_type,
)
def test_activations_grow_with_the_forward_batch_and_shrink_with_checkpointing(config):
    one, two = (estimated(config, forward_batch=rows).activations for rows in (8, 16))
    of_weights = 4 * LAYERS * 3 * H * H if config.model_type == "llama" else 0  # those that are multiplied together
    assert two - of_weights == pytest.approx(2 * (one - of_weights), rel=0.02)
    vocabulary = 2 * 4 * 16 * 16 * V
    checkpointed = estimated(config, activation_checkpointing=True).activations
    assert 0 < checkpointed - vocabulary < 0.5 * (two - vocabulary)


def test_of_a_rollout_the_cache_and_the_states_count():
    tokens, rows = 2 + 22, 64
    cache, states, logits = 2 * LAYERS * rows * tokens * H * 4, rows * 22 * H * 4, 3 * rows * V * 4
    assert estimated(query_length=2, response_length=22).rollout == cache + states + logits


def test_long_queries_go_through_the_model_at_once():
    rows, query, response = 64, 24, 2
    cache, in_a_layer = 2 * LAYERS * rows * query * H * 4, rows * query * 4 * H * 4  # of an MLP's inner width
    found = estimated(query_length=query, response_length=response).rollout
    assert cache + 2 * in_a_layer < found < 2 * (cache + 4 * in_a_layer)


def test_nothing_is_allocated(monkeypatch):
    """A model of 300 billion weights."""
    huge = LlamaConfig(
        num_hidden_layers=2, hidden_size=100_000, intermediate_size=400_000, num_attention_heads=8, vocab_size=32_000
    )
    assert estimated(huge).weights > 2 * 4 * 2 * 12 * 100_000**2


# the flag


def test_the_flag_prints_a_table_and_loads_nothing(chain, monkeypatch):
    monkeypatch.setattr(models, "load_pretrained", lambda *args, **options: pytest.fail("weights were loaded"))
    said = run("finetuning_nlg", "--estimate-memory", cwd=chain[0]).stdout
    rows = re.findall(r"^(\w+) +(\d+\.\d\d) GiB$", said, re.MULTILINE)
    assert tuple(name for name, _ in rows) == memory.LABELS
    assert float(dict(rows)["peak"]) > 0.1
    scratch = run("finetuning_nlg", "--estimate-memory", "--policy", "scratch:llama:4x256", cwd=chain[0]).stdout
    assert scratch.startswith("weights") and scratch != said


def test_a_model_that_has_no_configuration_is_refused(chain):
    ViTConfig().save_pretrained(chain[0] / "models" / "vit")
    said = refused("finetuning_nlg", "--estimate-memory", "--policy", "models/vit", cwd=chain[0])
    assert "--policy models/vit and --reward ['models/cls'] cannot be estimated" in said
    said = refused("finetuning_nlg", "--estimate-memory", "--policy", "models/none", cwd=chain[0])
    assert "--policy models/none has no configuration" in said


def test_the_scratch_tokenizers_size_is_known():
    assert models.load_config("scratch", "--policy").vocab_size == models.VOCABULARY == 4096
    assert torch.device("cpu") == SETTINGS.on
