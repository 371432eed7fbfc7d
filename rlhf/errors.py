"""What ends a script before it is done, and is no defect of the code."""

import contextlib
import signal
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend: its message says what is wrong and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with nothing lost: (number of the signal, what to say)."""


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM, so that a step can end and be saved; the second has its usual effect."""
    numbers, handlers = [], {}

    def note(number: int, _) -> None:
        numbers.append(number)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    handlers |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield numbers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
