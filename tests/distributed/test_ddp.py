"""Two processes on half a batch each compute what one process computes on the whole of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from ctmsr.model.network import ConsistencyModel
from ctmsr.training.state import TrainState, build_state, freeze
from ctmsr.training.step import train_step
from tests.support import tiny
from tests.support.tiny import distance, flat, make_batch

# One update of CT, one of CT + DTM.
NUM_STEPS = 2
RECIPE = replace(tiny.RECIPE, optim=replace(tiny.OPTIM, ct_steps=1))
GLOBAL_BATCH_SIZE = 4
NUM_WORKERS = 2
KINDS = {"all": (), "decoder": ("model.enc.*", "model.map_layer*")}
"""What each kind of run freezes."""


def double_model() -> ConsistencyModel:
    """Weights in float64: on some CPUs the batch size decides how float32 sums round.

    A training's gradient turns such last bits into 1e-5 and more, which could hide a fault.
    """
    return tiny.filled_model().double()


def train(state: TrainState, rank: int, num_workers: int) -> list[dict[str, Any]]:
    """After each update on this part of the batch: the gradient, the weights, their average, the losses."""
    size = GLOBAL_BATCH_SIZE // num_workers
    history = []
    for step in range(NUM_STEPS):
        first = step * GLOBAL_BATCH_SIZE + rank * size
        losses = train_step(state, make_batch([*range(first, first + size)]), RECIPE, distance)
        parameters = list(state.model.parameters())
        history.append(
            {
                "gradient": flat([p.grad for p in parameters if p.grad is not None]),
                "weights": flat(parameters),
                "ema": flat(list(state.ema_model.parameters())),
                "losses": {name: value.item() for name, value in losses.items()},
            }
        )
    return history


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_WORKERS
    )
    for name, patterns in KINDS.items():
        model = double_model()
        freeze(model, patterns)
        state = build_state(model, RECIPE.optim, DistributedDataParallel(model))
        torch.save(train(state, rank, NUM_WORKERS), folder / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes saved."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=NUM_WORKERS)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def histories(folder: Path, request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """Of one process, and of each of the two."""
    model = double_model()
    freeze(model, KINDS[request.param])
    paths = [folder / f"{request.param}{rank}.pt" for rank in range(NUM_WORKERS)]
    parts = [torch.load(path, weights_only=False) for path in paths]
    return [train(build_state(model, RECIPE.optim), 0, 1), *parts]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("what", ["gradient", "weights", "ema"])
def test_two_workers_equal_one(histories: list[list[dict[str, Any]]], what: str) -> None:
    whole, part, _ = histories
    errors = [relative_error(part[step][what], whole[step][what]) for step in range(NUM_STEPS)]
    assert max(errors) <= 1e-9, errors


def test_workers_stay_equal_bit_by_bit(histories: list[list[dict[str, Any]]]) -> None:
    _, left, right = histories
    for step in range(NUM_STEPS):
        assert all(
            np.array_equal(left[step][what], right[step][what]) for what in ("gradient", "weights", "ema")
        )
        assert left[step]["losses"]["grad_norm"] == right[step]["losses"]["grad_norm"]


def test_losses_of_the_workers_average_to_that_of_one(histories: list[list[dict[str, Any]]]) -> None:
    whole, left, right = ([each["losses"] for each in history] for history in histories)
    assert ["dtm_loss" in losses for losses in whole] == [False, True]
    for step in range(NUM_STEPS):
        for name, value in whole[step].items():
            assert (left[step][name] + right[step][name]) / 2 == pytest.approx(value, rel=1e-6), (step, name)
            if name != "grad_norm":
                assert left[step][name] != right[step][name]
