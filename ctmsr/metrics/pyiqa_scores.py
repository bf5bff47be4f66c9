"""CLIPIQA and MUSIQ, no-reference quality scores, computed by pyiqa if the user has installed it.

pyiqa is not a dependency: its licence, PolyForm Noncommercial 1.0.0, forbids commercial use, and it downloads
weights that have licences of their own. Nothing else needs this module.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:  # the command line needs only the names and should not wait for torch
    import numpy as np
    import torch

PYIQA_NAMES = ("clipiqa", "musiq")
"""Higher is better for both: CLIPIQA is in [0, 1], MUSIQ in [0, 100]."""


def check_pyiqa() -> None:
    """Checks that pyiqa is installed.

    Raises:
        UserError: It is not installed.
    """
    if find_spec("pyiqa") is None:
        raise UserError(
            f"{' and '.join(PYIQA_NAMES)} need pyiqa, which is not installed: its licence forbids "
            "commercial use. If that suits you, run `pip install pyiqa`; otherwise leave these scores out."
        )


def pyiqa_score(name: str, sr_u8: "np.ndarray", device: "torch.device") -> float:
    """The score of a uint8 HWC RGB picture; the first call of a process loads the network.

    Args:
        name: One of PYIQA_NAMES.
        sr_u8: The picture.
        device: Where the network runs.

    Raises:
        UserError: pyiqa is not installed.
    """
    import torch

    from ..image.ranges import to_tensor

    check_pyiqa()
    with torch.inference_mode():
        return float(_network(name, device)((to_tensor(sr_u8[None]) + 1) / 2))


@lru_cache
def _network(name: str, device: "torch.device") -> Any:
    import pyiqa

    return pyiqa.create_metric(name, device=device)
