"""What fine-tuning on the reference's own samples reaches, without PPO, at the same number of sampled texts.

    python -m experiments.without_ppo best_of_n --answers 8        # best-of-n distilled
    python -m experiments.without_ppo reward_weighted --beta 0.2   # every sample counts by exp(score / beta)
    python -m experiments.study beyond                             # all variants, three seeds each

The reference answers every query several times, once and for all, and a copy of it learns the answers: the best one to
each query, or all of them by weight. The least possible loss with weights is that of reference * exp(score / beta) / Z,
the best policy at the KL coefficient beta. Queries, sampling and reward are those of finetuning_nlg.py, and so are the
policy that is written and the run folder, which evaluate_nlg.py reads. Some queries, none of them for training, decide
which epoch's weights are kept; the answers to them are part of --episodes.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from rlhf import (
    checkpoint,
    cli,
    evaluation,
    flags,
    gold,
    models,
    outputs,
    precision,
    prompting,
    querying,
    recipes,
    rewards,
    runtime,
    supervised,
)
from rlhf.errors import UserError
from rlhf.policy import PolicyWithValue
from rlhf.run_log import MOVING_AVERAGE
from rlhf.sampling import Sampling, real_tokens, sample

BEST_OF_N, REWARD_WEIGHTED = METHODS = ("best_of_n", "reward_weighted")
RECIPE: recipes.Recipe = {name: recipes.PPO[name] for name in ("episodes", "reference_samples")}
RECIPE |= {"optimizer": recipes.GENERATOR["optimizer"], "lr": (3e-3, 5e-5), "epochs": (4, 2)}
VALIDATION = 16  # one of so many queries decides when to stop
MEASURED = 256  # held-out queries whose answers measure the policy after every epoch
NEGLIGIBLE = 1e-3  # a weight, relative to the mean, at which a sample is not worth a forward pass
ROWS = 512  # in a model at once, without gradients


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("method", choices=METHODS, help="what the samples are worth")
    flags.add_gold_flag(flags.add_data_flags(parser, default="data_nlg"))
    parser.add_argument("--policy", default="models/nlg", help="folder or hub name of the generator to improve")
    parser.add_argument("--out", type=cli.folder, default="models/nlg_without_ppo", help="folder to write")
    flags.add_rollout_flags(parser.add_argument_group("samples of the reference"))
    flags.add_reward_flags(parser.add_argument_group("reward"))
    training = parser.add_argument_group("training")
    recipe = functools.partial(recipes.described, RECIPE)
    training.add_argument("--episodes", type=cli.COUNT, help=recipe("episodes", "responses that are sampled in all"))
    beta_help = "KL coefficient of reward_weighted (default: --kl-coef of finetuning_nlg.py)"
    training.add_argument("--beta", type=cli.POSITIVE, help=beta_help)
    training.add_argument("--epochs", type=cli.COUNT, help=recipe("epochs", "passes over the samples"))
    training.add_argument("--batch-size", type=cli.COUNT, default=64, help="responses per step")
    training.add_argument("--lr", type=cli.POSITIVE, help=recipe("lr", "peak learning rate"))
    training.add_argument("--optimizer", choices=("adamw", "muon"), help=recipe("optimizer", "muon is the faster"))
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: METHOD_seed<seed>)")
    output.add_argument("--results", default="data_results/beyond", help="folder of the run folders")
    flags.add_machine_flags(parser)
    flags.add_checkpoint_flags(parser.add_argument_group("checkpoints"), every=200)
    parser.set_defaults(answers=16, chat=False, ppo_epochs=0)  # evaluate_nlg.py reads the last two
    args = parser.parse_args()
    recipes.choose(args, recipes.LENGTHS, args.chat)
    recipes.fill(args, RECIPE, args.policy)
    args.reward = args.reward or [flags.DEFAULT_REWARD]
    args.run = args.run or f"{args.method}_seed{args.seed}"
    check_flags(args)
    if args.method == REWARD_WEIGHTED:
        recipes.fill(args, {"beta": recipes.PPO["kl_coef"]}, args.policy)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything is loaded."""
    if args.method == BEST_OF_N and args.beta is not None:
        raise UserError("--beta is for reward_weighted; how far best_of_n goes, --answers says")
    if args.answers < 2:
        raise UserError("--answers 1 leaves nothing to compare a response with: give 2 or more")
    if args.episodes % args.answers or args.episodes < 2 * args.answers:
        raise UserError(f"--episodes {args.episodes} are not --answers {args.answers} to each of two queries or more")
    if rewards.includes_people(args.reward):
        raise UserError("--reward human: people are asked by finetuning_nlg.py only")


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args.device, args.seed, args.batch_size)
    with checkpoint.opened(args, Path(args.results) / args.run) as checkpoints:
        train(args, device, checkpoints)


