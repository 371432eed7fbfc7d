"""Fine-tune the generator with PPO so that its texts please the reward, and stay near the generator.

    python finetuning_nlg.py                                # models/nlg + models/cls -> models/nlg_ppo
    python finetuning_nlg.py --policy gpt2 --reward lvwerra/distilbert-imdb --data stanfordnlp/imdb
    python finetuning_nlg.py --reward human --feedback best-of-4 --labels 250 --label-rounds 5   # you are the reward

Every update: queries -> rollout -> scores -> rewards -> advantages -> update -> log. Writes the policy to --out, and
to data_results/<run>/ config.json, log.csv, samples.csv; the figure data_results/fig_K<K>_lr_<lr>.png shows all runs
with these settings.
"""

import rlhf.openmp  # noqa: F401, I001  (before torch is loaded)
import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

import ppo
from rlhf import (
    activations,
    checkpoint,
    cli,
    data,
    distributed,
    gold,
    lora,
    model_card,
    models,
    optim,
    plots,
    precision,
    recipes,
    rewards,
    runtime,
)
from rlhf.errors import UserError
from rlhf.human import annotator, feedback, page, questions, reward_model, terminal
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect, shuffled_minibatches
from rlhf.run_log import REWARD_MODEL, RunLog, append
from rlhf.sampling import Sampling

