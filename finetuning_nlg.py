"""Fine-tune the generator with PPO so that its texts please the reward model, and stay near the generator.

    python finetuning_nlg.py                                # models/nlg + models/cls -> models/nlg_ppo
    python finetuning_nlg.py --policy gpt2 --reward lvwerra/distilbert-imdb --data stanfordnlp/imdb \\
        --batch-size 512 --minibatches 1 --optimizer adam --lr 1e-5 --kl-coef 0.15 --target-kl 6

Every update: queries -> rollout -> score -> reward -> advantages -> update -> log. Writes the policy to --out, and
to data_results/<run>/ config.json, log.csv, samples.csv; the figure data_results/fig_K<K>_lr_<lr>.png shows all runs
with these settings.
"""

import argparse
import copy
import csv
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import common
import data
import figures
import model_io
import ppo
from common import COUNT, FRACTION, POSITIVE, UserError, number

MOVING_AVERAGE = 10  # updates that the moving average of the improvement looks back
SAMPLE_EVERY, SAMPLES = 10, 8  # updates between, and rows of, what samples.csv keeps


def parse_args() -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_data_flags(parser, default="data_nlg")
    models = parser.add_argument_group("models")
    models.add_argument("--policy", default="models/nlg", help="folder or hub name of the generator to improve")
    models.add_argument(
        "--reward", default="models/cls", help="folder or hub name of a classifier, or FILE.py:FUNCTION"
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
    rollout.add_argument("--reference-samples", type=COUNT, default=4096, help="samples that normalise the score")
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
    output = parser.add_argument_group("output")
    output.add_argument("--run", help="name of the run folder (default: K<K>_lr_<lr>_seed<seed>)")
    output.add_argument("--results", default="data_results", help="where run folders are")
    common.add_gold_flag(output)
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard events to the run folder too")
    common.add_machine_flags(parser)
    args = parser.parse_args()
    if args.batch_size % args.minibatches:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into --minibatches {args.minibatches}")
    if args.episodes < args.batch_size:
        raise UserError(f"--episodes {args.episodes} is less than one batch of --batch-size {args.batch_size}")
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
    updates = args.episodes // args.batch_size

    # data and models
    texts = data.nlg_texts(args)["valid"]
    reference, tokenizer = model_io.load_policy(args.policy, "--policy")
    reference.to(device).requires_grad_(False)
    policy = ppo.PolicyWithValue(copy.deepcopy(reference).requires_grad_(True), args.separate_value).to(device).eval()
    reward_model = model_io.load_reward(args.reward, device)
    judge = model_io.gold_judge(args.gold, texts)  # it is logged, and nothing learns from it
    queries, _ = data.split_queries(texts, tokenizer, args.query_length)
    batches = endless(queries, args.batch_size, args.seed)
    optimizers = ppo.make_optimizers(policy, args.lr, muon=args.optimizer == "muon")
    sampling = {
        "length": args.response_length,
        "temperature": args.temperature,
        "stop_id": model_io.stop_token(tokenizer, args.stop),
        "stop_after": args.stop_after,
        "generator": torch.Generator(device).manual_seed(args.seed),
    }
    learning = {
        "epochs": args.ppo_epochs,
        "minibatches": args.minibatches,
        "clip_range": args.clip_range,
        "value_clip_range": args.value_clip_range,
        "value_coef": args.value_coef,
        "temperature": args.temperature,
        "forward_batch": args.forward_batch,
        "generator": sampling["generator"],
    }

    # the policy before: its texts' scores normalise the score, and the improvement counts from their ethics
    chosen = list(itertools.islice(itertools.chain.from_iterable(batches), args.reference_samples))
    texts_before = model_io.continuations(reference, tokenizer, chosen, **sampling)
    raw_before, ethics_before = reward_model(texts_before)
    baseline = {
        "score_mean": raw_before.mean(),
        "score_std": max(raw_before.std(), 1e-6),
        "ethics_before": float(ethics_before.mean()),
    }

    folder = Path(args.results) / args.run
    writer = start_run(folder, args, baseline, device)
    kl_coef, improvements = args.kl_coef, []
    bar = tqdm(range(1, updates + 1), desc=args.run, unit="update", dynamic_ncols=True)
    for update in bar:
        clock = [time.perf_counter()]
        lr = set_lr(optimizers, args.lr * (1 - (update - 1) / updates))

        query_ids, query_mask = data.encode_queries(tokenizer, next(batches), device)
        with common.autocast(device):
            rollout = ppo.collect(
                policy, reference, query_ids, query_mask, forward_batch=args.forward_batch, **sampling
            )
        clock.append(time.perf_counter())

        texts = model_io.whole_texts(tokenizer, query_ids, query_mask, rollout.response_ids, rollout.response_mask)
        raw, ethics = reward_model(texts)
        scores = torch.tensor((raw - baseline["score_mean"]) / baseline["score_std"], device=device).float()
        scores = scores.where(rollout.terminated, args.missing_stop_score)
        clock.append(time.perf_counter())

        mask = rollout.response_mask
        rewards, scale = rewards_of(rollout, scores, kl_coef, args)
        advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, mask, args.discount, args.gae_lambda)
        exact_kl_weight = kl_coef / scale / ppo.masked_std(advantages, mask).item() if args.kl == "exact" else 0.0
        with common.autocast(device):
            statistics = ppo.update(
                policy,
                optimizers,
                rollout,
                ppo.whiten(advantages, mask),
                returns,
                kl_weight=exact_kl_weight,
                steps_done=(update - 1) * args.ppo_epochs * args.minibatches,
                **learning,
            )
        clock.append(time.perf_counter())

        improvements.append(ethics.mean() - baseline["ethics_before"])
        row = {"update": update, "episodes": update * args.batch_size, "lr": lr, "kl_coef": kl_coef}
        row |= {"improvement": improvements[-1], "improvement_ma": np.mean(improvements[-MOVING_AVERAGE:])}
        row |= of_scores(scores, ethics, rollout.kl, kl_coef) | of_rollout(rollout, returns) | statistics
        row |= {f"gold_{name}": share for name, share in model_io.gold_shares(judge, texts).items()}
        row |= timings(clock, args.batch_size)
        log(row, folder, writer, bar)
        if update % SAMPLE_EVERY in (0, 1) or update == updates:
            append_rows(folder / "samples.csv", samples(update, texts, rollout, scores, ethics, tokenizer))
        if args.target_kl:
            kl_coef = ppo.next_kl_coef(kl_coef, row["kl"], args.target_kl, args.kl_horizon, args.batch_size)

    # the result
    if writer:
        writer.close()
    save_policy(args, policy.model, tokenizer, sampling["stop_id"], row, baseline, device)
    show_pairs(texts_before, model_io.continuations(policy.model, tokenizer, chosen[:4], **sampling), chosen)
    figure = figures.save_improvement(Path(args.results), args.ppo_epochs, args.lr)
    print(f"policy: {args.out}; run: {folder}" + (f"; figure: {figure}" if figure else ""))


