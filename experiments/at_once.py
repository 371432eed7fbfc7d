"""Run scripts at the same time, each with its share of the threads, and show what they say one after the other.

    python -m experiments.at_once "train_cls.py --resume" "train_nlg.py --resume"

In models as small as the shipped ones two threads wait for each other. Two scripts with a thread each need less time
at the same time than in turn with two (benchmarks/RESULTS.md). Where one fails or is interrupted, all are stopped.
"""

import rlhf.environment  # noqa: F401, I001  (the scripts inherit it, with the threads that are set here)
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from experiments.commands import command_line, threads
from rlhf import cli
from rlhf.errors import Stopped, UserError, caught_signals

SECONDS = 0.1  # between two looks at what the scripts said


class Script(NamedTuple):
    command: str
    process: subprocess.Popen
    output: Path


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="a script and its flags")
    commands = parser.parse_args().commands
    with (
        caught_signals() as signals,
        tempfile.TemporaryDirectory() as folder,
        started(commands, Path(folder)) as scripts,
    ):
        for script in scripts:
            show(script, scripts, signals)


@contextlib.contextmanager
def started(commands: list[str], folder: Path) -> Iterator[list[Script]]:
    """Scripts that run side by side, and write what they say to files. None outlives the block."""
    columns, lines = shutil.get_terminal_size()
    variables = {
        "OMP_NUM_THREADS": max(1, threads() // len(commands)),
        "PYTHONUNBUFFERED": 1,
        "COLUMNS": columns,  # the width of progress bars, which a file does not tell
        "LINES": lines,
    }
    scripts = []
    try:
        for i, command in enumerate(commands):
            output, (program, *flags) = folder / str(i), command.split()
            with output.open("w") as file:
                process = subprocess.Popen(
                    command_line(program, flags), env=os.environ | {name: str(x) for name, x in variables.items()},
                    stdout=file, stderr=subprocess.STDOUT, start_new_session=True,  # a signal comes from here, and once
                )  # fmt: skip
            scripts.append(Script(command, process, output))
        yield scripts
    finally:
        for script in scripts:
            script.process.terminate()  # where it still runs: it writes a checkpoint
        for script in scripts:
            script.process.wait()


def show(script: Script, scripts: list[Script], signals: list[int]) -> None:
    """What a script says, until it has ended: first what it said while another one had the screen."""
    with begun(script) as file:
        ended = False
        while not ended:
            ended = script.process.poll() is not None
            failed = next((each for each in scripts if each.process.poll()), None)
            write(file.read())  # after these two looks: nothing that an ended script said is missed
            if signals:
                raise Stopped(signals[0], "\nstopped; the same command goes on from there")
            if failed:
                if failed is not script:
                    begun(failed).close()
                raise UserError(f"{failed.command} failed; it says why above")
            time.sleep(SECONDS)


def begun(script: Script) -> TextIO:
    """Show what a script has said so far. Returns the file in which it goes on."""
    print(f"\n{script.command}", flush=True)
    file = script.output.open(errors="replace", newline="")  # a return to the beginning of a line stays one
    write(last_state(file.read()))
    return file


def last_state(text: str) -> str:
    """Without what was written over: of each line what follows the last return to its beginning."""
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


def write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    cli.run(main)
