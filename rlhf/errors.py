"""What ends a script before it is done, and is no defect of the code."""


class UserError(Exception):
    """Something the user can mend: its message says what is wrong and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with nothing lost: (number of the signal, what to say)."""
