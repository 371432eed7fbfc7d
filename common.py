"""What every script needs: one-line errors, flags, device and seeds, result files."""

import argparse
import contextlib
import ctypes
import errno
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
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm

import parallel
import precision

datasets.disable_progress_bars()
datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
huggingface_hub.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
TOLERATED = 3  # steps in a row that are not finite, and are skipped, before a run stops

# errors and flags


class UserError(Exception):
    """Something the user can mend: its message says what is wrong and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with nothing lost: (number of the signal, what to say)."""


def run(main: Callable[[], None]) -> None:
    """Run a script; a UserError ends it with one line on stderr and exit code 2, a signal with 128 and its number."""
    try:
        main()
    except UserError as error:
        sys.exit(fail(error))
    except Stopped as stop:
        number, message = stop.args
        print(message, file=sys.stderr)
        sys.exit(128 + number)
    except torch.OutOfMemoryError as error:
        sys.exit(fail(f"the device is out of memory; lower --batch-size, or --forward-batch of PPO ({error})"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        sys.exit(fail(f"{error}; make room or give another folder, and go on with --resume"))


def fail(message) -> int:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and says in one line what is wrong with a flag."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message):
        sys.exit(fail(f"{message} (see --help)"))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Callable:
    """An argparse type: a finite number of this kind in [low, high] and > above."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and value > above):
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
            bounds += [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} is not {_ARTICLE[kind]} {' and '.join(bounds)}".rstrip())
        return value

    return parse


_ARTICLE = {int: "a whole number", float: "a number"}
COUNT, SAMPLE_COUNT, SEED = number(int, 1, 10**9), number(int, 1, 10**6), number(int, 0, 2**32 - 1)
POSITIVE, FRACTION = number(float, above=0), number(float, 0, 1)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA when there is one")
    group.add_argument(
        "--precision",
        choices=precision.PRECISIONS,
        default="auto",
        help="of matrix products. auto: bfloat16 on CUDA, and for models of 4 million weights and more on a CPU with "
        "avx512_bf16 or AMX; float32 elsewhere",
    )
    group.add_argument("--seed", type=SEED, default=0, help="seed of every random choice")


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument("--data", default=default, help="folder of this form, a file, or a hub dataset")
    group.add_argument("--data-config", help="configuration (subset) of a hub dataset")
    group.add_argument("--data-revision", help="branch or commit of a hub dataset, such as refs/convert/parquet")
    group.add_argument(
        "--text-column",
        nargs="+",
        metavar="COLUMN[+COLUMN...]",
        help="column of the text; several joined by + make one text, several names give several texts a row",
    )
    return group


def add_gold_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gold",
        default="data_cls/scenarios.py:judge",
        help="what knows the truth about texts: FILE.py:FUNCTION, heard only where it knows the data, or the folder of "
        "a second classifier; nothing learns from it",
    )


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--query-length", type=COUNT, default=5, help="longest query in tokens; the shortest is half")
    group.add_argument("--response-length", type=COUNT, default=40, help="longest response in tokens")
    group.add_argument("--temperature", type=POSITIVE, default=0.7, help="divides the logits, here and everywhere")


def set_up(args: argparse.Namespace) -> torch.device:
    """Joins the other processes, if there are any, seeds everything and returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch sees; use --device cpu")
    keep_memory()
    cuda = args.device != "cpu" and torch.cuda.is_available()
    parallel.start(cuda)
    if vars(args).get("batch_size", 0) % parallel.count():
        raise UserError(
            f"--batch-size {args.batch_size} cannot be shared evenly among {parallel.count()} processes; "
            "give a multiple of them"
        )
    if parallel.rank():
        sys.stdout = io.StringIO()  # the first process speaks for all
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return torch.device("cuda" if cuda else "cpu")


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
        disable=parallel.rank() > 0,
    )


# files


@parallel.by_the_first
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
    here = Path(__file__).parent
    commit = _git(here, "describe", "--always", "--abbrev=12").stdout.strip()
    if _git(here, "diff", "--quiet", "HEAD", "--", ".", ":!data_results").returncode == 1:  # the code, not results
        commit += "-dirty"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or None,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        "processes": parallel.count(),
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
