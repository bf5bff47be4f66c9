"""Items made ahead: all of them, in order, not more than asked for, and errors in their place."""

import threading
from collections.abc import Iterator

import pytest

from pipelines.data.read_ahead import read_ahead


def test_every_item_comes_once_and_in_order() -> None:
    assert list(read_ahead(iter(range(20)), 3)) == list(range(20))
    assert list(read_ahead(iter(range(2)), 8)) == [0, 1]
    assert list(read_ahead(iter(()), 2)) == []


def test_so_many_are_made_before_they_are_needed_and_no_more() -> None:
    made, enough = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 4:
                enough.set()
            yield number

    ahead = read_ahead(items(), 4)
    assert next(ahead) == 0
    assert enough.wait(10)
    assert next(ahead) == 1
    assert made[:5] == [0, 1, 2, 3, 4]
    assert len(made) <= 6


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    ahead = read_ahead(items(), 8)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(ahead)
