"""A model by any of its names: `starter`, a checkpoint's URI, or a version in the MLflow registry.

Only the last imports MLflow, which takes seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ctmsr.config import from_dict
from ctmsr.model import checkpoint
from ctmsr.model.device import choose_device
from ctmsr.model.graphs import replay_graphs
from ctmsr.model.inference import InferenceConfig, for_inference, upscale

from ..config.defaults import MODEL_NAME
from ..infra.checkpoints import STARTER, fetched

REGISTERED = "models:/"

Upscale = Callable[[np.ndarray, int], np.ndarray]
"""Takes a uint8 or uint16 (height, width, 3) picture and a seed, and returns the same enlarged by `scale`."""


class Released(Protocol):
    """A model that upscales pictures, before it is loaded."""

    @property
    def uri(self) -> str:
        """Its name, for messages."""

    @property
    def source(self) -> str:
        """Identifies its files: changes whenever they do."""

    @property
    def device(self) -> str | None:
        """Where to compute, one of DEVICES; None for the best one."""

    def load(self) -> Upscale:
        """Fetches and loads it; raises UserError if that fails."""


@dataclass(frozen=True)
class CheckpointModel:
    """A checkpoint as a model."""

    uri: str
    source: str
    """SHA-256 of the weights."""
    device: str | None = None

    def load(self) -> Upscale:
        """Loads it onto its device."""
        with fetched(self.uri) as folder:
            model, manifest = checkpoint.load_model(folder)
        sigma_max = manifest.config["schedule"]["sigma_max"]
        settings = from_dict(InferenceConfig, manifest.config["inference"], "inference")
        model = for_inference(model, choose_device(self.device), settings)
        model = replay_graphs(model)
        return lambda lq_u8, seed: upscale(model, lq_u8, sigma_max=sigma_max, seed=seed, config=settings)


def find_released(model: str | None, tracking_uri: str, device: str | None = None) -> Released:
    """Finds a model by name; by default the champion or, if there is none, the starter.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `starter` or a checkpoint's URI; None for the
            default.
        tracking_uri: The MLflow server whose registry to search.
        device: Where to compute, one of DEVICES; None for the best one.

    Raises:
        UserError: There is no such model, or MLflow fails.
    """
    if model is None:
        return champion(tracking_uri, device) or _starter(tracking_uri, device)
    if model.startswith(REGISTERED):
        from .models import find_version
        from .runs import preflight

        return find_version(preflight(tracking_uri), model, device)
    with fetched(model) as folder:
        files = checkpoint.read_manifest(folder).files
    return CheckpointModel(model, files[checkpoint.MODEL_FILE]["sha256"], device)


@contextmanager
def fetched_checkpoint(model: str, tracking_uri: str) -> Iterator[tuple[Path, str]]:
    """The checkpoint behind a model's name, as a local folder for the duration of a `with` block.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `starter` or a checkpoint's URI.
        tracking_uri: The MLflow server whose registry to search.

    Yields:
        The folder, and the licence of the weights.

    Raises:
        UserError: There is no such model, or MLflow or a store fails.
    """
    if model.startswith(REGISTERED):
        from .models import fetched_version
        from .runs import preflight

        with fetched_version(preflight(tracking_uri), model) as (folder, licence):
            yield folder, licence or _licence(folder)
    else:
        with fetched(model) as folder:
            yield folder, _licence(folder)


def _licence(folder: Path) -> str:
    """As the config of a checkpoint has it."""
    config = checkpoint.read_manifest(folder).config
    return str(config.get("register", {}).get("licence", "unknown"))


def champion(tracking_uri: str, device: str | None) -> Released | None:
    """The champion; None if the registry has no champion, or is a database file that does not exist."""
    database = tracking_uri.removeprefix("sqlite:///")
    if database != tracking_uri and not Path(database).expanduser().exists():
        return None
    from .models import NoSuchModelError, find_version
    from .runs import preflight

    try:
        return find_version(preflight(tracking_uri), f"{REGISTERED}{MODEL_NAME}@champion", device)
    except NoSuchModelError:
        return None


def _starter(tracking_uri: str, device: str | None) -> Released:
    print(
        f"There is no champion in {tracking_uri}: using the starter model included in the package.",
        flush=True,
    )
    return find_released(STARTER, tracking_uri, device)
