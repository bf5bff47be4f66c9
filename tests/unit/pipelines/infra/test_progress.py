"""What progress looks like in a terminal of any width, and in a file."""

import io
import logging
import re
from contextlib import redirect_stdout

import pytest

from pipelines.infra.progress import Bar, Ended, Progress, Scores, Screen, _tell

LINE = re.compile(r"\033\[(\d+)A\033\[J|([^\n\033]*)\n")


class Terminal(io.StringIO):
    """Knows what the text written to it looks like: lines, moves up, and erasing downwards."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        seen: list[str] = []
        for up, line in LINE.findall(self.getvalue()):
            if up:
                del seen[-int(up) :]
            else:
                seen.append(line)
        return seen


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


def progress(name: str, step: int) -> Progress:
    return Progress(name, "CT", step, 240, 0.123, 7.4, 0.02, 0.3, 65.0, 2)


def test_a_line_fits_and_shows_what_matters() -> None:
    bar = progress("first", 120).bar
    assert str(bar) == (
        "first  CT step 120/240  loss 0.123  7.4 images/s  ETA 0:01:05  wait 2%  data 0.3 MB/s  2 workers"
    )
    assert bar.fitted(79) == (
        "first  CT step 120/240  [=======       ]  loss 0.123  7.4 images/s  ETA 0:01:05"
    )
    wide = bar.fitted(119)
    assert wide.endswith("ETA 0:01:05  wait 2%  data 0.3 MB/s  2 workers")
    assert "[========" in wide
    for width in range(10, 200):
        assert len(bar.fitted(width)) <= width
    assert "  scoring the last checkpoint" in progress("first", 240).bar.fitted(79)
    assert Bar("scanned 7 pictures", 7, 0, ("3/s",)).fitted(79) == "scanned 7 pictures  3/s"


def test_two_runs_have_a_line_each_below_everything_else(terminal: Terminal) -> None:
    with redirect_stdout(terminal), Screen() as screen:
        for step in (40, 80, 120):
            for name in ("one", "two"):
                _tell(screen, progress(name, step))
        means = {"lpips": 0.3, "psnr_y": 24.0, "bicubic_lpips": 0.4, "bicubic_psnr_y": 25.0}
        _tell(screen, Scores("one", 120, means))
        _tell(screen, "warning: a name with a line\nbreak")
        assert [line.partition("  [")[0] for line in terminal.lines()] == [
            "one  step 120  LPIPS 0.3000 (bicubic 0.4000)  PSNR-Y 24.00 dB (25.00)",
            "warning: a name with a line\\nbreak",
            "one  CT step 120/240",
            "two  CT step 120/240",
        ]
        _tell(screen, Ended("one"))
    assert [line.split()[0] for line in terminal.lines()] == ["one", "warning:", "two"]
    assert all(len(line) < 80 for line in terminal.lines())


def test_what_is_logged_is_not_overwritten(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(terminal)  # stderr, on the same terminal
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with redirect_stdout(terminal), Screen() as screen:
        _tell(screen, progress("one", 40))
        logging.getLogger("any").warning("beware")
        _tell(screen, progress("one", 80))
    assert [line.partition("  [")[0] for line in terminal.lines()] == ["beware", "one  CT step 80/240"]
    assert not handler.filters


def test_a_file_gets_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        for step in range(0, 241, 40):
            for name in ("one", "two"):
                _tell(screen, progress(name, step))
        _tell(screen, Ended("one"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("/240")[0] for line in lines] == [
        f"{name}  CT step {step}" for step in (0, 240) for name in ("one", "two")
    ]