def train(args: argparse.Namespace, device: torch.device, checkpoints: checkpoint.Checkpoints) -> None:
    # data and models
    texts = prompting.load(args.chat, args.data, args.data_config, args.data_revision, args.text_column)
    model, tokenizer = models.load_policy(args.policy, "--policy")
    tokens = args.query_length + args.response_length
    models.check_length(model, tokenizer, tokens, "--query-length and --response-length")
    prompts = prompting.Texts(tokenizer)
    dtype = precision.choose(args.precision, device, model.to(device))
    reference = precision.freeze(copy.deepcopy(model), dtype)
    precision.set_precision(model, dtype)
    reward = rewards.load(
        args.reward, args.missing_stop_score, device, args.precision, args.bounded_score, split=prompts.split
    )
    judge = gold.load_judge(args.gold, texts["valid"], device, args.precision)
    stream = querying.QueryStream(prompts.training_queries(texts, args.query_length), args.seed)
    held_out = prompts.validation_queries(texts, args.query_length)
    runtime.print_device(device, dtype)
    print(recipes.summary(args, RECIPE, args.policy))

    # the reference's answers: first those that standardize the scores, as in finetuning_nlg.py with the same seed
    sampling, rng = prompting.sampling_of(args, prompts), torch.Generator().manual_seed(args.seed)
    first_queries = stream.take(args.reference_samples)
    reward.calibrate(first_queries, models.continuations(reference, prompts, first_queries, sampling, rng))
    clock, count = runtime.Clock(device), args.episodes // args.answers
    validation_queries = held_out[: max(1, count // VALIDATION)]
    training_queries = stream.take(count - len(validation_queries))
    queries = [query for query in training_queries + validation_queries for _ in range(args.answers)]
    samples = draw_samples(reference, prompts, queries, sampling, rng)
    clock.lap("rollout")
    scores = reward(queries, samples.texts, samples.terminated).total.double().cpu().numpy()
    clock.lap("score")

    # what they are worth, and the fit
    by_beta = args.method == REWARD_WEIGHTED
    weights = reward_weights(queries, scores, args.beta) if by_beta else best_weights(scores, args.answers)
    learned, validation = with_weights(samples.rows, weights, len(training_queries) * args.answers)
    print(f"{len(learned.rows):,} of {len(training_queries) * args.answers:,} responses count")
    measure = functools.partial(
        evaluation.measure, reference=reference, prompts=prompts, queries=held_out[:MEASURED], reward=reward,
        judge=judge, sampling=sampling, kl_coef=args.beta or 0.0, forward_batch=ROWS, seed=args.seed,
    )  # fmt: skip
    settings = supervised.FitSettings(args.epochs, args.batch_size, args.lr, args.optimizer == "muon", args.seed)
    loss = functools.partial(response_loss, model, temperature=sampling.temperature, pad_id=tokenizer.pad_token_id)
    history = fit(model, learned, validation, loss, measure, settings, checkpoints)
    log = log_of(history, args.episodes, reward.ethics_before, clock.laps)
    save(args, model, tokenizer, sampling, reward, log, runtime.provenance(device, dtype))


def save(args: argparse.Namespace, model, tokenizer, sampling: Sampling, reward, log: pd.DataFrame, provenance: dict):
    """The run folder, and then the policy."""
    folder = Path(args.results) / args.run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").unlink(missing_ok=True)  # of a previous run
    outputs.write_config(args, reward, folder, provenance)
    log.to_csv(folder / "log.csv", index=False, float_format="%.6g", lineterminator="\n")
    results = log.set_index("update")[["train_loss", "valid_loss", "eval_score", "eval_ethics", "eval_kl"]]
    print("\n" + results.to_string(float_format="%.4f"))
    title = f"A generator fine-tuned on its own samples: {args.method}"
    outputs.save_policy(args, args.out, model, tokenizer, sampling, title, results, provenance)
    print(f"policy: {args.out}; run: {folder}")


# the reference's samples


class Row(NamedTuple):
    """A query with a response, unpadded."""

    ids: list[int]  # of both
    query_length: int  # in tokens


class Samples(NamedTuple):
    """N responses."""

    rows: list[Row]
    texts: list[str]  # what is seen of them
    terminated: torch.Tensor  # [N]


class Weighted(NamedTuple):
    """Responses to learn, and what each of them counts."""

    rows: list[Row]
    weights: np.ndarray  # [N]

    @property
    def tokens(self) -> float:
        """Response tokens, as they count."""
        return float(sum(w * (len(row.ids) - row.query_length) for row, w in zip(*self, strict=True)))


def draw_samples(reference, prompts, queries: list[str], sampling: Sampling, rng: torch.Generator) -> Samples:
    """A response to each of the queries."""
    rows, texts, terminated = [], [], []
    for number in runtime.progress("samples", "batch", 0, -(-len(queries) // ROWS)):
        batch = queries[(number - 1) * ROWS : number * ROWS]
        query_ids, query_mask = prompts.encode(batch, reference.device)
        response_ids, _ = sample(reference, query_ids, query_mask, sampling, rng)
        response_mask, ends = real_tokens(response_ids, sampling)
        terminated.append(ends)
        texts += prompts.texts(batch, query_ids, query_mask, response_ids, response_mask)
        ids, is_real = torch.cat([query_ids, response_ids], 1), torch.cat([query_mask, response_mask], 1).bool()
        lengths = query_mask.sum(1).tolist()
        rows += [Row(each[real].tolist(), length) for each, real, length in zip(ids, is_real, lengths, strict=True)]
    return Samples(rows, texts, torch.cat(terminated))


# what a sample counts


def best_weights(scores: np.ndarray, answers: int) -> np.ndarray:
    """Scores [N] of so many answers to each query, side by side -> 1 for the best answer, 0 for the others, [N]."""
    by_query = scores.reshape(-1, answers)
    return (np.arange(answers) == by_query.argmax(1, keepdims=True)).astype(float).reshape(-1)


def reward_weights(queries: list[str], scores: np.ndarray, beta: float) -> np.ndarray:
    """exp(score / beta) [N], relative to its mean over all samples of the same query, which stands for Z."""
    _, query = np.unique(queries, return_inverse=True)
    largest = np.full(query.max() + 1, -np.inf)
    np.maximum.at(largest, query, scores)
    unnormalised = np.exp((scores - largest[query]) / beta)
    means = np.bincount(query, unnormalised) / np.bincount(query)
    return unnormalised / means[query]


def with_weights(rows: list[Row], weights: np.ndarray, training: int) -> tuple[Weighted, Weighted]:
    """The rows that count: of the first ones, which are for training, and of the others."""
    kept = np.flatnonzero(weights > NEGLIGIBLE)
    parts = kept[kept < training], kept[kept >= training]
    return tuple(Weighted([rows[i] for i in part], weights[part]) for part in parts)


# learning


def response_loss(model, rows: list[Row], *, temperature: float, pad_id: int) -> torch.Tensor:
    """-log policy(response | query) of every row in nats, [B], of the policy that is sampled at this temperature."""
    ids, mask = supervised.pad([row.ids for row in rows], pad_id, model.device)
    starts = torch.tensor([row.query_length for row in rows], device=model.device)
    is_response = torch.arange(ids.shape[1], device=model.device) >= starts.unsqueeze(1)
    return supervised.lm_loss(model, ids, mask, mask * is_response, temperature)[0]


def fit(
    model,
    learned: Weighted,
    validation: Weighted,
    loss: Callable[[list[Row]], torch.Tensor],
    measure: Callable[[PolicyWithValue], evaluation.Row],
    settings: supervised.FitSettings,
    checkpoints: checkpoint.Checkpoints,
) -> list[dict[str, float]]:
    """Minimise the weighted mean loss per response token. Returns what was measured after every epoch."""
    device, clock = model.device, runtime.Clock(model.device)
    weights = torch.tensor(learned.weights, device=device).float()
    # One number for all: were the loss of a batch divided by the tokens that it happens to have, responses that are
    # long would count less, and the loss would not be least at the optimum.
    tokens_per_row = learned.tokens / len(learned.rows)

    def loss_of(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        losses = weights[batch] * loss([learned.rows[i] for i in batch])
        return losses, torch.full_like(losses, tokens_per_row)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        clock.lap("update")
        total = 0.0
        for start in range(0, len(validation.rows), ROWS):
            part = slice(start, start + ROWS)
            total += float(loss(validation.rows[part]).double().cpu().numpy() @ validation.weights[part])
        measured = measure(PolicyWithValue(model).eval())
        measured = {name: np.nan if x is None else x for name, x in measured.items()}  # the judge may be silent
        clock.lap("evaluation")
        return {"loss": total / validation.tokens, **measured, "seconds_update": clock.laps["update"]}

    lengths = [len(row.ids) for row in learned.rows]
    return supervised.fit(
        model, lengths, loss_of, validate, settings, stage="fit", device=device, checkpoints=checkpoints
    )


def log_of(history: list[dict], episodes: int, ethics_before: float, seconds: dict[str, float]) -> pd.DataFrame:
    """A row an epoch, with the columns of finetuning_nlg.py that there are; seconds: of what came before the first."""
    log = pd.DataFrame(history).rename(columns={"epoch": "update", "loss": "valid_loss"})
    log.insert(1, "episodes", episodes)
    log.insert(2, "improvement", log.eval_ethics - ethics_before)
    log.insert(3, "improvement_ma", log.improvement.rolling(MOVING_AVERAGE, min_periods=1).mean())
    for stage in ("rollout", "score"):
        log[f"seconds_{stage}"] = [seconds[stage], *[0.0] * (len(log) - 1)]
    return log


if __name__ == "__main__":
    cli.run(main)
