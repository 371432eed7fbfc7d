"""Milliseconds that a step of our Muon and of torch.optim.Muon takes on the default model's matrices.

python -m benchmarks.optimizer_speed
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.optimizer_speed    # like a CPU without bfloat16
"""

import statistics
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf import models, muon

TURNS, STEPS = 7, 5  # turns of every optimizer, and steps in each


def matrices() -> list[nn.Parameter]:
    """Matrices of the shapes of the default model's, with gradients."""
    texts = ["The shapes of the inner matrices do not depend on the vocabulary."]
    model = AutoModelForCausalLM.from_config(models.scratch_config(models.scratch_tokenizer(texts)))
    new = [nn.Parameter(torch.randn_like(matrix)) for matrix in muon.inner_matrices(model)]
    for matrix in new:
        matrix.grad = torch.randn_like(matrix)
    return new


def main() -> None:
    optimizers = {
        "rlhf.muon.Muon, 3 Newton-Schulz steps in float32": muon.Muon(matrices(), lr=1e-3),
        "torch.optim.Muon, 3 steps in bfloat16": torch.optim.Muon(matrices(), lr=1e-3, ns_steps=3),
        "torch.optim.Muon, 5 steps (its default)": torch.optim.Muon(matrices(), lr=1e-3),
    }
    seconds = {name: [] for name in optimizers}
    for _ in range(TURNS):  # in turn, so that a slow moment of the machine slows all of them
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                optimizer.step()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    for name, per_step in seconds.items():
        low, median, high = (1000 * f(per_step) for f in (min, statistics.median, max))
        print(f"{name}: {median:.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
