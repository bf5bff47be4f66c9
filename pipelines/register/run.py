"""Registers a checkpoint: uploads it, proves it, compares it and makes it a version of a registered model."""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import ctmsr
from ctmsr.config import flatten, from_dict
from ctmsr.errors import TrackingError
from ctmsr.image import encode_png
from ctmsr.metrics.scoring import Evaluation
from ctmsr.model import checkpoint
from ctmsr.model.checkpoint import Manifest
from ctmsr.model.device import choose_device
from ctmsr.model.inference import InferenceConfig, upscale

from ..config.run_config import RegisterConfig
from ..infra.package import licence
from ..tracking.evaluations import PictureSet, log_evaluation
from ..tracking.models import FORMAT, MODEL_FORMAT, load_from
from ..tracking.runs import (
    MAX_PARAM_CHARS,
    answered,
    connect,
    ensure_experiment,
    tracked_run,
    tracking_errors,
)
from .model_card import SAMPLE_FILE, lineage, model_card, with_sample
from .promotion import CHAMPION, RISES, Decision, Measured, decision_of, record, settle

MODEL_CODE = Path(__file__).with_name("registered_model.py")
PACKAGE = Path(ctmsr.__file__).parent
REQUIREMENTS = ("mlflow-skinny", "numpy", "pandas", "pillow", "safetensors", "torch")
"""Of the model alone: mlflow.pyfunc needs pandas, but not the server and the databases of mlflow."""
_COMPARED: tuple[str, ...] = ("network", "schedule", "loss")
"""Sections of a config that MLflow shows as params of a model."""
EXAMPLE_SHAPE = (1, 20, 28, 3)  # neither square nor a multiple of the window, so padding is tested too


class Comparison(Protocol):
    """Scores models on the same pictures; `comparison.Comparison` is one implementation."""

    @property
    def uri(self) -> str: ...
    @property
    def set_version(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    def score(self, tracking_uri: str, sources: Sequence[str]) -> list[Evaluation]: ...


@dataclass(frozen=True)
class _Release:
    """A checkpoint on its way into the registry."""

    folder: Path
    """A copy of it without the training state."""
    manifest: Manifest
    num_parameters: int
    example: np.ndarray
    expected: np.ndarray
    """The checkpoint's output for the example."""


def register(
    checkpoint_folder: Path,
    *,
    tracking_uri: str,
    model_name: str,
    run_id: str | None,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    rule: RegisterConfig | None = None,
    comparison: Comparison | None = None,
) -> Decision:
    """Registers a checkpoint's EMA weights as a proven version, and lets the gate decide on its alias.

    The uploaded model is loaded back and must produce the same bytes as the checkpoint; only then is a
    version created. If anything fails before that, or the process is killed, the registry stays as it was.

    Args:
        checkpoint_folder: A local checkpoint; its training state stays behind.
        tracking_uri: From `tracking.preflight`.
        model_name: The registered model, created if it does not exist.
        run_id: The MLflow run that trained it; None creates one, in an experiment named after the model.
        metrics: Scores of the checkpoint, which become the version's tags `metric.<name>`.
        tags: Further tags of the version.
        rule: What it takes to become champion; None for the default.
        comparison: Scores it, bicubic and the champion. Without one nothing is measured, and the version can
            only become the first champion.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrackingError: MLflow fails, or the uploaded model does not reproduce the checkpoint's output.
        UserError: The comparison fails.
    """
    client, rule = connect(tracking_uri), rule or RegisterConfig()
    cannot = f"cannot register {model_name}"
    with tempfile.TemporaryDirectory() as folder, _run_of(tracking_uri, model_name, run_id, tags) as run_id:
        scratch = Path(folder)
        release = _release(checkpoint_folder, scratch / "checkpoint")
        with tracking_errors(cannot):
            logged = _upload(client, model_name, run_id, release, scratch)
        _prove(tracking_uri, logged.artifact_location, release, checkpoint_folder)
        with tracking_errors(cannot):
            _ensure_model(client, model_name)
            measured, evaluation = _compare(client, tracking_uri, model_name, logged, comparison)
            if comparison and evaluation:
                _log_scores(client, run_id, logged, release.manifest, comparison, evaluation)
            card = model_card(
                model_name,
                release.manifest,
                num_parameters=release.num_parameters,
                measured=measured,
                metrics=metrics,
                origin=dict(tags),
                requirements=_requirements(),
                licence=rule.licence,
            )
            _upload_card(client, logged.model_id, card, evaluation, scratch)
            client.finalize_logged_model(logged.model_id, "READY")
            labels = _labels(release.manifest, metrics, tags, rule) | record(rule, measured)
            version = _create_version(client, model_name, logged, run_id, card, labels)
            return decision_of(client, model_name, version)


def _labels(
    manifest: Manifest, metrics: Mapping[str, float], tags: Mapping[str, str], rule: RegisterConfig
) -> dict[str, str]:
    """What a version's tags say of its origin and scores."""
    origin = {f"lineage.{name}": text for name, text in lineage(manifest).items()}
    achieved = {f"metric.{name}": repr(float(value)) for name, value in metrics.items()}
    return {
        **origin,
        **achieved,
        **tags,
        "licence": rule.licence,
        "proven": "true",
        FORMAT: str(MODEL_FORMAT),
    }


def _run_of(
    tracking_uri: str, model_name: str, run_id: str | None, tags: Mapping[str, str]
) -> AbstractContextManager[str]:
    if run_id is not None:
        return nullcontext(run_id)
    experiment_id = ensure_experiment(tracking_uri, model_name)
    return tracked_run(tracking_uri, experiment_id, "register", params={}, tags=tags)


def _release(source: Path, target: Path) -> _Release:
    """Copies a checkpoint without its training state, and runs it on the example."""
    model, manifest = checkpoint.load_model(source, choose_device())
    checkpoint.save(target, model=model.state_dict(), config=manifest.config, meta=manifest.meta)
    sigma_max = manifest.config["schedule"]["sigma_max"]
    inference = from_dict(InferenceConfig, manifest.config.get("inference", {}))
    example = np.random.default_rng(0).integers(0, 256, EXAMPLE_SHAPE, np.uint8)
    expected = [upscale(model, lq_u8, sigma_max=sigma_max, config=inference) for lq_u8 in example]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return _Release(target, manifest, num_parameters, example, np.stack(expected))


def _upload(client: MlflowClient, name: str, run_id: str, release: _Release, scratch: Path) -> LoggedModel:
    """Builds the MLflow model around a checkpoint and uploads it."""
    package = shutil.copytree(PACKAGE, scratch / "ctmsr", ignore=shutil.ignore_patterns("__pycache__"))
    pictures = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    seed = ParamSchema([ParamSpec("seed", DataType.long, 0)])
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, params=_settings(release.manifest)
    )
    mlflow.pyfunc.save_model(
        scratch / "model",
        python_model=MODEL_CODE,
        artifacts={"checkpoint": str(release.folder), "ctmsr": str(package)},
        model_config={"device": ""},  # what is not here cannot be set when the model is loaded
        pip_requirements=_requirements(),
        signature=ModelSignature(outputs=pictures, params=seed),  # no inputs: see registered_model.py
        input_example=(release.example, {"seed": 0}),
        mlflow_model=Model(run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id),
    )
    (scratch / "model" / "LICENSE").write_text(licence(), encoding="utf-8")
    client.log_model_artifacts(logged.model_id, str(scratch / "model"))
    return logged


