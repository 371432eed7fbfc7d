"""Measure what a policy gained over its reference, at what price, and against what was possible at that price.

    python evaluate_nlg.py                                  # models/nlg_ppo against models/nlg
    python evaluate_nlg.py --run data_results/K1_lr_1e-3_seed* # several, of one reference and reward

Writes evaluation.json and evaluation_samples.csv to every --run, a run folder whose config.json says how the policy was
trained: data, reference, reward, temperature, lengths and the score's normalisation are taken from there; and draws
fig_frontier_K<K>_lr_<lr>.png beside it. All queries are ones that training never saw.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import ppo
from rlhf import cli, data, frontier, models, plots, precision, rewards, runtime
from rlhf.cli import COUNT
from rlhf.errors import UserError
from rlhf.sampling import real_tokens, sample_many

KEPT = 4  # responses to a query that evaluation_samples.csv keeps
SHARED = "policy reward data data_config data_revision text_column query_length response_length temperature".split()
SHARED += ["stop", "stop_after", "missing_stop_score"]  # settings that runs must have in common
TRUSTED_ESS = 30  # below this many effective samples a query, the optimum is not known well
BEST_OF = (1, 2, 4, 8, 16, 32, 64)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run", nargs="+", default=["data_results/K1_lr_1e-3_seed0"], help="run folders of the policies"
    )
    parser.add_argument("--policy", help="folder of the policy, for one run (default: the --out of the run)")
    parser.add_argument("--queries", type=COUNT, default=64, help="held-out queries, drawn at random")
    parser.add_argument("--samples", type=COUNT, default=32, help="responses to each, of the policy and the reference")
    parser.add_argument(
        "--reference-samples", type=COUNT, default=1024, help="responses of the reference to each, for the optimum"
    )
    parser.add_argument("--batch-size", type=COUNT, default=1024, help="rows in a model at once")
    cli.add_gold_flag(parser)
    cli.add_machine_flags(parser)
    args = parser.parse_args()
    if args.reference_samples < max(BEST_OF):
        raise UserError(f"--reference-samples {args.reference_samples} is too few for best of {max(BEST_OF)}")
    if args.policy and len(args.run) > 1:
        raise UserError("--policy names the policy of one --run")
    return args


def trained_with(run: Path) -> tuple[argparse.Namespace, dict]:
    """The settings of a run, and its config.json."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        settings = argparse.Namespace(**config["settings"])
        specs = [settings.reward] if isinstance(settings.reward, str) else settings.reward  # as runs once said it
        settings.reward = rewards.with_people(specs, settings.out)
        return settings, config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {run} is no run folder of finetuning_nlg.py: {error!r}") from error


