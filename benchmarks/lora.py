"""Seconds of a rollout's sampling with adapters, beside the same model with them merged.

python -m benchmarks.lora
"""

import copy
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf import lora
from rlhf.sampling import Sampling, sample

RANK, TURNS, QUERY, RESPONSE = 8, 5, 8, 8
SHAPES = {
    "GPT-2, 6 layers of 768": GPT2Config(n_layer=6, vocab_size=2000),
    "Llama, 10 layers of 576 as in SmolLM2-135M": LlamaConfig(
        num_hidden_layers=10,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=2000,
    ),
}


def seconds(model, rows: int) -> float:
    """Of sampling that many responses, all of full length."""
    ids = torch.randint(1, 2000, (rows, QUERY), generator=torch.Generator().manual_seed(0))
    sampling = Sampling(RESPONSE, 1.0, stop_id=0, stop_after=RESPONSE)
    start = time.perf_counter()
    sample(model, ids, torch.ones_like(ids), sampling, torch.Generator().manual_seed(0))
    return time.perf_counter() - start


def main() -> None:
    for name, config in SHAPES.items():
        base = AutoModelForCausalLM.from_config(config).eval()
        adapted = lora.with_adapters(base, RANK, name).eval()
        merged = lora.merge(adapted, copy.deepcopy(base))
        for rows in (32, 128):
            ratios = []
            for turn in range(TURNS + 1):  # in turn, so that a slow moment of the machine slows both
                pair = [seconds(model, rows) for model in (adapted, merged)]
                if turn:  # the first one warms up
                    ratios.append(pair[0] / pair[1])
            low, median, high = (f(ratios) for f in (min, statistics.median, max))
            print(f"{name}, {rows} rows: with adapters {median:.2f} ({low:.2f} to {high:.2f}) times as long as merged")


if __name__ == "__main__":
    main()
