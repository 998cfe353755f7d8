"""End every process that a run started, however the run ends.

A simulation is a tree of processes that Flower and Ray detach from the one that asked for them. Each of them
inherits an environment variable with a token that is unique to the run; whoever carries it, or descends from
one that does, belongs to the run. Nothing else is ever ended.

Run as a script, this module is the watchdog: it waits until its standard input closes, which happens even when
its parent is killed outright, and then clears up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

token_variable = "OT_FEDERATED_RUN_TOKEN"
_dismissal = "dismissed"


@contextlib.contextmanager
def guard_run(token: str, *, directories: Sequence[Path], grace_seconds: float = 8.0) -> Iterator[None]:
    """End the run's processes and remove its directories when the block is left, or when this process dies.

    Args:
        token: The value of ``OT_FEDERATED_RUN_TOKEN`` in the environment of the run's processes.
        directories: What the run leaves behind and nobody needs afterwards.
        grace_seconds: How long processes may take to end by themselves before they are killed.
    """
    environment = {name: value for name, value in os.environ.items() if name != token_variable}
    command = [sys.executable, __file__, token, str(grace_seconds), *map(str, directories)]
    # A session of its own: Ctrl-C in the terminal must not reach it.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, text=True, start_new_session=True
    ) as watchdog:
        assert watchdog.stdin is not None
        try:
            yield
        finally:
            clear_up(token, directories=directories, grace_seconds=grace_seconds)
            with contextlib.suppress(BrokenPipeError):
                watchdog.stdin.write(_dismissal)
                watchdog.stdin.close()


def clear_up(token: str, *, directories: Sequence[Path], grace_seconds: float) -> None:
    """End the run's processes, then remove its directories."""
    end_processes(token, grace_seconds=grace_seconds)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def end_processes(token: str, *, grace_seconds: float) -> None:
    """Ask the run's processes to end, and kill those that have not after ``grace_seconds``."""
    members = find_processes(token)
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(members, timeout=grace_seconds)
    # A process that was being started while the others were asked is found by a second look.
    for _ in range(5):
        members = find_processes(token)
        if not members:
            return
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(members, timeout=2.0)


def find_processes(token: str) -> list[psutil.Process]:
    """Return the processes of a run and their descendants, never the calling process."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        # Other users' processes, and ones that end while we look, cannot be read.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(token_variable) == token:
                for member in [process, *process.children(recursive=True)]:
                    found[member.pid] = member
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _watch(token: str, grace_seconds: str, *directories: str) -> None:
    if sys.stdin.read() != _dismissal:
        clear_up(token, directories=[Path(name) for name in directories], grace_seconds=float(grace_seconds))


if __name__ == "__main__":
    _watch(*sys.argv[1:])
