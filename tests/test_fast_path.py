"""GPT-2's body on real tokens only, against transformers' own forward pass."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

from rlhf import fast_path, forward, supervised
from rlhf.sampling import Sampling, sample

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 32}


def model_of(kind=GPT2LMHeadModel, **changes):
    torch.manual_seed(0)
    return kind(GPT2Config(**(SMALL | changes))).eval()


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(place) for place in row] for row in rows])


def test_states_and_gradients_are_those_of_transformers(monkeypatch):
    model, ids = model_of(), torch.randint(50, (4, 9))
    mask = mask_of("111111111", "001111111", "011111000", "000100000")  # five of query, four of response
    places = mask_of("000011110", "000011110", "000010000", "000000000").flatten().nonzero().squeeze(1)

    def found() -> list[torch.Tensor]:
        model.zero_grad()
        states = forward.hidden_states(model, ids, mask, places)
        states.pow(3).sum().backward()
        body = list(model.base_model.parameters())
        return [states, *(parameter.grad for parameter in body if parameter.grad is not None)]

    short = found()
    monkeypatch.setattr(fast_path, "is_supported", lambda body: False)
    plain = found()
    assert short[0].shape == (9, 32) and len(short) == len(plain) == 1 + 2 + 2 * 12 + 2
    for ours, theirs in zip(short, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_layer_but_the_last_sees_real_tokens_only_and_the_last_those_that_are_wanted():
    model, seen = model_of(GPT2Model, n_layer=3), []
    for block in model.h:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    mask = mask_of("0111", "1100")
    fast_path.hidden_states(model, torch.randint(50, (2, 4)), mask, forward.position_ids(mask), torch.tensor([2, 5]))
    assert seen == [5, 5, 2]


@pytest.mark.parametrize(
    "changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"add_cross_attention": True}]
)
def test_an_unusual_gpt2_goes_the_plain_way(changes):
    assert not fast_path.is_supported(model_of(GPT2Model, **changes))


def test_dropout_at_work_goes_the_plain_way():
    body = model_of(GPT2Model)
    assert fast_path.is_supported(body) and not fast_path.is_supported(body.train())
    without = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    assert fast_path.is_supported(model_of(GPT2Model, **without).train())
    for rate in (0.0, 0.1):
        config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=rate)
        assert fast_path.is_supported(LlamaModel(config).train()) == (rate == 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_says_what_transformers_says(side):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(GPT2Config(**SMALL, pad_token_id=49)).eval()
    rows = [[1, 2, 3, 4], [5, 6], [7]]
    ids, mask = supervised.pad(rows, 49, torch.device("cpu"))
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    encoded = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(forward.classifier_logits(model, encoded), model(**encoded).logits)


def test_a_classifier_whose_padding_is_its_end_of_text_reads_the_token_before_it():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(GPT2Config(**SMALL, pad_token_id=9)).eval()
    encoded = {"input_ids": torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9]]), "attention_mask": mask_of("1110", "1100")}
    torch.testing.assert_close(forward.classifier_logits(model, encoded), model(**encoded).logits)


def test_a_text_without_tokens_goes_the_plain_way():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(GPT2Config(**SMALL, pad_token_id=9)).eval()
    encoded = {"input_ids": torch.tensor([[1, 2], [9, 9]]), "attention_mask": mask_of("11", "00")}
    assert forward.classifier_logits(model, encoded).shape == (2, 2)


def test_a_sample_is_that_of_transformers(monkeypatch):
    model, queries = model_of(), torch.randint(1, 50, (6, 4))
    mask = mask_of("1111", "0111", "0011", "0001", "1111", "0111")

    def found():
        generator = torch.Generator().manual_seed(0)
        return sample(model, queries, mask, Sampling(12, 0.7, stop_id=0), generator)

    responses, states = found()
    monkeypatch.setattr(fast_path, "is_supported", lambda body: False)
    plain_responses, plain_states = found()
    assert torch.equal(responses, plain_responses)
    torch.testing.assert_close(states, plain_states, rtol=1e-5, atol=1e-5)
