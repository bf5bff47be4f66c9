"""Fixtures for several rooms: photographs in a bucket, and a finished run on them."""

import pytest

from tests.conftest import S3
from tests.support.registering import write_checkpoint
from tests.support.runs import Trained, run_config, run_to_end


@pytest.fixture(scope="session")
def bucket(s3: S3, photos: dict[str, bytes]) -> str:
    """A bucket with the photographs under photos/ and runs under runs/."""
    return s3.make_bucket("training", {f"photos/{name}": data for name, data in photos.items()})


@pytest.fixture(scope="session")
def trained(ray_session: None, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The finished run `first`, read-only, in bf16 like runs on GPUs; its MLflow database takes more runs."""
    config = run_config(bucket, tmp_path_factory.mktemp("training"), "train.precision=bf16")
    return Trained(config, run_to_end(config))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random network, for commands that take a checkpoint."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", seed=0))
