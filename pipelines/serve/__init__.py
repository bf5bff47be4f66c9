"""A released model over HTTP. `serve run pipelines.serve:app` and a RayService name its application here."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`app`, imported once somebody asks for it: --help should not wait for Ray."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .application import app

    return app
