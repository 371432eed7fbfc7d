"""Supervised training: perplexity, batches, the learning rate, the best epoch, and going on from a checkpoint."""

import copy
import itertools
import math
import signal

import numpy as np
import pytest
import torch
from torch import nn, tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
)

from rlhf import checkpoint, models, supervised
from rlhf.errors import Stopped, UserError
from tests import tiny

CPU = torch.device("cpu")


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    tokenizer = models.scratch_tokenizer(["a b c d"] * 2)
    config = models.scratch_config(tokenizer)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    rows = supervised.encode(tokenizer, ["a b c", "a b c d d d"], 128)
    metrics = supervised.perplexity(model, rows, tokenizer.pad_token_id, torch.device("cpu"))
    assert metrics["perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)
    assert metrics["loss"] == pytest.approx(np.log(len(tokenizer)), rel=1e-4)


def test_an_encoded_text_ends_once_unless_it_is_cut():
    tokenizer = models.scratch_tokenizer(["a b c d"] * 2)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = None  # as GPT-2's, it adds no end
    without, with_end = (supervised.encode(tokenizer, ["a b c"], 4, end_of_text=flag) for flag in (False, True))
    assert with_end == [[*without[0], end]] and len(without[0]) == 3
    assert supervised.encode(tokenizer, ["a b<|endoftext|>"], 4, end_of_text=True)[0].count(end) == 1
    assert supervised.encode(tokenizer, ["a b c"], 2, end_of_text=True) == [without[0][:2]]


# losses


def assert_same_training(config, kind, ours, theirs):
    """Two losses of a model in training mode, and all their gradients, are the same."""
    found = []
    for loss_of in (ours, theirs):
        torch.manual_seed(0)
        model = kind.from_config(copy.deepcopy(config)).train()
        loss = loss_of(model)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    assert found[0][1].abs().sum() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


IDS, MASK = tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]), tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("config", tiny.ARCHITECTURES, ids=lambda config: config.model_type)
def test_a_model_learns_texts_as_with_transformers_own_loss(config):
    def ours(model):
        losses, counts = supervised.lm_loss(model, IDS, MASK)
        assert counts.tolist() == [4, 1]
        return losses.sum() / counts.sum()

    def theirs(model):
        return model(input_ids=IDS, attention_mask=MASK, labels=IDS.where(MASK.bool(), -100)).loss

    config = copy.deepcopy(config)
    config.update(WITHOUT_DROPOUT)
    assert_same_training(config, AutoModelForCausalLM, ours, theirs)


@pytest.mark.parametrize("config", tiny.ARCHITECTURES, ids=lambda config: config.model_type)
def test_a_classifier_learns_labels_as_with_transformers_own_loss(config):
    labels = tensor([1, 0])

    def ours(model):
        return supervised.choice_loss(model, [[[1, 2, 3, 4, 5]], [[6, 7]]], labels, pad_id=0)[0].mean()

    def theirs(model):
        return model(input_ids=IDS, attention_mask=MASK, labels=labels).loss

    config = copy.deepcopy(config)
    config.update(WITHOUT_DROPOUT | {"pad_token_id": 0, "num_labels": 2})
    assert_same_training(config, AutoModelForSequenceClassification, ours, theirs)


def test_a_text_of_one_token_has_nothing_to_learn(tiny_model):
    losses, counts = supervised.lm_loss(tiny_model, *supervised.pad([[1], [2]], 0, CPU))
    losses.sum().backward()
    assert losses.tolist() == [0, 0] and counts.tolist() == [0, 0]


# batches


def a_pass(lengths, losses, revisit, rng=None):
    """The batches of one pass, of 32 rows at most."""
    return supervised.one_pass(lengths, losses, 32, revisit, rng or np.random.default_rng(0))


def test_every_row_is_in_one_batch_of_a_pass():
    lengths = np.random.default_rng(0).integers(1, 40, 1003)
    batches = a_pass(lengths, np.full(1003, np.inf), revisit=1.0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert max(map(len, batches)) <= 32


def test_learned_rows_are_revisited_now_and_then():
    lengths, losses = np.full(1000, 5), np.where(np.arange(1000) < 900, 0.01, 1.0)
    rng = np.random.default_rng(0)
    batches = [batch for _ in range(60) for batch in a_pass(lengths, losses, 0.2, rng)]
    visits = np.bincount(np.concatenate(batches), minlength=1000)
    assert (visits[900:] == 60).all()  # these in every pass
    assert visits[:900].mean() / 60 == pytest.approx(0.2, rel=0.05)


def test_when_all_rows_are_learned_a_pass_takes_all():
    rows = np.concatenate(a_pass(np.full(64, 5), np.zeros(64), revisit=0.0))
    assert sorted(rows) == list(range(64))


def test_batches_go_on_from_their_state(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 40, 100).tolist()
    batches, resumed = (supervised.Batches(lengths, 8, revisit=0.0, seed=seed) for seed in (0, 1))
    for _ in range(20):  # into the second pass, which the losses of the first one shorten
        batch = batches.take()
        batches.record(batch, [0.01 if row % 3 else 1.0 for row in batch])
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = [batches.take() for _ in range(20)]
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.take() for _ in range(20)] == expected
    assert all(row % 3 == 0 for batch in expected for row in batch)


