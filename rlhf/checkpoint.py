"""Checkpoints of the three scripts: all that a run needs to go on as if it had never stopped."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import torch

from rlhf import distributed
from rlhf.cli import COUNT
from rlhf.errors import Stopped, UserError

FORMAT = 3  # of the file; another one is refused
MAY_CHANGE = {"resume", "save_every", "device", "tensorboard", "page"}  # flags that change no result but by rounding
Keep = Callable[..., None]  # (step, state, now=False)


def add_flags(group: argparse._ArgumentGroup, every: int) -> None:
    group.add_argument("--save-every", type=COUNT, default=every, help="steps between checkpoints (OUT.checkpoint)")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")


@contextlib.contextmanager
def keeping(args: argparse.Namespace, *folders: Path) -> Iterator[tuple[dict | None, Keep]]:
    """What was saved of this run, or None, and a function keep(step, state) to call after every step.

    It saves what state() returns every --save-every steps, now, or when a signal asks the run to stop. --out and
    `folders` belong to this run meanwhile. The checkpoint goes when the run is done. Of several processes, the first
    writes what all of them have to say; each calls keep.
    """
    path = Path(f"{args.out}.checkpoint")
    settings = vars(args) | {"nproc_per_node": distributed.count()}
    with contextlib.ExitStack() as stack:
        for folder in (Path(args.out), *folders) if distributed.rank() == 0 else ():
            stack.enter_context(locked(folder))
        caught = stack.enter_context(signals())
        saved = load(path, settings) if path.exists() else None
        if saved and not args.resume:
            raise UserError(f"{path} is of a run that is not done: go on with --resume, or remove it to start anew")

        def keep(step: int, state: Callable[[], dict], now: bool = False) -> None:
            number = max(distributed.gather([caught[0] if caught else 0]))
            if now or number or step % args.save_every == 0:
                save(path, {"format": FORMAT, "settings": settings, **state()})
            if number:
                distributed.wait()
                raise Stopped(number, f"stopped after step {step}; the same command with --resume goes on from there")

        yield saved, keep
        if distributed.rank() == 0:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process writes to; the lock dies with its process."""
    locks = folder.parent / ".locks"  # apart, so that a pattern like data_results/K1* finds run folders only
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(locks / folder.name).acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"{folder} is in use by another process; wait for it, or choose another folder") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    with lock:
        yield


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Gathers the first SIGINT or SIGTERM, so that a step can end and be saved; the second has its usual effect."""
    caught, before = [], {}

    def note(number: int, _) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@distributed.by_the_first
def save(path: Path, state: dict) -> None:
    """The file, whole or not at all; the one before it stays until this one is on the disk."""
    fresh = path.with_name(path.name + ".new")
    try:
        with open(fresh, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when a write fails
        fresh.unlink(missing_ok=True)
        before = "the one before it is still there" if path.exists() else "there is none yet"
        raise UserError(f"the checkpoint {path} cannot be written ({error}); {before}") from error


def load(path: Path, settings: dict) -> dict:
    """The state in a checkpoint of a run with the same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        form, before = state["format"], state["settings"]
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of ours; remove it to start anew ({error})") from error
    if form != FORMAT:
        raise UserError(f"{path} has format {form}, not {FORMAT}: go on with the code that made it, or remove it")
    for name in sorted((before.keys() | settings.keys()) - MAY_CHANGE):
        if before.get(name) != settings.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} was made with {flag} {before.get(name)}, not {settings.get(name)}: give the same flags, "
                "or remove it to start anew"
            )
    return state


def random_states(*generators: torch.Generator) -> list[dict]:
    """Of torch's own generators and of these, the CPU's, in every process."""
    state = {"cpu": torch.get_rng_state(), "own": [generator.get_state() for generator in generators]}
    if torch.cuda.is_initialized():  # only where the run is on CUDA: asking a GPU takes memory on it
        state["cuda"] = torch.cuda.get_rng_state()
    return distributed.gather([state])


def set_random_states(states: list[dict], *generators: torch.Generator) -> None:
    state = states[distributed.rank()]
    torch.set_rng_state(state["cpu"])
    for generator, of_generator in zip(generators, state["own"], strict=True):
        generator.set_state(of_generator)
    if "cuda" in state and torch.cuda.is_initialized():  # dropout's; a run that goes on on a CPU has other ones
        torch.cuda.set_rng_state(state["cuda"])
