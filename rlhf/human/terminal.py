"""Questions at the terminal, answered with one key."""

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator

from rlhf.human.questions import COMMANDS, QUIT, View

try:
    import termios
    import tty
except ImportError:  # Windows: a key has to be followed by Enter
    termios = None

MAX_WIDTH = 100  # columns
ESCAPE = "\x1b"  # arrow keys and the like send it and then letters or digits, which are nobody's answer


def ask(view: View) -> str:
    """Print a question and return the key that is pressed, without Enter where the input is a terminal."""
    query, samples = view.question
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns if sys.stdout.isatty() else MAX_WIDTH)
    lines = ["", "─" * width, view.progress, "", *folded(query + " …", width), ""]
    for number, sample in enumerate(samples, 1):
        label = f"{number}  " if len(samples) > 1 else ""
        indent = " " * max(3, len(label))
        text = "… " + sample.strip()
        lines += [*folded(text, width, label or indent, indent), ""]
    keys = "  ".join(f"[{key}] {meaning}" for key, meaning in (view.answer_keys | COMMANDS).items())
    print("\n".join([*lines, keys]), flush=True)
    return read_key()


def folded(text: str, width: int, first_indent: str = "", indent: str = "") -> list[str]:
    """The lines of a text, none wider than `width`."""
    lines = []
    for line in text.splitlines():
        before = indent if lines else first_indent
        lines += textwrap.wrap(line, width, initial_indent=before, subsequent_indent=indent)
    return lines


def read_key() -> str:
    """The next key; Ctrl-C, Ctrl-D and the end of the input quit."""
    if termios is None or not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1].lower() if line else QUIT
    with raw_terminal():
        key = os.read(sys.stdin.fileno(), 1).decode(errors="replace").lower()
        if key == ESCAPE:
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
    return QUIT if key in ("\x03", "\x04", "") else key


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Let the terminal pass on every key at once, Ctrl-C like any other."""
    attributes = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
