"""Which settings may change when a command resumes an existing run or search, and which may not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctmsr.config import flatten, to_dict

from .run_config import RunConfig

_BEFORE = {"inference.noise_version": 1, "data.order_version": 1}
"""Settings whose default differs from what configs without them meant."""


@dataclass(frozen=True)
class Identity:
    """The settings that define a run: two configs that agree on them describe the same run."""

    free: tuple[str, ...]
    """Keys, or sections ending in a dot, that do not affect what is computed."""
    fixed: tuple[str, ...]
    """Keys within free sections that do."""

    def changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """The settings that make `now` another run, each as "key: old -> new", sorted by key.

        A setting that an older version did not have counts with the value it had then.
        """
        absent = flatten(to_dict(RunConfig())) | _BEFORE
        old, new = absent | flatten(before), absent | flatten(now)
        return [
            f"{key}: {old.get(key)} -> {new.get(key)}"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and (key in self.fixed or not key.startswith(self.free))
        ]


_PLACES = ("storage_uri", "tracking_uri", "experiment", "model_name", "data.", "train.", "register.")

RUN = Identity(
    free=(*_PLACES, "tune.", "inference."),
    fixed=(
        "train.global_batch_size",
        "train.precision",
        "data.order",
        "data.order_version",
        "data.crops_per_picture",
        "data.random_flip",
        "inference.noise_version",
    ),
)
"""The identity of a training run."""


def search_identity(free: Sequence[str]) -> Identity:
    """The identity of a search whose method lets the keys in `free` change without affecting its trials."""
    return Identity(
        free=(*_PLACES, *free),
        fixed=(
            "train.global_batch_size",
            "train.precision",
            "data.order",
            "data.order_version",
            "data.crops_per_picture",
            "data.random_flip",
            "data.eval_crop_size",
            "data.eval_draws",
        ),
    )
