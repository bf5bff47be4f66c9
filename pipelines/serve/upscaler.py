"""The deployment that holds the model: picture files in, larger ones out.

It takes one picture at a time: it would upscale a batch one by one anyway, so batching would only make the
first picture wait. Small pictures have a lane of their own, where they do not wait for large ones.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ctmsr.errors import UserError
from ctmsr.model.device import choose_device

from ..tracking.released import Released
from .asked import Asked, Loaded
from .limits import Limits, Refusal
from .picture import check_picture, enlarged

_MAX_WAITING = 8
"""Pictures in a lane; further ones are asked to try again later."""
_SMALL_PIXELS = 256**2
_SMALL_BYTES = 2**20
"""Of a small picture. Parsing as many bytes of the worst kind takes half a second."""
_MAX_DOUBLINGS = 6
"""Of the pause between looks at the registry while they fail: from 15 s to 16 minutes."""

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """An upscaled picture."""

    data: bytes
    warnings: tuple[str, ...]
    version: str
    """Name of the version that made it."""
    num_pixels: int
    """Of the picture that was sent, padded."""


class Upscaler:
    """A replica."""

    def __init__(self, asked: Asked, found: Released, limits: Limits, poll_s: float) -> None:
        """Loads the model that `asked` means now; `found`, which it meant before, if the registry is away."""
        device = choose_device(asked.device)
        # A GPU takes turns; on CPUs a small picture shares the cores with a large one.
        self._turn: AbstractContextManager = nullcontext() if device.type == "cpu" else threading.Lock()
        if device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)  # Ray sets it to one per worker
        self._asked, self._limits = asked, limits
        self._loaded = Loaded.load(_current(asked, found), self._turn)
        self._small, self._large, self._checks = Lane(), Lane(), Lane()
        self._stopped = threading.Event()
        if asked.may_move:
            threading.Thread(target=self._follow, args=(poll_s,), daemon=True).start()

    async def upscale(self, data: bytes, kind: str, seed: int) -> Made | Refusal:
        """Upscales a picture file; a refusal is returned, as Ray would wrap one that is raised.

        Args:
            data: The file.
            kind: Format of the result, one of `SUFFIXES`.
            seed: Selects the invented detail.
        """
        try:
            if len(data) <= _SMALL_BYTES:
                num_pixels = await asyncio.to_thread(check_picture, data, self._limits)
                lane = self._small if num_pixels <= _SMALL_PIXELS else self._large
            else:
                num_pixels = await self._checks.run(lambda: check_picture(data, self._limits))
                lane = self._large
            return await lane.run(lambda: self._make(data, kind, seed, num_pixels))
        except Refusal as refusal:
            return refusal

    async def check_health(self) -> None:
        """Of Ray Serve, which replaces a replica whose model no longer gives what it gave at first."""
        await asyncio.to_thread(self._check)

    def _check(self) -> None:
        with self._turn:
            self._loaded.check()

    def _make(self, data: bytes, kind: str, seed: int, num_pixels: int) -> Made:
        loaded = self._loaded  # one version a picture, even if another takes over meanwhile

        def upscale(rgb: np.ndarray) -> np.ndarray:
            with self._turn:
                return loaded.upscale(rgb, seed)

        keeps_metadata = self._limits.keeps_metadata
        made, warnings = enlarged(data, upscale, kind, keeps_metadata=keeps_metadata)
        return Made(made, warnings, loaded.released.uri, num_pixels)

    def stop(self) -> None:
        """Stops following the name; for replicas outside Ray, which ends the process."""
        self._stopped.set()

    def _follow(self, poll_s: float) -> None:
        """Looks again and again what the name means, and takes over another version once it works."""
        num_failures, said = 0, ""
        while not self._stopped.wait(poll_s * 2 ** min(num_failures, _MAX_DOUBLINGS)):
            before, meant = self._loaded.released, ""
            try:
                now = self._asked.now(before)
                meant = now.uri
                if (now.uri, now.source) != (before.uri, before.source):
                    self._loaded = Loaded.load(now, self._turn)
                    logger.warning("%s takes over from %s", now.uri, before.uri)
                num_failures, said = 0, ""
            except Exception as error:
                num_failures += 1
                told = f"{meant} {type(error).__name__}"  # not the message, which may name a temporary folder
                if told != said:
                    details = None if isinstance(error, UserError) else error
                    logger.error("%s goes on serving: %s", before.uri, error, exc_info=details)
                said = told


class Lane:
    """Runs functions one after the other in a thread, and refuses them when too many wait."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._places = threading.Semaphore(_MAX_WAITING)

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result.

        Raises:
            Refusal: Too many wait.
        """
        if not self._places.acquire(blocking=False):
            raise Refusal(503, f"{_MAX_WAITING} pictures are already waiting. Try again in a while.")
        future = self._thread.submit(function)
        # Not when the client leaves: the thread is busy until the function ends.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)


def _current(asked: Asked, found: Released) -> Released:
    try:
        return asked.now(found)
    except UserError as error:
        logger.error("serving %s, as it was found before: %s", found.uri, error)
        return found
