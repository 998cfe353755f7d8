"""What a run leaves on disk, file by file.

::

    run_config.json   every key with its value
    run_id            names the run to the data owners
    metrics.jsonl     one line a round
    client_privacy.jsonl
                      one line for each noised sum of updates, under privacy.mode=client
    seconds.json      how long each process of the run took
    rejections.json   whose replies were rejected, where any were
    checkpoints/      one directory a round
    adapter/ model/   what is delivered
    rounds.png        loss and accuracy by round
    summary.json      the result
    failure.txt       why the run failed, in place of a summary
    lock              locked by the process that is at work here
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text, explain_disk_errors, remove_partials
from ot_federated.errors import CheckpointError, ConfigError

if sys.platform != "win32":
    import fcntl

config_file, metrics_file, summary_file, failure_file = (
    "run_config.json",
    "metrics.jsonl",
    "summary.json",
    "failure.txt",
)
run_id_file = "run_id"
lock_file = "lock"
rejections_file = "rejections.json"
seconds_file = "seconds.json"
# These may differ between a run and its continuation, and so may evaluation.*: they do not change what is trained,
free_keys = (
    "resume",
    "output-dir",
    "strategy.node-timeout-seconds",
    "strategy.round-timeout-seconds",
    "strategy.straggler-seconds",
    "strategy.max-retries",
    "strategy.max-rejections",
)
# but for these, where every round's update is scaled by what the owner's validation data says.
alpha_switch = "evaluation.alpha-every-round"
alpha_keys = (alpha_switch, "evaluation.alphas", "evaluation.max-validation-examples")


class BusyRunError(ConfigError):
    """Another process is at work in the run's directory."""


def choose_directory(output_dir: str) -> Path:
    """Return a run's directory; where none is named, one of the time, in ``runs``."""
    return Path(output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}").expanduser().absolute()


@contextmanager
def hold_directory(output_dir: str) -> Iterator[Path]:
    """Choose a run's directory, make it where it is missing, and keep other processes out of it until the block ends.

    A ServerApp may outlive the SuperLink that it belongs to, while its owner already goes on with the run: two of them
    would write each other's rounds. The system lifts the lock of a process that dies; forks do not have it.

    Args:
        output_dir: See :func:`choose_directory`.

    Raises:
        BusyRunError: If another process holds it.
    """
    path = choose_directory(output_dir)
    with explain_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        stream = (path / lock_file).open("ab")
    with stream:
        if sys.platform != "win32":
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyRunError(
                    f"Another process is at work on the run in {path}. Wait until it has ended (a ServerApp whose "
                    "SuperLink is gone ends within a minute), or end it; then start this run again."
                ) from error
            except OSError:
                # A network disk without locks.
                pass
        yield path


class RunDirectory:
    """The directory of one run.

    Attributes:
        path: The directory.
        listeners: Called with every line of ``metrics.jsonl`` once it is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []

    @classmethod
    def open(cls, output_dir: str, flat_config: Mapping[str, Any], *, resume: bool) -> RunDirectory:
        """Open the directory of a new run, or of one that is continued.

        Raises:
            ConfigError: If a new run's directory already holds a run.
            CheckpointError: If a continued run had another configuration, or there is none.
        """
        path = choose_directory(output_dir)
        run, existing = cls(path), path / config_file
        if resume:
            run._check_same_config(existing, flat_config)
            for directory in (path, path / "checkpoints", path / "model"):
                remove_partials(directory)
        elif existing.exists():
            raise ConfigError(
                f"{path} already holds a run. Continue it with resume=true, or choose another output directory."
            )
        (path / failure_file).unlink(missing_ok=True)
        if not existing.exists():
            atomic_write_text(existing, json.dumps(dict(flat_config), indent=2) + "\n")
        return run

    @staticmethod
    def _check_same_config(existing: Path, flat_config: Mapping[str, Any]) -> None:
        if not existing.is_file():
            raise CheckpointError(
                f"resume=true, but {existing.parent} holds no run. Set output-dir to the run's directory."
            )
        try:
            before = json.loads(existing.read_text())
        except ValueError as error:
            raise CheckpointError(f"{existing} is damaged ({error}): this run cannot be continued safely.") from error
        if not isinstance(before, dict):
            raise CheckpointError(f"{existing} is damaged (it holds no table): this run cannot be continued safely.")
        # Its noise is the server's own: a run whose budget went into rounds that a crash repeated may go on with more.
        free = (*free_keys, *(["privacy.target-epsilon"] if before.get("privacy.mode") == "client" else []))
        bound = alpha_keys if before.get(alpha_switch) or flat_config.get(alpha_switch) else ()
        for name, value in flat_config.items():
            may_differ = name in free or (name.startswith("evaluation.") and name not in bound)
            if not may_differ and before.get(name) != value:
                raise CheckpointError(
                    f"resume=true with {name}={value!r}, but the run in {existing.parent} has {before.get(name)!r}. "
                    f"Set {name}={before.get(name)!r}, or start a new run in another directory."
                )

    @property
    def run_id(self) -> str:
        """The run's id, made when it began and the same after it was resumed."""
        path = self.path / run_id_file
        if not path.is_file():
            atomic_write_text(path, uuid.uuid4().hex + "\n")
        return path.read_text().strip()

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Write one line of ``metrics.jsonl``; a line of the same round is replaced."""
        lines = [old for old in self.read_metrics() if old.get("round") != line.get("round")]
        lines.append(dict(line))
        lines.sort(key=lambda entry: int(entry.get("round", 0)))
        atomic_write_text(self.path / metrics_file, "".join(json.dumps(entry) + "\n" for entry in lines))
        for listener in self.listeners:
            listener(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``."""
        path = self.path / metrics_file
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def forget_rounds_after(self, last_round: int) -> None:
        """Drop the metrics of rounds that a continued run does again."""
        kept = [line for line in self.read_metrics() if int(line.get("round", 0)) <= last_round]
        if kept:
            atomic_write_text(self.path / metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        else:
            (self.path / metrics_file).unlink(missing_ok=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        atomic_write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any | None:
        """Return a JSON file's content, or None where there is no such file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def write_failure(self, reason: str) -> None:
        """Note why the run failed, for whoever started it."""
        atomic_write_text(self.path / failure_file, reason.strip() + "\n")
