"""What is used of Ray's internals is there, and a release without it only costs a warning."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.infra import ray_internals
from pipelines.infra.ray_internals import LoopThrottle, keep_secrets_out_of_trials, train_helpers_find_cluster

TRAIN = "ray.train.v2._internal.constants"
TUNE = "ray.tune.execution.class_cache"


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """As in a new process: no warning was given yet."""
    ray_internals.private.cache_clear()
    yield
    ray_internals.private.cache_clear()


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if connected to a cluster."""
    context = SimpleNamespace(gcs_address="127.0.0.2:6379")
    known = SimpleNamespace(get_runtime_context=lambda: context, __version__=ray.__version__)
    monkeypatch.setattr(ray_internals, "ray", known)


def test_this_release_has_what_is_used(address: None, caplog: pytest.LogCaptureFixture) -> None:
    train, tune = importlib.import_module(TRAIN), importlib.import_module(TUNE)
    tune.ENV_VARS_TO_PROPAGATE.add("AWS_SECRET_ACCESS_KEY")
    keep_secrets_out_of_trials()
    assert "AWS_SECRET_ACCESS_KEY" not in tune.ENV_VARS_TO_PROPAGATE
    with train_helpers_find_cluster():
        assert "RAY_ADDRESS" in train.ENV_VARS_TO_PROPAGATE
        assert os.environ["RAY_ADDRESS"] == "127.0.0.2:6379"
    assert caplog.messages == []


@pytest.mark.parametrize("how", ["the name", "the module"])
def test_a_release_without_it_costs_one_warning(
    how: str, address: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (TRAIN, TUNE):
        if how == "the name":
            monkeypatch.delattr(importlib.import_module(module), "ENV_VARS_TO_PROPAGATE")
        else:
            monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            keep_secrets_out_of_trials()
            with train_helpers_find_cluster():
                pass
    assert len(caplog.messages) == 2
    assert "AWS credentials in this environment may get into the logs of a search" in caplog.messages[0]
    assert "a stopped trial may keep its resources" in caplog.messages[1]


def test_ray_data_can_call_every_method_of_the_throttle() -> None:
    methods = [name for name in vars(ExecutionCallback) if not name.startswith("_")]
    assert "on_execution_step" in methods
    for name in [*methods, "after_something_new"]:
        assert getattr(LoopThrottle(), name)("executor") is None


def test_the_commands_start_without_any_internal_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ray.data._internal.execution.execution_callback", TRAIN, TUNE):
        monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.find_spec(ray_internals.__name__)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
