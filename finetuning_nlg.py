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
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from rlhf.errors import UserError
from transformers import PreTrainedTokenizerBase

import ppo
from rlhf import checkpoint, cli, data, distributed, models, optim, plots, precision, rewards, run_log, runtime
from rlhf.human import feedback, people
from rlhf.run_log import MOVING_AVERAGE

SAMPLE_EVERY = 10  # updates between the rows of samples.csv
SHOWN = 4  # texts before and after, at the end


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser, default="data_nlg")
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
    cli.add_rollout_flags(parser.add_argument_group("rollout"))
    cli.add_reward_flags(parser.add_argument_group("reward"))
    people.add_flags(parser.add_argument_group("feedback from people (--reward human)"))
    cli.add_ppo_flags(parser.add_argument_group("PPO"))
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: K<K>_lr_<lr>_seed<seed>)")
    output.add_argument("--results", default="data_results", help="where run folders are")
    cli.add_gold_flag(output)
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard events to the run folder too")
    cli.add_machine_flags(parser)
    checkpoint.add_flags(parser.add_argument_group("checkpoints"), every=10)
    args = parser.parse_args()
    if args.batch_size % args.minibatches:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into --minibatches {args.minibatches}")
    if args.leave_one_out and args.answers < 2:
        raise UserError("--leave-one-out compares the answers to one query: give --answers 2 or more")
    if args.episodes < args.batch_size:
        raise UserError(f"--episodes {args.episodes} is less than one batch of --batch-size {args.batch_size}")
    args.reward = args.reward or ["models/cls"]
    if args.label_rounds > min(args.labels, args.episodes // args.batch_size):
        raise UserError(f"--label-rounds {args.label_rounds} are more than there are --labels or updates")
    args.run = args.run or f"K{args.ppo_epochs}_lr_{plots.short(args.lr)}_seed{args.seed}"
    return args


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args)
    with checkpoint.keeping(args, Path(args.results) / args.run) as (saved, keep):
        fine_tune(args, device, saved, keep)


class Parts(NamedTuple):
    """What a run works with."""

    reference: torch.nn.Module
    policy: ppo.PolicyWithValue
    tokenizer: PreTrainedTokenizerBase
    reward: list[rewards.Reward]
    people: tuple | None  # the model of people's answers and its tokenizer
    judge: rewards.Judge | None
    precision: torch.dtype
    queries: list[str]
    optimizers: list[torch.optim.Optimizer]
    sampling: dict  # as sampling.sample takes it
    learning: dict  # as ppo.update takes it


def load_parts(args: argparse.Namespace, device: torch.device) -> Parts:
    """Data and models."""
    texts = data.nlg_texts(args)["valid"]
    reference, tokenizer = models.load_policy(args.policy, "--policy")
    tokens = args.query_length + args.response_length
    models.check_length(reference, tokenizer, tokens, "--query-length and --response-length")
    model = copy.deepcopy(reference.to(device))
    chosen = precision.choose(args.precision, device, model)
    of_people = people.new_model(args.policy, args.feedback) if rewards.asks_people(args.reward) else None
    if of_people and distributed.count() > 1:
        raise UserError("--reward human asks one person, in one process; start it without torchrun")
    if args.batch_size % (args.answers * distributed.count()):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided into --answers {args.answers} to a query"
            + (f" in each of {distributed.count()} processes" if distributed.count() > 1 else "")
        )
    if of_people:
        precision.set_precision(of_people[0].to(device), precision.choose(args.precision, device, of_people[0]))
    queries, _ = data.split_queries(texts, tokenizer, args.query_length)
    policy = ppo.PolicyWithValue(model, args.separate_value, chosen).eval()
    return Parts(
        reference=precision.freeze(reference, chosen),
        policy=policy,
        tokenizer=tokenizer,
        reward=rewards.load(args.reward, device, args.precision, of_people),
        people=of_people,
        judge=rewards.gold_judge(args.gold, texts, device, args.precision),  # it is logged, and nothing learns from it
        precision=chosen,
        queries=queries,
        optimizers=optim.make_optimizers(policy, args.lr, muon=args.optimizer == "muon"),
        sampling={
            "length": args.response_length,
            "temperature": args.temperature,
            "stop_id": models.stop_token(tokenizer, args.stop),
            "stop_after": args.stop_after,
            "generator": torch.Generator().manual_seed(args.seed + 100_003 * distributed.rank()),
        },
        learning={
            "epochs": args.ppo_epochs,
            "clip_range": args.clip_range,
            "value_clip_range": args.value_clip_range,
            "value_coef": 0.0 if args.leave_one_out else args.value_coef,
            "temperature": args.temperature,
            "forward_batch": args.forward_batch,
            "generator": torch.Generator().manual_seed(args.seed),
        },
    )


