"""What can go wrong by the user's hand, and the exit codes of commands."""

import errno

EXIT_FAILED = 1
EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user's input is wrong.

    The message is one line: what was given, what is accepted, what to do.
    """


class CommandFailed(Exception):
    """A command failed for a reason that one line explains as well as a traceback would."""


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause of an error. SQLite reports it in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
