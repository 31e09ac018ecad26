"""Errors that are shown to the user in one line, and the exit codes of commands."""

import errno

EXIT_FAILED = 1
EXIT_USER_ERROR = 2


class UserError(Exception):
    """Wrong input from the user.

    The message is one line: what was received, what is accepted, and what to do.
    """


class CommandFailed(Exception):
    """A failure of a command that one line explains as well as a traceback would."""


def error_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line, of about 300 characters at most."""
    message = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error was caused by a full disk.

    The message is searched too, because SQLite reports a full disk only there.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
