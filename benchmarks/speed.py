"""Episodes per second, stage by stage, beside the least time that this machine needs for them, and beside TRL.

    python -m benchmarks.speed               # or make bench: all shapes for this machine
    benchmarks/.venv/bin/python -m benchmarks.speed --peer trl     # TRL's PPOTrainer in turn (see make peer)

The floor of a stage is the time that its floating-point operations take at the rate of this machine's large matrix
products, or its bytes at the rate of a copy, whichever is longer. Both rates are measured in the same process, in turn
with the updates, since a shared machine is not always equally fast. Only necessary operations count: real tokens,
causal attention, and after the last layer's attention the tokens whose states are used.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, TrainerCallback

from benchmarks import cases
from benchmarks.cases import CASES, Case
from rlhf import cli, flags, rollout, runtime, sampling
from rlhf.rollout import Rollout


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--peer", choices=("trl",), help="time this trainer too, in turn")
    parser.add_argument("--only", nargs="+", help="names of the cases to run (default: all)")
    parser.add_argument("--repeats", type=cli.COUNT, default=3, help="turns")
    parser.add_argument("--updates", type=cli.COUNT, default=3, help="timed updates in a turn")
    parser.add_argument("--out", default="benchmarks/speed.json", help="file to write")
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    device = runtime.set_up(args.device, args.seed)
    chosen = {name: case for name, case in CASES[device.type].items() if not args.only or name in args.only}
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in chosen.items():
            for epochs in case.ppo_epochs:
                records += time_case(name, case, epochs, args, device, Path(scratch))
    runtime.write_json(Path(args.out), runtime.provenance(device) | {"cases": records})
    print(f"\n{table(records)}\n\nfile: {args.out}")


# timing


def time_case(
    name: str, case: Case, epochs: int, args: argparse.Namespace, device: torch.device, scratch: Path
) -> list[dict]:
    """Time a case in each of its precisions. Prints the results, and returns a record for each precision."""
    shipped = Path("models/nlg"), Path("models/cls"), Path("models/cls")
    policy, reward, peer_reward = cases.random_models(case, scratch) if case.policy else shipped
    updates = {each: cases.Update(case, epochs, policy, reward, device, each) for each in case.precisions}
    rollouts, seconds, trl_seconds, machines = {}, *({each: [] for each in case.precisions} for _ in range(3))
    for update in updates.values():
        timed_update(update)
        timed_update(update)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other_process:
        for _ in range(args.repeats):  # in turn, so that a slow moment of the machine slows all of them
            for each, update in updates.items():
                machines[each].append(rates(device, each))
                for _ in range(args.updates):
                    stages, rollouts[each] = timed_update(update)
                    seconds[each].append(stages)
                if args.peer:
                    call = case, epochs, policy, peer_reward, args.updates, scratch / "trl", each
                    trl_seconds[each] += other_process.submit(time_trl, *call).result()
    records = []
    for each, update in updates.items():
        machine = tuple(statistics.median(rate) for rate in zip(*machines[each], strict=True))
        record = {"case": name, "K": epochs, "precision": each}
        record |= speed_of(case, seconds[each], trl_seconds[each])
        record |= {"operations_per_second": machine[0], "bytes_per_second": machine[1]}
        record["stages"] = stages_of(seconds[each], floors(update.reference, rollouts[each], epochs, machine, each))
        if device.type == "cuda":
            record["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 2**30
        show(record, seconds[each], trl_seconds[each])
        records.append(record)
    return records


def timed_update(update: cases.Update) -> tuple[dict[str, float], Rollout]:
    """Make an update. Returns the seconds of its stages, and its rollout.

    "rollout" is the sampling alone; "scoring" is what policy, reference and reward model say of the responses.
    """
    sampling_seconds = 0.0

    def timed_sample(*args, **kwargs):
        nonlocal sampling_seconds
        start = runtime.seconds(update.device)
        samples = sampling.sample(*args, **kwargs)
        sampling_seconds = runtime.seconds(update.device) - start
        return samples

    with mock.patch.object(rollout, "sample", timed_sample):
        start = runtime.seconds(update.device)
        collected = update.roll_out()
    scores = update.score(collected)
    scored = runtime.seconds(update.device)
    update.learn(collected, scores)
    end = runtime.seconds(update.device)
    stages = {"rollout": sampling_seconds, "scoring": scored - start - sampling_seconds, "update": end - scored}
    return stages, collected


def time_trl(
    case: Case, epochs: int, policy_folder: Path, reward_folder: Path, updates: int, scratch: Path, precision: str
) -> list[float]:
    """The seconds of `updates` updates of TRL's trainer, after one that is not counted.

    In a separate process, as its users run it: our memory settings (runtime.keep_memory) are not in it.
    """
    from experiments import peer_quality  # it needs trl

    class Clock(TrainerCallback):
        def __init__(self):
            self.readings = []

        def on_step_end(self, *_, **__):
            self.readings.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    reward, value = (peer_quality.reward_with_one_output(str(reward_folder), 0.0, 1.0) for _ in range(2))
    trainer = peer_quality.trainer(
        AutoModelForCausalLM.from_pretrained(policy_folder),
        reward,
        value,
        tokenizer,
        tokenizer(cases.queries_of(case, tokenizer), add_special_tokens=False)["input_ids"],
        batch_size=case.batch_size,
        output_dir=str(scratch),
        total_episodes=case.batch_size * (updates + 1),
        response_length=case.response_length,
        temperature=cases.TEMPERATURE,
        num_ppo_epochs=epochs,
        num_mini_batches=case.minibatches,
        learning_rate=cases.LR,
        missing_eos_penalty=1.0,
        logging_steps=1000,
        bf16=precision == "bfloat16",
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [end - start for start, end in zip(clock.readings, clock.readings[1:], strict=False)]


def rates(device: torch.device, precision: str) -> tuple[float, float]:
    """Floating-point operations and copied bytes per second that this machine reaches, the best of several tries."""
    size, dtype = 8192 if device.type == "cuda" else 2048, getattr(torch, precision)
    square, long = torch.randn(size, size, device=device, dtype=dtype), torch.randn(1 << 26, device=device)
    target = torch.empty_like(long)

    def best(work: Callable) -> float:
        tries = []
        for _ in range(9):
            start = runtime.seconds(device)
            work()
            tries.append(runtime.seconds(device) - start)
        return min(tries)

    return 2 * size**3 / best(lambda: square @ square), 2 * long.nbytes / best(lambda: target.copy_(long))


# the least time


def floors(model, rollout: Rollout, epochs: int, machine: tuple[float, float], precision: str) -> dict[str, float]:
    """The seconds that each stage needs at least; for GPT-2 only, whose operations are counted here."""
    if model.config.model_type != "gpt2":
        return {}
    operations, bandwidth = machine
    response_lengths = rollout.response_mask.sum(1)
    lengths, tokens = rollout.query_mask.sum(1) + response_lengths, int(response_lengths.sum())
    logits = 2 * model.config.hidden_size * model.config.vocab_size * tokens
    forward = body_operations(model.config, lengths, tokens) + logits
    reward = body_operations(model.config, lengths, len(lengths))
    low = precision == "bfloat16"
    policy = forward if low else logits  # in float32 from the sampler's states
    bytes_per_number = 2 if low else 4
    weights = sum(weight.numel() for weight in model.parameters()) * bytes_per_number
    cached = 2 * model.config.num_hidden_layers * model.config.hidden_size * bytes_per_number
    cache = (cached * (lengths.double() ** 2 / 2).sum()).item()
    return {
        "rollout": max(forward / operations, (int(response_lengths.max()) * weights + cache) / bandwidth),
        "scoring": (policy + forward + reward) / operations,
        "update": (3 * epochs * forward + epochs * logits) / operations,  # the reference's logits once more
    }


def body_operations(config: PretrainedConfig, lengths: torch.Tensor, used_states: int) -> float:
    """Floating-point operations of GPT-2's layers for rows of `lengths`, of whose last states so many are used."""
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, lengths.sum().item()
    linear = 2 * width**2 * (12 * layers * tokens - 9 * (tokens - used_states))  # 3 of 12: keys, values and queries
    return linear + 2 * 2 * width * layers * (lengths.double() ** 2 / 2).sum().item()


