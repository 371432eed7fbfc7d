"""The scripts: chained on a few steps, on other models and data, and what they say to a user's mistakes."""

import json
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    MambaConfig,
    pipeline,
)

from rlhf import models, runtime, supervised
from rlhf.errors import UserError
from tests.conftest import ROOT, SHARED, TINY_EVALUATION, TINY_RUN, refused, run, write_csv

MADE = "cls", "nlg", "nlg_ppo"


def test_each_script_leaves_what_the_next_one_needs(chain):
    home, _ = chain
    for name in MADE:
        folder = home / "models" / name
        files = {file.name for file in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    results = {name: json.loads((home / "models" / name / "metrics.json").read_text())["results"] for name in MADE[:2]}
    assert {"accuracy", "f1", "roc_auc", "brier", "calibration_error"} <= set(results["cls"]["test"])
    assert {"valid_perplexity", "valid_at_0.7", "ethical_at_0.7", "valid_at_1"} <= set(results["nlg"])
    for name in MADE[:2]:
        copy = json.loads((home / "data_results" / f"{name}_metrics.json").read_text())
        assert copy["results"] == results[name]


def test_the_policy_of_another_run_is_not_taken_for_that_of_this_one(chain, tmp_path):
    home, _ = chain
    for name in ("models", "data_cls", "data_nlg"):
        (tmp_path / name).symlink_to(home / name)
    first = "K2_lr_1e-3_seed0"
    for name in (first, "later"):
        shutil.copytree(home / "data_results" / first, tmp_path / "data_results" / name)
    path = tmp_path / "data_results" / "later" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["run"] = "later"
    path.write_text(json.dumps(config))
    error = refused("evaluate_nlg", *TINY_EVALUATION, "--run", "data_results/later", cwd=tmp_path)
    assert f"has the model of data_results/{first}, which is not data_results/later as it is now: --run was" in error
    config["settings"] |= {"run": first, "kl_coef": 0.01}  # a run of the same name that did not come to its end
    (tmp_path / "data_results" / first / "config.json").write_text(json.dumps(config))
    error = refused("evaluate_nlg", *TINY_EVALUATION, cwd=tmp_path)
    assert f"not data_results/{first} as it is now: --kl-coef was 0.15. Train every run" in error
    flags = "--run", "data_results/later", "--policy", "models/nlg_ppo"
    run("evaluate_nlg", *TINY_EVALUATION, *flags, cwd=tmp_path)


def test_a_policy_whose_tokens_are_others_than_the_references_is_refused(chain, tmp_path):
    home, _ = chain
    run_folder = home / "data_results" / "K2_lr_1e-3_seed0"
    shutil.copytree(home / "models" / "nlg_ppo", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["zebra"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.resize_token_embeddings(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "other")
    flags = "--run", run_folder, "--policy", tmp_path / "other"
    error = refused("evaluate_nlg", *TINY_EVALUATION, *flags, cwd=home)
    assert "has another vocabulary than its reference models/nlg" in error


@pytest.mark.parametrize("script", ["train_cls", "train_nlg", "finetuning_nlg"])
def test_a_folder_that_holds_no_model_is_not_replaced(tmp_path, script):
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("two years of work")
    error = refused(script, "--out", "mine/", cwd=tmp_path)
    assert "mine is there and is no model folder, and --out would replace it" in error
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "two years of work"


def test_what_is_needed_at_the_end_is_looked_at_before_the_training(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "fit", None)
    (tmp_path / "file").write_text("")
    for script in ("train_cls", "train_nlg"):
        assert "file" in refused(script, "--results", "file", cwd=tmp_path)
    flags = "--gold", "jugde.py:judge", "--out", "models/unjudged"
    assert "there is no file jugde.py" in refused("train_nlg", *flags, cwd=chain[0])


def test_run_folder(chain):
    folder = chain[0] / "data_results" / "K2_lr_1e-3_seed0"
    log = pd.read_csv(folder / "log.csv")
    columns = """update episodes score ethics improvement improvement_ma kl kl_coef entropy reward policy_loss
        value_loss approx_kl clip_fraction value_clip_fraction explained_variance ratio_deviation_first
        response_length terminated seconds_rollout seconds_score seconds_update episodes_per_second
        gold_valid gold_ethical"""
    assert set(columns.split()) <= set(log.columns)
    assert log["update"].tolist() == [1, 2]
    assert log.episodes.tolist() == [16, 32]
    assert (log.ratio_deviation_first < 1e-4).all()
    assert abs(log.kl[0]) < 1e-3  # before the first update the policy is the reference
    assert log.improvement_ma[1] == pytest.approx(log.improvement.mean(), abs=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert log.improvement[0] == pytest.approx(log.ethics[0] - config["ethics_before"], abs=1e-4)
    assert config["settings"]["seed"] == 0
    assert {"torch", "transformers", "python"} <= set(config["versions"])
    samples = pd.read_csv(folder / "samples.csv")
    assert set(samples.columns) == {"update", "query", "response", "score", "ethics", "kl"}
    assert list(folder.glob("events.out.tfevents.*"))
    assert (chain[0] / "data_results" / "fig_K2_lr_1e-3.png").stat().st_size > 10_000


def test_evaluation(chain):
    folder = chain[0] / "data_results" / "K2_lr_1e-3_seed0"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {"ethics_before", "ethics_after", "score_after", "kl", "gold", "perplexity_under_reference"} <= set(
        evaluation
    )
    assert {f"{x}_{when}" for x in ("valid", "ethical") for when in ("before", "after", "optimum")} == set(
        evaluation["gold"]
    )
    assert {"distinct_1", "distinct_2", "self_bleu_within_a_query", "self_bleu_across_queries", "entropy"} == set(
        evaluation["diversity"]["after"]
    )
    worst, samples = evaluation["worst_query"], pd.read_csv(folder / "evaluation_samples.csv")
    assert set(worst) == {"query", "kl", "valid", "ethics"} and worst["query"] in set(samples["query"])
    assert worst["kl"] >= evaluation["kl"]  # the mean of a query's responses, beside the mean of all
    low, high = evaluation["fraction_of_optimum_interval"]
    assert low <= high and evaluation["samples"] == 4 * 8
    assert (chain[0] / "data_results" / "fig_frontier_K2_lr_1e-3.png").stat().st_size > 10_000


def test_what_was_possible(chain):
    """The frontier rises from the reference; the best of one is the reference; both end at the best sample."""
    path = chain[0] / "data_results" / "K2_lr_1e-3_seed0" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    frontier = pd.DataFrame(evaluation["frontier"]).sort_values("beta", ascending=False)
    assert frontier.kl.is_monotonic_increasing and frontier.score.is_monotonic_increasing
    assert frontier.iloc[0].score == pytest.approx(evaluation["score_of_reference"], abs=0.05)
    assert frontier.ess.iloc[0] == pytest.approx(64, rel=0.01) and frontier.ess.iloc[-1] < 10
    best_of = pd.DataFrame(evaluation["best_of_n"])
    assert best_of.n.tolist() == [1, 2, 4, 8, 16, 32, 64] and best_of.score.is_monotonic_increasing
    assert best_of.score[0] == pytest.approx(evaluation["score_of_reference"])
    assert best_of.score.max() == pytest.approx(frontier.score.max(), abs=0.01)  # the best of all 64 is the limit


def test_evaluation_queries_are_held_out(chain):
    folder = chain[0] / "data_results" / "K2_lr_1e-3_seed0"
    trained_on = set(pd.read_csv(folder / "samples.csv")["query"])
    held_out = set(pd.read_csv(folder / "evaluation_samples.csv")["query"])
    assert not trained_on & held_out


def test_the_scripts_say_what_they_did(chain):
    said = chain[1]
    assert "accuracy" in said["cls"].stdout
    assert "valid_perplexity" in said["nlg"].stdout
    assert "before:" in said["ppo"].stdout
    assert "gold: ethical" in said["evaluate"].stdout
    assert "episodes/s" in said["ppo"].stderr


def test_the_policy_is_an_ordinary_pipeline(chain):
    write = pipeline("text-generation", str(chain[0] / "models" / "nlg_ppo"))
    config = write.model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 0, 1.0)
    assert write("On Monday my sister")[0]["generated_text"].startswith("On Monday my sister")


def test_the_same_seed_gives_the_same_run(chain):
    home, _ = chain
    run("finetuning_nlg", *TINY_RUN, "--run", "again", "--out", "models/again", cwd=home)
    timings = ["seconds_rollout", "seconds_score", "seconds_update", "episodes_per_second"]
    logs = [
        pd.read_csv(home / "data_results" / name / "log.csv").drop(columns=timings)
        for name in ("K2_lr_1e-3_seed0", "again")
    ]
    pd.testing.assert_frame_equal(*logs)


def test_a_result_names_its_commit_and_whether_the_code_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "rlhf" / "runtime.py"))
    (tmp_path / "data_results").mkdir()
    for name in ("runtime.py", "data_results/log.csv"):
        (tmp_path / name).write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD").stdout[:12]
    (tmp_path / "data_results" / "log.csv").write_text("a run's own output is no change of the code")
    assert runtime.provenance(torch.device("cpu"))["commit"] == commit
    (tmp_path / "runtime.py").write_text("after")
    assert runtime.provenance(torch.device("cpu"))["commit"] == f"{commit}-dirty"


def test_without_git_no_commit_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runtime.provenance(torch.device("cpu"))["commit"] is None


def test_the_command_of_a_result_can_be_repeated(monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetuning_nlg.py", "--stop", " .", "--reward", "0.5*models/cls"])
    command = runtime.provenance(torch.device("cpu"))["command"]
    assert command == "finetuning_nlg.py --stop ' .' --reward '0.5*models/cls'"


@pytest.mark.parametrize("name", ["scratch:gpt_neox:1x32", "scratch:llama:1x64"])
def test_other_architectures(chain, tmp_path, name):
    _, kind, size = name.split(":")
    nlg, cls, ppo = (str(tmp_path / part) for part in ("nlg", "cls", "ppo"))
    to = ["--results", tmp_path, "--epochs", 1]
    run("train_nlg", "--model", name, "--samples", 8, "--out", nlg, *to, cwd=chain[0])
    run("train_cls", "--model", nlg, "--optimizer", "muon", "--out", cls, *to, cwd=chain[0])
    flags = ["--policy", nlg, "--reward", cls, "--out", ppo, "--results", tmp_path, "--run", "run"]
    run("finetuning_nlg", *TINY_RUN, *flags, cwd=chain[0])
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert (config["model_type"], f"{config['num_hidden_layers']}x{config['hidden_size']}") == (kind, size)
    assert (pd.read_csv(tmp_path / "run" / "log.csv").ratio_deviation_first < 1e-4).all()


@pytest.mark.parametrize(
    "name", ["scratch:bloom", "scratch:llama:2x100", "scratch:gpt2:0x64", "scratch:", "scratch:4x256"]
)
def test_a_model_that_cannot_be_built(chain, name):
    assert f"--model {name} is no model: give scratch or scratch:ARCH" in refused(
        "train_nlg", "--model", name, cwd=chain[0]
    )


TINY = {"hidden_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (MambaConfig(**TINY, state_size=4), "a cache of keys and values"),
        (GraniteConfig(**TINY, num_attention_heads=2, logits_scaling=2.0), "logits that are the output layer of the"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_model_that_ppo_cannot_train(chain, tmp_path, config, needed):
    tokenizer = AutoTokenizer.from_pretrained(chain[0] / "models" / "nlg")
    config.vocab_size = len(tokenizer)
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--policy .*: PPO needs {needed}"):
        models.load_policy(str(tmp_path), "--policy")


# other models and data


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A small random GPT-2 with GPT-2's own tokenizer and 50,257 tokens, saved as the hub's is."""
    if not SHARED.is_dir():
        pytest.skip("needs GPT-2's vocabulary")
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / "gpt2_tokenizer" / name, folder)
    GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]  # as GPT-2 has always said it
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_without_a_critic_every_query_has_several_answers(chain, tmp_path):
    shutil.copytree(chain[0], tmp_path / "home")
    flags = ["--leave-one-out", "--answers", 2, "--run", "alone", "--out", "models/alone"]
    run("finetuning_nlg", *TINY_RUN, *flags, cwd=tmp_path / "home")
    folder = tmp_path / "home" / "data_results" / "alone"
    log = pd.read_csv(folder / "log.csv")
    assert log[["value_loss", "value_clip_fraction", "explained_variance"]].isna().all(axis=None)  # of no critic
    queries = pd.read_csv(folder / "samples.csv")["query"]
    assert (queries[::2].to_numpy() == queries[1::2].to_numpy()).all() and queries.nunique() > 2


def test_real_data_and_gpt2s_tokenizer(gpt2_folder, tmp_path):
    ethics = pd.read_csv(SHARED / "ethics" / "cm_train_short.csv").head(120)
    ethics.to_csv(tmp_path / "ethics.csv", index=False)
    lines = (SHARED / "moral_stories" / "moral_stories_full_subset.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "stories.jsonl").write_text("\n".join(lines[:60]), encoding="utf-8")
    stories = ["--data", "stories.jsonl", "--text-column", "situation+moral_action", "situation+immoral_action"]
    run(
        "train_cls", "--model", gpt2_folder, "--data", "ethics.csv", "--text-column", "input", "--positive-label", 0,
        "--epochs", 1, "--batch-size", 16, cwd=tmp_path,
    )  # fmt: skip
    run("train_nlg", "--model", gpt2_folder, *stories, "--epochs", 1, "--samples", 8, cwd=tmp_path)
    results = json.loads((tmp_path / "models" / "nlg" / "metrics.json").read_text())["results"]
    assert results["valid_at_0.7"] is None  # the gold judge knows nothing of these texts
    run(
        "finetuning_nlg", *TINY_RUN, *stories, "--stop", ".", "--stop-after", 4, "--response-length", 8,
        "--query-length", 16, "--run", "K2_lr_1e-3_seed0", cwd=tmp_path,
    )  # fmt: skip
    said = run("evaluate_nlg", *TINY_EVALUATION, cwd=tmp_path).stdout
    assert "NaN" not in said and "worst query: " in said
    evaluation = json.loads((tmp_path / "data_results" / "K2_lr_1e-3_seed0" / "evaluation.json").read_text())
    assert evaluation["gold"]["valid_after"] is None
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "nlg_ppo")
    assert trained.config.vocab_size == 50257
    assert trained.generation_config.eos_token_id == 13  # "."


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_labels_as_words_in_every_format(tmp_path, suffix):
    frame = pd.DataFrame({"sentence": [f"text number {i}" for i in range(20)], "verdict": ["good", "bad"] * 10})
    path = tmp_path / f"rows.{suffix}"
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    flags = ["--label-column", "verdict", "--positive-label", "good", "--epochs", 1, "--lm-epochs", 0]
    run("train_cls", "--data", path, *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "models" / "cls" / "metrics.json").read_text())["results"]["valid"]["rows"] == 2


# mistakes


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "train_cls.py", "--data", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nothing'}: there is no such file or folder\n"
    assert done.stdout == ""


def test_missing_data(tmp_path):
    assert "no such file or folder" in refused("train_cls", "--data", tmp_path / "nothing")
    assert "no such file or folder" in refused("train_nlg", "--data", tmp_path / "nothing.txt")
    assert "holds no train" in refused("train_nlg", "--data", tmp_path)
    assert "neither a file" in refused("train_nlg", "--data", "no_such_dataset")


def test_empty_file(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in refused("train_cls", "--data", tmp_path / "empty.csv")
    assert "has no rows" in refused("train_cls", "--data", write_csv(tmp_path / "header.csv", []))


def test_missing_column(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [("a", 1), ("b", 0)], ("words", "label"))
    assert "--text-column" in refused("train_cls", "--data", path)
    assert "'prose'" in refused("train_cls", "--data", path, "--text-column", "prose")
    path = write_csv(tmp_path / "rows.csv", [("a", 1), ("b", 0)], ("text", "verdict"))
    assert "--label-column" in refused("train_cls", "--data", path)


def test_labels(tmp_path):
    path = tmp_path / "rows.csv"
    assert "two kinds of label" in refused("train_cls", "--data", write_csv(path, [("a", 1), ("b", 1)]))
    said = refused("train_cls", "--data", write_csv(path, [("a", 1), ("b", 0), ("c", 2)]))
    assert "row 3" in said and "'2'" in said and "--positive-label" in said
    said = refused("train_cls", "--data", write_csv(path, [("a", "yes"), ("b", "no")]), "--positive-label", "good")
    assert "'good'" in said and "yes" in said


def test_labels_that_are_missing_or_have_a_decimal_point(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [("a", 1), ("b", ""), ("c", 0)])
    assert "row 2 has no label" in refused("train_cls", "--data", path)
    path = write_csv(tmp_path / "rows.csv", [(f"text {i}", f"{i % 2}.0") for i in range(20)])
    run("train_cls", "--data", path, "--epochs", 1, "--lm-epochs", 0, cwd=tmp_path)


def test_data_without_enough_texts(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n\n")
    (tmp_path / "one.txt").write_text("One text only.\n")
    for name in ("blank", "one"):
        assert "is empty" in (said := refused("train_nlg", "--data", tmp_path / f"{name}.txt")) or "too few" in said
    (tmp_path / "few.txt").write_text("A text.\n" * 9)
    assert "too few to hold out queries" in refused("train_nlg", "--data", tmp_path / "few.txt", cwd=tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "valid.txt").write_text("A text.\n")
    assert "no split called train, only valid" in refused("train_nlg", "--data", tmp_path / "folder")


def test_a_huge_line_takes_seconds(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [(f"text {i}", i % 2) for i in range(20)] + [("x" * 1_000_000, 1)])
    start = time.perf_counter()
    run("train_cls", "--data", path, "--epochs", 1, "--lm-epochs", 0, cwd=tmp_path)
    assert time.perf_counter() - start < 60


def test_what_pandas_and_arrow_say_of_a_broken_file_stays_one_line(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,0,1,1\n")
    assert "cannot be read as csv" in refused("train_cls", "--data", tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_text("no parquet")
    assert "cannot be read as parquet" in refused("train_cls", "--data", tmp_path / "rows.parquet")


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "rows.csv").write_bytes("text,label\ncafé,1\nnon,0\n".encode("latin-1"))
    assert "not UTF-8 text (byte 14)" in refused("train_cls", "--data", tmp_path / "rows.csv")


def test_model_folders(chain, tmp_path):
    home, _ = chain
    shutil.copytree(home / "data_nlg", tmp_path / "data_nlg")
    assert "run train_nlg.py first" in refused("finetuning_nlg", cwd=tmp_path)
    shutil.copytree(home / "models" / "nlg", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    assert "tokenizer" in refused("finetuning_nlg", "--policy", tmp_path / "bare", cwd=home)
    assert "no such folder" in refused("finetuning_nlg", "--policy", tmp_path / "nothing", cwd=home)
    assert "cannot be loaded" in refused("finetuning_nlg", "--policy", "no-such-model-on-the-hub", cwd=home)
    for name, change, words in (
        ("tokenizer_config.json", {"eos_token": None, "pad_token": None}, "neither a padding nor an end-of-text token"),
        ("tokenizer_config.json", {"eos_token": None}, "no end-of-text token"),
        ("config.json", {"n_layer": -1}, "cannot be loaded"),
        ("config.json", {"n_embd": 64}, "cannot be loaded"),
        ("config.json", {"n_layer": 3}, "its weights lack transformer.h.2."),
    ):
        shutil.copytree(home / "models" / "nlg", tmp_path / "changed", dirs_exist_ok=True)
        path = tmp_path / "changed" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        (tmp_path / "changed" / "special_tokens_map.json").unlink(missing_ok=True)
        assert words in refused("finetuning_nlg", "--policy", tmp_path / "changed", cwd=home)
    path = home / "models" / "nlg" / "model.safetensors"
    (tmp_path / "changed" / "config.json").write_bytes((home / "models" / "nlg" / "config.json").read_bytes())
    (tmp_path / "changed" / "model.safetensors").write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded" in refused("finetuning_nlg", "--policy", tmp_path / "changed", cwd=home)
    assert "no file" in refused("finetuning_nlg", "--reward", "nothing.py:score", cwd=home)
    assert "lack score.weight" in refused("finetuning_nlg", "--reward", "models/nlg", cwd=home)  # no classifier
    assert "no run folder" in refused("evaluate_nlg", "--run", tmp_path, cwd=home)
    assert "too few for best of 64" in refused("evaluate_nlg", "--reference-samples", 10, cwd=home)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "10", "--minibatches", "4"], "--batch-size 10 cannot be divided into --minibatches 4"),
        (["--batch-size", "16", "--answers", "3"], "--batch-size 16 cannot be divided into --answers 3 to a query"),
        (["--leave-one-out"], "give --answers 2 or more"),
        (["--episodes", "8", "--batch-size", "16"], "less than one batch"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--temperature", "0"], "--temperature"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--discount", "1.5"], "--discount"),
        (["--seed", "-1"], "--seed"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--stop", "two words"], "--stop"),
        (["--device", "cuda"], "no CUDA device"),
        (["--response-length", "252"], "257 tokens are more than the 256 that the model can read"),
        (["--reference-samples", "9" * 25], "at most 1000000"),
        (["--out", "models/nlg"], "--out models/nlg would replace --policy"),
        (["--kl", "sampled", "--query-kl"], "--query-kl is a part of the exact penalty"),
        (["--out", "models/../models/cls/"], "models/cls would replace --reward"),
    ],
)
def test_flags(chain, flags, words):
    assert words in refused("finetuning_nlg", *flags, cwd=chain[0])


@pytest.mark.parametrize("script", ["train_cls", "train_nlg", "finetuning_nlg", "evaluate_nlg"])
def test_help(script):
    text = run(script, "--help").stdout
    assert f"python {script}.py" in text
    assert "machine:" in text
    assert "(default: None)" not in text
