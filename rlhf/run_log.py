"""What a run of finetuning_nlg.py writes to its folder in data_results/, and what its numbers warn of."""

import argparse
import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ppo
from rlhf import distributed, rewards, runtime
from rlhf.errors import UserError
from rlhf.runtime import TOLERATED

MOVING_AVERAGE = 10  # updates that a moving average looks back
SAMPLES = 8  # rows of samples.csv at a time
REWARD_MODEL = "reward_model.csv"
GROWING = ("log.csv", "samples.csv", REWARD_MODEL)  # a checkpoint says how long they were


@distributed.by_the_first
def start(folder: Path) -> None:
    """A folder without the files of a run before."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*GROWING, "config.json", "evaluation.json", "evaluation_samples.csv"):
        (folder / name).unlink(missing_ok=True)


@distributed.by_the_first
def tensorboard(folder: Path, updates_done: int):
    """A TensorBoard writer that goes on after so many updates."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by few

    return SummaryWriter(str(folder), purge_step=updates_done + 1)


@distributed.by_the_first
def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def log(row: dict, folder: Path, writer, bar) -> None:
    """A row of log.csv, the same for TensorBoard, and the numbers that matter beside the progress bar."""
    append(folder / "log.csv", [row])
    if writer:
        for name in (name for name, value in row.items() if value is not None):  # the gold judge may be silent
            writer.add_scalar(name, row[name], row["update"])
    bar.set_postfix_str(
        f"ethics {row['ethics']:.3f}, improvement {row['improvement_ma']:+.3f}, KL {row['kl']:.2f}, "
        f"{row['episodes_per_second']:.0f} episodes/s"
    )


@distributed.by_the_first
def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the growing files, all of them on the disk."""
    there = [folder / name for name in GROWING if (folder / name).exists()]
    for path in there:
        runtime.sync(path)
    return {path.name: path.stat().st_size for path in there}


@distributed.by_the_first
def cut_back(folder: Path, to: dict[str, int]) -> None:
    """Takes off the rows that came after `sizes` said this."""
    for name, size in to.items():
        if not (folder / name).exists() or (folder / name).stat().st_size < size:
            raise UserError(
                f"{folder / name} is shorter than at the checkpoint: bring it back, or remove the checkpoint"
            )
    for name in GROWING:
        if name in to:
            os.truncate(folder / name, to[name])
        else:
            (folder / name).unlink(missing_ok=True)


# rows


def measured(
    rollout: ppo.Rollout, scores: torch.Tensor, ethics: np.ndarray, returns: torch.Tensor, kl_coef: float
) -> dict[str, float]:
    """What log.csv says of a rollout with scores and ethics [B], and of those of the other processes."""
    mask = rollout.response_mask
    score, kl, length, terminated = (
        distributed.mean(x).item() for x in (scores, rollout.kl, mask.sum(1), rollout.terminated)
    )
    return {
        "score": score,
        "ethics": float(np.mean(distributed.gather(ethics.tolist()))),
        "kl": kl,
        "reward": score - kl_coef * kl,
        "entropy": ppo.masked_mean(rollout.entropy, mask).item(),
        "explained_variance": ppo.explained_variance(rollout.values, returns, mask),
        "response_length": length,
        "terminated": terminated,
    }


def gold(judge: rewards.Judge | None, texts: list[str]) -> dict[str, float | None]:
    """What the gold judge, if there is one, says of the texts of all processes."""
    verdicts = rewards.judged(judge, distributed.gather(texts))
    return {f"gold_{name}": share for name, share in rewards.gold_shares(verdicts).items()}


def by_part(reward: list[rewards.Reward], scores: np.ndarray) -> dict[str, float]:
    """The mean score of every part of a reward of several, scores [B, parts], before it is weighted."""
    means = np.mean(distributed.gather(scores.tolist()), 0)
    return (
        {f"score_{part.name}": float(mean) for part, mean in zip(reward, means, strict=True)} if len(reward) > 1 else {}
    )


def timings(clock: list[float], episodes: int) -> dict[str, float]:
    """Seconds of the stages between four readings of the clock."""
    stages = ("seconds_rollout", "seconds_score", "seconds_update")
    seconds = {name: end - start for name, start, end in zip(stages, clock, clock[1:], strict=False)}
    return seconds | {"episodes_per_second": episodes / (clock[-1] - clock[0])}


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


def guard(run: dict, rollout: ppo.Rollout, args: argparse.Namespace, bar: tqdm) -> None:
    """Stops a run whose numbers stay not finite, and warns, once, of a KL that cannot be or that is far too large."""
    row, update = run["row"], run["update"]
    run["not_finite"] = run["not_finite"] + 1 if row["skipped"] == args.ppo_epochs * args.minibatches else 0
    if run["not_finite"] == TOLERATED:
        what = f"{rollout.not_finite} of the rollout" if rollout.not_finite else "gradient of the loss"
        raise UserError(
            f"update {update}: the {what} is not finite, {TOLERATED} updates in a row; lower --lr and start anew. "
            f"{args.out}.checkpoint, if there is one, holds the run as it was last saved"
        )
    run["kls"] = [*run["kls"], row["kl"]][-MOVING_AVERAGE:]
    warning = None
    if row["kl"] > args.kl_limit:
        warning = (
            f"the KL is {row['kl']:.1f} nats, above --kl-limit: the texts may be broken; raise --kl-coef or lower --lr"
        )
    elif len(run["kls"]) == MOVING_AVERAGE and np.mean(run["kls"]) < -0.1:
        warning = "the KL stays negative, which that of samples cannot: they are not the policy's own"
    if warning and not run["warned"] and distributed.rank() == 0:
        bar.write(f"warning: update {update}: {warning}", file=sys.stderr)
        run["warned"] = True
