"""How long OpenMP's threads wait awake. Import this before torch: GNU's OpenMP reads its settings when it is loaded.

A thread that has done its part of a parallel region spins until the others have, and with one other busy process on the
machine it spins for a time slice: training becomes many times slower. With a bound on the spinning it sleeps instead.
A lower bound helps beside a busy process and costs time on a quiet machine (benchmarks/RESULTS.md).
"""

import os

SPIN_COUNT = 10_000  # turns of the waiting loop

if not any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):  # the user knows better
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
