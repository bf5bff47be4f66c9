"""Registered models by name: found in MLflow, fetched and loaded.

Needs neither Ray nor the data plane. Loading a model runs the Python code registered with it, so use only
registries that you trust.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

from ctmsr.errors import TrackingError

from .runs import connect, tracking_errors

logger = logging.getLogger(__name__)
CHECKPOINT = "artifacts/checkpoint"
"""Where the files of a version have the checkpoint."""
FORMAT, MODEL_FORMAT = "format", 2
"""Tag of a version with its format, and the newest that this release reads. Versions of 1, which have no tag,
take pictures of 8 bits alone; since 2 `predict` is as `registered_model.py` documents it."""


class NoSuchModelError(TrackingError):
    """The registry has no such model, alias or version."""


def load_model(tracking_uri: str, model_uri: str) -> PyFuncModel:
    """A registered model as `mlflow.pyfunc.load_model` returns it; `registered_model.py` documents `predict`.

    Args:
        tracking_uri: From `runs.preflight`.
        model_uri: `models:/name@alias` or `models:/name/version`.

    Raises:
        TrackingError: MLflow fails, or has no such model, alias or version; the message lists what it has.
    """
    client = connect(tracking_uri)
    with tracking_errors(f"cannot fetch {model_uri} from {tracking_uri}"):
        version = named_version(client, model_uri)
        source = client.get_model_version_download_uri(version.name, version.version)
    return load_from(tracking_uri, source, model_uri)


def load_from(
    tracking_uri: str, source: str, name: str = "the model", device: str | None = None
) -> PyFuncModel:
    """Loads the model whose files are at `source`.

    Args:
        tracking_uri: From `runs.preflight`.
        source: Where MLflow keeps the files of a version or of a logged model.
        name: For messages.
        device: Where to compute, one of DEVICES; None leaves the choice to the model.

    Raises:
        TrackingError: The files cannot be fetched, or do not load.
    """
    if source.startswith("file:") and not Path(url2pathname(urlsplit(source).path)).exists():
        raise TrackingError(
            f"the files of {name} are at {source}, a folder that this machine does not have. Start the "
            "MLflow server with --artifacts-destination, so that it hands them out, and register it again."
        )
    with tempfile.TemporaryDirectory() as scratch:
        with tracking_errors(f"cannot fetch {name} from {tracking_uri}"):
            folder = mlflow.artifacts.download_artifacts(
                source, dst_path=scratch, tracking_uri=tracking_uri, registry_uri=tracking_uri
            )
        try:
            settings = {"device": device} if device else None
            model: PyFuncModel = mlflow.pyfunc.load_model(
                folder, suppress_warnings=True, model_config=settings
            )
        except Exception as error:  # the model's own code runs here and can raise anything
            raise TrackingError(
                f"{name} was fetched from {tracking_uri} but does not load "
                f"({type(error).__name__}: {error}). Install its requirements.txt, or register it again."
            ) from error
    return model


def named_version(client: MlflowClient, model_uri: str) -> ModelVersion:
    """The version that `models:/name@alias` or `models:/name/version` currently names.

    Raises:
        TrackingError: There is none, and the message lists the existing ones; or a newer release made it.
        MlflowException: MLflow fails.
    """
    named = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if not named:
        raise TrackingError(
            f"a model's name must be models:/name@alias or models:/name/version, got {model_uri!r}."
        )
    name, alias, version = named.groups()
    try:
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        models = {model.name: model for model in client.search_registered_models()}
        if name not in models:
            known = f"models: {', '.join(models) or 'none; register one first'}"
        else:
            versions = sorted(int(v.version) for v in client.search_model_versions(f"name='{name}'"))
            known = (
                f"aliases of {name}: {', '.join(models[name].aliases) or 'none'}; "
                f"versions: {', '.join(map(str, versions)) or 'none'}"
            )
        where = client.tracking_uri
        raise NoSuchModelError(
            f"{model_uri} is not in the registry at {where}. There are {known}."
        ) from error
    check_format(f"models:/{name}/{found.version}", found.tags)
    return found


def check_format(name: str, tags: Mapping[str, str]) -> None:
    """Checks that this release knows what a version with these tags is.

    Raises:
        TrackingError: It was made by a newer release.
    """
    if (found := int(tags.get(FORMAT, 1))) > MODEL_FORMAT:
        raise TrackingError(
            f"{name} has format {found}, and this release reads up to {MODEL_FORMAT}: it was made by a newer "
            "release. Upgrade this one, or name an older version."
        )


@dataclass(frozen=True)
class Version:
    """One version of a registered model; unlike an alias, it cannot move while pictures are upscaled."""

    tracking_uri: str
    uri: str
    """`models:/name/version`."""
    source: str
    """Where its files are; tells it apart from a model of the same name in another registry."""
    device: str | None = None

    def load(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Loads it as a function of a (height, width, 3) picture and a seed; runs the model's own code.

        Pictures are uint8 or uint16, and so is the result. Models of format 1 take uint8 only; for them,
        uint16 is rounded to it, with a warning.

        Raises:
            TrackingError: The model cannot be fetched or does not load.
        """
        model = load_from(self.tracking_uri, self.source, self.uri, self.device)

        def predict(lq: np.ndarray, seed: int) -> np.ndarray:
            return np.asarray(model.predict(lq[None], params={"seed": seed}))[0]

        def upscale(lq: np.ndarray, seed: int) -> np.ndarray:
            try:
                return predict(lq, seed)
            except ValueError:
                if lq.dtype != np.uint16:
                    raise
            logger.warning("%s takes pictures of 8 bits only. Register it again for 16.", self.uri)
            sr_u8 = predict(np.rint(lq / 257).astype(np.uint8), seed)
            return sr_u8.astype(np.uint16) * np.uint16(257)

        return upscale


@contextmanager
def fetched_version(tracking_uri: str, model_uri: str) -> Iterator[tuple[Path, str]]:
    """The checkpoint inside a version, as a local folder for the duration of a `with` block, and its licence.

    None of the version's code runs.

    Args:
        tracking_uri: From `runs.preflight`.
        model_uri: The model.

    Raises:
        TrackingError: As `find_version`; or the version was not made by `pipelines.register`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with tracking_errors(f"cannot fetch the weights of {model_uri} from {tracking_uri}"):
            client = connect(tracking_uri)
            found = named_version(client, model_uri)
            source = client.get_model_version_download_uri(found.name, found.version)
            folder = mlflow.artifacts.download_artifacts(
                f"{source}/{CHECKPOINT}",
                dst_path=scratch,
                tracking_uri=tracking_uri,
                registry_uri=tracking_uri,
            )
        yield Path(folder), found.tags.get("licence", "")


def find_version(tracking_uri: str, model_uri: str, device: str | None = None) -> Version:
    """Finds the version that `models:/name@alias` or `models:/name/version` currently names.

    Args:
        tracking_uri: From `runs.preflight`.
        model_uri: The model.
        device: Where to compute, one of DEVICES; None leaves the choice to the model.

    Raises:
        TrackingError: MLflow fails, or has no such model, alias or version; the message lists what it has.
    """
    with tracking_errors(f"cannot find {model_uri} at {tracking_uri}"):
        client = connect(tracking_uri)
        found = named_version(client, model_uri)
        source = client.get_model_version_download_uri(found.name, found.version)
    if not (found.name and found.version and source):  # any JSON object passes for MLflow's answer
        raise TrackingError(f"{tracking_uri} answers, but not as an MLflow server does. Check tracking_uri.")
    return Version(tracking_uri, f"models:/{found.name}/{found.version}", source, device)
