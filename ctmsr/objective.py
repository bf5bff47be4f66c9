"""The losses of one batch at one step, with gradient: what the optimizer update minimises.

Every random number is a function of the run seed and the global step or sample index, never of the number of
workers: n workers on n parts of a batch compute what one worker computes on the whole of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .image import to_tensor, upsample
from .losses import Distance, LossConfig, consistency_loss, dtm_loss, dtm_range
from .perceptual import Lpips
from .rng import sample_seed
from .schedule import ScheduleConfig, curriculum_steps, trajectory_levels
from .train_state import OptimConfig, TrainState
from .trajectory import trajectory_point


@dataclass
class Batch:
    """What one worker consumes in one step, as it comes from the data stream, already on the device."""

    hr_u8: Tensor
    """uint8 (N, H, W, 3)."""
    lq_u8: Tensor
    """uint8 (N, H/scale, W/scale, 3)."""
    samples: list[int]
    """Global sample indices: they seed the noise."""
    keys: list[str]
    """Image keys, for messages."""
    share: float = 1.0
    """Weight of these images' mean loss, such that the mean over all workers is that over the global batch:
    1 where all workers have equally many, less for one that lacks some."""

    def parts(self, size: int) -> "list[Batch]":
        """Consecutive parts of at most `size` images, with the `share` of the whole."""
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
    """What a training run's result depends on, besides its network and its data."""

    seed: int
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig


def compute_losses(state: TrainState, batch: Batch, recipe: Recipe, lpips: Distance) -> dict[str, Tensor]:
    """The losses of one batch at the state's step, with gradient; `loss` is what the phase minimises."""
    step, total = state.global_step, recipe.optim.total_steps
    hr, lq = to_tensor(batch.hr_u8), to_tensor(batch.lq_u8)
    lq_up = upsample(lq, state.model.config.scale)
    num_steps = curriculum_steps(recipe.schedule, step, total)
    alphas, sigmas = (levels.to(hr.device) for levels in trajectory_levels(recipe.schedule, num_steps))
    n = sample_seed(recipe.seed, "n", step) % num_steps  # one for the whole global batch

    noise = sample_noise(batch, recipe.seed, "ct")
    x_n = trajectory_point(hr, lq_up, noise, alphas[n], sigmas[n])
    x_next = trajectory_point(hr, lq_up, noise, alphas[n + 1], sigmas[n + 1])
    # The target draws the same dropout mask as the prediction (Song & Dhariwal 2023, arXiv:2310.14189);
    # the published run drew two. The first sample sets it, so that no two workers share a mask.
    mask_seed = sample_seed(recipe.seed, "dropout", step, batch.samples[0])
    with torch.no_grad():
        torch.manual_seed(mask_seed)
        target = hr if n == 0 else state.model(x_n, sigmas[n], lq)  # f(x, 0, y) = x
    torch.manual_seed(mask_seed)
    pred = state.parallel(x_next, sigmas[n + 1], lq)
    if state.dtm_model is not None and isinstance(lpips, Lpips):
        lpips = lpips.anchored(pred)  # DTM compares the same prediction again
    losses = consistency_loss(pred, target, lpips, recipe.loss)
    losses["loss"] = losses["ct_loss"]

    if state.dtm_model is not None:
        low, high = dtm_range(recipe.loss, num_steps)
        m = torch.tensor([low + sample_seed(recipe.seed, "m", k) % (high - low) for k in batch.samples])
        losses["dtm_loss"] = dtm_loss(
            pred,
            hr,
            lq,
            lq_up,
            sample_noise(batch, recipe.seed, "dtm"),
            alpha=alphas[m.to(hr.device)],
            sigma=sigmas[m.to(hr.device)],
            dtm_model=state.dtm_model,
            lpips=lpips,
            config=recipe.loss,
        )
        losses["loss"] = losses["ct_loss"] + losses["dtm_loss"]
    return losses


def sample_noise(batch: Batch, seed: int, purpose: str) -> Tensor:
    """Standard normal noise of the HR batch's shape, NCHW: a function of (seed, sample index, purpose)."""
    n, height, width, _ = batch.hr_u8.shape
    noise = torch.empty(n, 3, height, width, device=batch.hr_u8.device)
    generator = torch.Generator(batch.hr_u8.device)
    for row, k in zip(noise, batch.samples, strict=True):
        row.normal_(generator=generator.manual_seed(sample_seed(seed, purpose, k)))
    return noise
