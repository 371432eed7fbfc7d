"""Several processes, as torchrun starts them: each takes a shard of every batch, and all hold the same weights.

In a single process every function returns what it is given.
"""

import functools
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(cuda: bool) -> None:
    """Join the processes that torchrun started; without torchrun there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def main_process_only(write: Callable) -> Callable:
    """Decorator of a function that writes: only the process of rank 0 runs it, the others return None."""

    @functools.wraps(write)
    def wrapped(*args, **kwargs):
        return write(*args, **kwargs) if rank() == 0 else None

    return wrapped


def generator(seed: int) -> torch.Generator:
    """Random numbers on the CPU, different ones in every process."""
    return torch.Generator().manual_seed(seed + 100_003 * rank())


def shard(rows: list) -> list:
    """This process's part of the rows."""
    start, end = (len(rows) * part // world_size() for part in (rank(), rank() + 1))
    return rows[start:end]


def gather(items: list) -> list:
    """The items of all processes, in the order of `shard`."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce(x: Tensor, operation: str = "sum") -> Tensor:
    """The elementwise sum or maximum ("max") of x over all processes, the same in each of them."""
    if world_size() > 1:
        x = (
            x.cuda() if x.device.type == "cpu" and dist.get_backend() == "nccl" else x.clone()
        )  # NCCL takes nothing from the CPU
        dist.all_reduce(x, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, R] over the real tokens of all processes."""
    summed, tokens = all_reduce(torch.stack([(x * mask).sum(), mask.sum()]))
    return summed / tokens


def mean(x: Tensor) -> Tensor:
    """The mean of x over a batch of which every process has a shard of the same size."""
    return all_reduce(x.float().mean()) / world_size()


def all_reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every parameter that learns the sum of its gradients over all processes."""
    if world_size() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # this process had no rows of the minibatch
            parameter.grad = torch.zeros_like(parameter)
    sums = all_reduce(nn.utils.parameters_to_vector([parameter.grad for parameter in parameters]))
    nn.utils.vector_to_parameters(sums, [parameter.grad for parameter in parameters])


def barrier() -> None:
    """Wait until all processes are here."""
    gather([None])
