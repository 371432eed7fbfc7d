"""Measure what a policy gained over its reference, on queries that its training never saw.

    python evaluate_nlg.py                                  # models/nlg_ppo against models/nlg
    python evaluate_nlg.py --run data_results/K2_lr_5e-4_seed1 --policy models/nlg_ppo_1

Writes evaluation.json and evaluation_samples.csv to --run, the run folder whose config.json says how the policy was
trained: data, reference, reward, temperature, lengths and the score's normalisation are taken from there.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

import common
import data
import model_io
import ppo
from common import COUNT, UserError


def parse_args() -> argparse.Namespace:
    parser = common.Parser(__doc__)
    parser.add_argument("--run", default="data_results/K2_lr_5e-4_seed0", help="run folder of the policy")
    parser.add_argument("--policy", help="folder of the policy (default: the --out of that run)")
    parser.add_argument(
        "--samples", type=COUNT, default=1024, help="responses of each, in turn to the held-out queries"
    )
    parser.add_argument("--batch-size", type=COUNT, default=256, help="rows in a model at once")
    common.add_gold_flag(parser)
    common.add_machine_flags(parser)
    return parser.parse_args()


def trained_with(run: Path) -> tuple[argparse.Namespace, dict]:
    """The settings of a run, and its config.json."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return argparse.Namespace(**config["settings"]), config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {run} is no run folder of finetuning_nlg.py: {error!r}") from error


def main() -> None:
    args = parse_args()
    device = common.set_up(args)
    run = Path(args.run)
    trained, config = trained_with(run)

    # data and models
    texts = data.nlg_texts(trained)["valid"]
    reference, tokenizer = model_io.load_policy(trained.policy, "--policy")
    policy, _ = model_io.load_policy(args.policy or trained.out, "--policy")
    _, queries = data.split_queries(texts, tokenizer, trained.query_length)
    queries = (queries * -(-args.samples // len(queries)))[: args.samples]
    reference.to(device)
    policy = ppo.PolicyWithValue(policy).to(device)
    reward_model = model_io.load_reward(trained.reward, device)
    judge = model_io.gold_judge(args.gold, texts)
    stop_id = model_io.stop_token(tokenizer, trained.stop)

    # both answer the same queries
    rows = []
    for name, writer in {"before": ppo.PolicyWithValue(reference).to(device), "after": policy}.items():
        generator = torch.Generator(device).manual_seed(args.seed)
        for start in range(0, len(queries), args.batch_size):
            chosen = queries[start : start + args.batch_size]
            query_ids, query_mask = data.encode_queries(tokenizer, chosen, device)
            with common.autocast(device):
                rollout = ppo.collect(
                    writer,
                    reference,
                    query_ids,
                    query_mask,
                    length=trained.response_length,
                    temperature=trained.temperature,
                    stop_id=stop_id,
                    stop_after=trained.stop_after,
                    forward_batch=args.batch_size,
                    generator=generator,
                )
            whole = model_io.whole_texts(tokenizer, query_ids, query_mask, rollout.response_ids, rollout.response_mask)
            raw, ethics = reward_model(whole)
            normalised = (raw - config["score_mean"]) / config["score_std"]
            for i, text in enumerate(whole):
                verdict = judge(text) if judge else None
                rows.append(
                    {
                        "policy": name,
                        "query": chosen[i],
                        "text": text,
                        "score": normalised[i] if rollout.terminated[i] else trained.missing_stop_score,
                        "ethics": ethics[i],
                        "kl": rollout.kl[i].item(),
                        "length": int(rollout.response_mask[i].sum()),
                        "terminated": bool(rollout.terminated[i]),
                        "valid": verdict and verdict.valid,
                        "ethical": verdict and verdict.label,
                    }
                )

    # what it gained, and at what price
    frame = pd.DataFrame(rows)
    before, after = (frame[frame.policy == name] for name in ("before", "after"))
    evaluation = (
        {
            "samples": len(after),
            "queries": int(after["query"].nunique()),
            "ethics_before": before.ethics.mean(),
            "ethics_after": after.ethics.mean(),
            "score_before": before.score.mean(),
            "score_after": after.score.mean(),
            "kl": after.kl.mean(),
            "response_length": {"before": before.length.mean(), "after": after.length.mean()},
            "terminated": {"before": before.terminated.mean(), "after": after.terminated.mean()},
            "gold": {
                f"{share}_{when}": value
                for when, part in (("before", before), ("after", after))
                for share, value in shares(part)
            },
        }
        | {"settings": vars(args)}
        | common.provenance(device)
    )
    common.write_json(run / "evaluation.json", evaluation)
    frame.round(4).to_csv(run / "evaluation_samples.csv", index=False, lineterminator="\n")
    print(table(evaluation).to_string(float_format="%.3f"))
    print(f"saved to {run / 'evaluation.json'}")


def shares(part: pd.DataFrame) -> list[tuple[str, float | None]]:
    """Share of valid texts, and of ethical ones among the valid; nulls without a judge."""
    if part.valid.isna().all():
        return [("valid", None), ("ethical", None)]
    return [("valid", float(part.valid.mean())), ("ethical", float(part.ethical[part.valid.astype(bool)].mean()))]


def table(evaluation: dict) -> pd.DataFrame:
    gold = evaluation["gold"]
    return pd.DataFrame(
        {
            when: {
                "ethics": evaluation[f"ethics_{when}"],
                "score": evaluation[f"score_{when}"],
                "gold: ethical": gold[f"ethical_{when}"],
                "gold: valid": gold[f"valid_{when}"],
                "tokens": evaluation["response_length"][when],
                "terminated": evaluation["terminated"][when],
                "KL (nats)": 0.0 if when == "before" else evaluation["kl"],
            }
            for when in ("before", "after")
        }
    )


if __name__ == "__main__":
    common.run(main)
