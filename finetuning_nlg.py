"""Fine-tune the generator with PPO so that its texts please the reward, and stay near the generator.

    python finetuning_nlg.py                                # models/nlg + models/cls -> models/nlg_ppo
    python finetuning_nlg.py --policy gpt2 --reward lvwerra/distilbert-imdb --data stanfordnlp/imdb \\
        --batch-size 512 --minibatches 1 --optimizer adam --lr 1e-5 --kl-coef 0.15 --target-kl 6
    python finetuning_nlg.py --reward human --feedback best-of-4 --labels 250 --label-rounds 5   # you are the reward

Every update: queries -> rollout -> score -> reward -> advantages -> update -> log. Writes the policy to --out, and
to data_results/<run>/ config.json, log.csv, samples.csv; the figure data_results/fig_K<K>_lr_<lr>.png shows all runs
with these settings.
"""

import argparse
import copy
import itertools
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import checkpoint
import common
import data
import feedback
import figures
import model_io
import optimization
import parallel
import ppo
import run_folder
import scoring
from common import COUNT, FRACTION, POSITIVE, SAMPLE_COUNT, TOLERATED, UserError, number

MOVING_AVERAGE = 10  # updates that the moving average of the improvement looks back
SAMPLE_EVERY = 10  # updates between the rows of samples.csv
SHOWN = 4  # texts before and after, at the end


