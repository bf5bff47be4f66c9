"""Ray Data, configured for this project."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from ctmsr.errors import DataError

from .exit_status import root_cause
from .ray_internals import LoopThrottle, quieten_data

Row = dict[str, Any]


def configured(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The same dataset, set to run quietly, keep the order of rows and re-raise task errors unwrapped."""
    quieten_data()
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # The reservation leaves a core idle. SampleOrder already bounds how far the stream can run ahead.
    context.op_resource_reservation_enabled = False
    # Without the reservation, this policy compares bytes alone: a few small outputs in the queue would
    # throttle the stage before to a single task.
    context.downstream_capacity_backpressure_ratio = None
    context.custom_execution_callback_classes = [LoopThrottle]  # type: ignore[list-item]
    context.execution_options = in_order()
    return dataset


def in_order() -> ray.data.ExecutionOptions:
    """Execution options that keep the order of rows."""
    return ray.data.ExecutionOptions(preserve_order=True)


def map_rows(todo: Sequence[Row], task: Callable[[Row], Row], stopped: str) -> Iterator[Row]:
    """What a task makes of every row, in order, each in a Ray task of its own.

    Args:
        todo: At least one row.
        task: What to do with a row.
        stopped: What to say if a task fails, before the cause.

    Raises:
        DataError: A task failed.
    """
    blocks = ray.data.from_items(list(todo), override_num_blocks=len(todo))
    try:
        yield from configured(blocks.map(task)).iter_rows()
    except ray.exceptions.RayError as error:
        raise DataError(f"{stopped} {root_cause(error)}") from error
