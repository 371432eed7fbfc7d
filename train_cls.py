"""Fit the ethics classifier, which becomes the reward model.

    python train_cls.py                                                     # a small GPT-2 from scratch
    python train_cls.py --model models/nlg --optimizer muon --revisit 0.1   # from the generator, as [1] does it
    python train_cls.py --model roberta-base --lr 2e-5 --epochs 3 --batch-size 32 \\
        --data ethics.csv --text-column input --positive-label 0

Data: columns text,label with 1 = positive feedback (ethical). Writes --out with the weights that did best on the
validation rows, the tokenizer, a model card and metrics.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn import metrics as sk
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2ForSequenceClassification

import checkpoint
import common
import data
import model_io
import supervised
from common import UserError

LABELS = {0: "negative", 1: "positive"}
LABELS_FIT = "classifier"  # what the fit to labels is called, after that to language


def parse_args() -> argparse.Namespace:
    parser = common.Parser(__doc__)
    source = common.add_data_flags(parser, default="data_cls")
    source.add_argument("--label-column", default="label", help="column of the label")
    source.add_argument(
        "--positive-label", help="the label that means positive feedback (default: 1, with 0 the other)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="scratch", help="scratch (a small GPT-2), a folder or a hub name")
    model.add_argument("--results", default="data_results", help="folder of the results: a copy of metrics.json")
    model.add_argument("--out", default="models/cls", help="folder to write")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=common.COUNT, default=8, help="passes over the labelled texts")
    training.add_argument(
        "--lm-epochs",
        type=common.number(int, 0),
        help="passes of language modelling before (default: 3 for scratch, otherwise 0); "
        "a small new model learns nothing of ethics from labels alone",
    )
    training.add_argument("--lm-lr", type=common.POSITIVE, default=6e-3, help="peak learning rate of these")
    training.add_argument("--batch-size", type=common.COUNT, default=32, help="texts per step")
    training.add_argument("--lr", type=common.POSITIVE, default=1e-3, help="peak learning rate")
    training.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        help="default: muon for scratch, which it teaches faster; otherwise adamw",
    )
    training.add_argument(
        "--revisit",
        type=common.FRACTION,
        help="share of the learned texts that a pass goes through again (default: 0.1 for scratch, otherwise 1); "
        "where labels have no noise this gives the hard texts the time",
    )
    training.add_argument(
        "--label-smoothing",
        type=common.FRACTION,
        default=0.0,
        help="how much of a label is taken for chance: it bounds the log-odds, and so what one text can score",
    )
    training.add_argument("--max-length", type=common.COUNT, default=128, help="longest text in tokens")
    common.add_machine_flags(parser)
    checkpoint.add_flags(parser.add_argument_group("checkpoints"), every=200)
    return parser.parse_args()


def labelled(rows, args: argparse.Namespace) -> tuple[list[str], np.ndarray]:
    """Texts and labels, 1 = positive."""
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
    return texts, np.array([value == positive for value in values], dtype=np.float32)


def measure(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well log-odds [N] predict labels [N]; the calibration error compares ten bins of equal width."""
    probability, said = 1 / (1 + np.exp(-scores)), scores > 0
    bins = np.minimum((probability * 10).astype(int), 9)
    gaps = [(bins == b).mean() * abs(probability[bins == b].mean() - labels[bins == b].mean()) for b in set(bins)]
    return {
        "accuracy": sk.accuracy_score(labels, said),
        "f1": sk.f1_score(labels, said),
        "roc_auc": sk.roc_auc_score(labels, scores) if 0 < labels.mean() < 1 else None,  # it compares two kinds
        "brier": sk.brier_score_loss(labels, probability),
        "calibration_error": float(sum(gaps)),
        "rows": len(labels),
    }


