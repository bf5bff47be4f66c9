"""The losses of one batch at one step, with gradient: what an update minimises.

Every random number is a function of the run seed and the global step or sample index, never of the number of
workers: n workers on n parts of a batch compute what one worker computes on the whole of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..image.ranges import to_tensor, upsample
from ..metrics.perceptual import Lpips
from ..model.device import upload
from ..model.noise import NoiseVersion, normal
from ..model.schedule import ScheduleConfig, curriculum_steps, trajectory_levels
from ..model.trajectory import trajectory_point
from ..rng import sample_seed
from .losses import (
    Distance,
    LossConfig,
    Network,
    alignment_loss,
    consistency_loss,
    dtm_loss,
    dtm_range,
)
from .resized_crop import cropped
from .state import OptimConfig, TrainState


@dataclass
class Batch:
    """One worker's images for one step, on the device."""

    hr_u8: Tensor
    """uint8 (N, H, W, 3)."""
    lq_u8: Tensor
    """uint8 (N, H/scale, W/scale, 3)."""
    samples: list[int]
    """Global sample indices, which seed the noise."""
    keys: list[str]
    """Image keys, for messages."""
    share: float = 1.0
    """Weight of these images' mean loss that makes the mean over all workers equal the mean over the global
    batch: 1 if all workers have equally many images, less for a worker with fewer."""

    def parts(self, size: int) -> "list[Batch]":
        """Consecutive parts of at most `size` images, each with this batch's `share`."""
        return [
            Batch(
                hr_u8=self.hr_u8[first : first + size],
                lq_u8=self.lq_u8[first : first + size],
                samples=self.samples[first : first + size],
                keys=self.keys[first : first + size],
                share=self.share,
            )
            for first in range(0, len(self.samples), size)
        ]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that a run's result depends on, besides its network and its data."""

    seed: int
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig
    noise_version: NoiseVersion = 2
    """Version of the generator in `noise`; a run keeps the version it began with."""


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a batch's images, from x_0 = hr at t = 0 to the noisy y_0 = lq_up at t = N."""

    hr: Tensor
    """(N, 3, H, W) in [-1, 1], like `lq_up`."""
    lq: Tensor
    """(N, 3, H/scale, W/scale)."""
    lq_up: Tensor
    alphas: Tensor
    """Residual weights at t = 0 ... N, on the CPU, like `sigmas`."""
    sigmas: Tensor

    def levels(self, t: list[int]) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of every image at its own t, each (N,), on the images' device."""
        return upload(self.alphas[t], self.hr.device), upload(self.sigmas[t], self.hr.device)

    def point(self, noise: Tensor, t: list[int]) -> Tensor:
        """x_t of every image at its own t."""
        return trajectory_point(self.hr, self.lq_up, noise, *self.levels(t))


def compute_losses(state: TrainState, batch: Batch, recipe: Recipe, lpips: Distance) -> dict[str, Tensor]:
    """The losses of one batch at the state's step, with gradient.

    Returns:
        Scalars `lpips`, `charbonnier` and `ct_loss`; `alignment_loss` if its weight is not 0 and the
        trajectory has an inner point; `dtm_loss` in the second phase; and `loss`, the sum of the three
        objectives, which is minimised.

    Raises:
        ConfigError: loss.lpips_crop or DTM's range is too small for these images or this trajectory.
    """
    step, config = state.global_step, recipe.loss
    hr, lq = to_tensor(batch.hr_u8), to_tensor(batch.lq_u8)
    num_steps = curriculum_steps(recipe.schedule, step, recipe.optim.total_steps)
    paths = Trajectories(
        hr, lq, upsample(lq, state.model.config.scale), *trajectory_levels(recipe.schedule, num_steps)
    )
    pred, target = _pair(state, batch, recipe, paths)
    crops = cropped(lpips, config, seed=recipe.seed, samples=batch.samples, hr_size=hr.shape[-1])
    # DTM compares the same prediction again: without crops, its features are computed only once.
    of_pred = crops.anchored(pred) if isinstance(crops, Lpips) and state.dtm_model is not None else crops

    losses = consistency_loss(pred, target, of_pred, config)
    loss = losses["ct_loss"]
    if config.alignment_weight and num_steps > 1:
        losses["alignment_loss"] = _alignment(pred, batch, recipe, step, paths, crops)
        loss = loss + losses["alignment_loss"]
    if state.dtm_model is not None:
        losses["dtm_loss"] = _dtm(pred, batch, recipe, paths, state.dtm_model, of_pred)
        loss = loss + losses["dtm_loss"]
    return losses | {"loss": loss}


