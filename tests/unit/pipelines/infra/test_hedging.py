"""A second call where the first takes long: not too often, and no error is hidden."""

import threading
import time
from collections.abc import Callable

import pytest

from pipelines.infra.hedging import Hedge

pytestmark = pytest.mark.timed


@pytest.fixture
def hedge() -> Hedge:
    """One that knows of a hundred fast calls."""
    made = Hedge()
    for number in range(100):
        assert made(lambda number=number: number) == number
    return made


def by_turns(*calls: Callable[[], str]) -> Callable[[], str]:
    """A function that does another thing each time it is called."""
    left, lock = list(calls), threading.Lock()

    def call() -> str:
        with lock:
            turn = left.pop(0)
        return turn()

    return call


def after(seconds: float, result: str | Exception) -> Callable[[], str]:
    def call() -> str:
        time.sleep(seconds)
        if isinstance(result, Exception):
            raise result
        return result

    return call


def test_what_comes_first_is_taken(hedge: Hedge) -> None:
    started = time.monotonic()
    assert hedge(by_turns(after(3, "late"), after(0, "soon"))) == "soon"
    assert time.monotonic() - started < 2
    assert hedge(by_turns(after(0.3, "first"), after(3, "second"))) == "first"
    assert hedge.num_extra == 2


def test_an_error_counts_only_if_there_is_nothing_else(hedge: Hedge) -> None:
    with pytest.raises(ValueError, match="at once"):  # no time for a second
        hedge(by_turns(after(0, ValueError("at once"))))
    assert hedge(by_turns(after(0.3, "first"), after(0, ValueError("second")))) == "first"
    assert hedge(by_turns(after(0.3, ValueError("first")), after(0.5, "second"))) == "second"
    with pytest.raises(ValueError, match="first"):
        hedge(by_turns(after(0.3, ValueError("first")), after(0.1, ValueError("second"))))
    with pytest.raises(TimeoutError, match="mine"):
        hedge(by_turns(after(0, TimeoutError("mine"))))


def test_at_most_one_in_twenty_is_called_again(hedge: Hedge) -> None:
    for number in range(10):  # each slower than most before it
        assert hedge(after(0.1 + 0.03 * number, "x")) == "x"
    assert 5 <= hedge.num_extra <= 1 + 0.05 * hedge.num_calls


def test_nothing_is_called_again_before_usual_times_are_known() -> None:
    hedge = Hedge()
    assert hedge(by_turns(after(0.5, "x"))) == "x"
    assert hedge.num_extra == 0
