"""The memory of a process over time, as the system sees it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

max_points = 300


def read_memory() -> dict[str, float]:
    """Return this process's resident memory in MB: all of it, and what of it is not pages of a file.

    Pages of a memory-mapped file are shared with whoever maps it too, and given up when memory is short.
    """
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            fields[name] = int(value.split()[0]) * 1024 / 1e6
    return {"resident": fields["VmRSS"], "anonymous": fields["RssAnon"]}


class MemoryTrace:
    """Samples this process's memory in a thread while the block runs.

    Attributes:
        points: Seconds since the begin, resident MB, anonymous MB.
    """

    def __init__(self, *, interval_seconds: float = 0.02) -> None:
        self.points: list[tuple[float, float, float]] = []
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryTrace:
        self._began = time.monotonic()
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    def _note(self) -> None:
        memory = read_memory()
        self.points.append((time.monotonic() - self._began, memory["resident"], memory["anonymous"]))

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self._note()

    def summary(self) -> dict[str, object]:
        """Return begin and peaks in MB, and the trace: of each stretch of time its highest point."""
        stretch = max(1, len(self.points) // max_points)
        parts = [self.points[start : start + stretch] for start in range(0, len(self.points), stretch)]
        return {
            "start_mb": round(self.points[0][1], 1),
            "start_anonymous_mb": round(self.points[0][2], 1),
            "peak_mb": round(max(point[1] for point in self.points), 1),
            "peak_anonymous_mb": round(max(point[2] for point in self.points), 1),
            "seconds": round(self.points[-1][0], 1),
            "trace": [[round(value, 1) for value in max(part, key=lambda point: point[1])] for part in parts],
        }
