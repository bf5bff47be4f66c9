"""Ray Data as this project needs it."""

import ray.data

from .ray_internals import PausedLoop, quieten_data


def configured(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The data set: quiet, in order, and with the error of a task as it was raised."""
    quieten_data()
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # The reservation leaves a core idle; what is made ahead is bounded by SampleOrder.
    context.op_resource_reservation_enabled = False
    # Without the reservation it counts bytes alone: a few small outputs that wait leave one task running.
    context.downstream_capacity_backpressure_ratio = None
    context.custom_execution_callback_classes = [PausedLoop]
    context.execution_options = in_order()
    return dataset


def in_order() -> ray.data.ExecutionOptions:
    """Execution options that keep the order of rows."""
    return ray.data.ExecutionOptions(preserve_order=True)