def parse_args() -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_data_flags(parser, default="data_nlg")
    models = parser.add_argument_group("models")
    models.add_argument("--policy", default="models/nlg", help="folder or hub name of the generator to improve")
    models.add_argument(
        "--reward",
        action="append",
        metavar="[WEIGHT*]REWARD",
        help="folder or hub name of a reward model, FILE.py:FUNCTION, or human; several are normalised, weighted "
        "and added (default: models/cls)",
    )
    models.add_argument("--out", default="models/nlg_ppo", help="folder to write")
    models.add_argument("--separate-value", action="store_true", help="a value network of its own instead of a head")
    rollout = parser.add_argument_group("rollout")
    common.add_sampling_flags(rollout)
    rollout.add_argument("--stop", help="a token that ends a response (default: the tokenizer's end of text)")
    rollout.add_argument("--stop-after", type=number(int, 0), default=0, help="tokens before --stop counts")
    rollout.add_argument(
        "--missing-stop-score", type=number(float), default=-1.0, help="score of a response without it"
    )
    rollout.add_argument(
        "--reference-samples", type=SAMPLE_COUNT, default=4096, help="samples that normalise the score"
    )
    reward = parser.add_argument_group("reward")
    reward.add_argument("--kl-coef", type=number(float, 0), default=0.2, help="price of a nat of KL, first or fixed")
    reward.add_argument(
        "--kl",
        choices=("exact", "sampled"),
        default="exact",
        help="KL over the vocabulary, or of the sampled token as in [3]",
    )
    reward.add_argument("--target-kl", type=POSITIVE, help="adapt the coefficient to this KL, in nats a response")
    reward.add_argument("--kl-horizon", type=POSITIVE, default=10_000, help="of that adaptation, in episodes")
    people = parser.add_argument_group("feedback from people (--reward human)")
    people.add_argument(
        "--feedback", type=feedback.kind, default="good-bad", metavar="KIND", help="good-bad, or best-of-N, N up to 9"
    )
    people.add_argument("--labels", type=SAMPLE_COUNT, default=250, help="answers in all")
    people.add_argument(
        "--label-rounds", type=COUNT, default=1, help="times that people are asked, of the policy as it then is"
    )
    people.add_argument("--feedback-file", default="data_cls/feedback.jsonl", help="where every answer is kept")
    people.add_argument(
        "--annotator", help="who answers in a person's place: gold, classifier:FOLDER, or FILE.py:FUNCTION"
    )
    people.add_argument("--annotator-noise", type=FRACTION, default=0.0, help="how often that one answers at random")
    people.add_argument("--reward-epochs", type=COUNT, default=8, help="passes over the answers in every round")
    people.add_argument("--reward-lr", type=POSITIVE, default=1e-3, help="peak learning rate of these")
    learning = parser.add_argument_group("PPO")
    learning.add_argument("--episodes", type=COUNT, default=30_720, help="responses in all")
    learning.add_argument("--batch-size", type=COUNT, default=256, help="responses per update")
    learning.add_argument("--minibatches", type=COUNT, default=4, help="optimizer steps per pass over a batch")
    learning.add_argument("--ppo-epochs", type=COUNT, default=1, help="K, passes over a batch")
    learning.add_argument("--lr", type=POSITIVE, default=1e-3, help="learning rate, falling to 0")
    learning.add_argument(
        "--optimizer",
        choices=("muon", "adam"),
        default="muon",
        help="muon learns a small model faster; adam, at a third of the learning rate or less, is [3]'s",
    )
    learning.add_argument("--clip-range", type=POSITIVE, default=0.2, help="of the probability ratio")
    learning.add_argument("--value-clip-range", type=POSITIVE, default=0.2, help="of the value")
    learning.add_argument("--value-coef", type=number(float, 0), default=0.1, help="weight of the value loss")
    learning.add_argument("--discount", type=FRACTION, default=1.0, help="gamma")
    learning.add_argument("--gae-lambda", type=FRACTION, default=1.0, help="lambda")
    learning.add_argument("--whiten-rewards", action=argparse.BooleanOptionalAction, default=False, help="as in [3]")
    learning.add_argument("--forward-batch", type=COUNT, default=64, help="rows in a model at once; saves memory")
    learning.add_argument("--kl-limit", type=POSITIVE, default=20.0, help="warn of a KL above, in nats a response")
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: K<K>_lr_<lr>_seed<seed>)")
    output.add_argument("--results", default="data_results", help="where run folders are")
    common.add_gold_flag(output)
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard events to the run folder too")
    common.add_machine_flags(parser)
    checkpoint.add_flags(parser.add_argument_group("checkpoints"), every=10)
    args = parser.parse_args()
    if args.batch_size % args.minibatches:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into --minibatches {args.minibatches}")
    if args.episodes < args.batch_size:
        raise UserError(f"--episodes {args.episodes} is less than one batch of --batch-size {args.batch_size}")
    args.reward = args.reward or ["models/cls"]
    if args.label_rounds > min(args.labels, args.episodes // args.batch_size):
        raise UserError(f"--label-rounds {args.label_rounds} are more than there are --labels or updates")
    args.run = args.run or f"K{args.ppo_epochs}_lr_{figures.short(args.lr)}_seed{args.seed}"
    return args


def endless(queries: list[str], batch: int, seed: int):
    """Batches of queries in a new random order on every pass."""
    order, waiting = random.Random(seed), []
    while True:
        while len(waiting) < batch:
            waiting += order.sample(queries, len(queries))
        yield waiting[:batch]
        del waiting[:batch]


def main() -> None:
    args = parse_args()
    device = common.set_up(args)
    with checkpoint.keeping(args, Path(args.results) / args.run) as (saved, keep):
        fine_tune(args, device, saved, keep)


class Parts(NamedTuple):
    """What a run works with."""

    reference: torch.nn.Module
    policy: ppo.PolicyWithValue
    tokenizer: PreTrainedTokenizerBase
    reward: list[scoring.Reward]
    people: tuple | None  # the model of people's answers and its tokenizer
    judge: Callable | None
    queries: list[str]
    optimizers: list[torch.optim.Optimizer]
    sampling: dict  # as sampler.sample takes it
    learning: dict  # as ppo.update takes it


def load_parts(args: argparse.Namespace, device: torch.device) -> Parts:
    """Data and models."""
    texts = data.nlg_texts(args)["valid"]
    reference, tokenizer = model_io.load_policy(args.policy, "--policy")
    tokens = args.query_length + args.response_length
    model_io.check_length(reference, tokenizer, tokens, "--query-length and --response-length")
    reference.to(device).requires_grad_(False)
    policy = ppo.PolicyWithValue(copy.deepcopy(reference).requires_grad_(True), args.separate_value).to(device).eval()
    people = feedback.new_model(args.policy, args.feedback) if scoring.asks_people(args.reward) else None
    if people and parallel.count() > 1:
        raise UserError("--reward human asks one person, in one process; start it without torchrun")
    queries, _ = data.split_queries(texts, tokenizer, args.query_length)
    return Parts(
        reference=reference,
        policy=policy,
        tokenizer=tokenizer,
        reward=scoring.load(args.reward, device, people),
        people=people,
        judge=scoring.gold_judge(args.gold, texts),  # it is logged, and nothing learns from it
        queries=queries,
        optimizers=optimization.make_optimizers(policy, args.lr, muon=args.optimizer == "muon"),
        sampling={
            "length": args.response_length,
            "temperature": args.temperature,
            "stop_id": model_io.stop_token(tokenizer, args.stop),
            "stop_after": args.stop_after,
            "generator": torch.Generator(device).manual_seed(args.seed + 100_003 * parallel.rank()),
        },
        learning={
            "epochs": args.ppo_epochs,
            "minibatches": args.minibatches,
            "clip_range": args.clip_range,
            "value_clip_range": args.value_clip_range,
            "value_coef": args.value_coef,
            "temperature": args.temperature,
            "forward_batch": args.forward_batch,
            "generator": torch.Generator().manual_seed(args.seed),
        },
    )


def fine_tune(args: argparse.Namespace, device: torch.device, saved: dict | None, keep: checkpoint.Keep) -> None:
    parts, folder, updates = load_parts(args, device), Path(args.results) / args.run, args.episodes // args.batch_size
    policy, reference, tokenizer, sampling = parts.policy, parts.reference, parts.tokenizer, parts.sampling
    batches = endless(parts.queries, args.batch_size, args.seed)
    chosen = list(itertools.islice(itertools.chain.from_iterable(batches), args.reference_samples))
    asks = [1 + updates * i // args.label_rounds for i in range(args.label_rounds)] if parts.people else []
    ask = feedback.asker(args, device) if asks else None

    # the policy before: its texts' scores normalise the score, and the improvement counts from their ethics
    mine = parallel.share(chosen)
    texts_before = model_io.continuations(reference, tokenizer, mine, **sampling) if parts.people or not saved else []
    if saved:
        run = restore(saved, parts, folder)
        for _ in range(run["update"]):
            next(batches)
    else:
        run = {"update": 0, "kl_coef": args.kl_coef, "texts_before": texts_before[:SHOWN]}
        run.update(improvements=[], kls=[], not_finite=0, warned=False, labels=0)
        if asks:
            run_folder.start(folder)
        else:
            run.update(normalisation(parts.reward, mine, texts_before))
            run_folder.start(folder)  # not before: a reward that fails leaves the run before as it was
            write_config(args, run, folder, device)
    writer = run_folder.tensorboard(folder, run["update"]) if args.tensorboard else None

    bar = tqdm(
        range(run["update"] + 1, updates + 1),
        desc=args.run,
        unit="update",
        initial=run["update"],
        total=updates,
        dynamic_ncols=True,
        disable=parallel.rank() > 0,
    )
    for update in bar:
        if update in asks:
            keep(update - 1, lambda: state(run, parts, folder), now=True)  # people may take their time
            run["labels"] = args.labels * (asks.index(update) + 1) // args.label_rounds
            learn_from_people(args, parts, ask, run, folder)
            if args.feedback != "good-bad":  # the reward model's own scores become 0 on the reference, as in [1]
                scoring.normalise(*parts.people, texts_before)
            run.update(normalisation(parts.reward, mine, texts_before))
            write_config(args, run, folder, device)
        clock = [time.perf_counter()]
        lr, kl_coef = set_lr(parts.optimizers, args.lr * (1 - (update - 1) / updates)), run["kl_coef"]

        asked = parallel.share(next(batches))
        query_ids, query_mask = data.encode_queries(tokenizer, asked, device)
        with common.autocast(device):
            rollout = ppo.collect(
                policy, reference, query_ids, query_mask, forward_batch=args.forward_batch, **sampling
            )
        clock.append(time.perf_counter())

        texts = model_io.whole_texts(tokenizer, query_ids, query_mask, rollout.response_ids, rollout.response_mask)
        raw = scoring.raw_scores(parts.reward, asked, texts)
        ethics, of_parts = scoring.reading(parts.reward, raw), scoring.normalised(raw, run)
        scores = torch.tensor(of_parts @ [part.weight for part in parts.reward], device=device).float()
        scores = scores.where(rollout.terminated, args.missing_stop_score)
        clock.append(time.perf_counter())

        mask = rollout.response_mask
        rewards, scale = rewards_of(rollout, scores, kl_coef, args)
        advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, mask, args.discount, args.gae_lambda)
        exact_kl_weight = kl_coef / scale / ppo.masked_std(advantages, mask).item() if args.kl == "exact" else 0.0
        with common.autocast(device):
            statistics = ppo.update(
                policy,
                parts.optimizers,
                rollout,
                ppo.whiten(advantages, mask),
                returns,
                kl_weight=exact_kl_weight,
                steps_done=(update - 1) * args.ppo_epochs * args.minibatches,
                **parts.learning,
            )
        clock.append(time.perf_counter())

        measured = run_folder.measured(rollout, scores, ethics, returns, kl_coef)
        run["improvements"] = [*run["improvements"], measured["ethics"] - run["ethics_before"]][-MOVING_AVERAGE:]
        row = {"update": update, "episodes": update * args.batch_size, "lr": lr, "kl_coef": kl_coef}
        row |= {"improvement": run["improvements"][-1], "improvement_ma": float(np.mean(run["improvements"]))}
        row |= measured | statistics
        gold = scoring.gold_shares(parts.judge, parallel.gather(texts))
        row |= {f"gold_{name}": share for name, share in gold.items()}
        row |= run_folder.by_part(parts.reward, of_parts) | ({"labels": run["labels"]} if parts.people else {})
        row |= run_folder.timings(clock, args.batch_size)
        run_folder.log(row, folder, writer, bar)
        if update % SAMPLE_EVERY in (0, 1) or update == updates:
            rows = run_folder.samples(update, texts, rollout, scores, ethics, tokenizer)
            run_folder.append(folder / "samples.csv", rows)
        if args.target_kl and math.isfinite(row["kl"]):
            run["kl_coef"] = ppo.next_kl_coef(kl_coef, row["kl"], args.target_kl, args.kl_horizon, args.batch_size)
        run.update(update=update, row=row)
        guard(run, rollout, args, bar)
        keep(update, lambda: state(run, parts, folder))

    # the result
    if writer:
        writer.close()
    save_policy(args, policy.model, tokenizer, sampling["stop_id"], run, device)
    if parts.people:
        save_reward_model(args, *parts.people, run, device)
    show_pairs(run["texts_before"], model_io.continuations(policy.model, tokenizer, chosen[:SHOWN], **sampling), chosen)
    figure = figures.save_improvement(Path(args.results), args.ppo_epochs, args.lr)
    print(f"policy: {args.out}; run: {folder}" + (f"; figure: {figure}" if figure else ""))


def learn_from_people(args: argparse.Namespace, parts: Parts, ask: feedback.Ask, run: dict, folder: Path) -> None:
    """Asks about the policy's texts until there are as many answers as `run` wants, and trains the reward model."""
    model, tokenizer = parts.people
    samples, done = feedback.samples_of(args.feedback), run["update"]
    sampling = parts.sampling | {"seed": args.seed + done}
    rows = feedback.gather(
        feedback.questions(parts.policy.model, parts.tokenizer, parts.queries, samples, **sampling),
        Path(args.feedback_file),
        run["labels"],
        samples,
        ask,
        about={"policy": f"{args.out} after {done} updates" if done else args.policy, "annotator": args.annotator},
        opinion=feedback.opinion(model, tokenizer) if done else None,
    )
    found = feedback.learn(
        model,
        tokenizer,
        rows[: run["labels"]],
        epochs=args.reward_epochs,
        lr=args.reward_lr,
        muon=args.optimizer == "muon",
        seed=args.seed,
    )
    run_folder.append(folder / "reward_model.csv", [{"update": done} | found])


def save_reward_model(args: argparse.Namespace, model, tokenizer, run: dict, device: torch.device) -> None:
    table = pd.read_csv(Path(args.results) / args.run / "reward_model.csv").set_index("labels")
    record = {"settings": vars(args)} | common.provenance(device)
    card = model_io.card("What people's answers taught", "text-classification", args.feedback_file, record, table)
    model_io.save_folder(f"{args.out}_reward", model, tokenizer, card)


def write_config(args: argparse.Namespace, run: dict, folder: Path, device: torch.device) -> None:
    normal = {name: run[name] for name in ("score_mean", "score_std", "ethics_before")}
    common.write_json(folder / "config.json", {"settings": vars(args), **normal} | common.provenance(device))


def normalisation(reward: list[scoring.Reward], queries: list[str], texts: list[str]) -> dict:
    """What the reference's texts say for the run, those of all processes together."""
    mine = scoring.raw_scores(reward, queries, texts)
    raw = np.array(parallel.gather(mine.tolist()))
    return {
        "score_mean": raw.mean(0).tolist(),
        "score_std": raw.std(0).clip(1e-6).tolist(),
        "ethics_before": float(scoring.reading(reward, raw).mean()),
    }


def state(run: dict, parts: Parts, folder: Path) -> dict:
    """What a checkpoint holds."""
    people = (
        {"weights": parts.people[0].state_dict(), "config": scoring.normal_of(parts.people[0])}
        if parts.people
        else None
    )
    return {
        "run": run,
        "policy": parts.policy.state_dict(),
        "people": people,
        "optimizers": [optimizer.state_dict() for optimizer in parts.optimizers],
        "random": checkpoint.random_states(parts.sampling["generator"], parts.learning["generator"]),
        "sizes": run_folder.sizes(folder),
    }


def restore(saved: dict, parts: Parts, folder: Path) -> dict:
    """Puts everything back as it was, and returns what `state` called the run."""
    parts.policy.load_state_dict(saved["policy"])
    if parts.people:
        parts.people[0].load_state_dict(saved["people"]["weights"])
        parts.people[0].config.update(saved["people"]["config"])
    for optimizer, of_optimizer in zip(parts.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(of_optimizer)
    checkpoint.set_random_states(saved["random"], parts.sampling["generator"], parts.learning["generator"])
    run_folder.cut_back(folder, saved["sizes"])
    return saved["run"]


def guard(run: dict, rollout: ppo.Rollout, args: argparse.Namespace, bar: tqdm) -> None:
    """Stops a run whose numbers stay not finite, and warns, once, of a KL that cannot be or that is far too large."""
    row, update = run["row"], run["update"]
    run["not_finite"] = run["not_finite"] + 1 if row["skipped"] == args.ppo_epochs * args.minibatches else 0
    if run["not_finite"] == TOLERATED:
        what = f"{rollout.not_finite} of the rollout" if rollout.not_finite else "gradient of the loss"
        raise UserError(
            f"update {update}: the {what} is not finite, {TOLERATED} updates in a row; lower --lr. The policy of the "
            f"last finite update is in {args.out}.checkpoint"
        )
    run["kls"] = [*run["kls"], row["kl"]][-MOVING_AVERAGE:]
    warning = None
    if row["kl"] > args.kl_limit:
        warning = (
            f"the KL is {row['kl']:.1f} nats, above --kl-limit: the texts may be broken; raise --kl-coef or lower --lr"
        )
    elif len(run["kls"]) == MOVING_AVERAGE and np.mean(run["kls"]) < -0.1:
        warning = "the KL stays negative, which that of samples cannot: they are not the policy's own"
    if warning and not run["warned"] and parallel.rank() == 0:
        bar.write(f"warning: update {update}: {warning}", file=sys.stderr)
        run["warned"] = True


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> float:
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr
    return lr


def rewards_of(
    rollout: ppo.Rollout, scores: torch.Tensor, kl_coef: float, args: argparse.Namespace
) -> tuple[torch.Tensor, float]:
    """Rewards [B, R] of a rollout with scores [B], and by how much whitening divided them."""
    mask = rollout.response_mask
    penalty = ppo.kl_to_come(rollout.exact_kl) if args.kl == "exact" else rollout.logprobs - rollout.ref_logprobs
    rewards = ppo.token_rewards(scores, penalty, mask, kl_coef)
    if not args.whiten_rewards:
        return rewards, 1.0
    return ppo.whiten(rewards, mask, shift_mean=False), ppo.masked_std(rewards, mask).item()


def save_policy(args, model, tokenizer, stop_id: int, run: dict, device: torch.device) -> None:
    """The policy with its model card, whose results are those of the last update."""
    after = {name: run["row"][name] for name in ("ethics", "improvement_ma", "score", "kl", "entropy", "terminated")}
    before = {"ethics": run["ethics_before"], "score": 0.0, "kl": 0.0}
    table = pd.DataFrame({"before": before, "after": after}).loc[list(after)]
    record = {"settings": vars(args)} | common.provenance(device)
    card = model_io.card("A generator fine-tuned with PPO", "text-generation", args.data, record, table)
    model.generation_config = model_io.plain_sampling(tokenizer, args.temperature, args.response_length, stop_id)
    model_io.save_folder(args.out, model, tokenizer, card)


def show_pairs(before: list[str], after: list[str], queries: list[str]) -> None:
    for query, old, new in zip(queries, before, after, strict=False):
        print(f"\n{query}\n  before: {old.removeprefix(query).strip()}\n  after:  {new.removeprefix(query).strip()}")
    print()


if __name__ == "__main__":
    common.run(main)
