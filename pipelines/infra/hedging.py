"""A second request where the first takes longer than most: what comes first is taken.

A store of many machines answers one request in a hundred or so ten times as late as the others, and a batch
waits for the slowest of its pictures (Dean and Barroso, The Tail at Scale, 2013).
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

_PERCENTILE = 0.95
_RECENT = 200
_LEAST_KNOWN = 20
_LEAST_WAIT_S = 0.05
"""A store that answers faster has no delays that are worth another request."""
_MOST_EXTRA = 0.05
_THREADS = 64
"""More than wait at a time: eight per task or command, and requests that nobody waits for any more."""


class Hedge:
    """Calls functions that may be called twice, such as reads; of many threads, in threads of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "hedged")
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.num_calls, self.num_extra = 0, 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of the call that returns first; an error only if none returns."""
        self.num_calls += 1
        calls = [self._pool.submit(self._timed, function, *args, **kwargs)]
        try:
            calls[0].exception(self._patience_s())
        except TimeoutError:
            if self.num_extra < _MOST_EXTRA * self.num_calls:
                self.num_extra += 1
                calls.append(self._pool.submit(self._timed, function, *args, **kwargs))
        return _first_result(calls)

    def _timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        result = function(*args, **kwargs)
        self._recent.append(time.monotonic() - started)
        return result

    def _patience_s(self) -> float | None:
        """How long to wait for the first call; None until enough is known of other calls."""
        recent = sorted(self._recent.copy())
        return (
            max(_LEAST_WAIT_S, recent[int(_PERCENTILE * len(recent))])
            if len(recent) >= _LEAST_KNOWN
            else None
        )


def _first_result(calls: list[Future[Any]]) -> Any:
    pending = set(calls)
    while len(calls) > 1 and pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        if good := [call for call in done if not call.exception()]:
            return good[0].result()
    return calls[0].result()  # raises
