"""Running the project's scripts from an experiment."""

import os
import subprocess
import sys
from pathlib import Path

from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(command: str, **environment: str) -> None:
    """Run a script, or a module such as experiments.real_data, with these flags and environment variables.

    Nothing is done where its --out exists already, which a script writes last.
    """
    script, *flags = command.split()
    if "--out" in flags and Path(flags[flags.index("--out") + 1]).exists():
        return
    print(f"\n{command}", flush=True)
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    if subprocess.run([sys.executable, *program, *flags], env=environment).returncode:
        raise UserError(f"{script} failed; it says why above")
