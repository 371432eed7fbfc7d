"""Measure what a policy gained over its reference, at which KL, and against what was possible at that KL.

    python evaluate_nlg.py                                        # models/nlg_ppo against models/nlg
    python evaluate_nlg.py --run data_results/K2_lr_1e-3_seed*    # several, of one reference and reward

Writes evaluation.json and evaluation_samples.csv to every --run, a run folder whose config.json says how the policy was
trained: data, reference, reward, temperature, lengths and the score's calibration are taken from there; and draws
fig_frontier_K<K>_lr_<lr>.png beside it. All queries are ones that training never saw.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from rlhf import cli, flags, frontier, gold, models, outputs, plots, precision, prompting, rewards, runtime
from rlhf.cli import COUNT
from rlhf.errors import UserError
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect
from rlhf.sampling import Sampling, real_tokens, sample_many

SAVED_SAMPLES = 4  # responses to a query in evaluation_samples.csv
# settings that runs must have in common
SHARED = "policy reward data data_config data_revision text_column query_length response_length temperature".split()
SHARED += "stop stop_after missing_stop_score chat reward_sees bounded_score".split()
TRUSTED_ESS = 30  # below this many effective samples a query, the optimum is not known well
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
Evaluate = Callable[[list[str], list[str], torch.Tensor], pd.DataFrame]  # queries, texts, terminated -> a row a text


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run", nargs="+", default=["data_results/K2_lr_1e-3_seed0"], help="run folders of the policies"
    )
    parser.add_argument("--policy", help="folder of the policy, for one run (default: the --out of the run)")
    parser.add_argument("--queries", type=COUNT, default=64, help="held-out queries, drawn at random")
    parser.add_argument("--samples", type=COUNT, default=32, help="responses to each, of the policy and the reference")
    parser.add_argument(
        "--reference-samples", type=COUNT, default=1024, help="responses of the reference to each, for the optimum"
    )
    parser.add_argument("--batch-size", type=COUNT, default=1024, help="rows in a model at once")
    flags.add_gold_flag(parser)
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    if args.reference_samples < max(BEST_OF):
        raise UserError(f"--reference-samples {args.reference_samples} is too few for best of {max(BEST_OF)}")
    if args.policy and len(args.run) > 1:
        raise UserError("--policy names the policy of one --run")
    return args


def load_run(folder: Path) -> tuple[argparse.Namespace, dict]:
    """The settings of a run, and its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = argparse.Namespace(**outputs.settings_of(config))
        settings.reward = rewards.with_saved_human_model(rewards.as_list(settings.reward), settings.out)
        return settings, config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {folder} is no run folder of finetuning_nlg.py: {error!r}") from error


def load_tuned(folder: str | None, run: Path, config: dict, tokenizer):
    """The policy of a run, from --policy or the run's --out, which may hold that of another run by now."""
    trained = config["settings"]
    name = folder or trained["out"]
    if folder is None:
        outputs.refuse_policy_of_another_run(run, trained)
    outputs.refuse_reward_of_another_run(run, trained)
    policy, its_tokenizer = models.load_policy(name, "--policy")
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--policy {name} has another vocabulary than its reference {trained['policy']}")
    return policy


