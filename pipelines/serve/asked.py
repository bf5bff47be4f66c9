"""The model that a server was asked to serve: a name, which may come to mean another version."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from ctmsr.errors import TrackingError

from ..tracking.released import REGISTERED, Released, Upscale, champion, find_released

_KNOWN = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
"""The known picture that shows whether a model still works."""
_TOLERANCE = 2
"""Levels of 255: on a GPU, the same picture need not give the same bits."""


@dataclass(frozen=True)
class Asked:
    """A model's name."""

    model: str | None
    """As for `find_released`."""
    tracking_uri: str
    device: str | None

    @property
    def may_move(self) -> bool:
        """Whether the name is an alias, like the default."""
        return self.model is None or (self.model.startswith(REGISTERED) and "@" in self.model)

    def now(self, before: Released) -> Released:
        """What it means now; `before`, if the default has no champion.

        Raises:
            UserError: There is no such model, or MLflow fails.
        """
        if self.model is None:
            return champion(self.tracking_uri, self.device) or before
        return find_released(self.model, self.tracking_uri, self.device)


@dataclass(frozen=True)
class Loaded:
    """A model that has shown that it works."""

    released: Released
    upscale: Upscale
    sr_u8: np.ndarray
    """What it made of the known picture at first."""

    @classmethod
    def load(cls, released: Released, turn: AbstractContextManager) -> "Loaded":
        """Loads it and, in its `turn`, has it upscale the known picture.

        Raises:
            TrackingError: It does not load, or does not work.
        """
        upscale = released.load()
        try:
            with turn:
                sr_u8 = upscale(_KNOWN, 0)
        except Exception as error:  # the model's own code runs here and can raise anything
            raise TrackingError(
                f"{released.uri} loads, but cannot upscale a picture of 8 x 8 pixels "
                f"({type(error).__name__}: {error}). Register it again."
            ) from error
        return cls(released, upscale, sr_u8)

    def check(self) -> None:
        """Upscales the known picture again.

        Raises:
            RuntimeError: The result is no longer what it was.
        """
        sr_u8 = self.upscale(_KNOWN, 0)
        off = int(np.abs(sr_u8.astype(int) - self.sr_u8).max())
        if off > _TOLERANCE:
            raise RuntimeError(
                f"{self.released.uri} is off by {off} levels of 255 on a picture that it upscaled before."
            )
