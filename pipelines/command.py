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