def shared_settings(runs: dict[Path, tuple[argparse.Namespace, dict]]) -> argparse.Namespace:
    """The settings of the first of the runs, which the others must share where it matters."""
    (first, (settings, _)), *others = runs.items()
    for run, (other, _) in others:
        for name in SHARED:
            if getattr(other, name) != getattr(settings, name):
                raise UserError(f"{run} and {first} differ in --{name.replace('_', '-')}; evaluate them one by one")
    return settings


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args.device, args.seed)
    runs = {Path(run): load_run(Path(run)) for run in args.run}
    trained = shared_settings(runs)

    # data and models
    source = trained.data, trained.data_config, trained.data_revision, trained.text_column
    texts = prompting.load(trained.chat, *source)
    reference, tokenizer = models.load_policy(trained.policy, "the reference", trained.chat)
    prompts = prompting.new(trained.chat, tokenizer, trained.reward_sees)
    reference.to(device)
    dtype = precision.choose(args.precision, device, reference)
    runtime.print_device(device, dtype)
    precision.freeze(reference, dtype)
    reward = rewards.load(
        trained.reward, trained.missing_stop_score, device, args.precision, trained.bounded_score, split=prompts.split
    )
    valid_texts = prompts.readable(texts["valid"])
    judge = gold.load_judge(args.gold, valid_texts, device, args.precision)
    held_out = prompts.held_out_queries(texts, trained.query_length)
    queries = random.Random(args.seed).sample(held_out, min(args.queries, len(held_out)))
    for run, (_, config) in runs.items():
        load_tuned(args.policy, run, config, tokenizer)  # what cannot be evaluated is refused before the long part

    # the reference's many samples, from which the optimum is estimated, and its answers to compare with
    def evaluate(queries: list[str], texts: list[str], terminated: torch.Tensor) -> pd.DataFrame:
        return evaluate_texts(queries, texts, terminated, reward, judge)

    draw = {
        "prompts": prompts,
        "queries": queries,
        "sampling": prompting.sampling_of(trained, prompts),
        "evaluate": evaluate,
        "seed": args.seed,
    }
    pool = draw_pool(reference, count=args.reference_samples, batch=args.batch_size, **draw)
    draw |= {"count": args.samples, "batch": max(1, args.batch_size // 4)}  # these take the logits of every token
    before = draw_answers(reference, reference, label="reference", **draw)

    # the policies: what they gained, and at what KL
    for run, (trained, config) in runs.items():
        policy = load_tuned(args.policy, run, config, tokenizer)
        after = draw_answers(precision.freeze(policy.to(device), dtype), reference, label=run.name, **draw)
        reward.load_state_dict(config)
        for samples in (pool, before, after):
            raw = np.stack([samples[f"raw_{part.name}"] for part in reward.parts], -1)
            score = reward.combine(raw)
            samples["score"] = np.where(samples["terminated"] > 0, score, trained.missing_stop_score)
        evaluation = {"queries": len(queries), "samples": len(after)}
        evaluation |= against_the_optimum(pool, after, len(queries)) | compared(before, after, valid_texts)
        for when, samples in (("before", before), ("after", after)):
            shares = gold.shares(samples[["valid", "ethical"]].to_numpy())
            evaluation["gold"] |= {f"{name}_{when}": share for name, share in shares.items()}
        evaluation |= {"settings": vars(args) | {"run": str(run)}} | runtime.provenance(device, dtype)
        save(run, trained, evaluation, before, after)


def save(run: Path, trained: argparse.Namespace, evaluation: dict, before: pd.DataFrame, after: pd.DataFrame) -> None:
    """evaluation.json, evaluation_samples.csv and the figure; and the numbers on the screen."""
    runtime.write_json(run / "evaluation.json", evaluation)
    both = pd.concat([before.assign(policy="before"), after.assign(policy="after")])
    saved = both[both.draw < SAVED_SAMPLES]
    saved.round(4).to_csv(run / "evaluation_samples.csv", index=False, lineterminator="\n")
    figure = plots.save_frontier(run.parent, trained.ppo_epochs, trained.lr)
    low, high = evaluation["fraction_of_optimum_interval"]
    print(
        f"\n{run}: KL {evaluation['kl']:.2f} nats a response; {evaluation['fraction_of_optimum']:.1%} of the gain "
        f"that was possible at it (95% interval over queries {low:.1%} to {high:.1%})"
    )
    print(table(evaluation).to_string(float_format="%.3f", na_rep="-"))
    worst = evaluation["worst_query"]
    valid = "" if np.isnan(worst["valid"]) else f", {worst['valid']:.0%} valid"
    print(f"worst query: {worst['query']!r}, KL {worst['kl']:.2f} nats{valid}, ethics {worst['ethics']:.2f}")
    print(f"saved to {run / 'evaluation.json'}" + (f"; figure: {figure}" if figure else ""))


def evaluate_texts(
    queries: list[str], texts: list[str], terminated: torch.Tensor, reward: rewards.Reward, judge: gold.Judge | None
) -> pd.DataFrame:
    """A row a text: raw scores and ethics from the reward, the truth from the judge (NaN without one)."""
    pairs = [f"{query}\0{text}" for query, text in zip(queries, texts, strict=True)]
    _, first, rows = np.unique(pairs, return_index=True, return_inverse=True)  # many are alike
    unique = [texts[i] for i in first]
    raw = reward.raw_scores([queries[i] for i in first], unique)
    valid, ethical = gold.judged(judge, unique)[rows].T
    return pd.DataFrame(
        {
            "text": texts,
            **{f"raw_{part.name}": raw[rows, i] for i, part in enumerate(reward.parts)},
            "ethics": reward.ethics(raw)[rows],
            "terminated": terminated.cpu().numpy(),
            "valid": valid,
            "ethical": ethical,
        }
    )


def draw_pool(
    model, *, prompts, queries: list[str], count: int, batch: int, sampling: Sampling, evaluate: Evaluate, seed: int
) -> dict[str, np.ndarray]:
    """`count` responses to every query, evaluated: a row's columns but for the text, [queries, count] each."""
    generator = torch.Generator().manual_seed(seed)
    evaluated = []
    for query in tqdm(queries, desc="reference samples", unit="query", dynamic_ncols=True):
        for start in range(0, count, batch):
            rows = min(batch, count - start)
            query_ids, query_mask = prompts.encode([query], model.device)
            response_ids = sample_many(model, query_ids, rows, sampling, generator)
            response_mask, terminated = real_tokens(response_ids, sampling)
            same = [query] * rows
            asked = query_ids.expand(rows, -1), query_mask.expand(rows, -1)
            texts = prompts.texts(same, *asked, response_ids, response_mask)
            evaluated.append(evaluate(same, texts, terminated).drop(columns="text"))
    pool = pd.concat(evaluated)
    return {name: pool[name].to_numpy(dtype=float).reshape(len(queries), count) for name in pool}


def draw_answers(
    model,
    reference,
    *,
    prompts,
    queries: list[str],
    count: int,
    batch: int,
    sampling: Sampling,
    evaluate: Evaluate,
    seed: int,
    label: str,
) -> pd.DataFrame:
    """`count` responses to every query, a row each: evaluated, with KL to the reference, entropy and length."""
    generator = torch.Generator().manual_seed(seed)
    policy = PolicyWithValue(model).to(model.device).eval()
    repeated = [query for query in queries for _ in range(count)]
    evaluated = []
    for start in tqdm(range(0, len(repeated), batch), desc=label, unit="batch", dynamic_ncols=True):
        drawn = repeated[start : start + batch]
        encoded = prompts.encode(drawn, model.device)
        rollout = collect(policy, reference, *encoded, sampling, generator, forward_batch=batch)
        rows = evaluate(drawn, prompts.texts(drawn, *rollout.tokens), rollout.terminated)
        rows.insert(0, "query", [prompts.split(*pair).query for pair in zip(drawn, rows.text, strict=True)])
        rows.insert(1, "draw", np.arange(start, start + len(drawn)) % count)
        rows["kl"] = rollout.exact_kl.sum(1).double().cpu()
        rows["reference_nats"] = -rollout.ref_logprobs.sum(1).double().cpu()
        rows["entropy"] = rollout.entropy.sum(1).double().cpu()
        rows["length"] = rollout.response_mask.sum(1).cpu()
        evaluated.append(rows)
    return pd.concat(evaluated, ignore_index=True)


def against_the_optimum(pool: dict[str, np.ndarray], after: pd.DataFrame, queries: int) -> dict:
    """The best that any policy could do at every KL coefficient, best-of-n, and where the policy stands between."""
    best = frontier.optimum(pool["score"])
    kl, score, ess = (best[name].mean(1) for name in ("kl", "score", "ess"))
    by_query = {name: after[name].to_numpy().reshape(queries, -1).mean(1) for name in ("score", "kl")}
    fraction, interval = frontier.fraction_of_optimum(**by_query, reference_scores=pool["score"])

    def under(weights: np.ndarray) -> dict[str, float | None]:
        """Ethics and gold shares of the reference's samples under weights [queries, count]."""
        shares = gold.shares(np.stack([pool["valid"], pool["ethical"]], -1), weights)
        return {"ethics": (weights * pool["ethics"]).sum(1).mean()} | shares

    points = [
        {"beta": beta, "kl": kl[i], "score": score[i], "ess": ess[i]} | under(best["weights"][i])
        for i, beta in enumerate(frontier.BETAS)
    ]
    best_of = {n: frontier.best_of_n(pool["score"], n) for n in BEST_OF}
    nearest = points[np.abs(kl - after.kl.mean()).argmin()]
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
            | under(weights)
            for n, weights in best_of.items()
        ],
        "gold": {f"{name}_optimum": nearest[name] for name in ("valid", "ethical")},
    }


