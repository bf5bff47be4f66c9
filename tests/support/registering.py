"""Small checkpoints that state their own scores, and processes that register them."""

import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from ctmsr.config import to_dict
from ctmsr.metrics.scoring import Evaluation
from ctmsr.model import checkpoint
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from pipelines.register.promotion import Decision
from pipelines.register.run import register
from pipelines.tracking.runs import preflight
from tests.support.repository import ROOT

TINY = NetworkConfig(
    lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)
PICTURES = np.random.default_rng(1).integers(0, 256, (2, 11, 19, 3), np.uint8)
SIGMA_MAX = 0.9
WRITES = (
    "create_logged_model",
    "log_model_artifacts",
    "create_registered_model",
    "log_inputs",
    "log_batch",
    "log_model_artifact",
    "finalize_logged_model",
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
)
"""The calls of the client by which a registration changes the registry."""


def write_checkpoint(folder: Path, seed: int, *, lpips: float = 0.4, psnr_y: float = 25.0) -> Path:
    """Saves a random network as a checkpoint that claims these scores."""
    torch.manual_seed(seed)
    checkpoint.save(
        folder,
        model=ConsistencyModel(TINY).state_dict(),
        config={
            "network": to_dict(TINY),
            "schedule": {"sigma_max": SIGMA_MAX},
            "inference": {"noise_version": 2},
            "data": {"train_uri": "s3://photos.index"},
        },
        meta={
            "step": 3,
            "train_version": "0123456789abcdef",
            "commit": "c0ffee",
            "metrics": {"lpips": lpips, "psnr_y": psnr_y, "ssim_y": 0.7},
        },
        train_state={"optimizer": torch.zeros(5)},
    )
    return folder


def tiny_model() -> ConsistencyModel:
    """A random network, always the same, in eval mode."""
    torch.manual_seed(0)
    return ConsistencyModel(TINY).eval()


def register_model(model: ConsistencyModel, folder: Path, *, sigma_max: float = SIGMA_MAX) -> str:
    """Registers it as toy, first version and champion, in a new registry, whose address this returns."""
    config = {
        "network": to_dict(TINY),
        "schedule": {"sigma_max": sigma_max},
        "inference": {"noise_version": 2},
    }
    checkpoint.save(folder / "checkpoint", model=model.state_dict(), config=config, meta={})
    uri = preflight(f"sqlite:///{folder}/mlflow.db")
    register(folder / "checkpoint", tracking_uri=uri, model_name="toy", run_id=None, metrics={}, tags={})
    return uri


def by_checkpoint(folder: Path, seed: int = 0) -> np.ndarray:
    """PICTURES as upscaled by the trainer's checkpoint."""
    model, _ = checkpoint.load_model(folder)
    return np.stack([upscale(model, lq_u8, sigma_max=SIGMA_MAX, seed=seed) for lq_u8 in PICTURES])


@dataclass(frozen=True)
class StatedComparison:
    """Takes the scores of a registered model from its checkpoint: an instant gate, without Ray.

    Bicubic has an LPIPS of 0.95 and a PSNR-Y of 24 dB.
    """

    set_version: str = "a"
    uri: str = "s3://bucket/val"
    protocol: str = "as stated"

    def score(self, tracking_uri: str, sources: Sequence[str]) -> list[Evaluation]:
        return [Evaluation([_stated(tracking_uri, source)], PICTURES[0]) for source in sources]


def _stated(tracking_uri: str, source: str) -> dict[str, Any]:
    uri = f"{source}/artifacts/checkpoint/{checkpoint.MANIFEST_FILE}"
    file = mlflow.artifacts.download_artifacts(uri, tracking_uri=tracking_uri, registry_uri=tracking_uri)
    scores: dict[str, float] = json.loads(Path(file).read_text())["meta"]["metrics"]
    return {"key": "stated", **scores, "bicubic_lpips": 0.95, "bicubic_psnr_y": 24.0, "bicubic_ssim_y": 0.6}


def register_stated(tracking_uri: str, folder: Path, name: str = "toy", set_version: str = "a") -> Decision:
    """Registers a checkpoint of `write_checkpoint`, named by the tag "checkpoint"."""
    return register(
        folder,
        tracking_uri=tracking_uri,
        model_name=name,
        run_id=None,
        metrics={},
        tags={"checkpoint": str(folder)},
        comparison=StatedComparison(set_version),
    )


def warm_processes() -> Any:
    """A multiprocessing context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def register_and_die(tracking_uri: str, folder: Path, num_writes: int) -> None:
    """Like `register_stated`, but kills its own process before write number `num_writes`, from 0."""
    left = num_writes

    def counted(method: Any) -> Any:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return method(*arguments, **named)

        return call

    for name in WRITES:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    register_stated(tracking_uri, folder)
