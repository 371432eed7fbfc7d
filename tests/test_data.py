"""Texts, labels, queries and scores: what they are made of and what they mean."""

import json
import random

import datasets
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import train_cls
from rlhf import choice_data, data, models, plots, querying, rewards
from rlhf.errors import UserError
from tests.conftest import ROOT, write_csv


def test_an_opening_is_the_first_sentence_or_half_of_a_single_one():
    assert querying.opening("I found a purse. I kept it.") == "I found a purse."
    assert querying.opening("Who was it? Nobody knew. So it went.") == "Who was it?"
    assert querying.opening("one two three four five") == "one two three"


def test_no_query_is_on_both_sides_and_the_order_of_texts_does_not_matter():
    texts = [f"Person {i} came in. Then {j} left." for i in range(500) for j in range(2)]
    tokenizer = models.scratch_tokenizer(texts)
    training, held_out = querying.split_queries(texts, tokenizer, 3)  # "Person" and perhaps " 7", " came"
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 1000
    assert all(text.startswith(("Person", "Person ")) for text in training + held_out)
    assert sorted(querying.split_queries(texts[::-1], tokenizer, 3)[1]) == sorted(held_out)


def test_queries_have_from_half_the_length_to_the_length_in_tokens():
    texts = [f"{letter} two three four five six seven. And {i}." for i in range(9) for letter in "abcdefghijklmnop"]
    tokenizer = models.scratch_tokenizer(texts)
    queries = [query for side in querying.split_queries(texts, tokenizer, 4) for query in side]
    assert {len(query.split()) for query in queries} == {2, 3, 4}


def test_a_query_does_not_end_inside_a_character():
    tokenizer = models.scratch_tokenizer(["a b c"] * 8)  # which writes other characters byte by byte
    ids = tokenizer("a €", add_special_tokens=False)["input_ids"]
    texts = [querying.whole_text(tokenizer, ids[:count]) for count in range(1, len(ids) + 1)]
    assert texts[0] == "a" and texts[-1] == "a €"
    assert not any("\ufffd" in text for text in texts)


def test_a_query_is_the_beginning_of_what_is_seen():
    """Texts are seen without special tokens, so a query has none, and what follows it is the response."""
    tokenizer = models.scratch_tokenizer(["a b c"] * 8)
    ids = tokenizer("a<|endoftext|> b", add_special_tokens=False)["input_ids"]
    assert querying.whole_text(tokenizer, ids) == "a b"
    assert querying.whole_text(tokenizer, ids[1:2]) == "<|endoftext|>"  # nothing else is there to ask


def test_a_query_begins_as_texts_do():
    """Llama's tokenizer opens a text with a token of its own; a chat template may have written it already."""
    tokenizer = models.scratch_tokenizer(["a b c d"] * 8)
    plain, _ = querying.encode_queries(tokenizer, ["a b"], torch.device("cpu"))
    assert querying.shortest_row(tokenizer, 6) == 3
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    for query in ("a b", "<bos>a b"):
        ids, mask = querying.encode_queries(tokenizer, [query], torch.device("cpu"))
        assert ids.tolist() == [[tokenizer.bos_token_id, *plain[0].tolist()]] and mask.all()
    assert querying.shortest_row(tokenizer, 6) == 4


def test_a_query_stream_is_all_queries_in_one_random_order_after_the_other():
    queries, rng = [f"query {i}" for i in range(10)], random.Random(3)
    expected = rng.sample(queries, 10) + rng.sample(queries, 10) + rng.sample(queries, 10)
    stream = querying.QueryStream(queries, seed=3)
    taken = [query for count in (4, 4, 4, 0, 12, 6) for query in stream.take(count)]
    assert taken == expected
    assert querying.QueryStream(queries, seed=3).take(30) == expected  # more than all of them at once


def test_a_query_stream_goes_on_from_its_state(tmp_path):
    queries = [f"query {i}" for i in range(10)]
    stream, resumed = querying.QueryStream(queries, seed=0), querying.QueryStream(queries, seed=1)
    stream.take(13)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = stream.take(40)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.take(40) == expected


