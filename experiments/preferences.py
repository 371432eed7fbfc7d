"""Models of preferences (train_cls.py with comparisons): people's, and the gold judge's.

    python -m experiments.preferences utilitarianism --source FOLDER   # ETHICS: which of two lives is better
    python -m experiments.preferences shipped     # the best of four texts of models/nlg, by the gold judge

Writes the comparisons to models/preferences/<name>/rows, the model beside them, and its results on held-out comparisons
to data_results/preferences/<name>_metrics.json. The gold judge's test comparisons have queries that no training
comparison has.
"""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from experiments.commands import ROOT, start
from rlhf import cli, models, prompting, querying, runtime, user_code
from rlhf.errors import UserError
from rlhf.human import annotator, answers, questions
from rlhf.sampling import Sampling

JUDGE = f"{ROOT}/data_cls/scenarios.py:judge"
SAMPLES = 4  # texts in a comparison of the gold judge
QUERY_LENGTH, RESPONSE_LENGTH, TEMPERATURE = 5, 40, 0.7  # the defaults of finetuning_nlg.py
FLAGS = {  # people's answers have noise, and so have the judge's between equals: every text in every pass
    "utilitarianism": "--model scratch --revisit 1 --label-smoothing 0 --epochs 4 --lr 5e-4",
    "shipped": "--model models/nlg --revisit 1 --label-smoothing 0 --epochs 8",
}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=FLAGS, help="the comparisons to learn from")
    parser.add_argument("--source", help="of utilitarianism: folder of the downloaded files")
    parser.add_argument("--comparisons", type=cli.COUNT, default=4000, help="training comparisons of the gold judge")
    args = parser.parse_args()
    if args.name == "utilitarianism" and not args.source:
        raise UserError("utilitarianism is read from files: give their folder with --source")
    rows = Path("models/preferences") / args.name / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    if args.name == "shipped":
        write_shipped(rows, args.comparisons)
    else:
        copy_utilitarianism(rows, Path(args.source))
    results = Path("data_results/preferences")
    paths = ["--data", rows, "--out", rows.parent / args.name, "--results", results]
    if start("train_cls.py", [*FLAGS[args.name].split(), *paths]).returncode:
        raise UserError("train_cls.py failed; it says why above")
    if args.name == "shipped":
        path = results / "shipped_metrics.json"
        record = json.loads(path.read_text(encoding="utf-8")) | {"perfect_accuracy": perfect_accuracy(rows)}
        runtime.write_json(path, record)


def copy_utilitarianism(folder: Path, source: Path) -> None:
    """ETHICS's own training and test comparisons, with columns chosen and rejected."""
    for name in ("train", "test"):
        try:
            shutil.copy(source / "ethics" / f"util_{name}.csv", folder / f"{name}.csv")
        except FileNotFoundError as error:
            raise UserError(f"--source {source} lacks {error.filename}") from error


def write_shipped(folder: Path, comparisons: int) -> None:
    """`comparisons` to train on, and a quarter as many to test on, in the format of --feedback-file."""
    model, tokenizer = models.load_policy("models/nlg", "--policy")
    lines = (ROOT / "data_nlg" / "valid.txt").read_text(encoding="utf-8").splitlines()
    train_queries, test_queries = querying.split_queries([line for line in lines if line], tokenizer, QUERY_LENGTH)
    sampling = Sampling(RESPONSE_LENGTH, TEMPERATURE, tokenizer.eos_token_id)
    keys = questions.answer_keys(SAMPLES)
    for seed, (name, queries, count) in enumerate(
        (("train", train_queries, comparisons), ("test", test_queries, comparisons // 4))
    ):
        ask = annotator.load("gold", JUDGE, 0.0, seed, torch.device("cpu"), "float32")
        endless = questions.draw_questions(model, prompting.Texts(tokenizer), queries, SAMPLES, sampling, seed)
        rows = [
            answers.to_row(question, ask(questions.View(question, keys, "")), {})
            for question in itertools.islice(endless, count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def perfect_accuracy(folder: Path) -> float:
    """The accuracy on the test comparisons of a model that knows the truth.

    The gold judge chose at random among equally good texts, which no model can predict.
    """
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["query"] + row[f"sample{i}"] for row in rows for i in range(SAMPLES)]
    verdicts = map(user_code.load_function(JUDGE, "the judge"), texts)
    worth = np.array([verdict.label if verdict.valid else -1 for verdict in verdicts]).reshape(-1, SAMPLES)
    return float((1 / (worth == worth.max(1, keepdims=True)).sum(1)).mean())


if __name__ == "__main__":
    cli.run(main)
