"""One optimizer update, from a batch and a TrainState: consistency training, and DTM in the second phase.

Every random number of a step is a function of the run seed and the global step or sample index, never of the
number of workers: n workers on n parts of a batch compute what one worker computes on the whole of it.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .device import upload
from .image import to_tensor, upsample
from .losses import Distance, LossConfig, consistency_loss, dtm_loss, dtm_range
from .noise import NoiseVersion, normal
from .perceptual import Lpips
from .rng import sample_seed
from .schedule import ScheduleConfig, curriculum_steps, trajectory_levels
from .train_state import OptimConfig, StepRecord, TrainState
from .trajectory import trajectory_point

_STEPS_UNCHECKED = 16
"""On a GPU, steps between two checks that gradients were finite."""


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
    noise_version: NoiseVersion = 2
    """Of the generator in `noise`; a run that began with another goes on with it."""


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, lpips: Distance, micro_batch_size: int | None = None
) -> dict[str, Tensor]:
    """One update of `state` in place: forward, backward, finite check, AdamW, EMA.

    Args:
        state: What is trained; its `global_step` rises by one.
        batch: This worker's part of the global batch.
        recipe: The run's constants.
        lpips: LPIPS-vgg.
        micro_batch_size: Images of one forward and backward pass; the gradients of several are added up
            before the update. None takes the batch at once.

    Returns:
        Means over this worker's images, scalars without gradient: `loss`, `ct_loss`, `lpips`, `charbonnier`,
        `grad_norm`; then `dtm_loss`.

    Raises:
        FloatingPointError: As `check_finite`: at once on a CPU, up to 16 steps late on a GPU.
    """
    step, optim = state.global_step, recipe.optim
    if not state.parallel.training:
        state.parallel.train()
    state.drop_gradients()
    for group in state.optimizer.param_groups:
        group["lr"] = optim.lr * (0.5 if step >= optim.lr_halve_at else 1.0)
    if step >= optim.ct_steps and (step - optim.ct_steps) % optim.dtm_refresh_steps == 0:
        state.refresh_dtm_model()

    losses = _backward(state, batch.parts(micro_batch_size or len(batch.samples)), recipe, lpips)
    grad_norm = nn.utils.get_total_norm(state.gradients)
    losses |= {"grad_norm": grad_norm}
    state.unchecked.append(StepRecord(step, batch.samples, batch.keys, losses))
    if grad_norm.device.type == "cpu" or len(state.unchecked) >= _STEPS_UNCHECKED:
        check_finite(state)
    else:
        # A check would make the host wait for the device. Fused AdamW reads this there, and where it is 1
        # leaves the weights alone: from the first bad gradient on, until `check_finite` raises.
        norms = torch.stack([record.losses["grad_norm"] for record in state.unchecked])
        state.optimizer.found_inf = (~torch.isfinite(norms)).any().float()  # type: ignore[attr-defined]
    state.update()
    return losses


def _backward(state: TrainState, parts: list[Batch], recipe: Recipe, lpips: Distance) -> dict[str, Tensor]:
    """Adds the gradients of a batch's parts, which workers exchange once, with the last of them."""
    num_images = sum(len(part.samples) for part in parts)
    means: dict[str, Tensor] = {}
    no_sync = getattr(state.parallel, "no_sync", None)
    for number, part in enumerate(parts, 1):
        is_exchanged = no_sync is None or number == len(parts)
        with no_sync() if no_sync and not is_exchanged else contextlib.nullcontext():
            losses = compute_losses(state, part, recipe, lpips)
            weight = len(part.samples) / num_images
            (losses["loss"] * (weight * part.share)).backward()
        if is_exchanged:
            state.collect_gradients()
        for name, value in losses.items():
            term = weight * value.detach()
            means[name] = means[name] + term if name in means else term
    return means


