"""How often the host waits for the device in an update of GPT-2's shapes, and how many bytes the device holds at most.

    python -m benchmarks.host_waits          # some minutes, on a pretend CUDA device (tests/pretend.py)

The shapes are those of Ziegler et al. 2019, but for the width and depth of the model: batch 512, query 64, response 24,
K = 4, vocabulary 50,257. The waits do not depend on either. Each stops a GPU until the host has caught up with it.
"""

import collections
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import ppo
from benchmarks import cases
from rlhf import models, optim, precision, rewards, runtime
from tests import pretend


def stages(
    log: pretend.Log, reference, tokenizer, score: rewards.Score, queries: list[str], case: cases.Case, epochs: int = 1
) -> dict[str, collections.Counter]:
    """How often every line of the project makes the host wait in a rollout, in scoring it and in an update."""
    policy = ppo.PolicyWithValue(copy.deepcopy(reference), precision=torch.bfloat16).eval()
    precision.freeze(reference, torch.bfloat16)
    optimizers = optim.make_optimizers(policy, 1e-5, muon=False)
    generator = torch.Generator().manual_seed(0)

    def waits(stage: Callable, *arguments) -> tuple[collections.Counter, object]:
        before = log.waits.copy()
        result, lines = stage(*arguments), collections.Counter()
        for (_, line), count in (log.waits - before).items():
            lines[line] += count
        return lines, result

    of_rollout, rollout = waits(cases.roll_out, policy, reference, tokenizer, queries, case, generator)
    of_scores, scores = waits(cases.raw_scores, score, tokenizer, queries, rollout)
    learning = policy, reference, optimizers, rollout, scores, case, epochs, generator
    of_update, statistics = waits(cases.learn, *learning)
    assert statistics["skipped"] == 0 and statistics["ratio_deviation_first"] == 0
    return {"rollout": of_rollout, "scoring": of_scores, "update": of_update}


def main() -> None:
    torch.manual_seed(0)
    narrow = cases.gpt2_config(layers=2, width=64, heads=2, vocabulary=50_257)
    case = cases.Case(512, 64, 24, 1, (4,), 64, policy=narrow, reward=narrow)
    with tempfile.TemporaryDirectory() as folder, pretend.cuda() as log:
        policy, reward, _ = cases.random_models(case, Path(folder))
        reference, tokenizer = models.load_policy(str(policy), "--policy")
        score = rewards.of_model(*rewards.load_model(str(reward)), torch.device("cuda"), "bfloat16")
        queries = cases.queries_of(case, tokenizer)
        log.peak = log.live
        found = stages(log, reference.to("cuda"), tokenizer, score, queries, case, epochs=4)
    for stage, lines in found.items():
        print(f"{stage}: {lines.total()} waits\n" + "".join(f"  {n:4} {line}\n" for line, n in lines.most_common()))
    record = {"waits": {stage: lines.total() for stage, lines in found.items()}, "peak_gigabytes": log.peak / 2**30}
    runtime.write_json(Path("benchmarks/host_waits.json"), runtime.provenance(torch.device("cpu")) | record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
