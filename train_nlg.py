"""Fit the generator, which becomes the reference policy.

    python train_nlg.py                         # the shipped texts, a small GPT-2 from scratch
    python train_nlg.py --model gpt2 --data stories.jsonl --text-column story

Data: texts without labels, one per line or row. Writes to --out the weights of the epoch with the lowest validation
loss, the tokenizer, a model card and metrics.json.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import copy
import functools

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from rlhf import (
    checkpoint,
    cli,
    data,
    flags,
    gold,
    models,
    outputs,
    precision,
    prompting,
    querying,
    recipes,
    runtime,
    supervised,
)
from rlhf.sampling import Sampling

SHOWN = 5  # samples printed at each temperature


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    source = flags.add_data_flags(parser, default="data_nlg")
    flags.add_gold_flag(source)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="scratch", help=models.SCRATCH_HELP)
    model.add_argument("--results", default="data_results", help="folder for a copy of metrics.json")
    model.add_argument("--out", type=cli.folder, default="models/nlg", help="folder to write")
    flags.add_model_flags(model)
    training = parser.add_argument_group("training")
    recipe = functools.partial(recipes.described, recipes.GENERATOR)
    training.add_argument("--epochs", type=cli.COUNT, help=recipe("epochs", "passes over the training texts"))
    training.add_argument("--batch-size", type=cli.COUNT, default=32, help="texts per step")
    training.add_argument("--lr", type=cli.POSITIVE, help=recipe("lr", "peak learning rate"))
    training.add_argument("--optimizer", choices=("adamw", "muon"), help=recipe("optimizer", "muon is the faster"))
    training.add_argument("--max-length", type=cli.COUNT, default=128, help="longest text in tokens; the rest is cut")
    samples = parser.add_argument_group("samples for the report")
    samples.add_argument("--samples", type=cli.SAMPLE_COUNT, default=1024, help="how many to draw and judge")
    flags.add_sampling_flags(samples)
    flags.add_machine_flags(parser)
    flags.add_checkpoint_flags(parser.add_argument_group("checkpoints"), every=200)
    args = parser.parse_args()
    recipes.fill(args, recipes.with_lora(recipes.GENERATOR, args.lora), args.model)
    flags.check_lora(args, args.model, "--model")
    return args


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args.device, args.seed, args.batch_size)
    with checkpoint.opened(args, outputs.metrics_file(args)) as checkpoints:
        train(args, device, checkpoints)


def train(args: argparse.Namespace, device: torch.device, checkpoints: checkpoint.Checkpoints) -> None:
    # data
    texts = data.load_texts(args.data, args.data_config, args.data_revision, args.text_column)

    # model
    if models.is_scratch(args.model):
        tokenizer = models.scratch_tokenizer(texts["train"])
        model = AutoModelForCausalLM.from_config(models.scratch_config(tokenizer, args.model))
    else:
        model, tokenizer = models.load_policy(args.model, "--model")
    tokens = args.query_length + args.response_length
    models.check_length(model, tokenizer, tokens, "--query-length and --response-length")
    queries, _ = querying.split_queries(texts["valid"], tokenizer, args.query_length)
    judge = gold.load_judge(args.gold, texts["valid"], device, args.precision)
    model, dtype = supervised.prepare(args, model, recipes.GENERATOR, device)

    # fit
    settings = supervised.FitSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        muon=args.optimizer == "muon",
        seed=args.seed,
    )
    history = fit(model, tokenizer, texts, args.max_length, settings, device, checkpoints)

    # report
    metrics = {"valid_perplexity": min(row["perplexity"] for row in history)}
    writer = model if args.lora else precision.freeze(copy.deepcopy(model), dtype)
    metrics |= judge_samples(args, writer, tokenizer, queries, judge)
    record = {"results": metrics, "history": history, "settings": vars(args)} | runtime.provenance(device, dtype)
    save(args, model, tokenizer, record)


def fit(
    model,
    tokenizer,
    texts: dict[str, list[str]],
    max_length: int,
    settings: supervised.FitSettings,
    device: torch.device,
    checkpoints: checkpoint.Checkpoints,
) -> list[dict[str, float]]:
    """Language modelling on texts["train"]. Returns the perplexity of texts["valid"] and more after every epoch."""
    max_length, pad_id = min(max_length, models.max_length(model, tokenizer)), tokenizer.pad_token_id
    train, valid = (
        supervised.encode(tokenizer, texts[name], max_length, end_of_text=True) for name in ("train", "valid")
    )

    def loss_of(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return supervised.lm_loss(model, *supervised.pad([train[i] for i in batch], pad_id, device))

    def validate() -> dict[str, float]:
        return supervised.perplexity(model, valid, pad_id, device)

    lengths = [len(ids) for ids in train]
    return supervised.fit(
        model, lengths, loss_of, validate, settings, stage="generator", device=device, checkpoints=checkpoints
    )


def judge_samples(
    args: argparse.Namespace, model, tokenizer, queries: list[str], judge: gold.Judge | None
) -> dict[str, float | None]:
    """Print samples at --temperature and at 1. Returns the fractions that the gold judge finds valid and ethical."""
    queries, metrics = (queries * -(-args.samples // len(queries)))[: args.samples], {}
    for temperature in sorted({args.temperature, 1.0}):
        sampling = Sampling(args.response_length, temperature, tokenizer.eos_token_id)
        generator = torch.Generator().manual_seed(args.seed)
        samples = models.continuations(model, prompting.Texts(tokenizer), queries, sampling, generator)
        shares = gold.shares(gold.judged(judge, samples))
        metrics |= {f"{name}_at_{temperature:g}": share for name, share in shares.items()}
        print(f"\nsamples at temperature {temperature:g}")
        for text in samples[:SHOWN]:
            print("  " + text)
    return metrics


def save(args: argparse.Namespace, model, tokenizer, record: dict) -> None:
    """Print the results, and write the generator."""
    known = {name: value for name, value in record["results"].items() if value is not None}  # the judge may be silent
    results = pd.Series(known, name="value").to_frame()
    print("\n" + results.to_string(float_format="%.4f"))
    sampling = Sampling(args.response_length, args.temperature, tokenizer.eos_token_id)
    model.generation_config = models.generation_config(tokenizer, sampling)
    outputs.save_trained(args, model, tokenizer, "A generator", "text-generation", results, record)


if __name__ == "__main__":
    cli.run(main)