def _settings(manifest: Manifest) -> dict[str, str]:
    """What models are compared by, in MLflow's list of models."""
    config = {name: manifest.config.get(name, {}) for name in _COMPARED}
    settings = {"step": manifest.meta.get("step", 0), **flatten(config)}
    return {name: str(value)[:MAX_PARAM_CHARS] for name, value in settings.items()}


def _requirements() -> list[str]:
    # a local version such as 2.0+cpu is in no package index
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _prove(tracking_uri: str, source: str, release: _Release, checkpoint_folder: Path) -> None:
    model = load_from(tracking_uri, source, f"the model of {checkpoint_folder}")
    if not np.array_equal(model.predict(release.example, params={"seed": 0}), release.expected):
        raise TrackingError(
            f"the uploaded model does not give the same picture as its checkpoint {checkpoint_folder}, so no "
            "version was created and the champion is unchanged. Register it again."
        )


def _compare(
    client: MlflowClient, tracking_uri: str, name: str, logged: LoggedModel, comparison: Comparison | None
) -> tuple[Measured | None, Evaluation | None]:
    """Scores a model, bicubic, and the champion if there is one."""
    champion = settle(client, name).get(CHAMPION)
    if comparison is None:
        return None, None
    sources = [logged.artifact_location]
    if champion is not None:
        sources.append(client.get_model_version_download_uri(name, str(champion)))
    own, *others = comparison.score(tracking_uri, sources)
    scores, *champion_scores = ({m: one.means[m] for m in RISES} for one in (own, *others))
    measured = Measured(
        comparison.set_version,
        comparison.protocol,
        scores,
        champion,
        champion_scores[0] if champion_scores else {},
        {m: own.means[f"bicubic_{m}"] for m in RISES},
    )
    return measured, own


def _log_scores(
    client: MlflowClient,
    run_id: str,
    logged: LoggedModel,
    manifest: Manifest,
    comparison: Comparison,
    evaluation: Evaluation,
) -> None:
    """Adds the scores to the run, and to the model, by which MLflow's Models tab compares."""
    pictures = PictureSet(comparison.uri, comparison.set_version, "evaluation")
    step = int(manifest.meta.get("step", 0))
    log_evaluation(client, run_id, evaluation, pictures, step=step, prefix="val_", model_id=logged.model_id)


def _upload_card(
    client: MlflowClient, model_id: str, card: str, evaluation: Evaluation | None, scratch: Path
) -> None:
    """Adds README.md, and the sample picture if there is one, to the model's files."""
    if evaluation:
        card = with_sample(card)
        sample = scratch / SAMPLE_FILE
        sample.write_bytes(encode_png(evaluation.grid_u8))
        client.log_model_artifact(model_id, str(sample))
    readme = scratch / "README.md"
    readme.write_text(card, encoding="utf-8")
    client.log_model_artifact(model_id, str(readme))


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(
    client: MlflowClient, name: str, logged: LoggedModel, run_id: str, card: str, tags: dict[str, str]
) -> str:
    """Creates the version with all its tags, in one transaction."""
    source = logged.artifact_location  # models:/<id> would be looked up at MLflow's global address
    made = client.create_model_version(
        name, source=source, run_id=run_id, tags=tags, description=card, model_id=logged.model_id
    )
    # A request repeated after a lost response creates a twin, which the gate refuses, as it gains nothing.
    versions = answered(lambda: client.search_model_versions(f"name='{name}'"))
    twins = [v.version for v in versions if v.source == source]
    return str(min(map(int, [made.version, *twins])))
