"""Makes items in a thread before they are needed."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterator[T], most: int) -> Iterator[T]:
    """The same items in the same order, of which a thread makes up to `most` ahead of the consumer.

    An error of `items` is raised where its item would have come.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "read-ahead")
    try:
        coming = deque(thread.submit(next, items, end) for _ in range(most))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]  # not the end
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
