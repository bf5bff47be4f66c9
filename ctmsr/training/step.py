"""One optimizer update, from a batch and a TrainState: consistency training, and DTM in the second phase.

Every random number of a step is a function of the run seed and the global step or sample index, never of the
number of workers: n workers on n parts of a batch compute what one worker computes on the whole of it.
"""

import contextlib
import math

import torch
from torch import Tensor, nn

from ..model.network import ResidualBlock
from .losses import Distance
from .objective import Batch, Recipe, compute_losses
from .state import StepRecord, TrainState

_MAX_COMPILED_BLOCKS = 256
"""Limit on variants of a block, with and without gradients; torch gives up after eight by default."""


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, lpips: Distance, micro_batch_size: int | None = None
) -> dict[str, Tensor]:
    """One update of `state` in place: forward, backward, finite check, AdamW, EMA.

    Args:
        state: The state to update; its `global_step` rises by one.
        batch: This worker's part of the global batch.
        recipe: The run's settings.
        lpips: LPIPS-vgg.
        micro_batch_size: Most images per forward and backward pass; gradients accumulate before the update.
            None processes the batch in one pass.

    Returns:
        Means over this worker's images, scalars without gradient: `loss`, `ct_loss`, `lpips`, `charbonnier`,
        `grad_norm`, and possibly `alignment_loss` and `dtm_loss`: see `compute_losses`.

    Raises:
        FloatingPointError: See `check_finite`; raised at once on a CPU, up to 16 steps late on a GPU.
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
    if len(state.unchecked) >= state.check_every:
        check_finite(state)
    else:
        # A check would make the host wait for the device. Fused AdamW reads this flag on the device and skips
        # the update if it is 1: from the first bad gradient on, until `check_finite` raises.
        norms = torch.stack([record.losses["grad_norm"] for record in state.unchecked])
        state.optimizer.found_inf = (~torch.isfinite(norms)).any().float()  # type: ignore[attr-defined]
    state.update()
    return losses


def compile_step(state: TrainState) -> None:
    """Compiles the network's blocks on their first call, for the shapes they get.

    Blocks of one kind share what was compiled, so it takes half as long as for the network as a whole.
    Prediction and target still share their dropout masks: every call draws the seeds of its masks from the
    generator that `compute_losses` seeds.

    Args:
        state: Its `network` computes the same as before, except for rounding.
    """
    torch._dynamo.config.recompile_limit = _MAX_COMPILED_BLOCKS
    for module in state.network.modules():
        if isinstance(module, ResidualBlock):
            module.compile(dynamic=False)


def _backward(state: TrainState, parts: list[Batch], recipe: Recipe, lpips: Distance) -> dict[str, Tensor]:
    """Accumulates the gradients of a batch's parts; workers exchange them once, with the last part."""
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
    """Checks that all gradients since the last call were finite; call it before using the weights.

    Raises:
        FloatingPointError: One was not. As DDP averages gradients, all workers raise. The message names the
            step, the losses to blame and this worker's samples; the weights are those before that step.
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
