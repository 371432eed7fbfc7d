"""What bfloat16 gains: in every pass of a minibatch of SmolLM2-135M's shapes, and in updates of GPT-2s of five sizes.

    python -m benchmarks.bfloat16            # three minutes on two cores; writes benchmarks/bfloat16.json

Both precisions in turn in one process; medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import cases, speed
from rlhf import forward, policy, runtime, vocabulary

ROWS, QUERY_LENGTH, RESPONSE_LENGTH = 32, 8, 20  # a minibatch of the pretrained case
TEMPERATURE = cases.TEMPERATURE
SIZES = {"2 x 128": (2, 128, 4, 2304), "4 x 256": (4, 256, 4, 4096), "4 x 384": (4, 384, 6, 4096)}
SIZES |= {"6 x 512": (6, 512, 8, 8192), "8 x 512": (8, 512, 8, 16_384)}  # layers, width, heads, vocabulary


def main() -> None:
    runtime.keep_memory()
    record = {"passes": passes(), "sizes": sizes()}
    path = Path("benchmarks/bfloat16.json")
    runtime.write_json(path, runtime.provenance(torch.device("cpu")) | record)
    for name, seconds in record["passes"]["float32"].items():
        low = record["passes"]["bfloat16"][name]
        print(f"{name:28s} {1000 * seconds:6.0f} ms  {1000 * low:6.0f} ms  {seconds / low:.2f}")
    for name, size in record["sizes"].items():
        print(f"{name} ({size['millions']:.1f} million weights): {size['float32'] / size['bfloat16']:.2f}")
    print(f"file: {path}")


def timed(work: Callable) -> tuple[float, object]:
    """The seconds that some work takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def passes() -> dict[str, dict[str, float]]:
    """Seconds of every pass of a minibatch, by precision."""
    ids = torch.randint(2, cases.SMOLLM2.vocab_size, (ROWS, QUERY_LENGTH + RESPONSE_LENGTH))
    policies = {}
    for precision in cases.BOTH:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cases.SMOLLM2).eval()
        policies[precision] = policy.PolicyWithValue(model, precision=getattr(torch, precision))
    turns = [{each: time_passes(policies[each], ids) for each in cases.BOTH} for _ in range(7)][2:]
    return {
        each: {name: statistics.median(turn[each][name] for turn in turns) for name in turns[0][each]}
        for each in cases.BOTH
    }


def time_passes(policy_with_value: policy.PolicyWithValue, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of every pass of a minibatch of ids [B, T] without padding."""
    model, seconds = policy_with_value.in_precision(), {}
    mask, rows = torch.ones_like(ids), torch.arange(len(ids)).unsqueeze(1)
    predicting = (rows * ids.shape[1] + torch.arange(QUERY_LENGTH - 1, ids.shape[1] - 1)).flatten()
    response_ids = ids[:, QUERY_LENGTH:].flatten()
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(ids.numel(), layer.in_features).to(layer.weight.dtype) for layer in layers]

    def states_of() -> torch.Tensor:
        return forward.hidden_states(model, ids, mask, predicting)

    with torch.no_grad():
        seconds["linear layers alone"], _ = timed(lambda: [f(x) for f, x in zip(layers, inputs, strict=True)])
        seconds["forward, no gradient"], states = timed(states_of)
        head = vocabulary.head_of(model, TEMPERATURE)
        seconds["vocabulary projection alone"], _ = timed(lambda: head.logits(states))
        arguments = model, states, model, states, response_ids, TEMPERATURE
        seconds["vocabulary, no gradient"], _ = timed(lambda: vocabulary.token_statistics(*arguments))
    seconds["forward"], states = timed(states_of)
    gradient = torch.randn_like(states)
    seconds["backward"], _ = timed(lambda: states.backward(gradient))
    policy_with_value.zero_grad()
    return seconds


def sizes() -> dict[str, dict[str, float]]:
    """Millions of weights, and seconds of an update (K = 1) by precision, of GPT-2s of five sizes."""
    results = {}
    for name, size in SIZES.items():
        config = cases.gpt2_config(*size)
        case = cases.Case(64, 8, 24, 2, (1,), 64, cases.BOTH, config, config)
        with tempfile.TemporaryDirectory() as folder:
            folders = cases.random_models(case, Path(folder))[:2]
            updates = {each: cases.Update(case, 1, *folders, torch.device("cpu"), each) for each in cases.BOTH}
        turns = [{each: sum(speed.timed_update(updates[each])[0].values()) for each in cases.BOTH} for _ in range(8)]
        results[name] = {"millions": sum(x.numel() for x in updates["float32"].reference.parameters()) / 1e6}
        results[name] |= {each: statistics.median(turn[each] for turn in turns[2:]) for each in cases.BOTH}
    return results


if __name__ == "__main__":
    main()
