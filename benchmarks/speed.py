"""Episodes per second of our PPO, stage by stage, against what this machine could do at best, and against TRL.

    python -m benchmarks.speed               # or make bench: all shapes that this machine is for
    benchmarks/.venv/bin/python -m benchmarks.speed --peer trl     # TRL's PPOTrainer in turn with ours (see make peer)

A stage's floor is the time that its floating-point operations would take at the rate of this machine's large matrix
products, or its bytes at the rate of a copy, whichever is longer; both rates are measured in the same process, in turn
with the updates, since a shared machine is faster at one moment than at another. Only what cannot be left out is
counted: real tokens, causal attention, and behind the last layer's attention the tokens that are asked for.
"""

import copy
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import ppo
from benchmarks import cases
from benchmarks.cases import CASES, Case
from rlhf import cli, models, optim, precision, rewards, runtime, sampling


def rates(device: torch.device, in_precision: str) -> tuple[float, float]:
    """Floating-point operations and copied bytes a second, the best of several: what a stage is held against."""
    size, dtype = 8192 if device.type == "cuda" else 2048, getattr(torch, in_precision)
    square, long = torch.randn(size, size, device=device, dtype=dtype), torch.randn(1 << 26, device=device)
    target = torch.empty_like(long)

    def best(work) -> float:
        taken = []
        for _ in range(9):
            start = runtime.seconds(device)
            work()
            taken.append(runtime.seconds(device) - start)
        return min(taken)

    return 2 * size**3 / best(lambda: square @ square), 2 * long.nbytes / best(lambda: target.copy_(long))


def body_operations(config, lengths: torch.Tensor, wanted: int) -> float:
    """Floating-point operations of GPT-2's layers over rows of `lengths`, with `wanted` of the last hidden states."""
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, lengths.sum().item()
    linear = 2 * width**2 * (12 * layers * tokens - 9 * (tokens - wanted))  # 3 of 12 are keys, values and queries
    return linear + 2 * 2 * width * layers * (lengths.double() ** 2 / 2).sum().item()


def floors(model, rollout, case: Case, epochs: int, machine, in_precision: str) -> dict[str, float]:
    """Seconds that each stage needs at least; of GPT-2 only, whose operations are counted here."""
    if model.config.model_type != "gpt2":
        return {}
    operations, bandwidth = machine
    response_lengths = rollout.response_mask.sum(1)
    lengths, tokens = rollout.query_mask.sum(1) + response_lengths, int(response_lengths.sum())
    logits = 2 * model.config.hidden_size * model.config.vocab_size * tokens
    one = body_operations(model.config, lengths, tokens) + logits
    reward = body_operations(model.config, lengths, len(lengths))
    low = in_precision == "bfloat16"
    policy = one if low else logits  # from the sampler's states
    wide = 2 if low else 4  # bytes of a number
    weights = sum(p.numel() for p in model.parameters()) * wide
    cache = 2 * model.config.num_hidden_layers * model.config.hidden_size * wide * (lengths.double() ** 2 / 2).sum()
    return {
        "rollout": max(one / operations, (int(response_lengths.max()) * weights + cache.item()) / bandwidth),
        "scoring": (policy + one + reward) / operations,
        "update": (3 * epochs * one + epochs * logits) / operations,  # the reference's logits again
    }


def our_update(
    case: Case, epochs: int, policy_folder: Path, reward_folder: Path, device: torch.device, in_precision: str
):
    """A function that makes one update and returns the seconds of its stages, and the last rollout in a list."""
    reference, tokenizer = models.load_policy(str(policy_folder), "--policy")
    model = copy.deepcopy(reference.to(device))
    chosen = precision.choose(in_precision, device, model)
    precision.freeze(reference, chosen)
    policy = ppo.PolicyWithValue(model, precision=chosen).eval()
    optimizers = optim.make_optimizers(
        policy, 1e-6, muon=case.policy is None
    )  # a learning rate at which ours and the peer sample the same lengths
    (reward,) = rewards.load([str(reward_folder)], device, in_precision)
    queries, generator = cases.queries_of(case, tokenizer), torch.Generator().manual_seed(0)
    taken, last = {}, []

    def timed_sample(*args, **kwargs):
        start = runtime.seconds(device)
        responses = sampling.sample(*args, **kwargs)
        taken["rollout"] = runtime.seconds(device) - start
        return responses

    def one() -> dict[str, float]:
        ppo.sample = timed_sample
        start = runtime.seconds(device)
        rollout = cases.roll_out(policy, reference, tokenizer, queries, case, generator)
        scores = cases.raw_scores(reward.score, tokenizer, queries, rollout)
        scored = runtime.seconds(device)
        cases.learn(policy, reference, optimizers, rollout, scores, case, epochs, generator)
        end = runtime.seconds(device)
        last[:] = [rollout]
        return {"rollout": taken["rollout"], "scoring": scored - start - taken["rollout"], "update": end - scored}

    return one, last, reference


