"""The run folder of finetuning_nlg.py in data_results/: what is written to it, and warnings about the numbers."""

import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlhf import distributed, gold, runtime
from rlhf.errors import UserError
from rlhf.rewards import Scores, Split
from rlhf.rollout import Rollout
from rlhf.runtime import TOLERATED

MOVING_AVERAGE = 10  # updates that a moving average looks back
SAMPLE_EVERY = 10  # samples.csv has rows of every so many updates, and of the one after
SAMPLES = 8  # rows of samples.csv at a time
REWARD_MODEL = "reward_model.csv"
APPENDED_TO = ("log.csv", "samples.csv", REWARD_MODEL)  # a checkpoint says how long they were


class RunLog:
    """log.csv, samples.csv, TensorBoard and the progress bar of a run of so many updates."""

    def __init__(
        self,
        folder: Path,
        updates: int,
        batch_size: int,
        *,
        split: Split,
        part_names: list[str],
        judge: gold.Judge | None,
        kl_limit: float | None,  # of a warning
        tensorboard: bool,
    ):
        self.folder, self._updates, self._batch_size, self._split = folder, updates, batch_size, split
        self._part_names, self._judge, self._kl_limit, self._tensorboard = part_names, judge, kl_limit, tensorboard
        self.last_row: dict = {}
        self.texts_before: list[str] = []  # the reference's, to show beside the policy's at the end
        self._done = self._updates_not_finite = 0
        self._evaluation = ""  # the last one's numbers beside the progress bar
        self._improvements, self._kls = [], []  # of the last updates
        self._warned = False
        self._bar = self._writer = None

    @distributed.main_process_only
    def start(self) -> None:
        """Begin a new run: remove the files of a previous one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (*APPENDED_TO, "config.json", "evaluation.json", "evaluation_samples.csv"):
            (self.folder / name).unlink(missing_ok=True)

    def updates(self) -> Iterator[int]:
        """The numbers of the updates that are still to be made, with a progress bar."""
        self._writer = _tensorboard_writer(self.folder, self._done) if self._tensorboard else None
        self._bar = runtime.progress(self.folder.name, "update", self._done, self._updates)
        try:
            yield from self._bar
        finally:  # the guard may stop a run early
            if self._writer:
                self._writer.close()

    def write(
        self,
        update: int,
        *,
        lr: float,
        kl_coef: float,
        rollout: Rollout,
        queries: list[str],
        texts: list[str],
        scores: Scores,
        metrics: dict[str, float | None],
        seconds: dict[str, float],
        ethics_before: float,
        guard: str | None,
        evaluation: dict[str, float | None],
        labels: int | None = None,
    ) -> dict[str, float | str | None]:
        """Write an update's row of log.csv, and samples now and then. Returns the row.

        queries, texts: of the rollout; metrics: those of ppo.update; seconds: of the stages; guard: what it did;
        evaluation: its columns; labels: answers of people so far.
        """
        mask = rollout.response_mask
        ethics = float(np.mean(distributed.gather(scores.ethics.tolist())))
        score, kl, length, terminated = (
            distributed.mean(x).item() for x in (scores.total, rollout.kl, mask.sum(1), rollout.terminated)
        )
        self._improvements = [*self._improvements, ethics - ethics_before][-MOVING_AVERAGE:]
        row = {
            "update": update,
            "episodes": update * self._batch_size,
            "lr": lr,
            "kl_coef": kl_coef,
            "improvement": self._improvements[-1],
            "improvement_ma": float(np.mean(self._improvements)),
            "score": score,
            "ethics": ethics,
            "kl": kl,
            "reward": score - kl_coef * kl,
            "entropy": distributed.masked_mean(rollout.entropy, mask).item(),
            "explained_variance": metrics["explained_variance"],
            "response_length": length,
            "terminated": terminated,
            **metrics,
            **self._gold(texts),
            **self._by_part(scores),
            "guard": guard,
            **evaluation,
            **({} if labels is None else {"labels": labels}),
            **{f"seconds_{stage}": time for stage, time in seconds.items()},
            "episodes_per_second": self._batch_size / sum(seconds.values()),
        }
        append(self.folder / "log.csv", [row])
        self._show(row)
        if update % SAMPLE_EVERY in (0, 1) or update == self._updates:
            append(self.folder / "samples.csv", self._samples(update, rollout, queries, texts, scores))
        self._done, self.last_row = update, row
        return row

    def check(self, rollout: Rollout, update_skipped: bool, out: str) -> None:
        """Stop a run whose numbers stay not finite; warn, once, of a KL that is impossible or far too large."""
        update, kl = self.last_row["update"], self.last_row["kl"]
        self._updates_not_finite = self._updates_not_finite + 1 if update_skipped else 0
        if self._updates_not_finite == TOLERATED:
            what = f"{rollout.not_finite} of the rollout" if rollout.not_finite else "gradient of the loss"
            raise UserError(
                f"update {update}: the {what} is not finite, {TOLERATED} updates in a row; lower --lr and start anew. "
                f"{out}.checkpoint, if there is one, holds the run as it was last saved"
            )
        self._kls = [*self._kls, kl][-MOVING_AVERAGE:]
        warning = None
        if self._kl_limit is not None and kl > self._kl_limit:
            warning = (
                f"the KL is {kl:.1f} nats, above --kl-limit: the texts may be broken; raise --kl-coef or lower --lr"
            )
        elif len(self._kls) == MOVING_AVERAGE and np.mean(self._kls) < -0.1:
            warning = "the KL stays negative, which that of samples cannot: they are not the policy's own"
        if warning and not self._warned and distributed.rank() == 0:
            self._bar.write(f"warning: update {update}: {warning}", file=sys.stderr)
            self._warned = True

    def _gold(self, texts: list[str]) -> dict[str, float | None]:
        """What the held-out judge, if there is one, says of the texts of all processes."""
        verdicts = gold.judged(self._judge, distributed.gather(texts))
        return {f"gold_{name}": share for name, share in gold.shares(verdicts).items()}

    def _by_part(self, scores: Scores) -> dict[str, float]:
        """The mean score of every part of a reward of several, before it is weighted."""
        means = np.mean(distributed.gather(scores.by_part.tolist()), 0)
        several = len(self._part_names) > 1
        return {f"score_{name}": float(x) for name, x in zip(self._part_names, means, strict=True)} if several else {}

    def _show(self, row: dict) -> None:
        """The same row for TensorBoard, and the numbers that matter beside the progress bar."""
        if self._writer:
            numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}  # the judge may be silent
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, row["update"])
        if row.get("eval_score") is not None:
            self._evaluation = f", held out: score {row['eval_score']:.2f}, KL {row['eval_kl']:.2f}"
        self._bar.set_postfix_str(
            f"ethics {row['ethics']:.3f}, improvement {row['improvement_ma']:+.3f}, KL {row['kl']:.2f}, "
            f"{row['episodes_per_second']:.0f} episodes/s{self._evaluation}"
        )

    def _samples(
        self, update: int, rollout: Rollout, queries: list[str], texts: list[str], scores: Scores
    ) -> list[dict]:
        """The first rows of a rollout, for samples.csv."""
        samples = [self._split(query, text) for query, text in zip(queries[:SAMPLES], texts, strict=False)]
        return [
            {
                "update": update,
                "query": sample.query,
                "response": sample.response,
                "score": scores.total[i].item(),
                "ethics": float(scores.ethics[i]),
                "kl": rollout.kl[i].item(),
            }
            for i, sample in enumerate(samples)
        ]

    def state_dict(self) -> dict:
        return {
            "done": self._done,
            "last_row": self.last_row,
            "texts_before": self.texts_before,
            "updates_not_finite": self._updates_not_finite,
            "improvements": self._improvements,
            "kls": self._kls,
            "warned": self._warned,
            "sizes": _sizes(self.folder),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the update of this state: later rows are removed from the files."""
        self._done, self.last_row, self.texts_before = state["done"], state["last_row"], state["texts_before"]
        self._updates_not_finite, self._warned = state["updates_not_finite"], state["warned"]
        self._improvements, self._kls = state["improvements"], state["kls"]
        _cut_back(self.folder, state["sizes"])


# files


@distributed.main_process_only
def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a .csv file, with a header if it is new."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


@distributed.main_process_only
def _tensorboard_writer(folder: Path, updates_done: int):
    """A TensorBoard writer that goes on after so many updates."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by few

    return SummaryWriter(str(folder), purge_step=updates_done + 1)


@distributed.main_process_only
def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that are appended to, all of them on the disk."""
    paths = [folder / name for name in APPENDED_TO if (folder / name).exists()]
    for path in paths:
        runtime.sync(path)
    return {path.name: path.stat().st_size for path in paths}


@distributed.main_process_only
def _cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Remove the rows that were written after the files had these sizes."""
    for name, size in sizes.items():
        if not (folder / name).exists() or (folder / name).stat().st_size < size:
            raise UserError(
                f"{folder / name} is shorter than at the checkpoint: bring it back, or remove the checkpoint"
            )
    for name in APPENDED_TO:
        if name in sizes:
            os.truncate(folder / name, sizes[name])
        else:
            (folder / name).unlink(missing_ok=True)