SHOWN = 4  # texts before and after, at the end


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser, default="data_nlg")
    model_flags = parser.add_argument_group("models")
    model_flags.add_argument(
        "--policy", default="models/nlg", help="folder, .gguf file or hub name of the generator to improve"
    )
    model_flags.add_argument("--out", default="models/nlg_ppo", help="folder to write")
    cli.add_model_flags(model_flags)
    model_flags.add_argument("--separate-value", action="store_true", help="a value network, not a head on the policy")
    cli.add_rollout_flags(parser.add_argument_group("rollout"))
    cli.add_reward_flags(parser.add_argument_group("reward"))
    cli.add_human_flags(parser.add_argument_group("feedback from people (--reward human)"))
    cli.add_kl_flags(parser.add_argument_group("KL penalty"))
    cli.add_ppo_flags(parser.add_argument_group("PPO"))
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: K<K>_lr_<lr>_seed<seed>)")
    output.add_argument("--results", default="data_results", help="folder of the run folders")
    cli.add_gold_flag(output)
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard events to the run folder too")
    cli.add_machine_flags(parser)
    cli.add_checkpoint_flags(parser.add_argument_group("checkpoints"), every=10)
    args = parser.parse_args()
    recipes.fill(args, recipes.with_lora(recipes.PPO, args.lora), args.policy)
    cli.check_lora(args, args.policy, "--policy")
    if args.batch_size % args.minibatches:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into --minibatches {args.minibatches}")
    if args.leave_one_out and args.answers < 2:
        raise UserError("--leave-one-out compares the answers to one query: give --answers 2 or more")
    if args.episodes < args.batch_size:
        raise UserError(f"--episodes {args.episodes} is less than one batch of --batch-size {args.batch_size}")
    if args.label_rounds > min(args.labels, args.episodes // args.batch_size):
        raise UserError(f"--label-rounds {args.label_rounds} are more than there are --labels or updates")
    args.reward = args.reward or ["models/cls"]
    args.run = args.run or f"K{args.ppo_epochs}_lr_{plots.short(args.lr)}_seed{args.seed}"
    return args


def main() -> None:
    args = parse_args()
    device = runtime.set_up(args.device, args.seed, args.batch_size)
    with checkpoint.opened(args, Path(args.results) / args.run) as checkpoints:
        fine_tune(args, device, checkpoints)


def fine_tune(args: argparse.Namespace, device: torch.device, checkpoints: checkpoint.Checkpoints) -> None:
    updates = args.episodes // args.batch_size

    # data and models
    texts = data.load_texts(args.data, args.data_config, args.data_revision, args.text_column)
    reference, model, tokenizer, dtype = load_models(args, device)
    human = load_human(args, device, updates) if rewards.includes_people(args.reward) else None
    policy = PolicyWithValue(model, args.separate_value, dtype).eval()
    reward = rewards.load(
        args.reward, args.missing_stop_score, device, args.precision, human and (human.model, human.tokenizer)
    )
    judge = gold.load_judge(args.gold, texts["valid"], device, args.precision)
    queries = data.training_queries(texts, tokenizer, args.query_length)

    # what changes from update to update, and what does not
    optimizer = optim.ppo_optimizer(policy, args.lr, muon=args.optimizer == "muon")
    kl_schedule = ppo.KLSchedule(args.kl_coef, args.kl_start, args.target_kl, args.kl_horizon)
    query_stream = data.QueryStream(queries, args.seed)
    sample_rng = torch.Generator().manual_seed(args.seed + 100_003 * distributed.rank())  # one of every process
    shuffle_rng = torch.Generator().manual_seed(args.seed)  # the same in all of them
    log = new_log(args, updates, tokenizer, reward, judge)
    state = {
        "policy": lora.TrainedWeights(policy),
        "optimizer": optimizer,
        "kl": kl_schedule,
        "queries": query_stream,
        "reward": reward,
    }
    state |= {"random": checkpoint.RandomState(sample_rng, shuffle_rng), "log": log}
    state |= {"human": human} if human else {}
    settings, sampling = ppo_settings(args), sampling_of(args, tokenizer)

    # a new run, on whose reference samples the scores are standardized, or a stopped one
    first_queries = distributed.shard(query_stream.take(args.reference_samples))
    needed = first_queries if human or checkpoints.stage is None else []  # a stopped run has its score statistics
    texts = models.continuations(reference, tokenizer, needed, sampling, sample_rng)
    samples = ReferenceSamples(first_queries, texts)
    if not checkpoints.restore(state):
        start(args, log, reward, human, samples, runtime.provenance(device, dtype))

    runtime.print_device(device, dtype)
    print(recipes.summary(args, recipes.PPO, args.policy))
    for update in log.updates():
        if human and human.is_due(update):
            checkpoints.after_step(update - 1, state, now=True)  # people may take their time
            ask_people(args, human, policy, tokenizer, queries, sampling, update, log.folder)
            calibrate(reward, human, samples)
            write_config(args, reward, log.folder, runtime.provenance(device, dtype))
        progress, clock = (update - 1) / updates, runtime.Clock(device)
        lr = optimizer.set_lr(args.lr * (1 - progress))
        kl_coef = kl_schedule.coefficient(progress)

        batch = distributed.shard(query_stream.take(args.batch_size // args.answers))
        batch = [query for query in batch for _ in range(args.answers)]
        minibatches = shuffled_minibatches(len(batch), args.minibatches, shuffle_rng)
        rollout = collect(
            policy, reference, *data.encode_queries(tokenizer, batch, device), sampling, sample_rng,
            forward_batch=args.forward_batch, minibatches=minibatches,
            shortest_query=data.shortest_query(args.query_length) if args.query_kl else None,
        )  # fmt: skip
        clock.lap("rollout")

        texts = models.whole_texts(tokenizer, rollout.ids, rollout.mask)
        scores = reward(batch, texts, rollout.terminated)
        clock.lap("score")

        token_rewards = ppo.rewards(rollout, scores.total, kl_coef, settings)
        targets = ppo.targets(rollout, token_rewards, kl_coef, settings)
        metrics = ppo.update(policy, reference, optimizer, rollout, targets, settings, shuffle_rng)
        clock.lap("update")

        row = log.write(
            update, lr=lr, kl_coef=kl_coef, rollout=rollout, texts=texts, scores=scores, metrics=metrics,
            seconds=clock.laps, ethics_before=reward.ethics_before, labels=human.labels if human else None,
        )  # fmt: skip
        log.check(rollout, metrics["skipped"] == args.ppo_epochs * args.minibatches, args.out)
        kl_schedule.observe(row["kl"], args.batch_size)
        checkpoints.after_step(update, state)

    provenance = runtime.provenance(device, dtype)
    save_policy(args, policy.model, tokenizer, sampling, log.last_row, reward.ethics_before, provenance)
    if human:
        save_reward_model(args, human, log.folder, provenance)
    texts = models.continuations(policy.in_precision(), tokenizer, samples.queries[:SHOWN], sampling, sample_rng)
    show(args, samples.queries[:SHOWN], log.texts_before, texts)


# what a run is made of


class ReferenceSamples(NamedTuple):
    """This process's part of the reference's own texts."""

    queries: list[str]
    texts: list[str]  # each begins with its query; none where a stopped run has no use for them


def load_models(args: argparse.Namespace, device: torch.device) -> tuple:
    """The reference, a copy of it that becomes the policy, their tokenizer, and the precision of matrix products.

    With --lora the policy is the reference with adapters, and holds no other weights of its own.
    """
    reference, tokenizer = models.load_policy(args.policy, "--policy")
    tokens = args.query_length + args.response_length
    models.check_length(reference, tokenizer, tokens, "--query-length and --response-length")
    if args.batch_size % (args.answers * distributed.world_size()):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided into --answers {args.answers} to a query"
            + (f" in each of {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
        )
    dtype = precision.choose(args.precision, device, reference.to(device))
    model = None if args.lora else copy.deepcopy(reference)
    precision.freeze(reference, dtype)
    model = model or lora.with_adapters(reference, args.lora, args.policy)
    if args.activation_checkpointing:
        activations.checkpoint_layers(model)
    return reference, model, tokenizer, dtype


def load_human(args: argparse.Namespace, device: torch.device, updates: int) -> feedback.HumanFeedback:
    """People, or what answers in their place, and the reward model that will learn their answers."""
    if distributed.world_size() > 1:
        raise UserError("--reward human asks one person, in one process; start it without torchrun")
    model, tokenizer = reward_model.new_model(args.policy, args.feedback)
    precision.set_precision(model.to(device), precision.choose(args.precision, device, model))
    if args.annotator:
        noise, seed = args.annotator_noise, args.seed
        ask = annotator.load(args.annotator, args.gold, noise, seed, device, args.precision)
    elif args.page:
        ask = page.start(questions.answer_keys(questions.samples_per_question(args.feedback)))
    else:
        ask = terminal.ask
    settings = feedback.Settings(
        kind=args.feedback,
        labels=args.labels,
        rounds=args.label_rounds,
        file=Path(args.feedback_file),
        metadata={"annotator": args.annotator},
        epochs=args.reward_epochs,
        lr=args.reward_lr,
        muon=args.optimizer == "muon",
        seed=args.seed,
    )
    return feedback.HumanFeedback(model, tokenizer, ask, settings, updates)


def new_log(
    args: argparse.Namespace, updates: int, tokenizer, reward: rewards.Reward, judge: gold.Judge | None
) -> RunLog:
    return RunLog(
        Path(args.results) / args.run,
        updates,
        args.batch_size,
        tokenizer=tokenizer,
        part_names=[part.name for part in reward.parts],
        judge=judge,
        kl_limit=args.kl_limit,
        tensorboard=args.tensorboard,
    )


def ppo_settings(args: argparse.Namespace) -> ppo.Settings:
    return ppo.Settings(
        epochs=args.ppo_epochs,
        forward_batch=args.forward_batch,
        temperature=args.temperature,
        exact_kl=args.kl == "exact",
        leave_one_out=args.answers if args.leave_one_out else 0,
        discount=args.discount,
        gae_lambda=args.gae_lambda,
        whiten_rewards=args.whiten_rewards,
        clip_range=args.clip_range,
        value_clip_range=args.value_clip_range,
        value_coef=0.0 if args.leave_one_out else args.value_coef,
    )


def sampling_of(args: argparse.Namespace, tokenizer) -> Sampling:
    stop_id = models.stop_token(tokenizer, args.stop)
    return Sampling(args.response_length, args.temperature, stop_id, args.stop_after)


def calibrate(reward: rewards.Reward, human: feedback.HumanFeedback | None, samples: ReferenceSamples) -> None:
    """Standardize the scores on the reference's texts."""
    if human:
        human.calibrate(samples.texts)
    reward.calibrate(*samples)


# what a run writes


def start(
    args: argparse.Namespace,
    log: RunLog,
    reward: rewards.Reward,
    human: feedback.HumanFeedback | None,
    samples: ReferenceSamples,
    provenance: dict,
) -> None:
    """A new run folder. A reward that fails on the samples leaves the previous run as it was."""
    log.texts_before = samples.texts[:SHOWN]
    if human:  # the reward model has learned nothing yet: it is calibrated after the first answers
        log.start()
        return
    calibrate(reward, human, samples)
    log.start()
    write_config(args, reward, log.folder, provenance)


def ask_people(args, human, policy, tokenizer, queries: list[str], sampling: Sampling, update: int, folder) -> None:
    """A round of questions about the policy before this update, from which the reward model learns."""
    name = f"{args.out} after {update - 1} updates" if update > 1 else args.policy
    row = human.ask_and_learn(policy.in_precision(), name, tokenizer, queries, sampling, update)
    append(folder / REWARD_MODEL, [row])


def write_config(args: argparse.Namespace, reward: rewards.Reward, folder: Path, provenance: dict) -> None:
    runtime.write_json(folder / "config.json", {"settings": vars(args), **reward.state_dict()} | provenance)


def save_policy(
    args: argparse.Namespace, model, tokenizer, sampling: Sampling, row: dict, ethics_before: float, provenance: dict
) -> None:
    """The policy with its model card, whose results are those of the last update's row of log.csv."""
    after = {name: row[name] for name in ("ethics", "improvement_ma", "score", "kl", "entropy", "terminated")}
    before = {"ethics": ethics_before, "score": 0.0, "kl": 0.0}
    table = pd.DataFrame({"before": before, "after": after}).loc[list(after)]
    title, record = "A generator fine-tuned with PPO", {"settings": vars(args)} | provenance
    card = model_card.text(title, "text-generation", args.data, record, table)
    model.generation_config = models.generation_config(tokenizer, sampling)
    models.save_folder(args.out, model, tokenizer, card)


def save_reward_model(args: argparse.Namespace, human: feedback.HumanFeedback, folder: Path, provenance: dict) -> None:
    """The reward model that learned people's answers, in a folder beside the policy."""
    table = pd.read_csv(folder / REWARD_MODEL).set_index("labels")
    title, record = "What people's answers taught", {"settings": vars(args)} | provenance
    card = model_card.text(title, "text-classification", args.feedback_file, record, table)
    models.save_folder(f"{args.out}_reward", human.model, human.tokenizer, card)


def show(args: argparse.Namespace, queries: list[str], before: list[str], after: list[str]) -> None:
    """Print texts before and after, and where the results are."""
    for query, old, new in zip(queries, before, after, strict=False):
        print(f"\n{query}\n  before: {old.removeprefix(query).strip()}\n  after:  {new.removeprefix(query).strip()}")
    figure = plots.save_improvement(Path(args.results), args.ppo_epochs, args.lr)
    print(f"\npolicy: {args.out}; run: {Path(args.results) / args.run}" + (f"; figure: {figure}" if figure else ""))


if __name__ == "__main__":
    cli.run(main)
