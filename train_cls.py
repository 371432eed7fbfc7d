"""Fit the reward model: an ethics classifier, or a model of preferences.

    python train_cls.py                                                     # a small GPT-2 from scratch
    python train_cls.py --model models/nlg --optimizer muon --revisit 0.1   # from the generator, as [1] does it
    python train_cls.py --model roberta-base --lr 2e-5 --epochs 3 --batch-size 32 \\
        --data ethics.csv --text-column input --positive-label 0

Data: columns text,label with 1 = positive feedback (ethical); or comparisons: chosen,rejected (and prompt), or
query,sample0,...,sampleN,best, from which a model with one output learns ([1], equation 1). Writes --out with the
weights that did best on the validation rows, the tokenizer, a model card and metrics.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rlhf.errors import UserError
from sklearn import metrics as sk
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import checkpoint, cli, data, models, precision, rewards, runtime, supervised

LABELS = {0: "negative", 1: "positive"}
NORMALISED_ON = 8192  # candidates that say which scores are 0 and 1
Rows = tuple[list[list[str]], np.ndarray]  # the candidates of every row, and which of them is best; or text, label
LABELS_FIT = "classifier"  # what the fit to labels is called, after that to language


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    source = cli.add_data_flags(parser, default="data_cls")
    source.add_argument("--label-column", default="label", help="column of the label")
    source.add_argument(
        "--positive-label", help="the label that means positive feedback (default: 1, with 0 the other)"
    )
    source.add_argument("--rows", type=cli.COUNT, help="train on so many rows, drawn at random (default: all)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="scratch", help=models.SCRATCH_HELP)
    model.add_argument("--results", default="data_results", help="folder of the results: a copy of metrics.json")
    model.add_argument("--out", default="models/cls", help="folder to write")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.COUNT, default=8, help="passes over the labelled texts")
    training.add_argument(
        "--lm-epochs",
        type=cli.number(int, 0),
        help="passes of language modelling before (default: 3 for scratch, otherwise 0); "
        "a small new model learns nothing of ethics from labels alone",
    )
    training.add_argument("--lm-lr", type=cli.POSITIVE, default=6e-3, help="peak learning rate of these")
    training.add_argument("--batch-size", type=cli.COUNT, default=32, help="texts per step")
    training.add_argument("--lr", type=cli.POSITIVE, default=1e-3, help="peak learning rate")
    training.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        help="default: muon for scratch, which it teaches faster; otherwise adamw",
    )
    training.add_argument(
        "--revisit",
        type=cli.FRACTION,
        help="share of the learned texts that a pass goes through again (default: 0.1 for scratch, otherwise 1); "
        "where labels have no noise this gives the hard texts the time",
    )
    training.add_argument(
        "--label-smoothing",
        type=cli.FRACTION,
        default=0.0,
        help="how much of a label is taken for chance: it bounds the log-odds, and so what one text can score",
    )
    training.add_argument("--max-length", type=cli.COUNT, default=128, help="longest text in tokens")
    cli.add_machine_flags(parser)
    checkpoint.add_flags(parser.add_argument_group("checkpoints"), every=200)
    return parser.parse_args()


def labelled(rows, args: argparse.Namespace) -> Rows:
    """The text of every row, alone in a list, and the labels, 1 = positive."""
    if args.label_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"the data has no column {args.label_column!r}, only {columns}; name it with --label-column")
    texts = data.texts_of(rows, args.text_column)
    values = list(rows[args.label_column])
    if None in values:
        raise UserError(f"row {values.index(None) + 1} has no label; give it one, or take it out")
    whole = [isinstance(value, float) and value.is_integer() for value in values]  # a file may say 1.0
    values = [str(int(value) if is_whole else value).strip() for value, is_whole in zip(values, whole, strict=True)]
    if len(texts) != len(values):
        raise UserError("a labelled row has one text: give --text-column one name")
    kinds = sorted(set(values))
    positive = args.positive_label or "1"
    if args.positive_label is None and (strange := [kind for kind in kinds if kind not in ("0", "1")]):
        row = values.index(strange[0]) + 1
        raise UserError(
            f"row {row}: label {strange[0]!r} is neither 0 nor 1; say what is positive with --positive-label"
        )
    if len(kinds) != 2 or positive not in kinds:
        raise UserError(f"two kinds of label are needed, {positive!r} and another; the data has {', '.join(kinds)}")
    return [[text] for text in texts], np.array([value == positive for value in values], dtype=int)


def measure(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well log-odds [N] predict labels [N]."""
    probability, said = 1 / (1 + np.exp(-scores)), scores > 0
    return {
        "accuracy": sk.accuracy_score(labels, said),
        "f1": sk.f1_score(labels, said),
        "roc_auc": sk.roc_auc_score(labels, scores) if 0 < labels.mean() < 1 else None,  # it compares two kinds
        "brier": sk.brier_score_loss(labels, probability),
        "calibration_error": calibration_error(probability, labels),
        "rows": len(labels),
    }