# the loop


def test_the_learning_rate_rises_over_a_twentieth_of_the_steps_and_falls_at_the_end():
    assert [supervised.lr_factor(step, 100, 1.0) for step in (0, 4, 50, 99)] == pytest.approx([1 / 6, 5 / 6, 0.5, 0.01])
    assert [supervised.lr_factor(step, 100, 0.3) for step in (0, 5, 70, 85)] == pytest.approx([1 / 6, 1.0, 1.0, 0.5])


@pytest.mark.parametrize(("select_by", "best"), [("loss", 2), ("error", 1)])
def test_the_weights_of_the_best_epoch_remain(select_by, best):
    layer, weights = nn.Linear(2, 1), []
    metrics = [{"loss": 3.0, "error": 0.2}, {"loss": 2.0, "error": 0.1}, {"loss": 1.0, "error": 0.1}]

    def loss_of(batch):
        return layer(torch.ones(len(batch), 2)).squeeze(1), torch.ones(len(batch))

    def validate():
        weights.append(copy.deepcopy(layer.state_dict()))
        return metrics[len(weights) - 1]

    settings = supervised.FitSettings(epochs=3, batch_size=2, lr=0.1, muon=False, seed=0, select_by=select_by)
    history = supervised.fit(layer, [1] * 5, loss_of, validate, settings, stage="test", device=CPU)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [{name: row[name] for name in ("loss", "error")} for row in history] == metrics
    torch.testing.assert_close(layer.state_dict(), weights[best], rtol=0, atol=0)
    assert not torch.equal(weights[0]["weight"], weights[1]["weight"])


@pytest.mark.parametrize("stopped_at", [3, 4, 9])
def test_a_fit_that_was_stopped_ends_as_one_that_was_not(tiny_model, tmp_path, stopped_at):
    """Dropout and the order of the rows are random; the second of three steps per epoch is skipped at first."""
    rows, flags = [[1 + i % 7, 2 + i % 5, *range(i % 4)] for i in range(11)], {"save_every": 100}
    settings = supervised.FitSettings(epochs=4, batch_size=4, lr=1e-2, muon=True, seed=0, revisit=0.5)

    def fit(first_step=1, stop_at=None, saved=None):
        model, signals, steps = copy.deepcopy(tiny_model), [], itertools.count(first_step)

        def loss_of(batch):
            step = next(steps)
            if step == stop_at:
                signals.append(signal.SIGTERM)
            losses, counts = supervised.lm_loss(model, *supervised.pad([rows[i] for i in batch], 0, CPU))
            return losses * (np.nan if step == 2 else 1.0), counts

        def validate():
            return supervised.perplexity(model, rows, 0, CPU)

        torch.manual_seed(first_step)
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoint", flags, saved, signals)
        lengths = [len(row) for row in rows]
        history = supervised.fit(
            model, lengths, loss_of, validate, settings, stage="texts", device=CPU, checkpoints=checkpoints
        )
        return model.state_dict(), history

    weights, history = fit()
    with pytest.raises(Stopped, match=f"stopped after step {stopped_at}"):
        fit(stop_at=stopped_at)
    saved = checkpoint.load(tmp_path / "checkpoint", flags)
    resumed_weights, resumed_history = fit(stopped_at + 1, saved=saved)
    assert resumed_history == history and len(history) == 4
    torch.testing.assert_close(resumed_weights, weights, rtol=0, atol=0)


def test_an_encoder_reads_ahead_and_a_language_model_does_not(tiny_model):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=8, **small)).eval()
    assert supervised.reads_ahead(encoder) and not supervised.reads_ahead(tiny_model.base_model)


def fit_line(validate):
    """Two epochs of one step each."""
    layer = nn.Linear(1, 1)
    settings = supervised.FitSettings(epochs=2, batch_size=1, lr=1e-3, muon=False, seed=0)

    def loss_of(batch):
        return layer(torch.ones(len(batch), 1)).squeeze(1) ** 2, torch.ones(len(batch))

    return supervised.fit(layer, [1], loss_of, validate, settings, stage="test", device=CPU)


def test_a_fit_whose_validation_loss_is_never_finite_has_no_result():
    losses = iter([math.nan, math.inf])
    with pytest.raises(UserError, match="test: the loss on validation texts is not finite after any epoch; lower --lr"):
        fit_line(validate=lambda: {"loss": next(losses)})


def test_an_epoch_that_is_not_finite_is_never_the_best():
    losses = iter([math.nan, 2.0])
    assert [row["loss"] for row in fit_line(validate=lambda: {"loss": next(losses)})][1] == 2.0


def test_texts_of_one_token_have_no_perplexity(tiny_model):
    with pytest.raises(UserError, match="texts of two tokens and more"):
        supervised.perplexity(tiny_model, [[1], [2]], 0, torch.device("cpu"))


def test_an_empty_text_has_a_token():
    tokenizer = models.scratch_tokenizer(["a b c d"] * 2)
    assert models.with_a_token(tokenizer, ["a", ""]) == ["a", ""]  # this one closes every text
    tokenizer.backend_tokenizer.post_processor = None  # as GPT-2's, it adds nothing
    assert models.with_a_token(tokenizer, ["a", ""]) == ["a", "<|endoftext|>"]
