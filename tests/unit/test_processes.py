"""The processes of a run end with it, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from simulations.processes import find_processes, guard_run, token_variable

sleeper = "import time; time.sleep(600)"
# A child that ignores the request to end, in a session of its own and without the token.
stubborn = f"""
import subprocess, signal, os, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
environment = {{k: v for k, v in os.environ.items() if k != {token_variable!r}}}
subprocess.Popen([sys.executable, "-c", {sleeper!r}], env=environment, start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def start(code: str, token: str) -> subprocess.Popen[str]:
    environment = os.environ | {token_variable: token}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def wait_until(condition, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done


def test_processes_of_the_run_end_and_others_stay(tmp_path):
    directory = tmp_path / "left over"
    directory.mkdir()
    token, other_token = uuid.uuid4().hex, uuid.uuid4().hex
    other = start(sleeper, other_token)
    try:
        with guard_run(token, directories=[directory], grace_seconds=1.0):
            mine = start(stubborn, token)
            assert mine.stdout is not None
            assert mine.stdout.readline() == "ready\n"
            members = find_processes(token)
            assert len(members) == 2
        assert not any(process.is_running() for process in members)
        assert not directory.exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_exceptions_pass_and_clear_up():
    token = uuid.uuid4().hex

    def fail() -> None:
        with guard_run(token, directories=[]):
            start(sleeper, token)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert find_processes(token) == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_watchdog_clears_up_after_a_kill(tmp_path):
    token = uuid.uuid4().hex
    left_over = tmp_path / "left over"
    left_over.mkdir()
    code = f"""
import subprocess, sys, os, time, pathlib
from simulations.processes import guard_run
with guard_run({token!r}, directories=[pathlib.Path({str(left_over)!r})], grace_seconds=1.0):
    environment = os.environ | {{{token_variable!r}: {token!r}}}
    subprocess.Popen([sys.executable, "-c", {sleeper!r}], env=environment, start_new_session=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert wait_until(lambda: len(find_processes(token)) == 1)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not find_processes(token) and not left_over.exists())
    assert wait_until(lambda: not any(child.is_running() for child in children))  # the watchdog too
