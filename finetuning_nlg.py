"""Fine-tune the generator with PPO so that its texts please the reward, and stay near the generator.

    python finetuning_nlg.py                                # models/nlg + models/cls -> models/nlg_ppo
    python finetuning_nlg.py --policy gpt2 --reward lvwerra/distilbert-imdb --data stanfordnlp/imdb
    python finetuning_nlg.py --reward human --feedback best-of-4 --labels 250 --label-rounds 5   # you are the reward

Every update: queries -> rollout -> scores -> rewards -> advantages -> update -> log. Writes the policy to --out, and
to data_results/<run>/ config.json, log.csv, samples.csv; the figure data_results/fig_K<K>_lr_<lr>.png shows all runs
with these settings.
"""

import rlhf.environment  # noqa: F401, I001  (before torch is loaded)
import argparse
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import torch

import ppo
from rlhf import (
    checkpoint,
    cli,
    distributed,
    evaluation,
    flags,
    guard,
    lora,
    memory,
    model_card,
    models,
    optim,
    outputs,
    plots,
    prompting,
    querying,
    recipes,
    rewards,
    runtime,
    user_code,
    task,
)
from rlhf.errors import UserError
from rlhf.human import feedback
from rlhf.human import flags as human_flags
from rlhf.policy import PolicyWithValue
from rlhf.rollout import collect, shuffled_minibatches
from rlhf.run_log import REWARD_MODEL, RunLog, append
from rlhf.sampling import Sampling

SHOWN = 4  # texts before and after, at the end


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    flags.add_data_flags(parser, default="data_nlg")
    model_flags = parser.add_argument_group("models")
    model_flags.add_argument(
        "--policy", default="models/nlg", help="folder, .gguf file or hub name of the generator to improve"
    )
    model_flags.add_argument(
        "--start-from", help="folder of a model that was fine-tuned from --policy: PPO goes on with it, and --policy "
        "stays the reference",
    )  # fmt: skip
    model_flags.add_argument("--out", type=cli.folder, default="models/nlg_ppo", help="folder to write")
    flags.add_model_flags(model_flags)
    model_flags.add_argument("--separate-value", action="store_true", help="a value network, not a head on the policy")
    flags.add_chat_flags(parser.add_argument_group("chat models"))
    flags.add_rollout_flags(parser.add_argument_group("rollout"))
    flags.add_reward_flags(parser.add_argument_group("reward"))
    of_people = human_flags.add_flags(parser)
    flags.add_kl_flags(parser.add_argument_group("KL penalty"))
    flags.add_ppo_flags(parser.add_argument_group("PPO"))
    flags.add_evaluation_flags(parser.add_argument_group("evaluation"))
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: K<K>_lr_<lr>_seed<seed>)")
    output.add_argument("--results", default="data_results", help="folder of the run folders")
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard events to the run folder too")
    flags.add_machine_flags(parser).add_argument(
        "--estimate-memory", action="store_true", help="print how much memory the run would take, and do nothing else"
    )
    flags.add_checkpoint_flags(parser.add_argument_group("checkpoints"), every=10)
    args = parser.parse_args()
    args.reward = args.reward or [flags.DEFAULT_REWARD]
    rewards.refuse_missing_files(args.reward)
    asks_people = rewards.includes_people(args.reward)
    if not asks_people:
        human_flags.refuse_without_people(args, of_people)
    human_flags.refuse_contradictions(args)
    flags.fill(args)
    recipes.fill(args, recipes.with_lora(recipes.PPO, args.lora) | recipes.PEOPLE, args.policy)
    flags.check_lora(args, args.policy, "--policy")
    flags.check_ppo_flags(args)
    outputs.refuse_to_replace(args.out, args.policy, args.reward, args.gold)
    if args.reward_sees == prompting.REPLY and asks_people:
        raise UserError("--reward human: people judge a reply to its prompt; take --reward-sees both")
    args.run = args.run or f"K{args.ppo_epochs}_lr_{plots.short(args.lr)}_seed{args.seed}"
    if (Path(args.results) / args.run).is_file():
        raise UserError(f"--run {args.run}: in --results this is a file, not a run folder; give another name")
    return args


