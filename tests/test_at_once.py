"""Scripts that run at the same time: what is shown, and what becomes of the others when one ends badly."""

import signal
import subprocess
import sys
import time

import pytest

from experiments import at_once
from tests.conftest import ROOT, refused, run


@pytest.fixture
def script(tmp_path):
    """Writes a script of these lines, and returns its name as a command."""

    def write(name, *lines):
        path = tmp_path / f"{name}.py"
        path.write_text("\n".join(("import os, pathlib, sys, time", *lines)))
        return str(path)

    return write


def test_both_run_at_the_same_time_and_are_shown_one_after_the_other(script, tmp_path):
    waits = [f"while not pathlib.Path({str(tmp_path / name)!r}).exists(): time.sleep(0.01)" for name in "ab"]
    comes = [f"pathlib.Path({str(tmp_path / name)!r}).touch()" for name in "ab"]
    first = script("first", comes[0], waits[1], "print('first is done')")
    second = script("second", comes[1], waits[0], "print('second is done')")
    shown = run("experiments.at_once", first, f"{second} --flag", cwd=tmp_path)
    assert shown.stdout.split("\n") == ["", first, "", f"{second} --flag", ""]
    assert shown.stderr == "first is done\nsecond is done\n"


def test_each_has_its_share_of_the_threads_and_bars_as_wide_as_the_terminal(script, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")
    monkeypatch.setenv("COLUMNS", "77")
    tells = script("tells", "print(os.environ['OMP_NUM_THREADS'], os.environ['COLUMNS'])")
    assert run("experiments.at_once", tells, tells, cwd=tmp_path).stderr == "3 77\n" * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("experiments.at_once", tells, tells, cwd=tmp_path).stderr == "1 77\n" * 2


def test_a_bar_that_was_written_while_another_script_was_shown_appears_in_its_last_state():
    assert at_once.last_state("\r 1%\r50%\r      \repoch 1\n\r51%\r99%") == "epoch 1\n99%"
    assert at_once.last_state("no bar\n") == "no bar\n"


@pytest.mark.parametrize("is_first", [True, False])
def test_where_one_fails_it_says_why_and_the_others_are_stopped(script, tmp_path, is_first):
    forever = script("forever", f"pathlib.Path({str(tmp_path / 'alive')!r}).touch()", "time.sleep(60)")
    alive = f"while not pathlib.Path({str(tmp_path / 'alive')!r}).exists(): time.sleep(0.01)"
    fails = script("fails", alive, "sys.exit('error: no data')")
    began = time.monotonic()
    shown = run("experiments.at_once", *([fails, forever] if is_first else [forever, fails]), cwd=tmp_path, code=2)
    assert time.monotonic() - began < 30
    assert shown.stderr == f"error: no data\nerror: {fails} failed; it says why above\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_script_once(script, tmp_path, number):
    files = [str(tmp_path / name) for name in "ab"]
    lines = (
        "import signal",
        "signals = []",
        "signal.signal(signal.SIGTERM, lambda *_: signals.append('TERM'))",
        "signal.signal(signal.SIGINT, lambda *_: signals.append('INT'))",
        "pathlib.Path(sys.argv[1]).write_text('ready')",
        "while not signals: time.sleep(0.01)",
        "time.sleep(0.2)",
        "pathlib.Path(sys.argv[1]).write_text(' '.join(signals))",
    )
    waits = script("waits", *lines)
    command = [sys.executable, "-m", "experiments.at_once", *(f"{waits} {file}" for file in files)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / name).exists() for name in "ab"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said.strip().endswith("stopped; the same command goes on from there")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["TERM", "TERM"]


def test_no_command_is_an_error():
    assert "required: COMMAND" in refused("experiments.at_once")