def test_queries_are_padded_on_the_left():
    tokenizer = models.scratch_tokenizer(["a b c d e", "a b"] * 2)
    ids, mask = querying.encode_queries(tokenizer, ["a b c", "a b"], torch.device("cpu"))
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert tokenizer.decode(ids[0]) == "a b c"
    assert ids[1, 0] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_text_ends_with_its_stop_token():
    """Behind a stop token that people read, such as a full stop, the sampler's filling must not show."""
    tokenizer = models.scratch_tokenizer(["he left . so ."] * 2)
    query_ids, query_mask = querying.encode_queries(tokenizer, ["he", "so he"], torch.device("cpu"))
    left, stop = tokenizer.encode(" left", add_special_tokens=False), models.stop_token(tokenizer, " .")
    response_ids = torch.tensor([[*left, stop, stop, stop], [*left, *left, *left, stop]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ids, mask = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, mask], 1)
    texts = models.decode(tokenizer, ids, mask)
    assert texts == ["he left .", "so he left left left ."]


def test_a_tokenizer_gives_any_text_back_and_ends_whole_ones():
    tokenizer = models.scratch_tokenizer(["plain words only"] * 2)
    ids = tokenizer("Zoë's 7 €")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Zoë's 7 €"


@pytest.mark.parametrize(
    ("labels", "logits", "expected"),
    [
        ({0: "negative", 1: "positive"}, [1.0, 3.0], 2.0),
        ({0: "POSITIVE", 1: "NEGATIVE"}, [1.0, 3.0], -2.0),
        ({0: "LABEL_0", 1: "LABEL_1"}, [1.0, 3.0], 2.0),  # no name says positive: the last
        ({0: "a", 1: "b", 2: "positive"}, [0.0, 0.0, 1.0], 1.0 - np.log(2)),  # against all others together
        ({0: "score"}, [0.25], 0.25),
    ],
)
def test_log_odds(labels, logits, expected):
    tokenizer = models.scratch_tokenizer(["a b c"] * 2)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=1, n_embd=4, n_positions=8, pad_token_id=tokenizer.pad_token_id
    )
    config.update({"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "num_labels": len(labels)})
    model = GPT2ForSequenceClassification(config).eval()
    model.score.register_forward_hook(lambda module, args, out: torch.tensor(logits).expand_as(out))
    scores = rewards.log_odds(model, tokenizer, ["a", "a b c"], torch.device("cpu"))
    assert scores == pytest.approx([expected] * 2)


def test_a_score_does_not_depend_on_the_other_texts_of_its_batch():
    tokenizer = models.scratch_tokenizer(["a b c d e f g"] * 2)
    torch.manual_seed(0)
    config = models.scratch_config(tokenizer)
    config.update({"num_labels": 2})
    model = GPT2ForSequenceClassification(config).eval()
    together = rewards.log_odds(model, tokenizer, ["a b c d e f g", "a", "c b"], torch.device("cpu"))
    alone = [
        rewards.log_odds(model, tokenizer, [text], torch.device("cpu"))[0] for text in ("a b c d e f g", "a", "c b")
    ]
    assert together == pytest.approx(alone, abs=1e-5)


def test_measures_of_a_classifier_by_hand():
    # probabilities 0.9, 0.9, 0.6, 0.2 for labels 1, 0, 1, 0
    probability, labels = np.array([0.9, 0.9, 0.6, 0.2]), np.array([1.0, 0.0, 1.0, 0.0])
    results = train_cls.measure(np.log(probability / (1 - probability)), labels)
    assert results["accuracy"] == 0.75
    assert results["f1"] == pytest.approx(0.8)  # precision 2/3, recall 1
    assert results["roc_auc"] == pytest.approx(0.625)  # of 4 pairs two are won, one is tied, one lost
    assert results["brier"] == pytest.approx((0.01 + 0.81 + 0.16 + 0.04) / 4)
    assert results["calibration_error"] == pytest.approx(0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.2)


# labels and comparisons


def test_labels_are_choices_of_one_candidate(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [("one", 1), ("two", 0), ("three", "1.0")])
    choices = choice_data.labelled(data.load_file(path), None, "label", None)
    assert choices.candidates == [["one"], ["two"], ["three"]] and choices.texts == ["one", "two", "three"]
    assert choices.chosen.tolist() == [1, 0, 1]
    assert choices.select(np.array([2, 1])).chosen.tolist() == [1, 0]


def test_fewer_rows_to_train_on():
    whole, few = (choice_data.load_choices(str(ROOT / "data_cls"), train_rows=rows) for rows in (None, 100))
    assert list(whole) == list(few) == ["train", "valid", "hard", "test"]
    label_of = dict(zip(whole["train"].texts, whole["train"].chosen, strict=True))
    assert len(few["train"].candidates) == 100
    assert [label_of[text] for text in few["train"].texts] == few["train"].chosen.tolist()
    for name in ("valid", "test"):
        assert few[name].candidates == whole[name].candidates


def test_the_validation_split_of_the_data_is_used(tmp_path):
    for name, texts in (("train", "abcd"), ("dev", "ef"), ("test", "gh")):
        write_csv(tmp_path / f"{name}.csv", [(text, i % 2) for i, text in enumerate(texts)])
    splits = choice_data.load_choices(str(tmp_path))
    assert {name: split.texts for name, split in splits.items()} == {
        "train": list("abcd"), "valid": list("ef"), "test": list("gh")
    }  # fmt: skip


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.csv", "dev.csv", "valid.txt"):
        (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(UserError, match=r"dev\.csv and valid\.txt are the same split; remove one"):
        data.load_splits(str(tmp_path))


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_of(tmp_path, **rows_of):
    """A folder with a .csv file of texts and labels for every split."""
    for name, rows in rows_of.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    return str(tmp_path)


PAIR = [("good", 1), ("bad", 0)]


def warnings_in(capsys):
    """The warnings on stderr, between the library's progress bars."""
    return sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))


def test_only_train_must_have_both_labels(tmp_path):
    splits = choice_data.load_choices(folder_of(tmp_path, train=PAIR, valid=PAIR, test=[("one", 0), ("two", 0)]))
    assert splits["test"].chosen.tolist() == [0, 0]
    (tmp_path / "words").mkdir()
    words = folder_of(tmp_path / "words", train=[("a", "yes"), ("b", "no")], valid=[("c", "yes")])
    assert choice_data.load_choices(words, positive_label="yes")["valid"].chosen.tolist() == [1]


def test_a_split_without_trains_labels_is_left_out(tmp_path, capsys):
    """As the unsupervised split of IMDB and the test splits of GLUE, in which all labels are -1."""
    unlabelled = {"unsupervised": [("one", -1), ("", -1)], "other": [("one", ""), ("two", "")]}
    splits = choice_data.load_choices(folder_of(tmp_path, train=PAIR, valid=PAIR, test=PAIR, **unlabelled))
    assert list(splits) == ["train", "valid", "test"]
    assert warnings_in(capsys) == [
        "warning: other is left out: it has no labels, and train 0, 1",
        "warning: unsupervised is left out: it has the labels -1, and train 0, 1",
    ]


def test_a_split_without_the_label_column_is_left_out(tmp_path, capsys):
    folder = folder_of(tmp_path, train=PAIR * 10)
    (tmp_path / "valid.csv").write_text("text\na\nb\n")
    splits = choice_data.load_choices(folder)
    assert {name: len(split.candidates) for name, split in splits.items()} == {"train": 18, "valid": 2}  # of train's 20
    assert warnings_in(capsys) == ["warning: valid is left out: it has no labels, and train 0, 1"]


@pytest.mark.parametrize(
    ("test_rows", "message"),
    [
        ([("a", 1), ("b", 2)], r"test, row 2: label '2' is none of train's, 0, 1; correct it, or take it out"),
        ([("a", 1), ("b", "")], r"test, row 2 has no label; give it one, or take it out"),
    ],
)
def test_a_wrong_label_is_found_by_split_and_row(tmp_path, test_rows, message):
    with pytest.raises(UserError, match=message):
        choice_data.load_choices(folder_of(tmp_path, train=PAIR, valid=PAIR, test=test_rows))


def test_a_message_lists_a_few_labels():
    """Not all of a column of ratings, given by mistake."""
    rows = datasets.Dataset.from_dict({"text": list("abcdefg"), "label": [0, 1, 2, 3, 4, 5, 6]})
    with pytest.raises(UserError, match=r"train has 0, 1, 2, 3, 4, \.\.\.$"):
        choice_data.labelled(rows, None, "label", "1")


MESSAGES = [{"role": "user", "content": "Is it late?"}]


def test_a_cell_that_is_no_text_is_refused(tmp_path):
    """Python's notation of a list would be learned as if it were a text."""
    write_rows(tmp_path / "train.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 0})
    write_rows(tmp_path / "test.jsonl", {"text": MESSAGES, "label": 1})
    refusal = "test, row 1: text holds a list, not a text; write what it says as one text"
    for load in (data.load_texts, choice_data.load_choices):
        with pytest.raises(UserError, match=refusal):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "valid, row 1: chosen holds a list"),
        ({"prompt": MESSAGES, "chosen": "a", "rejected": "b"}, "valid, row 1: prompt holds a list"),
        ({"chosen": "a", "rejected": {"content": "b"}}, "valid, row 1: rejected holds a dict"),
        ({"chosen": "a", "rejected": None}, "valid, row 1 lacks a candidate"),
        ({"query": "a", "sample0": "b", "sample1": "c", "best": 2}, "valid, row 1: best must be a number from 0 to 1"),
    ],
)
def test_a_wrong_comparison_is_found_by_split_and_row(tmp_path, row, message):
    write_rows(tmp_path / "train.jsonl", {"chosen": "a", "rejected": "b"})
    write_rows(tmp_path / "valid.jsonl", row)
    with pytest.raises(UserError, match=message):
        choice_data.load_choices(str(tmp_path))


