"""Fit the reward model: an ethics classifier, or a model of preferences.

    python train_cls.py                         # a small GPT-2 from scratch: language modelling, then labels
    python train_cls.py --model models/nlg      # from the generator, as Ziegler et al. do it
    python train_cls.py --model roberta-base --data ethics.csv --text-column input --positive-label 0

Data: columns text,label with 1 = positive feedback (ethical); or comparisons: chosen,rejected (and prompt), or
query,sample0,...,sampleN,best, from which a model with one output learns (Ziegler et al. 2019, equation 1). Writes to
--out the weights of the epoch with the fewest errors on the validation rows, the tokenizer, a model card and
metrics.json.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import functools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import checkpoint, choice_data, cli, data, flags, models, outputs, recipes, rewards, runtime, supervised
from rlhf.choice_data import Choices
from rlhf.errors import UserError
from rlhf.supervised import FitSettings

LABELS = {0: "negative", 1: "positive"}
LM_DATA = "data_nlg"  # unlabelled texts of the shipped world, for language modelling before its labels
LM_STAGE, CHOICE_STAGE = "language modelling", "classifier"  # the two fits
CALIBRATION_TEXTS = 8192  # candidates on which a preference model's scores have mean 0 and standard deviation 1
BINS = 10  # of probabilities, for the calibration error


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    source = flags.add_data_flags(parser, default="data_cls")
    source.add_argument("--label-column", default="label", help="column of the label")
    source.add_argument(
        "--positive-label", help="the label that means positive feedback (default: 1, where the labels are 0 and 1)"
    )
    source.add_argument("--rows", type=cli.COUNT, help="number of rows to train on, drawn at random (default: all)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="scratch", help=models.SCRATCH_HELP)
    model.add_argument("--results", default="data_results", help="folder for a copy of metrics.json")
    model.add_argument("--out", type=cli.folder, default="models/cls", help="folder to write")
    flags.add_model_flags(model)
    training = parser.add_argument_group("training")
    recipe = functools.partial(recipes.described, recipes.CLASSIFIER)
    training.add_argument("--epochs", type=cli.COUNT, help=recipe("epochs", "passes over the labelled texts"))
    training.add_argument(
        "--lm-epochs",
        type=cli.number(int, 0),
        help="passes of language modelling before that, since a small new model learns nothing about ethics from "
        "labels alone (default: 1 over --lm-data, 3 over the labelled texts for a new model, otherwise 0)",
    )
    training.add_argument(
        "--lm-data",
        help="texts for it, as --data of train_nlg.py, in a column text, sentence, input, content or prompt (default: "
        "data_nlg for a new model of the shipped labels, otherwise the labelled texts)",
    )
    training.add_argument("--lm-lr", type=cli.POSITIVE, default=6e-3, help="peak learning rate of language modelling")
    training.add_argument("--batch-size", type=cli.COUNT, default=32, help="texts per step")
    training.add_argument("--lr", type=cli.POSITIVE, help=recipe("lr", "peak learning rate"))
    training.add_argument("--optimizer", choices=("adamw", "muon"), help=recipe("optimizer", "muon is the faster"))
    revisit_help = "fraction of the learned texts that a pass takes again; a small one leaves time for the hard texts"
    training.add_argument("--revisit", type=cli.FRACTION, help=recipe("revisit", revisit_help))
    smoothing_help = "fraction of every label that is spread over all choices; it bounds the log-odds, and so the score"
    training.add_argument("--label-smoothing", type=cli.FRACTION, help=recipe("label_smoothing", smoothing_help))
    training.add_argument("--max-length", type=cli.COUNT, default=128, help="longest text in tokens; the rest is cut")
    flags.add_machine_flags(parser)
    flags.add_checkpoint_flags(parser.add_argument_group("checkpoints"), every=200)
    args = parser.parse_args()
    recipes.fill(args, recipes.with_lora(recipes.CLASSIFIER, args.lora), args.model)
    flags.check_lora(args, args.model, "--model")
    is_new = models.is_scratch(args.model)
    if is_new and args.data == parser.get_default("data") and Path(LM_DATA).is_dir():
        args.lm_data = args.lm_data or LM_DATA
    if args.lm_epochs is None:
        args.lm_epochs = 1 if args.lm_data else 3 if is_new else 0
    return args


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args.device, args.seed, args.batch_size)
    with checkpoint.opened(args, outputs.metrics_file(args)) as checkpoints:
        train(args, device, checkpoints)


def train(args: argparse.Namespace, device: torch.device, checkpoints: checkpoint.Checkpoints) -> None:
    # data
    splits = choice_data.load_choices(
        args.data,
        args.data_config,
        args.data_revision,
        text_columns=args.text_column,
        label_column=args.label_column,
        positive_label=args.positive_label,
        train_rows=args.rows,
        seed=args.seed,
    )
    training = splits.pop("train")
    labelled_texts = {"train": training.texts, "valid": splits["valid"].texts}
    lm_texts = data.load_texts(args.lm_data) if args.lm_data else labelled_texts

    # model
    compares = len(training.candidates[0]) > 1
    all_texts = [*training.texts, *lm_texts["train"]] if args.lm_data else training.texts
    model, tokenizer = load_model(args.model, all_texts, {0: "score"} if compares else LABELS)
    model, dtype = supervised.prepare(args, model, recipes.CLASSIFIER, device)
    max_length = min(args.max_length, models.max_length(model, tokenizer))
    tokenizer.model_max_length = max_length  # where every script that scores with this model cuts texts, too
    ids = tokenizer(models.with_a_token(tokenizer, training.texts), truncation=True)["input_ids"]

    # fit: language modelling, then labels or comparisons
    lm_settings, choice_settings = fit_settings(args)
    if lm_settings.epochs and checkpoints.stage != CHOICE_STAGE:
        lm_ids = [supervised.encode(tokenizer, lm_texts[name], max_length) for name in ("train", "valid")]
        fit_language_model(model, *lm_ids, tokenizer.pad_token_id, lm_settings, device, checkpoints)
    if compares:
        rewards.reset_head(model)
    history = fit_choices(
        model, tokenizer, ids, training, splits["valid"], args.label_smoothing, choice_settings, device, checkpoints
    )

    # report
    results = {name: measure_split(model, tokenizer, split, device) for name, split in splits.items()}
    if compares:
        rewards.calibrate_head(model, tokenizer, training.texts[:CALIBRATION_TEXTS])
    record = {"results": results, "history": history, "settings": vars(args)} | runtime.provenance(device, dtype)
    save(args, model, tokenizer, record)


def fit_settings(args: argparse.Namespace) -> tuple[FitSettings, FitSettings]:
    """The settings of language modelling, of 0 epochs if there is none, and of learning from labels or comparisons."""
    shared = {"batch_size": args.batch_size, "muon": args.optimizer == "muon", "seed": args.seed}
    lm_settings = FitSettings(epochs=args.lm_epochs, lr=args.lm_lr, **shared)
    # selected by error: a few texts that are wrong for sure raise the loss while others are still being learned
    choice_settings = FitSettings(
        epochs=args.epochs, lr=args.lr, decay_fraction=0.3, revisit=args.revisit, select_by="error", **shared
    )
    return lm_settings, choice_settings


def load_model(name: str, texts: list[str], labels: dict[int, str]):
    """The reward model before training, with an output for each of `labels`, and its tokenizer."""
    outputs = {"num_labels": len(labels), "id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    if not models.is_scratch(name):
        return models.load_pretrained(AutoModelForSequenceClassification, name, "--model", new_head=True, **outputs)
    tokenizer = models.scratch_tokenizer(texts)
    config = models.scratch_config(tokenizer, name)
    config.update(outputs)
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def fit_language_model(
    model,
    ids: list[list[int]],
    valid_ids: list[list[int]],
    pad_id: int,
    settings: FitSettings,
    device: torch.device,
    checkpoints: checkpoint.Checkpoints,
) -> None:
    """Language modelling with the classifier's own body, under an output layer that is thrown away."""
    if supervised.reads_ahead(model.base_model):
        raise UserError(
            "--lm-epochs is for models that read from left to right, and --model is an encoder; leave it out"
        )
    generator = AutoModelForCausalLM.from_config(model.config).to(device)
    setattr(generator, generator.base_model_prefix, model.base_model)
    generator.tie_weights()

    def loss_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        return supervised.lm_loss(generator, *supervised.pad([ids[i] for i in batch], pad_id, device))

    def validate() -> dict[str, float]:
        return supervised.perplexity(generator, valid_ids, pad_id, device)

    lengths = [len(row) for row in ids]
    supervised.fit(
        generator, lengths, loss_of, validate, settings, stage=LM_STAGE, device=device, checkpoints=checkpoints
    )


