"""A checkpoint as a version of a registered MLflow model: `python -m pipelines.register --help`.

The alias `champion` moves to the version once it has been loaded back and has proven equal to its checkpoint.
"""

import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PyFuncModel
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from ctmsr import checkpoint
from ctmsr.config import from_dict
from ctmsr.errors import TrackingError
from ctmsr.inference import InferenceConfig, upscale

from .checkpoints import fetched, find
from .cli import config_parser, print_config, resolve
from .command import run
from .tracking import connect, ensure_experiment, preflight, tracked_run, tracking_errors

EXAMPLES = """\
  the newest checkpoint of a run:
    python -m pipelines.register --set name=first
  any checkpoint, in a team's registry:
    python -m pipelines.register --checkpoint s3://bucket/runs/first/checkpoint_... --tracking-uri http://mlflow:5000"""

CHAMPION = "champion"
MODEL_CODE = Path(__file__).with_name("registered_model.py")
PACKAGE = Path(checkpoint.__file__).parent
REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "torch")
EXAMPLE_SHAPE = (1, 20, 28, 3)  # not square and no multiple of a window: it takes the padding too


def register(
    checkpoint_folder: Path,
    *,
    tracking_uri: str,
    model_name: str,
    run_id: str | None,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> str:
    """Registers a checkpoint's EMA weights, proves the registered version, and makes it the champion.

    The version is loaded back from the registry and must give the same bytes as the checkpoint. If anything
    fails before that, the alias stays where it was.

    Args:
        checkpoint_folder: A local checkpoint; its training state stays behind.
        tracking_uri: From `tracking.preflight`.
        model_name: The registered model, made if there is none.
        run_id: The MLflow run that trained it; None makes one, in an experiment named after the model.
        metrics: What the checkpoint achieved; they become tags `metric.<name>` of the version.
        tags: Further tags of the version.

    Returns:
        The new version.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrackingError: MLflow fails, or the registered version does not behave as the checkpoint does.
    """
    if run_id is None:
        experiment_id = ensure_experiment(tracking_uri, model_name)
        with tracked_run(tracking_uri, experiment_id, "register", params={}, tags=tags) as new_run_id:
            return register(
                checkpoint_folder,
                tracking_uri=tracking_uri,
                model_name=model_name,
                run_id=new_run_id,
                metrics=metrics,
                tags=tags,
            )
    client = connect(tracking_uri)
    example = np.random.default_rng(0).integers(0, 256, EXAMPLE_SHAPE, np.uint8)
    with tempfile.TemporaryDirectory() as scratch, tracking_errors(f"cannot register {model_name}"):
        expected = _release(checkpoint_folder, Path(scratch, "checkpoint"), example)
        logged = _log_model(client, model_name, run_id, Path(scratch), example)
        version = _create_version(client, model_name, logged, run_id, metrics, tags)
    model = load_model(tracking_uri, f"models:/{model_name}/{version}")
    if not np.array_equal(model.predict(example, params={"seed": 0}), expected):
        raise TrackingError(
            f"{model_name} version {version} does not give the same picture as its checkpoint "
            f"{checkpoint_folder}. The champion stays as it was; delete the version and register again."
        )
    with tracking_errors(f"cannot promote {model_name} version {version}"):
        client.set_model_version_tag(model_name, version, "proven", "true")
        client.set_registered_model_alias(model_name, CHAMPION, version)
    return version


def load_model(tracking_uri: str, model_uri: str) -> PyFuncModel:
    """A registered model: `predict(uint8 NHWC, params={"seed": 0})` gives uint8 NHWC.

    Loading runs the Python code that was registered with the model.

    Args:
        tracking_uri: From `tracking.preflight`.
        model_uri: `models:/name@alias` or `models:/name/version`.

    Raises:
        TrackingError: MLflow fails, or has no such model, alias or version; those it has are listed.
    """
    client = connect(tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        with tracking_errors(f"cannot fetch {model_uri} from {tracking_uri}"):
            version = _find(client, model_uri)
            source = client.get_model_version_download_uri(version.name, version.version)
            folder = mlflow.artifacts.download_artifacts(
                source, dst_path=scratch, tracking_uri=tracking_uri, registry_uri=tracking_uri
            )
        try:
            model: PyFuncModel = mlflow.pyfunc.load_model(folder, suppress_warnings=True)
        except Exception as error:  # the model's own code runs here: it can raise anything
            raise TrackingError(
                f"{model_uri} was fetched from {tracking_uri} but does not load "
                f"({type(error).__name__}: {error}). Install its requirements.txt, or register it again."
            ) from error
    return model


def _find(client: MlflowClient, model_uri: str) -> ModelVersion:
    named = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if not named:
        raise TrackingError(
            f"a model is named models:/name@alias or models:/name/version, got {model_uri!r}."
        )
    name, alias, version = named.groups()
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)
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
        raise TrackingError(f"{model_uri} is not in the registry at {where}. There are {known}.") from error


def _release(source: Path, target: Path, example: np.ndarray) -> np.ndarray:
    """Copies a checkpoint without its training state; returns what it makes of the example."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, manifest = checkpoint.load_model(source, device)
    checkpoint.save(target, model=model.state_dict(), config=manifest.config, meta=manifest.meta)
    sigma_max = manifest.config["schedule"]["sigma_max"]
    inference = from_dict(InferenceConfig, manifest.config.get("inference", {}))
    return np.stack([upscale(model, lq_u8, sigma_max=sigma_max, config=inference) for lq_u8 in example])


def _log_model(
    client: MlflowClient, name: str, run_id: str, scratch: Path, example: np.ndarray
) -> LoggedModel:
    """Builds the MLflow model around `scratch/checkpoint` and uploads it."""
    package = shutil.copytree(PACKAGE, scratch / "ctmsr", ignore=shutil.ignore_patterns("__pycache__"))
    pictures = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    seed = ParamSchema([ParamSpec("seed", DataType.long, 0)])
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id)
    mlflow.pyfunc.save_model(
        scratch / "model",
        python_model=MODEL_CODE,
        artifacts={"checkpoint": str(scratch / "checkpoint"), "ctmsr": str(package)},
        # a local version such as 2.0+cpu is in no package index
        pip_requirements=[f"{p}=={importlib.metadata.version(p).partition('+')[0]}" for p in REQUIREMENTS],
        signature=ModelSignature(inputs=pictures, outputs=pictures, params=seed),
        input_example=(example, {"seed": 0}),
        mlflow_model=Model(run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id),
    )
    client.log_model_artifacts(logged.model_id, str(scratch / "model"))
    return client.finalize_logged_model(logged.model_id, "READY")


def _create_version(
    client: MlflowClient,
    name: str,
    logged: LoggedModel,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> str:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    measured = {f"metric.{key}": repr(float(value)) for key, value in metrics.items()}
    version = client.create_model_version(
        name,
        source=logged.artifact_location,  # models:/<id> would be looked up at MLflow's global address
        run_id=run_id,
        tags={**tags, **measured},
        model_id=logged.model_id,
    )
    return str(version.version)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("register", __doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", metavar="URI", help="default: the newest of the run")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    tracking_uri = preflight(config.tracking_uri)
    checkpoint_uri = arguments.checkpoint or find(config.run_uri).uri
    with fetched(checkpoint_uri) as folder:
        metrics = checkpoint.read_manifest(folder).meta.get("metrics", {})  # a converted one has none
        version = register(
            folder,
            tracking_uri=tracking_uri,
            model_name=config.model_name,
            run_id=None,
            metrics={f"val_{name}": value for name, value in metrics.items()},
            tags={"checkpoint": checkpoint_uri},
        )
    print(f"models:/{config.model_name}@{CHAMPION} is version {version}, from {checkpoint_uri}")
    print(f"next: python -m pipelines.upscale PHOTO --output upscaled --tracking-uri {config.tracking_uri}")
    return 0


if __name__ == "__main__":
    run(main)
