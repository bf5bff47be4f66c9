"""How every command ends: with an exit status and, for an error the user can fix, one line on stderr."""

import logging
import sys
from collections.abc import Callable

from ctmsr.errors import UserError


def run(main: Callable[[list[str] | None], int]) -> None:
    """Exits with main's status; a UserError becomes one line and status 2, Ctrl-C becomes status 130."""
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
    """The original error of a chain; it says more than Ray's wrappers around it."""
    while True:
        # Ray's wrappers carry the wrapped error here, and may be instances of its class.
        cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None)
        if cause is None and not isinstance(error, UserError):  # a UserError's message is complete
            cause = error.__cause__
        if cause is None:
            return error
        error = cause


def root_cause(error: BaseException) -> str:
    """The original error of a chain, in one line."""
    return one_line(first_cause(error))


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"  # Ray Data appends lines of its own
