"""Checkpoints of the three training scripts: a run goes on from one as if it had never stopped."""

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import torch

from rlhf import distributed
from rlhf.errors import Stopped, UserError, caught_signals

FORMAT = 6  # of the file; a file of another format is refused
MAY_CHANGE = {"resume", "save_every", "device", "tensorboard", "page", "activation_checkpointing"}
# flags that change results by rounding at most


class Stateful(Protocol):
    """An object with a state that training changes."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class Checkpoints:
    """The checkpoint file of one run. Of several processes, the main one writes it; each calls every method."""

    def __init__(self, path: Path, settings: dict, saved: dict | None, signals: list[int]):
        self._path, self._settings, self._saved, self._signals = path, settings, saved, signals

    @property
    def stage(self) -> str | None:
        """The stage of the run in which the checkpoint was saved, or None without a checkpoint."""
        return self._saved["stage"] if self._saved else None

    def restore(self, state: dict[str, Stateful], stage: str = "") -> bool:
        """Restore the training state if there is a checkpoint of this stage. Returns whether there is."""
        if self.stage != stage:
            return False
        try:
            for name, each in state.items():
                each.load_state_dict(self._saved["state"][name])
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(f"{self._path} is damaged; remove it to start anew ({error})") from error
        self._saved = None  # it may be large
        return True

    def after_step(self, step: int, state: dict[str, Stateful], stage: str = "", now: bool = False) -> None:
        """Save the training state every --save-every steps, if `now`, or when a signal asks the run to stop."""
        number = max(distributed.gather([self._signals[0] if self._signals else 0]))
        if now or number or step % self._settings["save_every"] == 0:
            states = {name: each.state_dict() for name, each in state.items()}
            save(self._path, {"format": FORMAT, "settings": self._settings, "stage": stage, "state": states})
        if number:
            distributed.barrier()
            raise Stopped(number, f"stopped after step {step}; the same command with --resume goes on from there")


@contextlib.contextmanager
def opened(args: argparse.Namespace, *folders: Path) -> Iterator[Checkpoints]:
    """The checkpoints of the run with these flags, while it lasts.

    --out and `folders` are locked for other processes meanwhile. The checkpoint is removed when the run is done.
    """
    refuse_other_than_model(args.out)
    path = Path(f"{args.out}.checkpoint")
    settings = vars(args) | {"nproc_per_node": distributed.world_size()}
    with contextlib.ExitStack() as stack:
        for folder in (Path(args.out), *folders) if distributed.rank() == 0 else ():
            stack.enter_context(locked(folder))
        signals = stack.enter_context(caught_signals())
        saved = load(path, settings) if path.exists() else None
        if len(set(distributed.gather([saved is None]))) > 1:  # they would wait for each other forever
            raise UserError(f"only some processes see {path}: all machines of a run need the same file system")
        if saved and not args.resume:
            raise UserError(f"{path} is of a run that is not done: go on with --resume, or remove it to start anew")
        yield Checkpoints(path, settings, saved, signals)
        if distributed.rank() == 0:
            path.unlink(missing_ok=True)


def refuse_other_than_model(folder: str) -> None:
    """What a finished model takes the place of must be a model, or nothing."""
    out = Path(folder)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not any(out.glob("*.safetensors"))):
        raise UserError(f"{out} is there and is no model folder, and --out would replace it; give another --out")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process writes to; the lock dies with its process."""
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


@distributed.main_process_only
def save(path: Path, content: dict) -> None:
    """Write the file, whole or not at all; the previous one stays until this one is on the disk."""
    fresh = path.with_name(path.name + ".new")
    try:
        with open(fresh, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a write fails
        fresh.unlink(missing_ok=True)
        previous = "the previous one is still there" if path.exists() else "there is none yet"
        raise UserError(f"the checkpoint {path} cannot be written ({error}); {previous}") from error


def load(path: Path, settings: dict) -> dict:
    """The content of a checkpoint of a run with the same settings."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        form, saved = content["format"], content["settings"]
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of this project; remove it to start anew ({error})") from error
    if form != FORMAT:
        raise UserError(f"{path} has format {form}, not {FORMAT}: go on with the code that made it, or remove it")
    for name in sorted((saved.keys() | settings.keys()) - MAY_CHANGE):
        if saved.get(name) != settings.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} was made with {flag} {saved.get(name)}, not {settings.get(name)}: give the same flags, "
                "or remove it to start anew"
            )
    return content


def cpu_copy(state: Any) -> Any:
    """A copy of a state in the CPU's memory, which training does not change; tied weights stay tied."""
    storages = {}  # by address: what shares memory is copied once; torch.save to memory takes twice as much

    def copied(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: copied(each) for name, each in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(copied(each) for each in x)
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        key = storage.device, storage.data_ptr()
        if key not in storages:
            storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        return torch.empty(0, dtype=x.dtype).set_(storages[key], x.storage_offset(), x.size(), x.stride())

    return copied(state)


class RandomState:
    """The states of torch's, Python's and NumPy's own random generators, which a user's reward may use, and of some
    others of torch on the CPU, in every process."""

    def __init__(self, *generators: torch.Generator):
        self._generators = generators

    def state_dict(self) -> list[dict]:
        state = {"cpu": torch.get_rng_state(), "own": [generator.get_state() for generator in self._generators]}
        numpy = np.random.get_state(legacy=False)
        numpy["state"]["key"] = numpy["state"]["key"].tolist()  # a checkpoint holds no arrays
        state |= {"python": random.getstate(), "numpy": numpy}
        if torch.cuda.is_initialized():  # only where the run is on CUDA: asking a GPU takes memory on it
            state["cuda"] = torch.cuda.get_rng_state()
        return distributed.gather([state])

    def load_state_dict(self, state: list[dict]) -> None:
        own = state[distributed.rank()]
        torch.set_rng_state(own["cpu"])
        random.setstate(own["python"])
        np.random.set_state(own["numpy"])
        for generator, of_generator in zip(self._generators, own["own"], strict=True):
            generator.set_state(of_generator)
        if "cuda" in own and torch.cuda.is_initialized():  # dropout's; a run that goes on on a CPU has other ones
            torch.cuda.set_rng_state(own["cuda"])
