"""Running the project's scripts from an experiment."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def threads() -> int:
    """How many a script has for itself: OMP_NUM_THREADS, or one for each core."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of nested regions, a list
    return int(given) if given.isdecimal() else cores()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(command: str, **variables: str) -> None:
    """Run a script, or a module such as experiments.real_data, with these flags and environment variables.

    Nothing is done where its --out exists already, which a script writes last.
    """
    script, *flags = shlex.split(command)
    if is_done(flags):
        return
    print(f"\n{command}", flush=True)
    if start(script, flags, variables).returncode:
        raise UserError(f"{script} failed; it says why above")


def is_done(flags: list[str]) -> bool:
    """Whether the --out of a script's flags exists, which it writes last."""
    return "--out" in flags and Path(flags[flags.index("--out") + 1]).exists()


def start(script: str, flags: list, variables: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    """Run a script or a module to its end, from whatever folder. options: of subprocess.run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (variables or {})
    return subprocess.run(command_line(script, flags), env=environment, **options)


def command_line(script: str, flags: list) -> list:
    """The words that start a script or a module with this Python."""
    return [sys.executable, *([str(ROOT / script)] if script.endswith(".py") else ["-m", script]), *flags]
