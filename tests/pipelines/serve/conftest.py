"""A registered toy, and replicas that serve it in this process."""

import pytest

from ctmsr.model.network import ConsistencyModel
from pipelines.serve.front import Front
from pipelines.serve.upscaler import Upscaler
from tests.support import serving
from tests.support.registering import register_model, tiny_model


@pytest.fixture(scope="package")
def model() -> ConsistencyModel:
    return tiny_model()


@pytest.fixture(scope="package")
def registry(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a registry whose models:/toy/1 is `model`, and its champion."""
    return register_model(model, tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="package")
def upscaler(registry: str) -> Upscaler:
    return serving.upscaler(registry, "models:/toy/1")


@pytest.fixture(scope="package")
def server(upscaler: Upscaler) -> Front:
    """What answers requests."""
    return serving.front(upscaler)
