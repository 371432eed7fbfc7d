"""Models of preferences (train_cls.py with comparisons), on people's and on the gold judge's.

    python -m experiments.preferences utilitarianism --source ../shared/data   # ETHICS: which of two lives is better
    python -m experiments.preferences shipped     # which of four texts of models/nlg the gold judge finds best

Writes the comparisons to models/preferences/<name>/rows, the model beside them, and what it reached on held-out ones to
data_results/preferences/<name>_metrics.json. The gold judge's comparisons to test on answer queries that training never
saw.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from rlhf import cli, data, models, rewards, runtime
from rlhf.cli import COUNT
from rlhf.errors import UserError
from rlhf.human import feedback

ROOT = Path(__file__).resolve().parents[1]

JUDGE = f"{ROOT}/data_cls/scenarios.py:judge"
CHOICES = 4
SAMPLING = {"length": 40, "temperature": 0.7, "stop_after": 0, "generator": None}
FLAGS = {
    "utilitarianism": "--model scratch --revisit 1 --epochs 4 --lr 5e-4",  # people's answers have noise
    "shipped": "--model models/nlg --optimizer muon --epochs 8",
}


def utilitarianism(folder: Path, source: Path, count: int) -> None:
    """ETHICS's own split; columns chosen, rejected."""
    for name in ("train", "test"):
        try:
            shutil.copy(source / "ethics" / f"util_{name}.csv", folder / f"{name}.csv")
        except FileNotFoundError as error:
            raise UserError(f"--source {source} lacks {error.filename}") from error


def shipped(folder: Path, source: Path, count: int) -> None:
    """`count` comparisons to train on and a quarter as many to test on, as finetuning_nlg.py's --feedback-file."""
    model, tokenizer = models.load_policy("models/nlg", "--policy")
    lines = (ROOT / "data_nlg" / "valid.txt").read_text(encoding="utf-8").splitlines()
    queries = data.split_queries([line for line in lines if line], tokenizer, 5)
    for seed, (name, asked, wanted) in enumerate(zip(("train", "test"), queries, (count, count // 4), strict=True)):
        ask = feedback.annotator("gold", JUDGE, 0.0, seed, torch.device("cpu"), "float32")
        sampling = SAMPLING | {"seed": seed, "stop_id": tokenizer.eos_token_id}
        questions = feedback.questions(model, tokenizer, asked, CHOICES, **sampling)
        keys = feedback.choices(CHOICES)
        rows = [
            feedback.row_of(question, ask(feedback.View(question, keys, "")), {})
            for question in itertools.islice(questions, wanted)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def perfect_accuracy(folder: Path) -> float:
    """How often one who knows the truth names the text that the gold judge did, who takes one of equals at random."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["query"] + row[f"sample{i}"] for row in rows for i in range(CHOICES)]
    verdicts = map(rewards.load_function(JUDGE, "the judge"), texts)
    worth = np.array([verdict.label if verdict.valid else -1 for verdict in verdicts]).reshape(-1, CHOICES)
    return float((1 / (worth == worth.max(1, keepdims=True)).sum(1)).mean())


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=FLAGS, help="whose comparisons")
    parser.add_argument("--source", default="../shared/data", help="folder of the downloaded files")
    parser.add_argument("--comparisons", type=COUNT, default=4000, help="how many the gold judge makes")
    args = parser.parse_args()
    folder = Path("models/preferences") / args.name / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    {"utilitarianism": utilitarianism, "shipped": shipped}[args.name](folder, Path(args.source), args.comparisons)
    results = Path("data_results/preferences")
    where = ["--data", folder, "--out", folder.parent / args.name, "--results", results]
    if subprocess.run([sys.executable, ROOT / "train_cls.py", *FLAGS[args.name].split(), *where]).returncode:
        raise UserError("train_cls.py failed; it says why above")
    if args.name == "shipped":
        path = results / "shipped_metrics.json"
        record = json.loads(path.read_text(encoding="utf-8")) | {"perfect_accuracy": perfect_accuracy(folder)}
        runtime.write_json(path, record)


if __name__ == "__main__":
    cli.run(main)
