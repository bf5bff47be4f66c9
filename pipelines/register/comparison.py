"""Scores of registered models and of bicubic on one pinned set of pictures: what a promotion compares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from ctmsr.errors import UserError
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import Evaluation, score
from ctmsr.model.device import choose_device

from ..config.run_config import RunConfig
from ..data.held_out import HeldOut, find_held_out, of_val
from ..infra.cluster import check_gpus
from ..infra.exit_status import root_cause
from ..tracking.models import load_from


@dataclass(frozen=True)
class Comparison:
    """The pictures of data.val_uri, cropped and degraded alike for every model.

    The degradation comes from `config`, not from a model's training, so that all see the same LR pictures.
    """

    config: RunConfig
    held_out: HeldOut

    @property
    def uri(self) -> str:
        """Of the pictures."""
        return self.held_out.data.test_uri

    @property
    def set_version(self) -> str:
        """Hash of the pictures, and of how they are cropped and degraded."""
        return self.held_out.version(self.config)

    @property
    def protocol(self) -> str:
        """What the scores mean, in one line."""
        return self.held_out.protocol

    def score(self, tracking_uri: str, sources: Sequence[str]) -> list[Evaluation]:
        """Scores each model, running its own code in a Ray task, and bicubic along with it.

        Args:
            tracking_uri: From `tracking.runs.preflight`.
            sources: URIs of the models' files.

        Raises:
            UserError: A model does not load or has another scale, or a picture cannot be read.
        """
        train = self.config.train
        task = _score_remotely.options(num_cpus=train.cpus_per_worker, num_gpus=int(train.use_gpu))
        try:
            return ray.get([task.remote(self, tracking_uri, source) for source in sources])
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the comparison with bicubic and the champion failed. {root_cause(error)}"
            ) from error


def find_comparison(config: RunConfig) -> Comparison:
    """Lists and checks the pictures of data.val_uri, before anything expensive starts.

    Raises:
        UserError: There are no pictures, one cannot be read, or a GPU is required and there is none.
    """
    check_gpus(1, use_gpu=config.train.use_gpu)
    return Comparison(config, find_held_out(of_val(config.data)))


@ray.remote
def _score_remotely(comparison: Comparison, tracking_uri: str, source: str) -> Evaluation:
    model = load_from(tracking_uri, source)
    return score(
        lambda lq_u8: np.asarray(model.predict(lq_u8[None]))[0],
        comparison.held_out.rows(comparison.config),
        scale=comparison.config.network.scale,
        lpips=load_lpips("alex").to(choose_device()),
        crop_border=comparison.config.data.eval_crop_border,
    )
