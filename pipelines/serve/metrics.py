"""What the server tells Prometheus, through Ray."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.serve import metrics


class Metrics:
    """Of one replica of the front; Ray exports them with `ray_` before each name."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "ctmsr_serve_requests", description="Answered requests.", tag_keys=("status",)
        )
        self._seconds = metrics.Histogram(
            "ctmsr_serve_seconds",
            description="From a request to its answer.",
            boundaries=[0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=("status",),
        )
        self._pixels = metrics.Counter("ctmsr_serve_pixels", description="Upscaled pixels, padded.")
        self._queue = metrics.Gauge(
            "ctmsr_serve_queue", description="Pictures that wait for a model, or are with one."
        )
        self._num_waiting = 0

    def answered(self, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.inc(tags={"status": str(status)})
        self._seconds.observe(seconds, tags={"status": str(status)})

    def upscaled(self, num_pixels: int) -> None:
        """Counts a picture."""
        self._pixels.inc(num_pixels)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A `with` block during which one more picture waits."""
        self._num_waiting += 1
        self._queue.set(self._num_waiting)
        try:
            yield
        finally:
            self._num_waiting -= 1
            self._queue.set(self._num_waiting)
