"""Several processes, as torchrun starts them: each takes a share of every batch, and all hold the same weights.

In a single process every function gives back what it is given.
"""

import functools
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(cuda: bool) -> None:
    """Joins the processes that torchrun started; without torchrun there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def by_the_first(write: Callable) -> Callable:
    """Makes a function that writes do so in the first process only."""

    @functools.wraps(write)
    def only_there(*args, **kwargs):
        return write(*args, **kwargs) if rank() == 0 else None

    return only_there


def share(rows: list) -> list:
    """This process's part of the rows."""
    start, end = (len(rows) * part // count() for part in (rank(), rank() + 1))
    return rows[start:end]


def gather(items: list) -> list:
    """The items of all processes, in the order of `share`."""
    if count() == 1:
        return items
    parts = [None] * count()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, which is the same number in all of them."""
    if count() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of x over a batch of which every process has an equal share."""
    return total(x.float().mean()) / count()


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Gives every parameter the sum of its gradients in all processes."""
    if count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # this process had no rows
            parameter.grad = torch.zeros_like(parameter)
    sums = total(nn.utils.parameters_to_vector([parameter.grad for parameter in parameters]))
    nn.utils.vector_to_parameters(sums, [parameter.grad for parameter in parameters])


def wait() -> None:
    """Until all processes are here."""
    gather([None])