def test_numbers_are_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n7,1\n0,0\n")
    assert choice_data.labelled(data.load_file(path), None, "label", None).texts == ["7", "0"]
    path.write_text("prompt,chosen,rejected\n3,0,1.5\n")
    assert choice_data.comparisons(data.load_file(path)).candidates == [["30", "31.5"]]


def test_one_comparison_is_too_few(tmp_path):
    (tmp_path / "rows.csv").write_text("chosen,rejected\na,b\n")
    with pytest.raises(UserError, match="holds too few rows"):
        choice_data.load_choices(str(tmp_path / "rows.csv"))


# names, files and models


@pytest.mark.parametrize(("lr", "name"), [(1e-6, "1e-6"), (5e-4, "5e-4"), (1.5e-5, "1.5e-5"), (1.0, "1e0")])
def test_learning_rates_in_names(lr, name):
    assert plots.short(lr) == name


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt", "rows.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_from_windows(tmp_path, name, encoding):
    """With its mark at the beginning, and lines that end in two characters."""
    lines = {
        "rows.csv": ["text", "hé", "two"],
        "rows.txt": ["hé", "two"],
        "rows.jsonl": ['{"text": "hé"}', '{"text": "two"}'],
    }
    (tmp_path / name).write_bytes("\r\n".join([*lines[name], ""]).encode(encoding))
    assert data.load_file(tmp_path / name)["text"][:] == ["hé", "two"]


