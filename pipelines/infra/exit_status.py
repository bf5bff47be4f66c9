"""How every command ends: with an exit status and, for an error the user can fix, one line on stderr."""

import io
import logging
import os
import select
import sys
from collections.abc import Callable

from ctmsr.errors import UserError

from .invocation import as_typed, printable

READER_GONE = 141  # 128 + SIGPIPE
"""Exit status when nobody reads the output any more, as shells report it."""


def run(main: Callable[[list[str] | None], int]) -> None:
    """Exits with main's status; a UserError becomes one line and status 2, Ctrl-C becomes status 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in letters that the terminal does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _status(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # At exit Python flushes stdout once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = READER_GONE
    sys.exit(status)


def _status(main: Callable[[list[str] | None], int]) -> int | str | None:
    try:
        return main(None)
    except SystemExit as ended:  # raised by argparse
        return ended.code
    except UserError as error:
        print(f"error: {printable(as_typed(str(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose reader is gone, as with `| head`; the broken pipe may be another."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


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