def fit_choices(
    model,
    tokenizer,
    ids: list[list[int]],
    training: Choices,
    valid: Choices,
    label_smoothing: float,
    settings: FitSettings,
    device: torch.device,
    checkpoints: checkpoint.Checkpoints,
) -> list[dict[str, float]]:
    """Learn labels or comparisons. Returns the validation metrics of every epoch.

    ids: the token ids of training.texts.
    """
    width = len(training.candidates[0])
    rows = [ids[start : start + width] for start in range(0, len(ids), width)]
    chosen = torch.tensor(training.chosen, device=device)

    def loss_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        batch_rows = [rows[i] for i in batch]
        return supervised.choice_loss(model, batch_rows, chosen[batch], tokenizer.pad_token_id, label_smoothing)

    def validate() -> dict[str, float]:
        return supervised.choice_errors(scores_of(model, tokenizer, valid, device), valid.chosen)

    lengths = [sum(map(len, row)) for row in rows]
    return supervised.fit(
        model, lengths, loss_of, validate, settings, stage=CHOICE_STAGE, device=device, checkpoints=checkpoints
    )


def scores_of(model, tokenizer, split: Choices, device: torch.device) -> np.ndarray:
    """Scores of the candidates, or log-odds of the only one, [N, candidates]."""
    return rewards.log_odds(model, tokenizer, split.texts, device).reshape(len(split.candidates), -1)


