"""What bfloat16 gains, pass by pass for SmolLM2-135M's shapes, and from which size of model on it gains at all.

    python -m benchmarks.bfloat16            # three minutes on two cores; writes benchmarks/bfloat16.json

Both precisions in turn in one process; medians.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import cases, speed
from rlhf import policy as models
from rlhf import runtime

ROWS, QUERY, RESPONSE = 32, 8, 20  # a minibatch of the pretrained case
SIZES = {"2 x 128": (2, 128, 4, 2304), "4 x 256": (4, 256, 4, 4096), "4 x 384": (4, 384, 6, 4096)}
SIZES |= {"6 x 512": (6, 512, 8, 8192), "8 x 512": (8, 512, 8, 16_384)}  # layers, width, heads, vocabulary


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def passes() -> dict[str, dict[str, float]]:
    """Seconds of each pass of a minibatch, by precision."""
    ids = torch.randint(2, cases.SMOLLM2.vocab_size, (ROWS, QUERY + RESPONSE))
    mask, rows = torch.ones_like(ids), torch.arange(ROWS).unsqueeze(1)
    places = (rows * ids.shape[1] + torch.arange(QUERY - 1, ids.shape[1] - 1)).flatten()
    chosen = ids[:, QUERY:].flatten()
    taken = {each: {} for each in cases.BOTH}
    setups = {}
    for each in cases.BOTH:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cases.SMOLLM2).eval()
        setups[each] = models.PolicyWithValue(model, precision=getattr(torch, each))

    def one(each: str) -> dict[str, float]:
        model, found = setups[each].in_precision(), {}
        linear = [x for x in model.base_model.modules() if isinstance(x, torch.nn.Linear)]
        inputs = [torch.randn(ids.numel(), x.in_features).to(x.weight.dtype) for x in linear]
        with torch.no_grad():
            found["linear layers alone"] = seconds(lambda: [x(y) for x, y in zip(linear, inputs, strict=True)])
            start = time.perf_counter()
            states = models.hidden_states(model, ids, mask, places)
            found["forward, no gradient"] = time.perf_counter() - start
            head = models.head_of(model, 0.7)
            found["vocabulary projection alone"] = seconds(lambda: head.logits(states))
            arguments = model, states, model, states, chosen, 0.7
            found["vocabulary, no gradient"] = seconds(lambda: models.token_statistics(*arguments))
        start = time.perf_counter()
        states = models.hidden_states(model, ids, mask, places)
        found["forward"] = time.perf_counter() - start
        gradient = torch.randn_like(states)
        found["backward"] = seconds(lambda: states.backward(gradient))
        setups[each].zero_grad()
        return found

    rounds = [{each: one(each) for each in cases.BOTH} for _ in range(7)][2:]
    for each in cases.BOTH:
        taken[each] = {name: statistics.median(x[each][name] for x in rounds) for name in rounds[0][each]}
    return taken


def sizes() -> dict[str, dict[str, float]]:
    """Millions of weights, and seconds of an update (K = 1) of GPT-2s of some sizes, by precision."""
    found = {}
    for name, size in SIZES.items():
        config = cases.gpt2_config(*size)
        case = cases.Case(64, 8, 24, 2, (1,), 64, cases.BOTH, config, config)
        with tempfile.TemporaryDirectory() as folder:
            folders = cases.random_models(case, Path(folder))[:2]
            updates = {each: speed.our_update(case, 1, *folders, torch.device("cpu"), each) for each in cases.BOTH}
        rounds = [{each: sum(updates[each][0]().values()) for each in cases.BOTH} for _ in range(8)][2:]
        weights = sum(x.numel() for x in updates["float32"][2].parameters()) / 1e6
        found[name] = {"millions": weights} | {each: statistics.median(x[each] for x in rounds) for each in cases.BOTH}
    return found


def main() -> None:
    runtime.keep_memory()
    record = {"passes": passes(), "sizes": sizes()}
    runtime.write_json(Path("benchmarks/bfloat16.json"), runtime.provenance(torch.device("cpu")) | record)
    for name, value in record["passes"]["float32"].items():
        low = record["passes"]["bfloat16"][name]
        print(f"{name:28s} {1000 * value:6.0f} ms  {1000 * low:6.0f} ms  {value / low:.2f}")
    for name, one in record["sizes"].items():
        print(f"{name} ({one['millions']:.1f} million weights): {one['float32'] / one['bfloat16']:.2f}")
    print(json.dumps({"file": "benchmarks/bfloat16.json"}))


if __name__ == "__main__":
    main()