def main() -> None:
    args = parse_args()
    if args.estimate_memory:
        return print_memory(args)
    device = runtime.set_up(args.device, args.seed, args.batch_size)
    with checkpoint.opened(args, Path(args.results) / args.run) as checkpoints:
        fine_tune(args, device, checkpoints)


def fine_tune(args: argparse.Namespace, device: torch.device, checkpoints: checkpoint.Checkpoints) -> None:
    updates = args.episodes // args.batch_size

    policy, reference, prompts, reward, _, human, texts, dtype = trained_on = task.load(args, device, updates)
    queries = prompts.training_queries(texts, args.query_length)
    settings, sampling = ppo_settings(args), prompting.sampling_of(args, prompts)
    training = new_training(args, trained_on, queries, sampling, updates)
    optimizer, kl_schedule, kl_guard, query_stream, sample_rng, shuffle_rng, evaluations, log = training
    state = training.state(trained_on)

    # a new run, on whose reference samples the scores are standardized, or a stopped one
    first_queries = distributed.shard(query_stream.take(args.reference_samples))
    needed = first_queries if human or checkpoints.stage is None else []  # a stopped run has its score statistics
    samples = ReferenceSamples(
        first_queries, models.continuations(reference, prompts, needed, sampling, sample_rng, args.batch_size)
    )
    if not checkpoints.restore(state):
        start(args, log, reward, human, samples, runtime.provenance(device, dtype))

    runtime.print_device(device, dtype)
    print(recipes.summary(args, recipes.PPO | (recipes.PEOPLE if human else {}), args.policy))
    if args.kl_guard and not is_guarded(args):
        print("the KL guard is off: with --kl-coef 0 there is nothing that it could raise")
    for update in log.updates():
        if human and human.is_due(update):
            checkpoints.after_step(update - 1, state, now=True)  # people may take their time
            ask_people(args, human, policy, prompts, queries, sampling, update, log.folder)
            calibrate(reward, human, samples)
            evaluations.forget_best()
            outputs.write_config(args, reward, log.folder, runtime.provenance(device, dtype))
        progress, clock = (update - 1) / updates, runtime.Clock(device)
        lr = optimizer.set_lr(args.lr * (1 - progress))
        kl_coef = kl_schedule.coefficient(progress) * kl_guard.kl_factor

        batch = distributed.shard(query_stream.take(args.batch_size // args.answers))
        batch = [query for query in batch for _ in range(args.answers)]
        minibatches = shuffled_minibatches(len(batch), args.minibatches, shuffle_rng)
        rollout = collect(
            policy, reference, *prompts.encode(batch, device), sampling, sample_rng,
            forward_batch=args.forward_batch, minibatches=minibatches,
            shortest_query=querying.shortest_row(prompts.tokenizer, args.query_length) if args.query_kl else None,
        )  # fmt: skip
        clock.lap("rollout")

        texts = prompts.texts(batch, *rollout.tokens)
        scores = reward(batch, texts, rollout.terminated)
        clock.lap("score")

        token_rewards = ppo.rewards(rollout, scores.total, kl_coef, settings)
        targets = ppo.targets(rollout, token_rewards, kl_coef, settings)
        with policy.learning(critic_only=update <= args.critic_warmup):
            metrics = ppo.update(policy, reference, optimizer, rollout, targets, settings, shuffle_rng)
        clock.lap("update")

        measured = evaluations.after_update(update, policy)  # before the guard may go back
        action = kl_guard.watch(update, distributed.mean(rollout.exact_kl.sum(1)).item())
        row = log.write(
            update, lr=lr, kl_coef=kl_coef, rollout=rollout, queries=batch, texts=texts, scores=scores, metrics=metrics,
            seconds=clock.laps, ethics_before=reward.ethics_before, labels=human.labels if human else None,
            guard=action, evaluation=measured,
        )  # fmt: skip
        if action == guard.STOPPED:
            break
        log.check(rollout, not action and metrics["skipped"] == args.ppo_epochs * args.minibatches, args.out)
        kl_schedule.observe(row["kl"], args.batch_size if update > args.critic_warmup else 0)
        checkpoints.after_step(update, state)

    provenance = runtime.provenance(device, dtype)
    finish(args, policy, reward, prompts, sampling, human, log, evaluations, kl_guard, provenance)
    texts = models.continuations(policy.in_precision(), prompts, samples.queries[:SHOWN], sampling, sample_rng)
    show(args, prompts, samples.queries[:SHOWN], log.texts_before, texts)


def print_memory(args: argparse.Namespace) -> None:
    """What the run would take, from the configurations of its models."""
    specs = [rewards.weight_and_reward(spec)[1] for spec in args.reward]
    of_models = [spec for spec in specs if spec != "human" and not user_code.is_function(spec)]
    judges = [models.load_config(spec, "--reward") for spec in of_models]
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(memory.Settings)}
    policy = models.load_config(args.policy, "--policy")
    try:
        print(memory.estimate(policy, judges, memory.Settings(**settings)).table())
    except (ValueError, AttributeError) as error:  # an encoder, say
        raise UserError(f"--policy {args.policy} and --reward {args.reward} cannot be estimated: {error}") from error


# what a run is made of


class Training(NamedTuple):
    """What changes from update to update."""

    optimizer: optim.Optimizer
    kl_schedule: ppo.KLSchedule
    kl_guard: guard.KLGuard
    query_stream: querying.QueryStream
    sample_rng: torch.Generator  # another one in every process
    shuffle_rng: torch.Generator  # the same in all of them
    evaluations: evaluation.Evaluation
    log: RunLog

    def state(self, trained_on: task.Task) -> dict[str, checkpoint.Stateful]:
        """What belongs to a checkpoint."""
        state = weights_and_optimizer(trained_on.policy, self.optimizer) | {
            "kl": self.kl_schedule, "queries": self.query_stream, "reward": trained_on.reward,
            "random": checkpoint.RandomState(self.sample_rng, self.shuffle_rng), "log": self.log,
            "guard": self.kl_guard, "evaluations": self.evaluations,
        }  # fmt: skip
        return state | ({"human": trained_on.human} if trained_on.human else {})


def new_training(
    args: argparse.Namespace, trained_on: task.Task, queries: list[str], sampling: Sampling, updates: int
) -> Training:
    policy, reference, prompts, reward, judge, _, texts, _ = trained_on
    measure = functools.partial(
        evaluation.measure, reference=reference, prompts=prompts, reward=reward, judge=judge, sampling=sampling,
        queries=evaluation.held_out_queries(prompts, texts, args.query_length) if args.eval_every else [],
        kl_coef=args.kl_coef, forward_batch=args.forward_batch, seed=args.seed,
    )  # fmt: skip
    optimizer = optim.ppo_optimizer(policy, args.lr, muon=args.optimizer == "muon", value_lr=args.value_lr)
    kl_limit, of_guard = args.kl_limit, is_guarded(args)
    log = RunLog(
        Path(args.results) / args.run, updates, args.batch_size, split=prompts.split, judge=judge,
        part_names=[part.name for part in reward.parts], kl_limit=None if of_guard else kl_limit,
        tensorboard=args.tensorboard,
    )  # fmt: skip
    return Training(
        optimizer,
        ppo.KLSchedule(args.kl_coef, args.kl_start, args.target_kl, args.kl_horizon),
        guard.KLGuard(kl_limit if of_guard else None, weights_and_optimizer(policy, optimizer)),
        querying.QueryStream(queries, args.seed),
        distributed.generator(args.seed),
        torch.Generator().manual_seed(args.seed),
        evaluation.Evaluation(args.eval_every, updates, measure),
        log,
    )


def is_guarded(args: argparse.Namespace) -> bool:
    return args.kl_guard and args.kl_coef > 0  # without a KL coefficient there is none to raise


def weights_and_optimizer(policy: PolicyWithValue, optimizer: optim.Optimizer) -> dict[str, checkpoint.Stateful]:
    return {"policy": lora.TrainedWeights(policy), "optimizer": optimizer}


class ReferenceSamples(NamedTuple):
    """This process's part of the reference's own texts."""

    queries: list[str]
    texts: list[str]  # what is seen of them; none where a stopped run has no use for them


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


def calibrate(reward: rewards.Reward, human: feedback.HumanFeedback | None, samples: ReferenceSamples) -> None:
    """Standardize the scores on the reference's texts."""
    if human:
        human.calibrate(samples.texts)
    reward.calibrate(*samples)


# what a run writes


def start(
    args: argparse.Namespace, log: RunLog, reward: rewards.Reward, human: feedback.HumanFeedback | None,
    samples: ReferenceSamples, provenance: dict,
) -> None:  # fmt: skip
    """A new run folder. A reward that fails on the samples leaves the previous run as it was."""
    log.texts_before = samples.texts[:SHOWN]
    if human:  # the reward model has learned nothing yet: it is calibrated after the first answers
        log.start()
        return
    calibrate(reward, human, samples)
    log.start()
    outputs.write_config(args, reward, log.folder, provenance)


def ask_people(args, human, policy, prompts, queries: list[str], sampling: Sampling, update: int, folder) -> None:
    """A round of questions about the policy before this update, from which the reward model learns."""
    name = f"{args.out} after {update - 1} updates" if update > 1 else args.policy
    row = human.ask_and_learn(policy.in_precision(), name, prompts, queries, sampling, update)
    append(folder / REWARD_MODEL, [row])


def finish(args, policy, reward, prompts, sampling, human, log, evaluations, kl_guard, provenance: dict) -> None:
    """Write the last policy, the best, or the last good one of a run that the guard has stopped; and say which."""
    chosen = (evaluations.bring_back_best(policy) if args.keep_best else None) or kl_guard.chosen
    out = outputs.stopped_folder(args.out) if kl_guard.chosen else args.out
    if args.interpolate < 1:
        reference, *_ = models.load_policy(args.policy, "--policy", args.chat)  # in float32: its weights were rounded
        policy.interpolate(reference, args.interpolate)
        print(f"\n{out} is {args.interpolate:g} of the way from the reference to PPO's policy, of which the log tells")
    title, results = model_card.of_ppo(log.last_row, reward.ethics_before, chosen, args.interpolate)
    outputs.save_policy(args, out, policy.model, prompts.tokenizer, sampling, title, results, provenance)
    if chosen:
        print(f"\n{out} is the policy after update {chosen.update}, {chosen.reason}")
    if human:
        outputs.save_reward_model(args, human, log.folder, provenance)
    kl_guard.raise_if_stopped(args.out, saved_to=out, update=chosen.update if chosen else log.last_row["update"])


def show(args: argparse.Namespace, prompts, queries: list[str], texts_before: list[str], texts_after: list[str]):
    """Print texts before and after, and where the results are."""
    for query, old, new in zip(queries, texts_before, texts_after, strict=False):
        before, after = (prompts.split(query, text) for text in (old, new))
        print(f"\n{before.query}\n  before: {before.response.strip()}\n  after:  {after.response.strip()}")
    figure = plots.save_improvement(Path(args.results), args.ppo_epochs, args.lr)
    print(f"\npolicy: {args.out}; run: {Path(args.results) / args.run}" + (f"; figure: {figure}" if figure else ""))


if __name__ == "__main__":
    cli.run(main)