# results


def speed_of(case: Case, seconds: list[dict[str, float]], trl_seconds: list[float]) -> dict[str, float]:
    """The speed of whole updates."""
    median = statistics.median(sum(stages.values()) for stages in seconds)
    record = {"seconds": median, "episodes_per_second": case.batch_size / median}
    if trl_seconds:
        trl_median = statistics.median(trl_seconds)
        record |= {"peer_seconds": trl_median, "peer_ratio": trl_median / median}
    return record


def stages_of(seconds: list[dict[str, float]], least: dict[str, float]) -> dict[str, dict[str, float]]:
    """Median seconds of every stage, with its floor, if that is known, and how many times the floor it takes."""
    stages = {}
    for stage in seconds[0]:
        median = statistics.median(each[stage] for each in seconds)
        stages[stage] = {"seconds": median}
        if least:
            stages[stage] |= {"floor": least[stage], "ratio": median / least[stage]}
    return stages


def show(record: dict, seconds: list[dict[str, float]], trl_seconds: list[float]) -> None:
    """Print the results of a case in one precision."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"

    print(
        f"\n{record['case']}, K = {record['K']}, {record['precision']}: "
        f"{spread([sum(stages.values()) for stages in seconds])} per update, "
        f"{record['episodes_per_second']:.1f} episodes/s"
    )
    print(
        f"  the machine: matrix products at {record['operations_per_second'] / 1e9:.0f} GFLOP/s, "
        f"copies at {record['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    for name, stage in record["stages"].items():
        floor = f", floor {stage['floor']:.3f} s: {stage['ratio']:.1f} times it" if "floor" in stage else ""
        print(f"  {name:8s} {spread([stages[name] for stages in seconds])}{floor}")
    if trl_seconds:
        print(f"  TRL {spread(trl_seconds)}: {record['peer_ratio']:.2f} times ours")
    if "peak_gigabytes" in record:
        print(f"  peak memory {record['peak_gigabytes']:.1f} GiB")


def table(records: list[dict]) -> str:
    """The rows of RESULTS.md: seconds per update, and in brackets how many times the floor."""

    def stage_cell(stage: dict[str, float]) -> str:
        return f"{stage['seconds']:.2f}" + (f" ({stage['ratio']:.1f})" if "ratio" in stage else "")

    columns = "shapes, K, precision, rollout, scoring, update, whole, episodes/s, TRL, TRL / this code, peak GiB"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * 11]
    for record in records:
        optional = [
            f"{record[key]:.2f}" if key in record else "" for key in ("peer_seconds", "peer_ratio", "peak_gigabytes")
        ]
        cells = [record["case"], record["K"], record["precision"], *map(stage_cell, record["stages"].values())]
        cells += [f"{record['seconds']:.2f}", f"{record['episodes_per_second']:.1f}", *optional]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