def check_finite(state: TrainState) -> None:
    """Asks whether all gradients since the last call were finite; call it before the weights are used.

    Raises:
        FloatingPointError: One was not, on every worker, as DDP averages it. It names the step, the losses
            that are to blame, and this worker's samples; the weights are still those before that step.
    """
    records, state.unchecked = state.unchecked, []
    norms = torch.stack([record.losses["grad_norm"] for record in records]).tolist() if records else []
    for record, norm in zip(records, norms, strict=True):
        if math.isfinite(norm):
            continue
        shown = ", ".join(f"{name} {value.item():.4g}" for name, value in record.losses.items())
        terms = [name for name, value in record.losses.items() if not torch.isfinite(value)]
        terms = [name for name in terms if name not in ("loss", "grad_norm")]
        blame = f"to blame: {', '.join(terms)}" if terms else "the losses of this worker are finite"
        raise FloatingPointError(
            f"the gradient of step {record.step} is not finite ({shown}); {blame}; samples {record.samples}, "
            f"images {record.keys}. The weights are those of the step before. Lower optim.lr or check the "
            "images."
        )


def compute_losses(state: TrainState, batch: Batch, recipe: Recipe, lpips: Distance) -> dict[str, Tensor]:
    """The losses of one batch at the state's step, with gradient; `loss` is what the phase minimises."""
    step, total = state.global_step, recipe.optim.total_steps
    hr, lq = to_tensor(batch.hr_u8), to_tensor(batch.lq_u8)
    lq_up = upsample(lq, state.model.config.scale)
    num_steps = curriculum_steps(recipe.schedule, step, total)
    alphas, sigmas = (upload(levels, hr.device) for levels in trajectory_levels(recipe.schedule, num_steps))
    n = sample_seed(recipe.seed, "n", step) % num_steps  # one for the whole global batch

    noise = sample_noise(batch, recipe.seed, "ct", recipe.noise_version)
    x_n = trajectory_point(hr, lq_up, noise, alphas[n], sigmas[n])
    x_next = trajectory_point(hr, lq_up, noise, alphas[n + 1], sigmas[n + 1])
    # The target draws the same dropout mask as the prediction (Song & Dhariwal 2023, arXiv:2310.14189);
    # the published run drew two. The first sample sets it, so that no two workers share a mask.
    mask_seed = sample_seed(recipe.seed, "dropout", step, batch.samples[0])
    with torch.no_grad():
        torch.manual_seed(mask_seed)
        target = hr if n == 0 else state.network(x_n, sigmas[n], lq)  # f(x, 0, y) = x
    torch.manual_seed(mask_seed)
    pred = state.parallel(x_next, sigmas[n + 1], lq)
    if state.dtm_model is not None and isinstance(lpips, Lpips):
        lpips = lpips.anchored(pred)  # DTM compares the same prediction again
    losses = consistency_loss(pred, target, lpips, recipe.loss)
    losses["loss"] = losses["ct_loss"]

    if state.dtm_model is not None:
        low, high = dtm_range(recipe.loss, num_steps)
        drawn = [low + sample_seed(recipe.seed, "m", k) % (high - low) for k in batch.samples]
        m = upload(torch.tensor(drawn), hr.device)
        losses["dtm_loss"] = dtm_loss(
            pred,
            hr,
            lq,
            lq_up,
            sample_noise(batch, recipe.seed, "dtm", recipe.noise_version),
            alpha=alphas[m],
            sigma=sigmas[m],
            dtm_model=state.dtm_model,
            lpips=lpips,
            config=recipe.loss,
        )
        losses["loss"] = losses["ct_loss"] + losses["dtm_loss"]
    return losses


def sample_noise(batch: Batch, seed: int, purpose: str, version: NoiseVersion = 2) -> Tensor:
    """Standard normal noise of the HR batch's shape, NCHW: a function of (seed, sample index, purpose)."""
    _, height, width, _ = batch.hr_u8.shape
    seeds = [sample_seed(seed, purpose, k) for k in batch.samples]
    return normal(seeds, (3, height, width), batch.hr_u8.device, version)
