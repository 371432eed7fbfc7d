"""Command lines: flags with readable help, and errors that end in one line. Loads no torch."""

import argparse
import errno
import math
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf.errors import Stopped, UserError


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
    except RuntimeError as error:
        if "out of memory" not in str(error):  # of a GPU: torch.OutOfMemoryError
            raise
        sys.exit(fail(f"the device is out of memory; lower --batch-size, or --forward-batch of PPO ({error})"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        sys.exit(fail(f"{error}; make room or give another folder, and go on, with --resume where a script has it"))


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


def folder(text: str) -> str:
    """An argparse type: a path without a slash at its end, because other names are made from it."""
    return str(Path(text))


_ARTICLE = {int: "a whole number", float: "a number"}
COUNT, SAMPLE_COUNT, SEED = number(int, 1, 10**9), number(int, 1, 10**6), number(int, 0, 2**32 - 1)
POSITIVE, FRACTION = number(float, above=0), number(float, 0, 1)
