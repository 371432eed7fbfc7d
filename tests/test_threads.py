"""The number of threads beside other programs."""

import subprocess
import sys
import time

import pytest
import torch

from rlhf import threads


@pytest.mark.parametrize(
    "others, cores, most, expected",
    [
        (0.0, 2, 2, 2),
        (-0.02, 2, 2, 2),  # the clocks tick in hundredths of a second
        (0.39, 2, 2, 2),  # a browser
        (0.5, 2, 2, 1),  # wants a whole core, and shares it with one of our two threads
        (1.0, 2, 2, 1),
        (2.0, 2, 2, 1),  # never none
        (3.0, 16, 16, 13),
        (3.0, 16, 8, 8),  # two threads of the processor to a core: there is room for all of ours
        (10.0, 16, 8, 6),
    ],
)
def test_other_programs_have_their_cores(others, cores, most, expected):
    assert threads.threads_beside(others, cores, most) == expected


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads and two cores, looked at before every step, with no variable set; as it was afterwards."""
    before = torch.get_num_threads()
    for name in threads.KEEP:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "PERIOD", 0.0)
    monkeypatch.setattr(threads, "usable_cores", lambda: [0, 1])
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbers_of_threads(steps):
    return [torch.get_num_threads() for _ in threads.following_load(steps)]


def loads(monkeypatch, *values):
    """What others take, at the start and before each step; we ourselves take nothing."""
    looks = iter(values)
    monkeypatch.setattr(threads, "busy_cores", lambda cores: next(looks))
    monkeypatch.setattr(threads.time, "process_time", lambda: 0.0)


def test_the_number_follows_the_load_both_ways_and_the_user_is_told_once(monkeypatch, two_threads, capsys):
    loads(monkeypatch, 0.0, 0.0, 1.0, 1.0, 0.1, 0.9)
    assert numbers_of_threads(range(5)) == [2, 1, 1, 2, 1]
    assert torch.get_num_threads() == 2  # what comes after the steps looks for itself
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "other programs are busy: 1 of 2 threads (OMP_NUM_THREADS keeps a number)\n"


def test_a_loop_that_is_left_early_leaves_the_number_as_it_was(monkeypatch, two_threads):
    loads(monkeypatch, 0.0, 1.0)
    steps = threads.following_load(range(5))
    next(steps)
    assert torch.get_num_threads() == 1
    steps.close()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", threads.KEEP)
def test_a_number_that_the_user_gives_stays(monkeypatch, two_threads, name):
    loads(monkeypatch, *[2.0] * 4)
    monkeypatch.setenv(name, "2")
    assert numbers_of_threads(range(3)) == [2, 2, 2]


@pytest.mark.parametrize("ours, expected", [(2.0, [2, 2, 2]), (1.2, [1, 1, 1])])
def test_our_own_work_is_not_others(monkeypatch, two_threads, ours, expected):
    """Two busy cores, of which our threads have this many: all, or what beside a busy program is left."""
    loads(monkeypatch, *[2.0] * 4)
    now = 0.0

    def a_second_before_each():
        nonlocal now
        for step in range(3):
            now += 1.0
            yield step

    monkeypatch.setattr(threads.time, "monotonic", lambda: now)
    monkeypatch.setattr(threads.time, "process_time", lambda: ours * now)
    assert numbers_of_threads(a_second_before_each()) == expected


def test_a_busy_process_for_every_core_leaves_one_thread(monkeypatch, two_threads):
    """The load is measured, not said."""
    monkeypatch.undo()
    for name in threads.KEEP:
        monkeypatch.delenv(name, raising=False)
    cores = threads.usable_cores()
    torch.set_num_threads(2)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    monkeypatch.setattr(threads, "PERIOD", 1.0)
    try:
        steps = threads.following_load(range(3))
        next(steps)
        time.sleep(1.5)
        next(steps)
        assert torch.get_num_threads() == 1
        steps.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()