def fine_tune(args: argparse.Namespace, device: torch.device, saved: dict | None, keep: checkpoint.Keep) -> None:
    parts, folder, updates = load_parts(args, device), Path(args.results) / args.run, args.episodes // args.batch_size
    runtime.say_where(device, parts.precision)
    batches = data.endless(parts.queries, args.batch_size // args.answers, args.seed)
    chosen = list(itertools.islice(itertools.chain.from_iterable(batches), args.reference_samples))
    asks = [1 + updates * i // args.label_rounds for i in range(args.label_rounds)] if parts.people else []
    ask = people.asker(args, device) if asks else None
    run, normalise = begin(args, parts, folder, chosen, saved, device)
    for _ in range(run["update"]):
        next(batches)
    writer = run_log.tensorboard(folder, run["update"]) if args.tensorboard else None
    bar = runtime.progress(args.run, "update", run["update"], updates)
    for update in bar:
        if update in asks:
            keep(update - 1, lambda: state(run, parts, folder), now=True)  # people may take their time
            run["labels"] = args.labels * (asks.index(update) + 1) // args.label_rounds
            learn_from_people(args, parts, ask, run, folder)
            normalise()
        clock = [runtime.seconds(device)]
        done, kl_coef = (update - 1) / updates, run["kl_coef"]
        lr = optim.set_lr(parts.optimizers, args.lr * (1 - done))
        if not args.target_kl:
            kl_coef = ppo.falling_kl_coef(kl_coef, args.kl_start, done)

        asked = [query for query in distributed.share(next(batches)) for _ in range(args.answers)]
        rollout = roll_out(args, parts, asked, device)
        clock.append(runtime.seconds(device))

        texts, scores, ethics, of_parts = score(args, parts, run, asked, rollout)
        clock.append(runtime.seconds(device))

        mask = rollout.response_mask
        rewards, scale = rewards_of(rollout, scores, kl_coef, args)
        if args.leave_one_out:
            rollout = dataclasses.replace(rollout, values=ppo.leave_one_out(rewards, mask, args.answers))
        advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, mask, args.discount, args.gae_lambda)
        statistics = ppo.update(
            parts.policy,
            parts.reference,
            parts.optimizers,
            rollout,
            ppo.whiten(advantages, mask),
            returns,
            kl_weight=kl_coef / scale / ppo.masked_std(advantages, mask).item() if args.kl == "exact" else 0.0,
            **parts.learning,
        )
        clock.append(runtime.seconds(device))

        measured = run_log.measured(rollout, scores, ethics, returns, kl_coef)
        if args.leave_one_out:  # these would be of the other answers' returns, not of a critic
            statistics |= dict.fromkeys(("value_loss", "value_clip_fraction"))
            measured["explained_variance"] = None
        run["improvements"] = [*run["improvements"], measured["ethics"] - run["ethics_before"]][-MOVING_AVERAGE:]
        row = {"update": update, "episodes": update * args.batch_size, "lr": lr, "kl_coef": kl_coef}
        row |= {"improvement": run["improvements"][-1], "improvement_ma": float(np.mean(run["improvements"]))}
        row |= measured | statistics | run_log.gold(parts.judge, texts)
        row |= run_log.by_part(parts.reward, of_parts) | ({"labels": run["labels"]} if parts.people else {})
        row |= run_log.timings(clock, args.batch_size)
        run_log.log(row, folder, writer, bar)
        if update % SAMPLE_EVERY in (0, 1) or update == updates:
            rows = run_log.samples(update, texts, rollout, scores, ethics, parts.tokenizer)
            run_log.append(folder / "samples.csv", rows)
        if args.target_kl and math.isfinite(row["kl"]):
            run["kl_coef"] = ppo.next_kl_coef(kl_coef, row["kl"], args.target_kl, args.kl_horizon, args.batch_size)
        run.update(update=update, row=row)
        run_log.guard(run, rollout, args, bar)
        keep(update, lambda: state(run, parts, folder))
    if writer:
        writer.close()
    finish(args, parts, run, chosen[:SHOWN], device)


def begin(
    args: argparse.Namespace, parts: Parts, folder: Path, chosen: list[str], saved: dict | None, device: torch.device
) -> tuple[dict, Callable[[], None]]:
    """The state of the run, new or as it was saved, and a function that normalises its reward.

    The scores of the reference's texts to the chosen queries become 0 on average with deviation 1, and the improvement
    counts from their ethics. People's reward is normalised when it has learned.
    """
    mine = distributed.share(chosen)
    again = parts.people or not saved
    texts = models.continuations(parts.reference, parts.tokenizer, mine, **parts.sampling) if again else []
    run = restore(saved, parts, folder) if saved else {"update": 0, "kl_coef": args.kl_coef, "labels": 0}

    def normalise() -> None:
        if parts.people and args.feedback != "good-bad":  # on the reference its own scores become 0 too, as in [1]
            rewards.normalise(*parts.people, texts)
        run.update(rewards.normalisation(parts.reward, mine, texts))
        if not parts.people:  # not before: a reward that fails leaves the run before as it was
            run_log.start(folder)
        write_config(args, run, folder, runtime.provenance(device, parts.precision))

    if not saved:
        run |= {"texts_before": texts[:SHOWN], "improvements": [], "kls": [], "not_finite": 0, "warned": False}
        run_log.start(folder) if parts.people else normalise()
    return run, normalise


def learn_from_people(args: argparse.Namespace, parts: Parts, ask: feedback.Ask, run: dict, folder: Path) -> None:
    """A round of questions about the policy as it is; the reward model learns from all the answers."""
    writer = parts.policy.in_precision(), parts.tokenizer, parts.queries
    done, wanted = run["update"], run["labels"]
    found = people.ask_and_learn(args, parts.people, ask, *writer, parts.sampling, wanted=wanted, done=done)
    run_log.append(folder / run_log.REWARD_MODEL, [found])


def roll_out(args: argparse.Namespace, parts: Parts, asked: list[str], device: torch.device) -> ppo.Rollout:
    """The policy's responses to B queries."""
    query_ids, query_mask = data.encode_queries(parts.tokenizer, asked, device)
    return ppo.collect(
        parts.policy,
        parts.reference,
        query_ids,
        query_mask,
        minibatches=ppo.shuffled(len(asked), args.minibatches, parts.learning["generator"]),
        forward_batch=args.forward_batch,
        **parts.sampling,
    )


def score(
    args: argparse.Namespace, parts: Parts, run: dict, asked: list[str], rollout: ppo.Rollout
) -> tuple[list[str], torch.Tensor, np.ndarray, np.ndarray]:
    """Of B responses: the whole texts, scores [B], ethics [B], and the scores of the parts of the reward [B, parts].

    A response without the stop token has a fixed score.
    """
    texts = models.whole_texts(
        parts.tokenizer, rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.response_mask
    )
    raw = rewards.raw_scores(parts.reward, asked, texts)
    of_parts = rewards.normalised(raw, run)
    scores = torch.tensor(of_parts @ [part.weight for part in parts.reward], device=rollout.terminated.device).float()
    scores = scores.where(rollout.terminated, args.missing_stop_score)
    return texts, scores, rewards.reading(parts.reward, raw), of_parts


def write_config(args: argparse.Namespace, run: dict, folder: Path, provenance: dict) -> None:
    normal = {name: run[name] for name in ("score_mean", "score_std", "ethics_before")}
    runtime.write_json(folder / "config.json", {"settings": vars(args), **normal} | provenance)


def state(run: dict, parts: Parts, folder: Path) -> dict:
    """What a checkpoint holds."""
    model = parts.people[0] if parts.people else None
    return {
        "run": run,
        "policy": parts.policy.state_dict(),
        "people": model and {"weights": model.state_dict(), "config": rewards.normal_of(model)},
        "optimizers": [optimizer.state_dict() for optimizer in parts.optimizers],
        "random": checkpoint.random_states(parts.sampling["generator"], parts.learning["generator"]),
        "sizes": run_log.sizes(folder),
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
    run_log.cut_back(folder, saved["sizes"])
    return saved["run"]


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


def finish(args: argparse.Namespace, parts: Parts, run: dict, queries: list[str], device: torch.device) -> None:
    """Saves what was trained, and shows what it does with some queries."""
    save_policy(args, parts, run, device)
    if parts.people:
        people.save(args, *parts.people, device)
    after = models.continuations(parts.policy.in_precision(), parts.tokenizer, queries, **parts.sampling)
    for query, old, new in zip(queries, run["texts_before"], after, strict=False):
        print(f"\n{query}\n  before: {old.removeprefix(query).strip()}\n  after:  {new.removeprefix(query).strip()}")
    figure = plots.save_improvement(Path(args.results), args.ppo_epochs, args.lr)
    print(f"\npolicy: {args.out}; run: {Path(args.results) / args.run}" + (f"; figure: {figure}" if figure else ""))


def save_policy(args: argparse.Namespace, parts: Parts, run: dict, device: torch.device) -> None:
    """The policy with its model card, whose results are those of the last update."""
    after = {name: run["row"][name] for name in ("ethics", "improvement_ma", "score", "kl", "entropy", "terminated")}
    before = {"ethics": run["ethics_before"], "score": 0.0, "kl": 0.0}
    table = pd.DataFrame({"before": before, "after": after}).loc[list(after)]
    record = {"settings": vars(args)} | runtime.provenance(device, parts.precision)
    card = models.card("A generator fine-tuned with PPO", "text-generation", args.data, record, table)
    model, stop_id = parts.policy.model, parts.sampling["stop_id"]
    model.generation_config = models.plain_sampling(parts.tokenizer, args.temperature, args.response_length, stop_id)
    models.save_folder(args.out, model, parts.tokenizer, card)


if __name__ == "__main__":
    cli.run(main)
