"""How many threads a run on the CPU has: as many as other programs leave it cores.

All threads of a parallel region wait for its slowest one. Where another program takes half the core of one of them, two
threads are slower than one that has a core for itself (benchmarks/RESULTS.md).

Another number of threads rounds differently. OMP_NUM_THREADS or MKL_NUM_THREADS, set by the user, keeps the number.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator

import psutil
import torch
from tqdm import tqdm

KEEP = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
PERIOD = 2.0  # seconds over which the load is measured
# A program that wants a whole core gets half of one or more beside our threads. What takes a smaller part than this
# costs less than one thread fewer would.
SMALL = 0.4


def following_load(steps: Iterable) -> Iterator:
    """The steps. Between them the number of torch's threads follows the load; after them it is what it was."""
    most = threads = torch.get_num_threads()
    if most == 1 or any(name in os.environ for name in KEEP):
        yield from steps
        return
    cores, is_told = usable_cores(), False
    busy_cores(cores)  # the next call tells of the time from here on
    start, ours = time.monotonic(), time.process_time()
    try:
        for step in steps:
            seconds = time.monotonic() - start
            if seconds >= PERIOD:
                others = busy_cores(cores) - (time.process_time() - ours) / seconds
                start, ours, before = time.monotonic(), time.process_time(), threads
                threads = threads_beside(others, len(cores), most)
                if threads != before:
                    torch.set_num_threads(threads)
                if threads < most and not is_told:
                    is_told = True
                    notice = f"other programs are busy: {threads} of {most} threads (OMP_NUM_THREADS keeps a number)"
                    tqdm.write(notice, file=sys.stderr)
            yield step
    finally:
        if threads != most:
            torch.set_num_threads(most)


def threads_beside(others: float, cores: int, most: int) -> int:
    """The number of threads, at most `most`, where other programs take `others` of our cores."""
    taken = int(others + 1 - SMALL)
    return min(most, max(1, cores - taken))


def usable_cores() -> list[int]:
    """The numbers of those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def busy_cores(cores: list[int]) -> float:
    """How many of the cores were busy since the last call, on average."""
    percent = psutil.cpu_percent(percpu=True)
    return sum(percent[core] for core in cores) / 100