def measure_comparisons(scores: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """How well scores [N, candidates] tell which candidate is best [N]; by chance, accuracy is 1 / candidates."""
    rows = np.arange(len(best))
    others = np.delete(scores, best + rows * scores.shape[1]).reshape(len(best), -1)
    ahead = scores[rows, best][:, None] - others
    wins = 1 / (1 + np.exp(-np.abs(ahead)))  # the probability that a pair goes as the scores say
    return {
        "accuracy": float((scores.argmax(1) == best).mean()),
        "pairwise_accuracy": float((ahead > 0).mean()),
        "log_loss": float(supervised.choice_log_loss(scores, best).mean()),
        "calibration_error": calibration_error(wins.ravel(), (ahead > 0).ravel()),
        "rows": len(best),
    }


def calibration_error(probability: np.ndarray, truth: np.ndarray) -> float:
    """The mean distance of what is said from what is true, over ten bins of equal width."""
    bins = np.minimum((probability * 10).astype(int), 9)
    gaps = [(bins == b).mean() * abs(probability[bins == b].mean() - truth[bins == b].mean()) for b in set(bins)]
    return float(sum(gaps))


def load_model(args: argparse.Namespace, texts: list[str], compares: bool):
    """The reward model before training, and its tokenizer."""
    labels = {0: "score"} if compares else LABELS
    outputs = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    if not models.is_scratch(args.model):
        return models.load_pretrained(
            AutoModelForSequenceClassification, args.model, "--model", num_labels=len(labels), **outputs
        )
    tokenizer = models.scratch_tokenizer(texts)
    config = models.scratch_config(tokenizer, args.model)
    config.update({"num_labels": len(labels), **outputs})
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def learn_language(model, ids: list[list[int]], valid_ids: list[list[int]], pad_id: int, device, **fitting) -> None:
    """Language modelling on the classifier's own body, under a head that is thrown away."""
    generator = AutoModelForCausalLM.from_config(model.config).to(device)
    setattr(generator, generator.base_model_prefix, model.base_model)
    generator.tie_weights()

    def loss(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return supervised.lm_loss(generator, *supervised.pad([ids[i] for i in batch], pad_id, device))

    def validate() -> dict[str, float]:
        return supervised.perplexity(generator, valid_ids, pad_id, device)

    lengths = [len(row) for row in ids]
    supervised.fit(generator, lengths, loss, validate, device=device, decay=1.0, label="language modelling", **fitting)


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args)
    with checkpoint.keeping(args) as (saved, keep):
        train(args, device, saved, keep)


def load_rows(args: argparse.Namespace) -> tuple[Rows, dict[str, Rows]]:
    """The rows to train on, and those of the other splits; a tenth of the first is for validation if no split is."""
    loaded = data.load_splits(args.data, args.data_config, args.data_revision)
    splits = {name: data.comparisons(rows) or labelled(rows, args) for name, rows in loaded.items()}
    candidates, chosen = splits.pop("train")
    if "valid" not in splits:
        train, held_out = data.split_off(len(candidates), 0.1, args.seed)
        splits = {"valid": ([candidates[i] for i in held_out], chosen[held_out])} | splits
        candidates, chosen = [candidates[i] for i in train], chosen[train]
    if args.rows:
        drawn = np.random.default_rng(args.seed).permutation(len(candidates))[: args.rows]
        candidates, chosen = [candidates[i] for i in drawn], chosen[drawn]
    widths = {name: len(rows[0]) for name, (rows, _) in (splits | {"train": (candidates, chosen)}).items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"the splits are not of one kind: candidates in a row are {widths}")
    return (candidates, chosen), {"valid": splits["valid"]} | splits


def train(args: argparse.Namespace, device: torch.device, saved: dict | None, keep: checkpoint.Keep) -> None:
    # data and model
    (candidates, best), splits = load_rows(args)
    width, texts = len(candidates[0]), [text for row in candidates for text in row]
    chosen, (valid, valid_best) = torch.tensor(best, device=device), splits["valid"]
    model, tokenizer = load_model(args, texts, compares=width > 1)
    model.to(device)
    chosen_precision = precision.choose(args.precision, device, model)
    runtime.say_where(device, chosen_precision)
    precision.set_precision(model, chosen_precision)
    longest = min(args.max_length, models.longest(model, tokenizer))
    ids = supervised.encode(tokenizer, texts, longest)
    scratch = models.is_scratch(args.model)
    shared = {
        "batch_size": args.batch_size,
        "muon": (args.optimizer or ("muon" if scratch else "adamw")) == "muon",
        "device": device,
        "seed": args.seed,
        "keep": keep,
        "saved": saved,
    }

    # language modelling first, on the reward model's own body
    lm_epochs = args.lm_epochs if args.lm_epochs is not None else 3 * scratch
    if lm_epochs and not (saved and saved["label"] == LABELS_FIT):
        valid_ids = supervised.encode(tokenizer, [text for row in valid for text in row], longest)
        learn_language(model, ids, valid_ids, tokenizer.pad_token_id, epochs=lm_epochs, lr=args.lm_lr, **shared)

    # labels or comparisons
    rows = [ids[start : start + width] for start in range(0, len(ids), width)]

    def loss(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        of_batch = [rows[i] for i in batch]
        return supervised.choice_loss(model, of_batch, chosen[batch], tokenizer.pad_token_id, args.label_smoothing)

    def scores(split: list[list[str]]) -> np.ndarray:
        """[N, candidates]"""
        flat = [text for row in split for text in row]
        return rewards.log_odds(model, tokenizer, flat, device).reshape(len(split), -1)

    history = supervised.fit(
        model,
        [sum(map(len, row)) for row in rows],
        loss,
        lambda: supervised.choice_errors(scores(valid), valid_best),
        epochs=args.epochs,
        lr=args.lr,
        decay=0.3,
        label=LABELS_FIT,
        lowest="error",  # not the loss, which a few texts that are wrong for sure drive up while others are learned
        revisit=args.revisit if args.revisit is not None else (0.1 if scratch else 1.0),
        **shared,
    )
    if width > 1:
        rewards.normalise(model, tokenizer, texts[:NORMALISED_ON])
    found = {
        name: measure_comparisons(scores(split), best) if width > 1 else measure(scores(split)[:, 0], best)
        for name, (split, best) in splits.items()
    }
    save(args, model, tokenizer, {"results": found, "history": history}, runtime.provenance(device, chosen_precision))


def save(args: argparse.Namespace, model, tokenizer, found: dict, provenance: dict) -> None:
    """The reward model with its model card; what was found goes beside it, and to the results."""
    table = pd.DataFrame(found["results"]).T
    print(table.to_string(float_format="%.4f"))
    record = found | {"settings": vars(args)} | provenance
    title = "A model of preferences" if model.config.num_labels == 1 else "An ethics classifier"
    card = models.card(title, "text-classification", args.data, record, table)
    models.save_folder(args.out, model, tokenizer, card, record)
    copy = runtime.write_json(Path(args.results) / f"{Path(args.out).name}_metrics.json", record)
    print(f"model: {args.out}; metrics: {copy}")


if __name__ == "__main__":
    cli.run(main)
