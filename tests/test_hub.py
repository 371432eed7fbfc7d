"""Loading from the hub, in whose place a server on this machine has a tiny GPT-2, RoBERTa and ETHICS."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2Model, GPT2Tokenizer, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from tests.conftest import ROOT
from tests.stand_in_hub import serve

SMALL = {  # of two equal flags, the last one counts
    "train_cls.py": "--epochs 1",
    "train_nlg.py": "--epochs 1 --samples 8",
    "finetuning_nlg.py": "--episodes 32 --batch-size 16 --reference-samples 16",
    "evaluate_nlg.py": "--queries 2 --samples 4 --reference-samples 64",
}
OLD_NAMES = {"gpt2": "openai-community/gpt2", "roberta-base": "FacebookAI/roberta-base"}
NOBODY = "http://127.0.0.1:9"  # the port of a service that no machine offers any more
PARQUET = "refs/convert/parquet"


def stories(count):
    """Labels and texts in the form of ETHICS, where 1 is wrong."""
    people, things = ("my aunt", "our guest", "a pupil", "the baker"), ("lamp", "kite", "drum", "coat", "bicycle")
    ends = ("I gave it back the next day.", "I sold it and told nobody.")
    rows = [
        (i % 2, f"I borrowed the {things[i % 5]} of {people[i % 4]} for {2 + i} days. {ends[i % 2]}")
        for i in range(count)
    ]
    return pd.DataFrame(rows, columns=["label", "input"])


def save_tokenizer(kind, folder, special_tokens, length):
    """A byte-level BPE of these stories in the files in which the hub has GPT-2's and RoBERTa's."""
    folder.mkdir()
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(stories(40).input, 400, special_tokens=special_tokens, show_progress=False)
    learned.save_model(str(folder))
    tokenizer = kind.from_pretrained(folder, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_gpt2(folder):
    """As the hub's, it lacks the language model's head, whose weights are those of the embedding."""
    tokenizer = save_tokenizer(GPT2Tokenizer, folder, ["<|endoftext|>"], 128)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    model = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=128, **ends))
    with torch.no_grad():  # it often writes a full stop, without which every score is the same
        stop = model.wte.weight[tokenizer.encode(".")[0]]
        model.ln_f.bias.copy_(4 * stop / stop.square().sum())
    model.save_pretrained(folder)


def save_roberta(folder):
    tokenizer = save_tokenizer(RobertaTokenizer, folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 128)
    config = RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32,
        max_position_embeddings=130,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of the hub, and what it is asked."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    save_gpt2(home / "gpt2")
    save_roberta(home / "roberta")
    for split, count in (("train", 40), ("validation", 41), ("test", 10)):
        folder = home / "parquet" / "commonsense" / split
        folder.mkdir(parents=True)
        stories(count).to_parquet(folder / "0000.parquet")
    reviews = pd.DataFrame({"text": [f"a {i}th film" for i in range(12)], "label": [0, 1] * 6})
    (home / "sst2").mkdir()
    for name in ("train", "dev", "test"):
        reviews.to_json(home / "sst2" / f"{name}.jsonl", orient="records", lines=True)
    acts = {
        name: [f"{name.split('_')[0].capitalize()} act {i}." for i in range(20)]
        for name in ("moral_action", "immoral_action")
    }
    (home / "moral" / "full" / "train").mkdir(parents=True)
    moral = pd.DataFrame({"situation": [f"Situation {i}." for i in range(20)]} | acts)
    moral.to_parquet(home / "moral" / "full" / "train" / "0000.parquet")
    (home / "script").mkdir()
    (home / "script" / "ethics.py").write_text("# a loading script, which is refused\n")
    branches = {
        ("models", OLD_NAMES["gpt2"], "main"): home / "gpt2",
        ("models", OLD_NAMES["roberta-base"], "main"): home / "roberta",
        ("datasets", "hendrycks/ethics", "main"): home / "script",
        ("datasets", "hendrycks/ethics", PARQUET): home / "parquet",
        ("datasets", "someone/ethics", "main"): home / "script",
        ("datasets", "SetFit/sst2", "main"): home / "sst2",
        ("datasets", "demelin/moral_stories", PARQUET): home / "moral",
    }
    with serve(branches, OLD_NAMES) as found:
        yield found


def make_gpt2():
    """The commands of the Makefile with the settings of [3], but less of everything."""
    said = subprocess.run(["make", "-n", "gpt2", "FULL=1"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\S*bin/python (.*)$", said.replace("\\\n", " "), re.MULTILINE)
    commands = {words[0]: words for words in map(shlex.split, lines)}
    assert list(commands) == list(SMALL)
    return {script: [*words, *SMALL[script].split()] for script, words in commands.items()}


def start(command, address, home):
    """A script in a process of its own: the libraries read the hub's address when they are imported."""
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|.*_proxy$", name, re.IGNORECASE)}
    changed = {"HF_ENDPOINT": address, "HF_HOME": str(home / ".cache"), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    script, *flags = command
    return subprocess.run(
        [sys.executable, *([ROOT / script] if script.endswith(".py") else ["-m", script]), *flags],
        cwd=home, env=kept | changed, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def refusal(command, address, home):
    done = start(command, address, home)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-2000:]
    return done.stderr


@pytest.fixture(scope="module")
def made(hub, tmp_path_factory):
    """The folder in which `make gpt2 FULL=1` has run."""
    home = tmp_path_factory.mktemp("made")
    for command in make_gpt2().values():
        done = start(command, hub[0], home)
        assert done.returncode == 0, done.stderr[-2000:]
    return home


def test_make_gpt2(hub, made):
    folder = made / "data_results" / "K4_lr_1e-5_seed0"
    log = pd.read_csv(folder / "log.csv")
    assert log.episodes.tolist() == [16, 32]
    assert log.terminated.between(0, 1, inclusive="neither").all()
    assert (log.ratio_deviation_first < 1e-4).all()
    assert json.loads((folder / "evaluation.json").read_text())["samples"] == 2 * 4
    settings = json.loads((folder / "config.json").read_text())["settings"]  # those of [3], not a recipe's
    of_the_original = {
        "lr": 1e-5,
        "ppo_epochs": 4,
        "kl_coef": 0.15,
        "target_kl": 6,
        "value_coef": 0.1,
        "gae_lambda": 0.95,
    }
    assert {name: settings[name] for name in of_the_original} == of_the_original
    opened = set(pd.read_csv(folder / "samples.csv")["query"])
    assert all(any(text.startswith(query) for text in stories(41).input) for query in opened)
    for name, kind in (("gpt2_cls", "roberta"), ("gpt2_nlg", "gpt2"), ("gpt2_ppo", "gpt2")):
        assert json.loads((made / "models" / name / "config.json").read_text())["model_type"] == kind
    loaded = [path for path in hub[1] if path.startswith("GET") and path.endswith((".safetensors", ".parquet"))]
    assert len(loaded) == len(set(loaded)) == 2 + 3  # each once, although three scripts read the data


def test_what_was_loaded_once_needs_no_hub(made):
    done = start([*make_gpt2()["train_nlg.py"], "--out", "models/again"], NOBODY, made)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_dataset_without_a_parquet_branch(hub, tmp_path):
    said = refusal([*make_gpt2()["train_nlg.py"], "--data", "someone/ethics"], hub[0], tmp_path)
    assert f"someone/ethics has no branch {PARQUET} on the hub" in said and "--data FOLDER" in said


def test_a_configuration_that_the_parquet_branch_does_not_have(hub, tmp_path):
    said = refusal([*make_gpt2()["train_nlg.py"], "--data-config", "comonsense"], hub[0], tmp_path)
    assert said == "error: --data-config comonsense: the configurations of hendrycks/ethics are commonsense\n"


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    """Unlike the policy, which is found, and which no training has touched."""
    stories(40).input.to_csv(tmp_path / "stories.csv", index=False)
    command = "finetuning_nlg.py --data stories.csv --policy gpt2 --reward someone/nothing".split()
    assert "--reward someone/nothing cannot be loaded" in refusal(command, hub[0], tmp_path)


@pytest.mark.parametrize(("name", "training", "queries"), [("sentiment", 6, 12), ("ethics", 36, 4)])
def test_the_data_of_the_pretrained_tasks(hub, tmp_path, name, training, queries):
    """12 reviews a split; 20 stories with two actions, of which 16 are to train on, and 40 cases of ETHICS."""
    done = start(["experiments.real_data", name, "--source", "hub", "--out", "rows"], hub[0], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for who in ("reward", "judge"):
        assert len(pd.read_csv(tmp_path / "rows" / who / "train.csv")) == pytest.approx(training, abs=8)
    openings = pd.concat([pd.read_csv(tmp_path / "rows" / "queries" / f"{half}.csv") for half in ("train", "valid")])
    assert len(openings) == queries


def test_a_hub_that_cannot_be_reached(tmp_path):
    begin = time.perf_counter()
    assert "Couldn't reach" in refusal(["train_nlg.py", "--data", "someone/ethics"], NOBODY, tmp_path)
    assert time.perf_counter() - begin < 20  # most of it for the imports