def load_model(args: argparse.Namespace, texts: list[str]):
    """The classifier before training, and its tokenizer."""
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    if args.model != "scratch":
        return model_io.load_pretrained(
            AutoModelForSequenceClassification, args.model, "--model", num_labels=2, **labels
        )
    tokenizer = model_io.scratch_tokenizer(texts)
    config = model_io.scratch_config(tokenizer)
    config.update({"num_labels": 2, **labels})
    return GPT2ForSequenceClassification(config), tokenizer


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
    device = common.set_up(args)
    with checkpoint.keeping(args) as (saved, keep):
        train(args, device, saved, keep)


def train(args: argparse.Namespace, device: torch.device, saved: dict | None, keep: checkpoint.Keep) -> None:
    scratch = args.model == "scratch"

    # data
    loaded = data.load_splits(args.data, args.data_config, args.data_revision)
    splits = {name: labelled(rows, args) for name, rows in loaded.items()}
    texts, labels = splits["train"]
    if "valid" in splits:
        train, valid = np.arange(len(texts)), splits["valid"]
    else:
        train, held_out = data.split_off(len(texts), 0.1, args.seed)
        valid = [texts[i] for i in held_out], labels[held_out]
    texts, labels = [texts[i] for i in train], torch.tensor(labels[train], device=device)

    # model
    model, tokenizer = load_model(args, texts)
    model.to(device)
    longest = min(args.max_length, model_io.longest(model, tokenizer))
    ids = supervised.encode(tokenizer, texts, longest)
    shared = {
        "batch_size": args.batch_size,
        "muon": (args.optimizer or ("muon" if scratch else "adamw")) == "muon",
        "device": device,
        "seed": args.seed,
        "keep": keep,
        "saved": saved,
    }

    # language modelling first, on the classifier's own body
    lm_epochs = args.lm_epochs if args.lm_epochs is not None else 3 * scratch
    if lm_epochs and not (saved and saved["label"] == LABELS_FIT):
        valid_ids = supervised.encode(tokenizer, valid[0], longest)
        learn_language(model, ids, valid_ids, tokenizer.pad_token_id, epochs=lm_epochs, lr=args.lm_lr, **shared)

    # labels
    chance = args.label_smoothing / 2
    least = float(torch.special.entr(torch.tensor([chance, 1 - chance])).sum())  # a smoothed label's own entropy

    def loss(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, mask = supervised.pad([ids[i] for i in batch], tokenizer.pad_token_id, device)
        logits = model(input_ids=inputs, attention_mask=mask).logits.float()
        smoothed = cross_entropy(logits, labels[batch].long(), reduction="none", label_smoothing=args.label_smoothing)
        return smoothed - least, torch.ones_like(smoothed)  # 0 for a text that is learned, whatever the smoothing

    def validate() -> dict[str, float]:
        scores = model_io.log_odds(model, tokenizer, valid[0], device)
        log_loss = float(np.logaddexp(0, np.where(valid[1] == 1, -scores, scores)).mean())
        return {"loss": log_loss, "error": float(np.mean((scores > 0) != valid[1]))}

    history = supervised.fit(
        model,
        [len(row) for row in ids],
        loss,
        validate,
        epochs=args.epochs,
        lr=args.lr,
        decay=0.3,
        label=LABELS_FIT,
        lowest="error",  # not the loss, which a few texts that are wrong for sure drive up while others are learned
        revisit=args.revisit if args.revisit is not None else (0.1 if scratch else 1.0),
        **shared,
    )

    # report
    report = {"valid": valid} | {name: split for name, split in splits.items() if name not in ("train", "valid")}
    found = {
        name: measure(model_io.log_odds(model, tokenizer, split[0], device), split[1]) for name, split in report.items()
    }
    table = pd.DataFrame(found).T
    print(table.to_string(float_format="%.4f"))
    record = {"results": found, "history": history, "settings": vars(args)} | common.provenance(device)
    card = model_io.card("An ethics classifier", "text-classification", args.data, record, table)
    model_io.save_folder(args.out, model, tokenizer, card, record)
    copy = common.write_json(Path(args.results) / f"{Path(args.out).name}_metrics.json", record)
    print(f"model: {args.out}; metrics: {copy}")


if __name__ == "__main__":
    common.run(main)
