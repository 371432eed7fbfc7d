"""Fit the generator, which becomes the reference policy.

    python train_nlg.py                                     # the shipped texts, a small GPT-2 from scratch
    python train_nlg.py --model gpt2 --lr 5e-5 --epochs 3 --batch-size 16 --data stories.jsonl --text-column story

Data: one unlabelled text a line. Writes --out with the weights that did best on the validation texts, the
tokenizer, a model card and metrics.json.
"""

import argparse
import copy
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from rlhf import checkpoint, cli, data, models, precision, rewards, runtime, supervised


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    source = cli.add_data_flags(parser, default="data_nlg")
    cli.add_gold_flag(source)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="scratch", help=models.SCRATCH_HELP)
    model.add_argument("--results", default="data_results", help="folder of the results: a copy of metrics.json")
    model.add_argument("--out", default="models/nlg", help="folder to write")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.COUNT, default=4, help="passes over the training texts")
    training.add_argument("--batch-size", type=cli.COUNT, default=32, help="texts per step")
    training.add_argument("--lr", type=cli.POSITIVE, default=8e-3, help="peak learning rate")
    training.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        help="default: muon for scratch, which it teaches faster; otherwise adamw",
    )
    training.add_argument("--max-length", type=cli.COUNT, default=128, help="longest text in tokens")
    sampling = parser.add_argument_group("samples for the report")
    sampling.add_argument("--samples", type=cli.SAMPLE_COUNT, default=1024, help="how many to write and judge")
    cli.add_sampling_flags(sampling)
    cli.add_machine_flags(parser)
    checkpoint.add_flags(parser.add_argument_group("checkpoints"), every=200)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args)
    with checkpoint.keeping(args) as (saved, keep):
        train(args, device, saved, keep)


def train(args: argparse.Namespace, device: torch.device, saved: dict | None, keep: checkpoint.Keep) -> None:
    scratch = models.is_scratch(args.model)

    # data
    texts = data.nlg_texts(args)

    # model
    if scratch:
        tokenizer = models.scratch_tokenizer(texts["train"])
        model = AutoModelForCausalLM.from_config(models.scratch_config(tokenizer, args.model))
    else:
        model, tokenizer = models.load_policy(args.model, "--model")
    tokens = args.query_length + args.response_length
    models.check_length(model, tokenizer, tokens, "--query-length and --response-length")
    model.to(device)
    chosen = precision.choose(args.precision, device, model)
    runtime.say_where(device, chosen)
    precision.set_precision(model, chosen)
    queries, _ = data.split_queries(texts["valid"], tokenizer, args.query_length)

    # training
    longest = min(args.max_length, models.longest(model, tokenizer))
    ids = {name: supervised.encode(tokenizer, texts[name], longest, end=True) for name in ("train", "valid")}
    history = supervised.fit(
        model,
        [len(row) for row in ids["train"]],
        lambda batch: supervised.lm_loss(
            model, *supervised.pad([ids["train"][i] for i in batch], tokenizer.pad_token_id, device)
        ),
        lambda: supervised.perplexity(model, ids["valid"], tokenizer.pad_token_id, device),
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        muon=(args.optimizer or ("muon" if scratch else "adamw")) == "muon",
        device=device,
        seed=args.seed,
        decay=1.0,
        label="generator",
        keep=keep,
        saved=saved,
    )

    writer = precision.freeze(copy.deepcopy(model), chosen)
    judge = rewards.gold_judge(args.gold, texts["valid"], device, args.precision)
    found = {"valid_perplexity": min(row["perplexity"] for row in history)}
    found |= judge_samples(args, writer, tokenizer, queries, judge)
    record = {"results": found, "history": history, "settings": vars(args)} | runtime.provenance(device, chosen)
    save(args, model, tokenizer, record)


def judge_samples(
    args: argparse.Namespace, writer, tokenizer, queries: list[str], judge: rewards.Judge | None
) -> dict[str, float | None]:
    """Shows samples at --temperature and at 1, and returns what the gold judge says of them."""
    queries, found = (queries * -(-args.samples // len(queries)))[: args.samples], {}
    for temperature in sorted({args.temperature, 1.0}):
        samples = models.continuations(
            writer,
            tokenizer,
            queries,
            length=args.response_length,
            temperature=temperature,
            stop_id=tokenizer.eos_token_id,
            generator=torch.Generator().manual_seed(args.seed),
        )
        shares = rewards.gold_shares(rewards.judged(judge, samples))
        found |= {f"{name}_at_{temperature:g}": share for name, share in shares.items()}
        print(f"\nsamples at temperature {temperature:g}")
        for text in samples[:5]:
            print("  " + text)
    return found


def save(args: argparse.Namespace, model, tokenizer, record: dict) -> None:
    """The generator with its model card; what was found goes beside it, and to the results."""
    table = pd.Series(record["results"], name="value").to_frame()
    print("\n" + table.to_string(float_format="%.4f"))
    card = models.card("A generator", "text-generation", args.data, record, table)
    model.generation_config = models.plain_sampling(
        tokenizer, args.temperature, args.response_length, tokenizer.eos_token_id
    )
    models.save_folder(args.out, model, tokenizer, card, record)
    written = runtime.write_json(Path(args.results) / f"{Path(args.out).name}_metrics.json", record)
    print(f"model: {args.out}; metrics: {written}")


if __name__ == "__main__":
    cli.run(main)
