"""Errors that a user can fix. Commands print only their message and exit with status 2."""


class UserError(Exception):
    """Base class: the message names the thing, the value received, what is allowed and what to do next."""


class ConfigError(UserError, ValueError):
    """A configuration value or key is not allowed."""


class DataError(UserError):
    """An image or the storage that holds it cannot be used."""


class StoreError(DataError):
    """A store denies access, fails or does not respond; the same call may succeed later."""


class PictureError(DataError):
    """A picture cannot be used; `reason` is the kind of defect in one word."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged or of another shape."""


class TrackingError(UserError):
    """The tracking server or the model registry cannot be used."""
