"""The server as a Ray Serve application: `serve run pipelines.serve:app model=models:/toy@champion`.

`python -m pipelines.serve` builds the same one.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import ray
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from ctmsr.errors import UserError

from ..config.defaults import TRACKING_URI
from ..tracking.released import Released, find_released
from .asked import Asked
from .front import Front
from .limits import Limits
from .token import TOKEN_ENV, TokenSource
from .upscaler import Upscaler

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

_ANY = "*"
_SQLITE = "sqlite:///"
_MAX_REQUESTS = 1000
"""Requests that the front handles at a time, nearly all of them waiting; it bounds bodies itself."""
_MAX_PICTURES = 64
"""Pictures that a replica of the model is offered at a time. It refuses most of so many."""
_PICTURES_PER_REPLICA = 3
"""More on average, and another replica starts."""


class Arguments(BaseModel, extra="forbid"):
    """What the application is built with."""

    model: str | None = None
    """`models:/NAME@ALIAS`, which is followed to another version, `models:/NAME/VERSION`, `starter` or a
    checkpoint's URI. By default the champion or, if there is none, the starter."""
    tracking_uri: str = TRACKING_URI
    """MLflow with the model."""
    device: Literal["cuda", "rocm", "mps", "cpu"] | None = None
    """Where to compute; by default the first that works."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Most replicas of the model; by default as many as the cluster has GPUs now, and at least one."""
    max_megapixels: Annotated[float, Field(gt=0)] = 2.0
    """Largest picture accepted."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Time limit for one picture, in seconds."""
    strip_metadata: bool = False
    """Leaves out EXIF, XMP and resolution of the pictures."""
    hosts: str = _ANY
    """Names that requests may use for this server, with commas between; `*` allows all."""
    token_file: str | None = None
    """File with the token that clients must show, on the machine that serves."""
    needs_token: bool = False
    """Starts only where there is a token, in the file or in CTMSR_SERVE_TOKEN."""
    poll_s: Annotated[float, Field(gt=0)] = 15.0
    """Seconds between looks at the registry for another version, if `model` is an alias."""

    @property
    def limits(self) -> Limits:
        """The limits on requests."""
        names = frozenset(name.strip() for name in self.hosts.split(",") if name.strip())
        if not names:
            raise UserError(f"hosts must be names with commas between, or {_ANY}; got {self.hosts!r}.")
        return Limits(
            round(self.max_megapixels * 1e6),
            self.timeout,
            keeps_metadata=not self.strip_metadata,
            hosts=frozenset() if _ANY in names else names,
        )


def app(arguments: Arguments) -> serve.Application:
    """The application, as `serve run pipelines.serve:app` builds it.

    Raises:
        UserError: There is no such model, or MLflow fails. A replica fails if the model does not load there,
            or if there should be a token and is none.
    """
    return build(arguments, find(arguments))


def find(arguments: Arguments) -> Released:
    """The model that is asked for.

    Raises:
        UserError: There is none, or MLflow fails.
    """
    return find_released(arguments.model, _absolute(arguments.tracking_uri), arguments.device)


def build(arguments: Arguments, found: Released) -> serve.Application:
    """The application that starts with the model `found`; Ray must be running."""
    asked = Asked(arguments.model, _absolute(arguments.tracking_uri), arguments.device)
    has_gpus = arguments.device in (None, "cuda", "rocm")
    gpus = int(ray.cluster_resources().get("GPU", 0)) if has_gpus else 0
    upscaler = serve.deployment(
        name="upscaler",
        autoscaling_config=AutoscalingConfig(
            min_replicas=1,
            max_replicas=arguments.max_replicas or max(1, gpus),
            target_ongoing_requests=_PICTURES_PER_REPLICA,
        ),
        max_ongoing_requests=_MAX_PICTURES,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=arguments.timeout,
        health_check_timeout_s=max(30.0, arguments.timeout),
        ray_actor_options={"num_cpus": 1, "num_gpus": min(1, gpus)},
        logging_config=QUIET,
    )(Upscaler)
    front = serve.deployment(
        name="front",
        max_ongoing_requests=_MAX_REQUESTS,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=arguments.timeout,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )(Front)
    has_token = arguments.needs_token or arguments.token_file or os.environ.get(TOKEN_ENV)
    token = TokenSource(arguments.token_file) if has_token else None
    pictures = upscaler.bind(asked, found, arguments.limits, arguments.poll_s)
    return front.bind(pictures, found.uri, arguments.limits, token)


def _absolute(tracking_uri: str) -> str:
    """With the path of a database file made absolute, as replicas have another working directory."""
    path = tracking_uri.removeprefix(_SQLITE)
    return tracking_uri if path == tracking_uri else f"{_SQLITE}{Path(path).expanduser().absolute()}"
