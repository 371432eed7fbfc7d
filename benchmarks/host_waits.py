"""How often the host waits for the device in an update of GPT-2's shapes, and how many bytes the device holds at most.

    python -m benchmarks.host_waits          # some minutes, on a pretend CUDA device (tests/pretend.py)

The shapes are those of Ziegler et al. 2019, but for the width and depth of the model: batch 512, query 64, response 24,
K = 4, vocabulary 50,257. The number of waits does not depend on width and depth. Each one stops a GPU until the host
has caught up with it.
"""

import collections
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import cases
from rlhf import runtime
from tests import pretend


def waits_by_stage(log: pretend.Log, update: cases.Update) -> dict[str, collections.Counter]:
    """How often every line of the project makes the host wait in a rollout, in scoring it, and in an update."""

    def counted(stage: Callable, *arguments) -> tuple[collections.Counter, object]:
        before = log.waits.copy()
        result, by_line = stage(*arguments), collections.Counter()
        for (_, line), count in (log.waits - before).items():
            by_line[line] += count
        return by_line, result

    in_rollout, rollout = counted(update.roll_out)
    in_scoring, scores = counted(update.score, rollout)
    in_update, metrics = counted(update.learn, rollout, scores)
    assert metrics["skipped"] == 0 and metrics["ratio_deviation_first"] == 0
    return {"rollout": in_rollout, "scoring": in_scoring, "update": in_update}


def show(waits: dict[str, collections.Counter]) -> None:
    for stage, by_line in waits.items():
        lines = (f"  {count:4} {line}\n" for line, count in by_line.most_common())
        print(f"{stage}: {by_line.total()} waits\n" + "".join(lines))


def main() -> None:
    torch.manual_seed(0)
    narrow = cases.gpt2_config(layers=2, width=64, heads=2, vocabulary=50_257)
    case = cases.Case(512, 64, 24, 1, (4,), 64, policy=narrow, reward=narrow)
    with tempfile.TemporaryDirectory() as folder, pretend.cuda() as log:
        policy, reward, _ = cases.random_models(case, Path(folder))
        update = cases.Update(case, 4, policy, reward, torch.device("cuda"), "bfloat16")
        log.peak = log.live
        waits = waits_by_stage(log, update)
    show(waits)
    record = {"waits": {stage: by_line.total() for stage, by_line in waits.items()}, "peak_gigabytes": log.peak / 2**30}
    runtime.write_json(Path("benchmarks/host_waits.json"), runtime.provenance(torch.device("cpu")) | record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