def peer_seconds(
    case: Case, epochs: int, policy_folder: Path, reward_folder: Path, updates: int, scratch: Path, in_precision: str
) -> list[float]:
    """The seconds of `updates` updates of TRL's trainer, after one that is not counted.

    In a process of its own, as its users run it: our memory settings (runtime.keep_memory) are not in it.
    """
    import peer_quality  # it needs trl
    from transformers import AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.readings = []

        def on_step_end(self, *_, **__):
            self.readings.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    asked = tokenizer(cases.queries_of(case, tokenizer), add_special_tokens=False)["input_ids"]
    trainer = peer_quality.trainer(
        AutoModelForCausalLM.from_pretrained(policy_folder),
        peer_quality.reward_with_one_output(str(reward_folder), 0.0, 1.0),
        tokenizer,
        asked,
        batch_size=case.batch,
        output_dir=str(scratch),
        total_episodes=case.batch * (updates + 1),
        response_length=case.response,
        temperature=cases.TEMPERATURE,
        num_ppo_epochs=epochs,
        num_mini_batches=case.minibatches,
        learning_rate=1e-6,
        logging_steps=1000,
        bf16=in_precision == "bfloat16",
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [end - start for start, end in zip(clock.readings, clock.readings[1:], strict=False)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def measure(name: str, case: Case, epochs: int, args, device, scratch: Path) -> list[dict]:
    """One case in each of its precisions: prints a table for each, and returns them for the file."""
    own = Path("models/nlg"), Path("models/cls"), Path("models/cls")
    policy, reward, peer_reward = cases.random_models(case, scratch) if case.policy else own
    ours = {each: our_update(case, epochs, policy, reward, device, each) for each in case.precisions}
    alone = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    found, theirs, machines = ({each: [] for each in case.precisions} for _ in range(3))
    for one, _, _ in ours.values():
        one()
        one()
    for _ in range(args.repeats):  # in turn, so that a slow moment of the machine meets all of them
        for each, (one, _, _) in ours.items():
            machines[each].append(rates(device, each))
            found[each] += [one() for _ in range(args.updates)]
            if args.peer:
                asked = case, epochs, policy, peer_reward, args.updates, scratch / "trl", each
                theirs[each] += alone.submit(peer_seconds, *asked).result()
    alone.shutdown()
    return [
        report(name, case, epochs, each, found[each], theirs[each], machines[each], ours[each], device)
        for each in case.precisions
    ]


def report(name, case: Case, epochs: int, in_precision: str, found, theirs, machines, ours, device) -> dict:
    """Prints and returns what was measured in one precision."""
    _, (rollout,), model = ours
    machine = [statistics.median(rate) for rate in zip(*machines, strict=True)]
    whole = [sum(one.values()) for one in found]
    record = {
        "case": name,
        "K": epochs,
        "precision": in_precision,
        "seconds": statistics.median(whole),
        "episodes_per_second": case.batch / statistics.median(whole),
        "operations_per_second": machine[0],
        "bytes_per_second": machine[1],
        "stages": {},
    }
    print(
        f"\n{name}, K = {epochs}, {in_precision}: {spread(whole)} an update, "
        f"{record['episodes_per_second']:.1f} episodes/s"
    )
    print(f"  the machine: matrix products at {machine[0] / 1e9:.0f} GFLOP/s, copies at {machine[1] / 1e9:.1f} GB/s")
    least = floors(model, rollout, case, epochs, machine, in_precision)
    for stage in found[0]:
        seconds = [one[stage] for one in found]
        record["stages"][stage] = {"seconds": statistics.median(seconds)}
        if least:
            ratio = statistics.median(seconds) / least[stage]
            record["stages"][stage] |= {"floor": least[stage], "ratio": ratio}
            print(f"  {stage:8s} {spread(seconds)}, floor {least[stage]:.3f} s: {ratio:.1f} times it")
        else:
            print(f"  {stage:8s} {spread(seconds)}")
    if theirs:
        ratio = statistics.median(theirs) / statistics.median(whole)
        record |= {"peer_seconds": statistics.median(theirs), "peer_ratio": ratio}
        print(f"  TRL {spread(theirs)}: {ratio:.2f} times ours")
    if device.type == "cuda":
        record["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 2**30
        print(f"  peak memory {record['peak_gigabytes']:.1f} GiB")
    return record


def table(records: list[dict]) -> str:
    """The rows of RESULTS.md: seconds an update, in brackets how many times the floor."""

    def stage(one: dict) -> str:
        return f"{one['seconds']:.2f}" + (f" ({one['ratio']:.1f})" if "ratio" in one else "")

    lines = [
        "| shapes | K | precision | rollout | scoring | update | ours | episodes/s | TRL | TRL / ours | peak GiB |"
    ]
    lines.append("|" + "---|" * 11)
    for one in records:
        known = [f"{one[key]:.2f}" if key in one else "" for key in ("peer_seconds", "peer_ratio", "peak_gigabytes")]
        cells = [one["case"], one["K"], one["precision"], *map(stage, one["stages"].values())]
        cells += [f"{one['seconds']:.2f}", f"{one['episodes_per_second']:.1f}", *known]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--peer", choices=("trl",), help="time this trainer too, in turn with ours")
    parser.add_argument("--only", nargs="+", help="some of the cases, by name")
    parser.add_argument("--repeats", type=cli.COUNT, default=3, help="turns")
    parser.add_argument("--updates", type=cli.COUNT, default=3, help="timed updates in a turn")
    parser.add_argument("--out", default="benchmarks/speed.json", help="file to write")
    cli.add_machine_flags(parser)
    args = parser.parse_args()
    device = runtime.set_up(args)
    chosen = {name: case for name, case in CASES[device.type].items() if not args.only or name in args.only}
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in chosen.items():
            for k in case.ppo_epochs:
                records += measure(name, case, k, args, device, Path(scratch))
    runtime.write_json(Path(args.out), runtime.provenance(device) | {"cases": records})
    print(f"\n{table(records)}\n\nfile: {args.out}")


if __name__ == "__main__":
    cli.run(main)
