"""How long a run takes, over all the processes that it takes: it may be stopped and go on."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any, Self

from ot_federated.errors import CheckpointError, OtFederatedError
from ot_federated.reporting.run_directory import RunDirectory, seconds_file


class Elapsed:
    """The seconds of a run; as a context manager it notes them at the end of this process, however that comes.

    They are noted with every line of ``metrics.jsonl`` too: of a process that was killed, what came after its last line
    is not counted.

    Args:
        run: The run's directory.
        resume: Whether earlier processes count.

    Raises:
        CheckpointError: If what they noted is damaged.
    """

    def __init__(self, run: RunDirectory, *, resume: bool) -> None:
        self._run = run
        self._began = time.monotonic()
        self._setup: float | None = None
        self._earlier = _read(run) if resume else []
        run.listeners.append(lambda _line: self.save())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()

    def end_setup(self) -> None:
        """Say that from now on the time is not setup any more."""
        self._setup = self._now()
        self.save()

    def setup(self) -> float:
        """Return the seconds before the first round, of every process."""
        return sum(entry["setup"] for entry in self._entries())

    def total(self) -> float:
        """Return the seconds of every process."""
        return sum(entry["total"] for entry in self._entries())

    def save(self) -> None:
        """Note the seconds so far; a disk too full for it must not hide why a run ends."""
        with contextlib.suppress(OtFederatedError, OSError):
            self._run.write_json(seconds_file, self._entries())

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _entries(self) -> list[dict[str, float]]:
        total = self._now()
        return [*self._earlier, {"setup": total if self._setup is None else self._setup, "total": total}]


def _read(run: RunDirectory) -> list[dict[str, float]]:
    try:
        saved: Any = run.read_json(seconds_file) or []
        return [{name: float(entry[name]) for name in ("setup", "total")} for entry in saved]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.path / seconds_file} is damaged ({type(error).__name__}: {error}). Delete it to go on without the "
            "seconds of earlier processes."
        ) from error
