"""What the libraries under torch read from the environment when they are loaded. Import this before torch.

OpenMP: a thread that has done its part of a parallel region spins until the others have, and with one other busy
process on the machine it spins for a time slice: training becomes many times slower. With a bound on the spinning it
sleeps instead. A lower bound helps beside a busy process and costs time on a quiet machine (benchmarks/RESULTS.md).

oneDNN: for every shape of a matrix product it keeps what it compiled, with its working memory, and it keeps 1,024 of
them. No two rollouts have the same number of tokens, so that the memory of a run grows for hundreds of updates.
"""

import os

SPIN_COUNT = 10_000  # turns of the waiting loop
KEPT_PRODUCTS = 64  # more than one update needs of each number of tokens

if not any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):  # the user knows better
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
