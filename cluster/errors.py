"""What can go wrong by the user's hand, and how a command says so."""

import errno
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EXIT_FAILED = 1
EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user's input is wrong.

    The message is one line: what came, what is accepted, what to do.
    """


class Failed(Exception):
    """It failed, for a reason that one line tells as well as a traceback would."""


def run_command(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> NoReturn:
    """Run a command and leave the process by the contract of all commands.

    What `main` returns is the last line on stdout, as one JSON object. Exit 0 done, 2 the
    user's input is wrong (one line on stderr, no traceback), 1 it failed.
    """
    # A process manager ends a command by SIGTERM, a user by Ctrl-C: both mean the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Exception as error:
        if _disk_is_full(error):
            print(
                "error: the disk is full. What was complete stays; free some and run it again.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.exit(EXIT_FAILED)
    if result is not None:
        print(json.dumps(result), flush=True)
    sys.exit(0)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether that is the cause; SQLite says it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