def start_run(folder: Path, args: argparse.Namespace, baseline: dict, device: torch.device):
    """An empty run folder with its config.json; returns a TensorBoard writer if one is wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.csv", "samples.csv", "evaluation.json", "evaluation_samples.csv"):
        (folder / name).unlink(missing_ok=True)
    common.write_json(folder / "config.json", {"settings": vars(args), **baseline} | common.provenance(device))
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by few

    return SummaryWriter(str(folder))


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


def of_scores(scores: torch.Tensor, ethics: np.ndarray, kl: torch.Tensor, kl_coef: float) -> dict[str, float]:
    """What log.csv says of scores, ethics and KL [B] of a batch."""
    score, kl = scores.mean().item(), kl.mean().item()
    return {"score": score, "ethics": ethics.mean(), "kl": kl, "reward": score - kl_coef * kl}


def of_rollout(rollout: ppo.Rollout, returns: torch.Tensor) -> dict[str, float]:
    """What log.csv says of a rollout itself."""
    mask = rollout.response_mask
    return {
        "entropy": ppo.masked_mean(rollout.entropy, mask).item(),
        "explained_variance": ppo.explained_variance(rollout.values, returns, mask),
        "response_length": mask.sum(1).float().mean().item(),
        "terminated": rollout.terminated.float().mean().item(),
    }


def timings(clock: list[float], episodes: int) -> dict[str, float]:
    """Seconds of the stages between four readings of the clock."""
    stages = ("seconds_rollout", "seconds_score", "seconds_update")
    seconds = {name: end - start for name, start, end in zip(stages, clock, clock[1:], strict=False)}
    return seconds | {"episodes_per_second": episodes / (clock[-1] - clock[0])}


def log(row: dict, folder: Path, writer, bar: tqdm) -> None:
    """A row of log.csv, the same for TensorBoard, and the numbers that matter beside the progress bar."""
    append_rows(folder / "log.csv", [row])
    if writer:
        for name in (name for name, value in row.items() if value is not None):  # the gold judge may be silent
            writer.add_scalar(name, row[name], row["update"])
    bar.set_postfix_str(
        f"ethics {row['ethics']:.3f}, improvement {row['improvement_ma']:+.3f}, KL {row['kl']:.2f}, "
        f"{row['episodes_per_second']:.0f} episodes/s"
    )


def save_policy(args, model, tokenizer, stop_id: int, last: dict, baseline: dict, device: torch.device) -> None:
    """The policy with its model card, whose results are those of the last update."""
    after = {name: last[name] for name in ("ethics", "improvement_ma", "score", "kl", "entropy", "terminated")}
    before = {"ethics": baseline["ethics_before"], "score": 0.0, "kl": 0.0}
    table = pd.DataFrame({"before": before, "after": after}).loc[list(after)]
    record = {"settings": vars(args), **baseline} | common.provenance(device)
    card = model_io.card("A generator fine-tuned with PPO", "text-generation", args.data, record, table)
    model.generation_config = model_io.plain_sampling(tokenizer, args.temperature, args.response_length, stop_id)
    model_io.save_folder(args.out, model, tokenizer, card)


def append_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def samples(update, texts, rollout: ppo.Rollout, scores, ethics, tokenizer) -> list[dict]:
    """The first rows of a rollout, for samples.csv."""
    queries = tokenizer.batch_decode(rollout.query_ids[:SAMPLES], skip_special_tokens=True)
    return [
        {
            "update": update,
            "query": query,
            "response": texts[i][len(query) :],
            "score": scores[i].item(),
            "ethics": float(ethics[i]),
            "kl": rollout.kl[i].item(),
        }
        for i, query in enumerate(queries)
    ]


def show_pairs(before: list[str], after: list[str], queries: list[str]) -> None:
    for query, old, new in zip(queries, before, after, strict=False):
        print(f"\n{query}\n  before: {old.removeprefix(query).strip()}\n  after:  {new.removeprefix(query).strip()}")
    print()


if __name__ == "__main__":
    common.run(main)
