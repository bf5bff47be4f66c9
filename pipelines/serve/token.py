"""The token that clients must show, if the server has one: `Authorization: Bearer ...`.

It comes from a file or the environment of the machine that serves, never from a command line or a config,
which `ps` and Ray's dashboard show.
"""

import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from ctmsr.errors import UserError

TOKEN_ENV = "CTMSR_SERVE_TOKEN"
_MIN_CHARS = 16


@dataclass(frozen=True)
class TokenSource:
    """Where the token is."""

    file: str | None
    """Path of a file with the token, such as a mounted secret; None takes the variable `TOKEN_ENV`."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"the token file {self.file}" if self.file else TOKEN_ENV

    def read(self) -> str:
        """The token. It is read anew for each request, so a mounted secret may change.

        Raises:
            UserError: There is none, or it is too short or has other than visible ASCII characters.
        """
        try:
            text = (Path(self.file).read_text() if self.file else os.environ.get(TOKEN_ENV, "")).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.name} cannot be read where the server runs ({error}).") from error
        if len(text) < _MIN_CHARS or not text.isascii() or not text.isprintable() or " " in text:
            raise UserError(
                f"{self.name} must hold at least {_MIN_CHARS} visible ASCII characters where the server "
                f"runs, and holds {len(text)}. Make one with `openssl rand -hex 32`."
            )
        return text

    def accepts(self, authorization: str) -> bool:
        """Whether a header `Authorization` shows the token."""
        scheme, _, shown = authorization.partition(" ")
        known = self.read().encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), known)
