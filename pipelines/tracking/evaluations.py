"""Scores in MLflow: of which model, on which pictures, and how the pictures look.

MLflow compares models, runs and trials by metric and data set. So a score names both, and sets of pictures
are MLflow data sets whose digest is the version that this project gives them.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ctmsr.metrics.scoring import Evaluation

from .runs import connect, first_line

logger = logging.getLogger(__name__)
_MAX_NAME_CHARS = 500


@dataclass(frozen=True)
class PictureSet:
    """A set of pictures as a data set in MLflow."""

    uri: str
    """Of the folder or index."""
    version: str
    """Hash of the set, at most 36 characters: the digest in MLflow."""
    context: str
    """What it is for: training, validation or evaluation."""

    @property
    def name(self) -> str:
        """Shown in MLflow: the end of its URI."""
        return "/".join(self.uri.rstrip("/").split("/")[-2:])[:_MAX_NAME_CHARS]

    def as_input(self) -> DatasetInput:
        """What MLflow stores of it."""
        kind = self.uri.partition("://")[0] if "://" in self.uri else "local"
        dataset = Dataset(self.name, self.version, source_type=kind, source=json.dumps({"uri": self.uri}))
        return DatasetInput(dataset, [InputTag("mlflow.data.context", self.context)])


def log_sets(tracking_uri: str, run_id: str, sets: Sequence[PictureSet]) -> None:
    """Records that a run uses sets of pictures; if MLflow fails, only logs a warning."""
    try:
        _log_inputs(connect(tracking_uri), run_id, sets)
    except (MlflowException, SQLAlchemyError) as error:
        logger.warning("MLflow did not accept the data sets of run %s: %s", run_id, first_line(error))


def log_evaluation(
    client: MlflowClient,
    run_id: str,
    evaluation: Evaluation,
    pictures: PictureSet,
    *,
    step: int,
    prefix: str,
    model_id: str | None = None,
) -> None:
    """Logs the means as metrics of a run and of a model, and a table with every picture.

    Args:
        client: From `connect`.
        run_id: The run.
        evaluation: The scores.
        pictures: What they were measured on.
        step: Optimizer updates of the model.
        prefix: Of the metrics' names, such as "test_".
        model_id: The model in MLflow that was scored, if there is one.

    Raises:
        MlflowException: MLflow fails, as may SQLAlchemyError and OSError say.
    """
    _log_inputs(client, run_id, [pictures])
    now = int(time.time() * 1000)
    means = [
        Metric(
            f"{prefix}{name}",
            value,
            now,
            step,
            model_id=model_id,
            dataset_name=pictures.name,
            dataset_digest=pictures.version,
        )
        for name, value in evaluation.means.items()
    ]
    client.log_batch(run_id, means)
    file = f"evaluation/{pictures.version}-{step}.json"
    files = {found.path for found in client.list_artifacts(run_id, "evaluation")}
    if evaluation.samples_u8 and file not in files:  # it would grow
        client.log_table(run_id, _table(evaluation), file)


def _log_inputs(client: MlflowClient, run_id: str, sets: Sequence[PictureSet]) -> None:
    inputs = [one.as_input() for one in sets]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        client.log_inputs(run_id, inputs)  # another process has just made the same set: now it is there


def _table(evaluation: Evaluation) -> pd.DataFrame:
    """A row per picture that there is a sample of: LR | bicubic | ours | HR, and the scores."""
    rows = [
        {"picture": row["key"], "LR | bicubic | ours | HR": mlflow.Image(sample_u8)}
        | {name: value for name, value in row.items() if name != "key"}
        for row, sample_u8 in zip(evaluation.rows, evaluation.samples_u8, strict=False)  # the first few
    ]
    return pd.DataFrame(rows)