def _pair(state: TrainState, batch: Batch, recipe: Recipe, paths: Trajectories) -> tuple[Tensor, Tensor]:
    """CT's (prediction, target): f at x_{n+1}, with gradient, and f at x_n or the HR images, without."""
    step, config, num_steps = state.global_step, recipe.loss, len(paths.sigmas) - 1
    n = _drawn(recipe, "n", step, batch, num_steps)
    if config.steps == "last":
        n = [num_steps - 1] * len(n)
    following = [t + 1 for t in n]
    noise = sample_noise(batch, recipe.seed, "ct", recipe.noise_version)
    # The target draws the same dropout mask as the prediction (Song & Dhariwal 2023, arXiv:2310.14189);
    # the published run drew two. The first sample seeds it, so that no two workers share a mask.
    mask_seed = sample_seed(recipe.seed, "dropout", step, batch.samples[0])
    if step < config.hr_target_until * recipe.optim.total_steps or not any(n):
        target = paths.hr  # f(x, 0, y) = x, for the images with n = 0 in a mixed batch too
    else:
        with torch.no_grad():
            torch.manual_seed(mask_seed)
            target = state.network(paths.point(noise, n), paths.levels(n)[1], paths.lq)
    torch.manual_seed(mask_seed)
    pred = state.parallel(paths.point(noise, following), paths.levels(following)[1], paths.lq)
    return pred, target


def _drawn(recipe: Recipe, purpose: str, step: int, batch: Batch, num: int) -> list[int]:
    """A number in [0, num) for every image: the same for the whole global batch, or one per image."""
    if recipe.loss.step_per_image:
        return [sample_seed(recipe.seed, purpose, k) % num for k in batch.samples]
    return [sample_seed(recipe.seed, purpose, step) % num] * len(batch.samples)


def _alignment(
    pred: Tensor, batch: Batch, recipe: Recipe, step: int, paths: Trajectories, lpips: Distance
) -> Tensor:
    num_steps = len(paths.sigmas) - 1
    t = [1 + drawn for drawn in _drawn(recipe, "t", step, batch, num_steps - 1)]
    alpha, sigma = paths.levels(t)
    return alignment_loss(
        pred,
        paths.hr,
        paths.lq_up,
        sample_noise(batch, recipe.seed, "alignment", recipe.noise_version),
        alpha=alpha,
        sigma=sigma,
        num_steps=num_steps,
        lpips=lpips,
        config=recipe.loss,
    )


def _dtm(
    pred: Tensor, batch: Batch, recipe: Recipe, paths: Trajectories, dtm_model: Network, lpips: Distance
) -> Tensor:
    low, high = dtm_range(recipe.loss, len(paths.sigmas) - 1)
    alpha, sigma = paths.levels(
        [low + sample_seed(recipe.seed, "m", k) % (high - low) for k in batch.samples]
    )
    return dtm_loss(
        pred,
        paths.hr,
        paths.lq,
        paths.lq_up,
        sample_noise(batch, recipe.seed, "dtm", recipe.noise_version),
        alpha=alpha,
        sigma=sigma,
        dtm_model=dtm_model,
        lpips=lpips,
        config=recipe.loss,
    )


def sample_noise(batch: Batch, seed: int, purpose: str, version: NoiseVersion = 2) -> Tensor:
    """Standard normal noise of the HR batch's shape, NCHW: a function of (seed, sample index, purpose)."""
    _, height, width, _ = batch.hr_u8.shape
    seeds = [sample_seed(seed, purpose, k) for k in batch.samples]
    return normal(seeds, (3, height, width), batch.hr_u8.device, version)