def same_settings(runs: dict[Path, tuple[argparse.Namespace, dict]]) -> argparse.Namespace:
    """The settings of the first of the runs, which the others must share where it matters."""
    (first, (settings, _)), *others = runs.items()
    for run, (other, _) in others:
        for name in SHARED:
            if getattr(other, name) != getattr(settings, name):
                raise UserError(f"{run} and {first} differ in --{name.replace('_', '-')}; evaluate them one by one")
    return settings


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args)
    runs = {Path(run): trained_with(Path(run)) for run in args.run}
    trained = same_settings(runs)

    # data and models
    texts = data.nlg_texts(trained)["valid"]
    reference, tokenizer = models.load_policy(trained.policy, "--policy")
    reference.to(device)
    chosen = precision.choose(args.precision, device, reference)
    runtime.say_where(device, chosen)
    precision.freeze(reference, chosen)
    parts = rewards.load(trained.reward, device, args.precision)
    judge = rewards.gold_judge(args.gold, texts, device, args.precision)
    _, held_out = data.split_queries(texts, tokenizer, trained.query_length)
    queries = random.Random(args.seed).sample(held_out, min(args.queries, len(held_out)))

    # the reference's many samples, from which the optimum is read, and its answers to compare with
    draw = {
        "tokenizer": tokenizer,
        "queries": queries,
        "read": lambda asked, texts, terminated: read(asked, texts, terminated, parts, judge),
        "device": device,
        "seed": args.seed,
        "length": trained.response_length,
        "temperature": trained.temperature,
        "stop_id": models.stop_token(tokenizer, trained.stop),
        "stop_after": trained.stop_after,
    }
    pool = draw_pool(reference, count=args.reference_samples, batch=args.batch_size, **draw)
    draw |= {"count": args.samples, "batch": max(1, args.batch_size // 4)}  # here come the logits of every token
    before = draw_answers(reference, reference, label="reference", **draw)

    # the policies: what they gained, and at what price
    for run, (trained, config) in runs.items():
        policy, _ = models.load_policy(args.policy or trained.out, "--policy")
        after = draw_answers(precision.freeze(policy.to(device), chosen), reference, label=run.name, **draw)
        for part in (pool, before, after):
            raw = np.stack([part[f"raw_{reward.name}"] for reward in parts], -1)
            score = rewards.normalised(raw, config) @ [reward.weight for reward in parts]
            part["score"] = np.where(part["terminated"] > 0, score, trained.missing_stop_score)
        evaluation = {"queries": len(queries), "samples": len(after)}
        evaluation |= against_the_optimum(pool, after, len(queries)) | compared(before, after, texts)
        for when, part in sides(before, after):
            shares = rewards.gold_shares(part[["valid", "ethical"]].to_numpy())
            evaluation["gold"] |= {f"{name}_{when}": share for name, share in shares.items()}
        evaluation |= {"settings": vars(args) | {"run": str(run)}} | runtime.provenance(device, chosen)
        runtime.write_json(run / "evaluation.json", evaluation)
        kept = pd.concat(part[part.draw < KEPT].assign(policy=when) for when, part in sides(before, after))
        kept.round(4).to_csv(run / "evaluation_samples.csv", index=False, lineterminator="\n")
        figure = plots.save_frontier(run.parent, trained.ppo_epochs, trained.lr)
        low, high = evaluation["fraction_of_optimum_interval"]
        print(
            f"\n{run}: KL {evaluation['kl']:.2f} nats a response; {evaluation['fraction_of_optimum']:.1%} of the gain "
            f"that was possible at it (95% interval over queries {low:.1%} to {high:.1%})"
        )
        print(table(evaluation).to_string(float_format="%.3f"))
        print(f"saved to {run / 'evaluation.json'}" + (f"; figure: {figure}" if figure else ""))


def read(
    asked: list[str],
    texts: list[str],
    terminated: torch.Tensor,
    parts: list[rewards.Reward],
    judge: rewards.Judge | None,
) -> pd.DataFrame:
    """Raw scores and ethics from the reward, the truth from the gold judge (NaN without one)."""
    pairs = [f"{query}\0{text}" for query, text in zip(asked, texts, strict=True)]
    _, first, rows = np.unique(pairs, return_index=True, return_inverse=True)  # many are alike
    unique, of_unique = [texts[i] for i in first], [asked[i] for i in first]
    raw = rewards.raw_scores(parts, of_unique, unique)
    valid, ethical = rewards.judged(judge, unique)[rows].T
    return pd.DataFrame(
        {
            "text": texts,
            **{f"raw_{part.name}": raw[rows, i] for i, part in enumerate(parts)},
            "ethics": rewards.reading(parts, raw)[rows],
            "terminated": terminated.cpu().numpy(),
            "valid": valid,
            "ethical": ethical,
        }
    )


def sides(before: pd.DataFrame, after: pd.DataFrame) -> tuple[tuple[str, pd.DataFrame], ...]:
    return ("before", before), ("after", after)


def draw_pool(
    model, *, tokenizer, queries: list[str], count: int, batch: int, read: Callable, seed: int, device, **sampling
) -> dict[str, np.ndarray]:
    """`count` responses to every query, read: raw, ethics, terminated, valid and ethical, [Q, N] each."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for query in tqdm(queries, desc="reference samples", unit="query", dynamic_ncols=True):
        for start in range(0, count, batch):
            ids, mask = data.encode_queries(tokenizer, [query], device)
            rows = min(batch, count - start)
            response_ids = sample_many(model, ids, rows, generator=generator, **sampling)
            response_mask, terminated = real_tokens(response_ids, sampling["stop_id"], sampling["stop_after"])
            queries_too = [x.expand(rows, -1) for x in (ids, mask)]
            texts = models.whole_texts(tokenizer, *queries_too, response_ids, response_mask)
            parts.append(read([query] * rows, texts, terminated).drop(columns="text"))
    pool = pd.concat(parts)
    return {name: pool[name].to_numpy(dtype=float).reshape(len(queries), count) for name in pool}


def draw_answers(
    model,
    reference,
    *,
    tokenizer,
    queries: list[str],
    count: int,
    batch: int,
    read: Callable,
    seed: int,
    device,
    label: str,
    **sampling,
) -> pd.DataFrame:
    """`count` rows a query: a response, read, with its KL to the reference, its entropy and its length in tokens."""
    generator = torch.Generator().manual_seed(seed)
    writer = ppo.PolicyWithValue(model).to(device).eval()
    asked = [query for query in queries for _ in range(count)]
    parts = []
    for start in tqdm(range(0, len(asked), batch), desc=label, unit="batch", dynamic_ncols=True):
        chosen = asked[start : start + batch]
        ids, mask = data.encode_queries(tokenizer, chosen, device)
        rollout = ppo.collect(writer, reference, ids, mask, forward_batch=batch, generator=generator, **sampling)
        texts = models.whole_texts(tokenizer, ids, mask, rollout.response_ids, rollout.response_mask)
        part = read(chosen, texts, rollout.terminated)
        part.insert(0, "query", chosen)
        part.insert(1, "draw", np.arange(start, start + len(chosen)) % count)
        part["kl"] = rollout.exact_kl.sum(1).double().cpu()
        part["reference_nats"] = -rollout.ref_logprobs.sum(1).double().cpu()
        part["entropy"] = rollout.entropy.sum(1).double().cpu()
        part["length"] = rollout.response_mask.sum(1).cpu()
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def against_the_optimum(pool: dict[str, np.ndarray], after: pd.DataFrame, queries: int) -> dict:
    """The best that any policy could do at every price, best-of-n, and where the policy stands between."""
    best = frontier.optimum(pool["score"])
    kl, score, ess = (best[name].mean(1) for name in ("kl", "score", "ess"))
    by_query = {name: after[name].to_numpy().reshape(queries, -1).mean(1) for name in ("score", "kl")}
    fraction, interval = frontier.fraction_of_optimum(**by_query, reference_scores=pool["score"])

    def truth(weights: np.ndarray) -> dict[str, float | None]:
        """Ethics and gold shares of the reference's samples under weights [Q, N]."""
        shares = rewards.gold_shares(np.stack([pool["valid"], pool["ethical"]], -1), weights)
        return {"ethics": (weights * pool["ethics"]).sum(1).mean()} | shares

    points = [
        {"beta": beta, "kl": kl[i], "score": score[i], "ess": ess[i]} | truth(best["weights"][i])
        for i, beta in enumerate(frontier.BETAS)
    ]
    best_of = {n: frontier.best_of_n(pool["score"], n) for n in BEST_OF}
    here = points[np.abs(kl - after.kl.mean()).argmin()]
    return {
        "kl": after.kl.mean(),
        "fraction_of_optimum": fraction,
        "fraction_of_optimum_interval": interval,
        "trusted_up_to_kl": kl[np.median(best["ess"], axis=1) >= TRUSTED_ESS].max(initial=0.0),
        "score_of_optimum": frontier.best_score(after.kl.mean(), kl, score),
        "score_of_reference": pool["score"].mean(),
        "frontier": points[::8],
        "best_of_n": [
            {"n": n, "score": (weights * pool["score"]).sum(1).mean(), "kl_bound": frontier.best_of_n_kl_bound(n)}
            | truth(weights)
            for n, weights in best_of.items()
        ],
        "gold": {f"{name}_optimum": here[name] for name in ("valid", "ethical")},
    }


def compared(before: pd.DataFrame, after: pd.DataFrame, texts: list[str]) -> dict:
    """The reference's answers and the policy's, side by side; `texts` are the data's, for their vocabulary."""
    parts = dict(sides(before, after))
    return {
        **{f"{name}_{when}": part[name].mean() for name in ("ethics", "score") for when, part in parts.items()},
        "response_length": {when: part.length.mean() for when, part in parts.items()},
        "terminated": {when: part.terminated.mean() for when, part in parts.items()},
        "perplexity_under_reference": np.exp(after.reference_nats.sum() / after.length.sum()),
        "perplexity_under_reference_before": np.exp(before.reference_nats.sum() / before.length.sum()),
        "diversity": {when: diversity(part, texts) for when, part in parts.items()},
    }


def diversity(part: pd.DataFrame, texts: list[str]) -> dict[str, float]:
    """Of the responses: distinct n-grams against chance, how alike they are to one query and to different ones
    (self-BLEU, 0 to 1), and entropy in nats a token."""
    found = {
        f"distinct_{n}": frontier.distinct(part.text.tolist(), n, len(set(frontier.ngrams(texts, n)))) for n in (1, 2)
    }
    for name, column, draws in (("within_a_query", "query", 8), ("across_queries", "draw", 2)):
        groups = part[part.draw < draws].groupby(column).text
        found[f"self_bleu_{name}"] = groups.apply(lambda x: frontier.self_bleu(x.tolist())).mean()
    return found | {"entropy": part.entropy.sum() / part.length.sum()}


def table(evaluation: dict) -> pd.DataFrame:
    gold, diverse = evaluation["gold"], evaluation["diversity"]
    rows = {
        when: {
            "ethics": evaluation[f"ethics_{when}"],
            "score": evaluation[f"score_{when}"],
            "gold: ethical": gold[f"ethical_{when}"],
            "gold: valid": gold[f"valid_{when}"],
            "tokens": evaluation["response_length"][when],
            "terminated": evaluation["terminated"][when],
            **diverse[when],
        }
        for when in ("before", "after")
    }
    rows["optimum"] = {"score": evaluation["score_of_optimum"]}
    rows["optimum"] |= {f"gold: {name}": gold[f"{name}_optimum"] for name in ("ethical", "valid")}
    return pd.DataFrame(rows)


if __name__ == "__main__":
    cli.run(main)
