"""The progress of a scan."""

import threading
import time
from contextlib import suppress

from ctmsr.errors import DataError

from ..infra.listing import iter_images
from ..infra.progress import Bar, Screen, duration


class ScanProgress:
    """The progress: pictures/s, MB/s and the time left.

    The scan lists the folder as it goes, so the total comes from a second listing that only counts.
    """

    def __init__(self, uri: str, screen: Screen) -> None:
        self._started = time.monotonic()
        self._screen = screen
        self._files, self._pictures, self._bytes = 0, 0, 0
        self._listed, self._is_whole = 0, False
        self.reused = 0
        """Files whose results were there already."""
        threading.Thread(target=self._count, args=(uri,), daemon=True).start()

    def _count(self, uri: str) -> None:
        with suppress(DataError):  # the scan hits the same error and reports it
            for _ in iter_images(uri, shards=True):
                self._listed += 1
            self._is_whole = True

    def show(self, files: int, pictures: int, num_bytes: int) -> None:
        """Counts files that have been scanned, and the pictures that they are or contain."""
        self._files, self._pictures = self._files + files, self._pictures + pictures
        self._bytes += num_bytes
        self._screen.show(self._bar())

    def end(self) -> None:
        """Leaves the last line where it is."""
        self._screen.end()
        self._screen.say(str(self._bar()))

    def _bar(self) -> Bar:
        elapsed_s = time.monotonic() - self._started
        facts = [f"{self._pictures / elapsed_s:.0f}/s", f"{self._bytes / 1e6 / elapsed_s:.1f} MB/s"]
        if self.reused:
            facts.append(f"{self.reused} scanned before")
        done = self.reused + self._files
        left = max(0, self._listed - done) if self._is_whole else 0
        if left:
            facts = [f"{left} to go, ETA {duration(left * elapsed_s / max(self._files, 1e-3))}", *facts]
        return Bar(f"scanned {self._pictures} pictures", done, done + left if left else 0, tuple(facts))
