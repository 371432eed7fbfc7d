"""Set-up of a process (device, seeds, memory, libraries), its clock, and what its result files say of it."""

import argparse
import contextlib
import ctypes
import io
import json
import logging
import math
import os
import platform
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm

from rlhf import distributed, precision
from rlhf.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOLERATED = 3  # steps in a row that are not finite, and are skipped, before a run stops


def set_up(args: argparse.Namespace) -> torch.device:
    """Joins the other processes, if there are any, seeds everything and returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch sees; use --device cpu")
    keep_memory()
    quiet_libraries()
    cuda = args.device != "cpu" and torch.cuda.is_available()
    distributed.start(cuda)
    if vars(args).get("batch_size", 0) % distributed.count():
        raise UserError(
            f"--batch-size {args.batch_size} cannot be shared evenly among {distributed.count()} processes; "
            "give a multiple of them"
        )
    if distributed.rank():
        sys.stdout = io.StringIO()  # the first process speaks for all
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return torch.device("cuda" if cuda else "cpu")


def quiet_libraries() -> None:
    """Only our own progress bars and errors; what these libraries have to say of errors comes as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def say_where(device: torch.device, chosen: torch.dtype) -> None:
    print(f"device {device.type}, matrix products in {precision.name_of(chosen)}")


def keep_memory() -> None:
    """Makes glibc keep the memory that tensors leave, for the next ones; they cost page faults otherwise.

    That is a fifth of an update's time for a small model on the CPU. Other systems have no mallopt, or none of use.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no memory of its own for what is large, which would go back at once
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_TOP_PAD, 2**28)


def seconds(device: torch.device) -> float:
    """The clock, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def progress(label: str, unit: str, done: int, total: int) -> tqdm:
    """The numbers of the steps after `done`, with a progress bar in the first process."""
    return tqdm(
        range(done + 1, total + 1),
        desc=label,
        unit=unit,
        initial=done,
        total=total,
        dynamic_ncols=True,
        disable=distributed.rank() > 0,
    )


# files


@distributed.by_the_first
def write_json(path: Path, value: dict) -> Path:
    """Numbers that are not known (NaN) become null: JSON has no other word for them."""

    def known(x):
        if isinstance(x, dict):
            return {key: known(one) for key, one in x.items()}
        if isinstance(x, (list, tuple)):
            return [known(one) for one in x]
        return None if isinstance(x, float) and math.isnan(x) else x

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


def provenance(device: torch.device, chosen: torch.dtype = torch.float32) -> dict:
    """What a result must name to be repeated: command, commit, versions, machine, precision."""
    here = Path(__file__).parents[1]
    commit = _git(here, "describe", "--always", "--abbrev=12").stdout.strip()
    if _git(here, "diff", "--quiet", "HEAD", "--", ".", ":!data_results").returncode == 1:  # the code, not results
        commit += "-dirty"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or None,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        "processes": distributed.count(),
        "device": device.type,
        "precision": precision.name_of(chosen),
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores, {platform.machine()}",
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
