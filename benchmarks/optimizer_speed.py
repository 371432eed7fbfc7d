"""Milliseconds a step of our Muon and of torch.optim.Muon takes on the default model's matrices, side by side.

python -m benchmarks.optimizer_speed
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.optimizer_speed    # as a processor without bf16
"""

import statistics
import time

import torch
from torch import nn

from rlhf import models, optim

REPEATS, STEPS = 7, 5


def matrices() -> list[nn.Parameter]:
    """Of as many shapes as the default model's, with gradients."""
    width = models.SCRATCH["n_embd"]
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * models.SCRATCH["n_layer"]
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for matrix in found:
        matrix.grad = torch.randn_like(matrix)
    return found


def main() -> None:
    optimizers = {
        "optimization.Muon, 3 Newton-Schulz steps in float32": optim.Muon(matrices(), lr=1e-3),
        "torch.optim.Muon, 3 steps in bfloat16": torch.optim.Muon(matrices(), lr=1e-3, ns_steps=3),
        "torch.optim.Muon, 5 steps (its default)": torch.optim.Muon(matrices(), lr=1e-3),
    }
    seconds = {name: [] for name in optimizers}
    for _ in range(REPEATS):  # in turn, so that a slow moment of the machine meets all of them
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                optimizer.step()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    for name, found in seconds.items():
        low, middle, high = (1000 * f(found) for f in (min, statistics.median, max))
        print(f"{name}: {middle:.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
