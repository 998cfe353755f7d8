"""A clock that only sleeping moves: waits take no time, and how long they were is known."""

from __future__ import annotations


class FakeClock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