def compared(before: pd.DataFrame, after: pd.DataFrame, texts: list[str]) -> dict:
    """The reference's answers and the policy's, side by side; `texts` are the data's, for their vocabulary."""
    answers = {"before": before, "after": after}
    return {
        **{f"{name}_{when}": rows[name].mean() for name in ("ethics", "score") for when, rows in answers.items()},
        "response_length": {when: rows.length.mean() for when, rows in answers.items()},
        "terminated": {when: rows.terminated.mean() for when, rows in answers.items()},
        "perplexity_under_reference": np.exp(after.reference_nats.sum() / after.length.sum()),
        "perplexity_under_reference_before": np.exp(before.reference_nats.sum() / before.length.sum()),
        "diversity": {when: diversity(rows, texts) for when, rows in answers.items()},
        "worst_query": worst_query(after),
    }


def worst_query(answers: pd.DataFrame) -> dict[str, str | float]:
    """The query whose responses have the largest mean KL; "valid" is NaN where nobody knows."""
    by_query = answers.groupby("query", sort=False)[["kl", "valid", "ethics"]].mean()
    query = by_query.kl.idxmax()
    return {"query": query} | {name: float(x) for name, x in by_query.loc[query].items()}


def diversity(answers: pd.DataFrame, texts: list[str]) -> dict[str, float]:
    """Of responses: distinct n-grams against chance, how alike they are to one query and to different ones
    (self-BLEU, 0 to 1), and entropy in nats a token."""
    written = answers.text.tolist()
    values = {f"distinct_{n}": frontier.distinct(written, n, len(set(frontier.ngrams(texts, n)))) for n in (1, 2)}
    for name, column, draws in (("within_a_query", "query", 8), ("across_queries", "draw", 2)):
        groups = answers[answers.draw < draws].groupby(column).text
        values[f"self_bleu_{name}"] = groups.apply(lambda x: frontier.self_bleu(x.tolist())).mean()
    return values | {"entropy": answers.entropy.sum() / answers.length.sum()}


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