def test_gpt2s_activation_is_fused_and_the_same_function(tmp_path):
    tokenizer = models.scratch_tokenizer(["one two three four"] * 3)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=16, n_positions=16, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    plain = GPT2LMHeadModel(config).eval()
    assert plain.config.activation_function == "gelu_new"
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fused, _ = models.load_policy(str(tmp_path), "--policy")
    assert "Tanh" in type(fused.transformer.h[1].mlp.act).__name__
    ids = torch.arange(2, 14).view(2, 6)
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_words_that_pandas_takes_for_missing(tmp_path):
    """Only an empty cell is."""
    words = ["None", "NA", "nan", "null"]
    write_csv(tmp_path / "train.csv", [(word, i % 2) for i, word in enumerate([*words, ""])])
    assert data.texts_of(data.load_file(tmp_path / "train.csv"), None) == [*words, ""]
    write_csv(tmp_path / "names.csv", [("a", "None"), ("b", "some")])
    assert choice_data.labels_of(data.load_file(tmp_path / "names.csv"), "label") == ["None", "some"]


def test_a_language_without_spaces_has_tokens_of_its_own():
    """Its lines are longer than any word."""
    line = "今天天气很好我们一起去公园散步吧" * 20
    tokenizer = models.scratch_tokenizer([line] * 8)
    assert len(tokenizer(line)["input_ids"]) < len(line) / 4  # of the three bytes of each character


@pytest.mark.parametrize("flags", [("commonsense", None), (None, "main")])
def test_configurations_are_of_the_hub(tmp_path, flags):
    write_csv(tmp_path / "train.csv", [("a", 0), ("b", 1)])
    with pytest.raises(UserError, match=r"--data-config and --data-revision are of a hub dataset, and .* is here"):
        data.load_splits(str(tmp_path), *flags)
