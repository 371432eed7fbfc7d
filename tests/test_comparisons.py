"""Learning from comparisons: the loss, the metrics, the columns, and a preference model that learns a word."""

import json

import numpy as np
import pytest
import torch

import train_cls
from rlhf import choice_data, data, rewards, supervised
from rlhf.errors import UserError
from tests.conftest import refused, run, write_csv

COLUMNS_OF_TWO = ["sample0", "sample1", "best"]


def test_the_loss_of_a_comparison_is_the_papers():
    """[1], equation 1: -log of the softmax of the best's score."""
    scores, best = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), np.array([1, 2])
    expected = [-np.log(np.e**2 / (np.e + np.e**2 + 1)), np.log(3)]
    assert supervised.choice_log_loss(scores, best) == pytest.approx(expected)

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            score = (input_ids * attention_mask).sum(1, keepdim=True).float()
            return type("Out", (), {"logits": score})

    losses, counts = supervised.choice_loss(Model(), [[[1], [2, 0], [0]], [[0], [0, 0], [0]]], torch.tensor(best), 0)
    assert losses.tolist() == pytest.approx(expected)
    assert counts.tolist() == [1, 1]


def test_label_smoothing_leaves_a_loss_of_zero_where_a_label_is_learned():
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Out", (), {"logits": torch.tensor([[0.0, np.log(0.95 / 0.05)], [0.0, 9.0]])})

    losses, _ = supervised.choice_loss(Model(), [[[1]], [[1]]], torch.tensor([1, 1]), 0, label_smoothing=0.1)
    assert losses[0].item() == pytest.approx(0.0, abs=1e-6)
    assert losses[1].item() > 0.1  # surer than its label


def test_metrics_of_comparisons_by_hand():
    """Two of three rows are right, five of the six pairs; a pair that differs by log 3 should go so in 3 of 4."""
    scores, best = np.array([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.5]]), np.array([0, 1, 2])
    metrics = train_cls.measure_comparisons(scores, best)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["pairwise_accuracy"] == pytest.approx(5 / 6)
    scores = np.tile([np.log(3), 0.0], (4, 1))
    assert train_cls.measure_comparisons(scores, np.array([0, 0, 0, 1]))["calibration_error"] == pytest.approx(0)
    assert train_cls.measure_comparisons(scores, np.array([0, 0, 0, 0]))["calibration_error"] == pytest.approx(0.25)


def test_columns_of_comparisons(tmp_path):
    def read(name, text):
        (tmp_path / name).write_text(text)
        return choice_data.comparisons(data.load_file(tmp_path / name))

    assert read("a.csv", "chosen,rejected\ngood,bad\n").candidates == [["good", "bad"]]
    assert read("b.csv", "prompt,chosen,rejected\nI am, good, bad\n").candidates == [["I am good", "I am bad"]]
    comparisons = read("c.csv", "query,sample0,sample1,sample2,best\nI,a,b,c,2\n")
    assert (comparisons.candidates, comparisons.chosen.tolist()) == ([["Ia", "Ib", "Ic"]], [2])
    empty = '{"query": "I", "sample0": "", "sample1": " do", "best": 0}\n'  # a policy may end at once
    assert read("f.jsonl", empty).candidates == [["I", "I do"]]
    with pytest.raises(UserError, match="row 1 lacks a candidate"):
        read("g.jsonl", empty.replace('"I"', '""'))
    assert read("d.csv", "text,label\na,1\n") is None
    with pytest.raises(UserError, match="row 1: best must be a number from 0 to 1, the place of a sample"):
        read("e.csv", "query,sample0,sample1,best\nI,a,b,2\n")
    with pytest.raises(UserError, match="row 2 lacks a candidate"):
        read("f.csv", "chosen,rejected\na,b\nc,\n")


def test_a_model_learns_preferences(tmp_path):
    """A word that is always chosen scores higher, and all texts score 0 on average with deviation 1."""
    rows = [{"chosen": f"the dog ran {i}", "rejected": f"the dog sat {i}"} for i in range(120)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--epochs", 3, "--lm-epochs", 0, "--lr", "3e-3", "--out", "models/pref"]
    run("train_cls", "--data", path, *flags, cwd=tmp_path)
    record = json.loads((tmp_path / "data_results" / "pref_metrics.json").read_text())
    metrics, best = record["results"]["valid"], min(record["history"], key=lambda epoch: epoch["error"])
    assert metrics["log_loss"] == pytest.approx(best["loss"], rel=1e-3)  # of the scores as they were trained
    assert metrics["pairwise_accuracy"] == metrics["accuracy"] == 1.0
    model, tokenizer = rewards.load_model(str(tmp_path / "models" / "pref"))
    texts = [row[name] for row in rows for name in row]
    scores = rewards.log_odds(model, tokenizer, texts, torch.device("cpu"))
    assert abs(scores.mean()) < 0.1 and scores.std() == pytest.approx(1, abs=0.1)


def test_splits_of_two_kinds_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("chosen,rejected\na,b\nc,d\n")
    (tmp_path / "test.csv").write_text("text,label\na,1\nb,0\n")
    assert "the splits are not of one kind" in refused("train_cls", "--data", tmp_path)


@pytest.mark.parametrize("flag", ["--text-column", "--positive-label"])
def test_flags_of_labelled_texts_are_refused(tmp_path, flag):
    path = write_csv(tmp_path / "pairs.csv", [("a", "b", "c")] * 20, ["prompt", "chosen", "rejected"])
    said = refused("train_cls", "--data", path, flag, "x", cwd=tmp_path)
    assert f"{flag} is for labelled texts, and these are comparisons" in said


def test_the_row_without_a_best_is_named(tmp_path):
    """An empty cell makes floats of a csv's column."""
    path = write_csv(tmp_path / "rows.csv", [("a", "b", 0), ("c", "d", 1), ("e", "f", "")], COLUMNS_OF_TWO)
    with pytest.raises(UserError, match="train, row 3: best must be a number from 0 to 1"):
        choice_data.comparisons(data.load_file(path))
    path = write_csv(tmp_path / "whole.csv", [("a", "b", "0.0"), ("c", "d", "1.0")], COLUMNS_OF_TWO)
    assert choice_data.comparisons(data.load_file(path)).chosen.tolist() == [0, 1]
