"""How every command ends: an exit status, and for a mistake the user can mend one line on stderr."""

import logging
import sys
from collections.abc import Callable

from ctmsr.errors import UserError


def run(main: Callable[[list[str] | None], int]) -> None:
    """Ends the process with main's status; a UserError becomes one line and status 2, Ctrl-C status 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        status = main(None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        status = 130
    sys.exit(status)


def first_cause(error: BaseException) -> BaseException:
    """The error that started a chain of them: what Ray wraps says more than its wrapping."""
    while True:
        # of Ray's wrappings, which may pass for what they wrap
        cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None)
        if cause is None and not isinstance(error, UserError):  # whose message says it all
            cause = error.__cause__
        if cause is None:
            return error
        error = cause


def root_cause(error: BaseException) -> str:
    """The error that started a chain of them, in one line."""
    return one_line(first_cause(error))


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"  # Ray Data adds lines of its own
