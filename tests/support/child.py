"""Child processes of tests, each in a session of its own, so that all it starts can be killed with it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tests.support.repository import ROOT

_TAIL_CHARS = 3000

T = TypeVar("T")


class Child:
    """A running command; leaving the `with` block kills it and every process it started."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Starts `command` with the environment `env`; its output is appended to `log`."""
        self.log = log
        with log.open("ab") as out:
            self._printed_before = out.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # also keeps Ctrl-C on the terminal away from it
            )
        self.pid = self._process.pid
        self._is_gone = False  # its number may belong to another process by now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def printed(self) -> str:
        """Its output so far."""
        return self.log.read_bytes()[self._printed_before :].decode(errors="replace")

    def pids(self, title: str = "") -> list[int]:
        """Running processes of its session whose command line begins with `title`."""
        found: list[int] = []
        for process in Path("/proc").iterdir():
            if self._is_gone or not process.name.isdigit():
                continue
            try:
                state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
                command_line = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if int(session) == self.pid and state not in "ZX" and command_line.startswith(title.encode()):
                found.append(int(process.name))
        return sorted(found)

    def kill(self) -> None:
        """Sends SIGKILL to it and to all of its session, until none is left."""
        while pids := self.pids():
            for pid in pids:
                kill(pid)
            time.sleep(0.01)
        self._process.wait()
        self._is_gone = True

    def wait_until_printed(self, text: str, *, timeout_s: float = 90) -> None:
        """Returns once its output contains `text`."""
        self.wait_until(lambda: text in self.printed() or None, f"{text!r}", timeout_s=timeout_s)

    def wait_until(self, condition: Callable[[], T | None], what: str, *, timeout_s: float) -> T:
        """Polls `condition` while the child runs, and returns its first value that is not None.

        Raises:
            RuntimeError: It ended first, or `timeout_s` passed; the message quotes the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if (value := condition()) is not None:
                return value
            if status is not None or time.monotonic() > deadline:
                how = f"ended with {status}" if status is not None else f"kept running for {timeout_s:g} s"
                raise RuntimeError(f"no {what}: the command {how}. {self.log_tail()}")
            time.sleep(0.25)

    def log_tail(self) -> str:
        """The end of its output, for error messages."""
        return f"{self.log.name} ends with:\n{self.printed()[-_TAIL_CHARS:]}"


def kill(pid: int) -> None:
    """Sends SIGKILL; does nothing if the process has just ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