# how well it did


def measure_split(model, tokenizer, split: Choices, device: torch.device) -> dict[str, float | None]:
    """The results of the rows of a split."""
    scores = scores_of(model, tokenizer, split, device)
    if scores.shape[1] > 1:
        return measure_comparisons(scores, split.chosen)
    return measure(scores[:, 0], split.chosen)


def measure(log_odds: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """How well log-odds [N] predict labels [N]."""
    probability, predicted = 1 / (1 + np.exp(-log_odds)), log_odds > 0
    has_both_labels = 0 < labels.mean() < 1
    return {
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "f1": sklearn_metrics.f1_score(labels, predicted),
        "roc_auc": sklearn_metrics.roc_auc_score(labels, log_odds) if has_both_labels else None,
        "brier": sklearn_metrics.brier_score_loss(labels, probability),
        "calibration_error": calibration_error(probability, labels),
        "rows": len(labels),
    }


def measure_comparisons(scores: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """How well scores [N, candidates] tell which candidate is best [N]; by chance, accuracy is 1 / candidates."""
    rows = np.arange(len(best))
    others = np.delete(scores, best + rows * scores.shape[1]).reshape(len(best), -1)
    margins = scores[rows, best][:, None] - others
    probability = 1 / (1 + np.exp(-np.abs(margins)))  # that a pair goes as its scores say
    return {
        "accuracy": float((scores.argmax(1) == best).mean()),
        "pairwise_accuracy": float((margins > 0).mean()),
        "log_loss": float(supervised.choice_log_loss(scores, best).mean()),
        "calibration_error": calibration_error(probability.ravel(), (margins > 0).ravel()),
        "rows": len(best),
    }


def calibration_error(probability: np.ndarray, outcome: np.ndarray) -> float:
    """The mean distance of predicted probabilities from the frequency of the outcome, over bins of equal width."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = [(bins == b).mean() * abs(probability[bins == b].mean() - outcome[bins == b].mean()) for b in set(bins)]
    return float(sum(gaps))


def save(args: argparse.Namespace, model, tokenizer, record: dict) -> None:
    """Print the results, and write the reward model."""
    results = pd.DataFrame(record["results"]).T
    print(results.to_string(float_format="%.4f"))
    title = "A model of preferences" if model.config.num_labels == 1 else "An ethics classifier"
    outputs.save_trained(args, model, tokenizer, title, "text-classification", results, record)


if __name__ == "__main__":
    cli.run(main)
