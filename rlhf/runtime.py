"""Set-up of a process (device, seeds, memory, libraries), its clock, and what its result files say of it."""

import contextlib
import ctypes
import functools
import io
import json
import logging
import math
import os
import platform
import random
import shlex
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm

from rlhf import distributed, precision, threads
from rlhf.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOLERATED = 3  # steps in a row that are not finite, and are skipped, before a run stops


def set_up(device: str, seed: int, batch_size: int | None = None) -> torch.device:
    """Prepare this process: join the others if there are any, seed everything. Returns the device.

    device: auto, cpu or cuda. batch_size: of all processes together, where they share batches.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch sees; use --device cpu")
    keep_memory()
    quiet_libraries()
    cuda = device != "cpu" and torch.cuda.is_available()
    distributed.start(cuda)
    if batch_size and batch_size % distributed.world_size():
        raise UserError(
            f"--batch-size {batch_size} cannot be shared evenly among {distributed.world_size()} processes; "
            "give a multiple of them"
        )
    if distributed.rank():
        sys.stdout = io.StringIO()  # the main process speaks for all
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.device("cuda" if cuda else "cpu")


def quiet_libraries() -> None:
    """Only our own progress bars and errors; what these libraries have to say of errors comes as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of a broken model, which is refused


def print_device(device: torch.device, dtype: torch.dtype) -> None:
    print(f"device {device.type}, matrix products in {precision.dtype_name(dtype)}")


@functools.cache
def warn_once(message: str) -> None:
    """On stderr, where a progress bar survives it."""
    if distributed.rank() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def keep_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones, which would cost page faults otherwise.

    They take a fifth of an update's time for a small model on the CPU. Other systems have no mallopt, or none of use.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap too; a mapping of their own would go back at once
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the heap's end back
        mallopt(M_TOP_PAD, 2**28)


class Clock:
    """Times the stages of an update, in seconds."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, seconds(device)
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The stage that began with the clock or the lap before is done."""
        now = seconds(self._device)
        self.laps[stage], self._last = now - self._last, now


def seconds(device: torch.device) -> float:
    """The time, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def progress(label: str, unit: str, done: int, total: int) -> tqdm:
    """The numbers of the steps after `done`, with a progress bar in the main process."""
    return tqdm(
        threads.following_load(range(done + 1, total + 1)),
        desc=label,
        unit=unit,
        initial=done,
        total=total,
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )


# files


@distributed.main_process_only
def write_json(path: Path, value: dict) -> Path:
    """Write a value, NaN and infinity as null: JSON has neither. The previous file stays until this one is whole."""

    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return path


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _git(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output; that of a command that is not found where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return 127, ""
    return done.returncode, done.stdout.strip()


def provenance(device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """What a result must name to be repeated: command, commit, versions, machine, precision."""
    root, script = Path(__file__).parents[1], Path(sys.argv[0])
    _, commit = _git(root, "describe", "--always", "--abbrev=12")
    changed, _ = _git(root, "diff", "--quiet", "HEAD", "--", ".", ":!data_results")  # the code, not results
    if changed == 1:
        commit += "-dirty"
    return {
        "command": shlex.join(
            [script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name, *sys.argv[1:]]
        ),
        "commit": commit or None,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        "processes": distributed.world_size(),
        "device": device.type,
        "precision": precision.dtype_name(dtype),
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def offline_without_network() -> None:
    """Where the hub cannot be reached, ask its cache only: each look-up would retry for half a minute."""
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or {hub.scheme, "all"} & getproxies().keys():
        return  # what a proxy reaches, and which names it knows, cannot be seen from here
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
