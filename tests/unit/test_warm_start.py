"""Warm starts, with small stand-ins for Flower and the packages that are imported beforehand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ot_federated.data_owner import warm_start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts are for Linux")

# What flwr-clientapp is here: it tells where it is, or ends in the way that it is asked to.
client_app = """
import os, sys, time
imported = os.getpid()

def flwr_clientapp():
    if sys.argv[1] == "tell":
        print("warm" if imported != os.getpid() else "cold", os.getcwd(), os.environ.get("TOLD"), sys.argv[2:])
    elif sys.argv[1] == "sleep":
        open(sys.argv[2], "w").write(str(os.getpid()))
        time.sleep(60)
    else:
        sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    root = tmp_path / "packages"
    (root / "flwr" / "supernode").mkdir(parents=True)
    for name in ("flwr/__init__.py", "flwr/supernode/__init__.py"):
        (root / name).touch()
    (root / "flwr" / "supernode" / "cli.py").write_text(client_app)
    for name in ("torch", "transformers", "datasets", "peft"):
        (root / f"{name}.py").write_text("raise ImportError")
    return root


@pytest.fixture
def home(tmp_path: Path, packages: Path) -> Iterator[Path]:
    # A path that is too long for a socket's address.
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    command = [sys.executable, "-P", warm_start.__file__, "serve"]
    server = subprocess.Popen(command, cwd=directory, env=environment)
    deadline = time.monotonic() + 60
    while not (directory / warm_start.socket_name).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield directory
    server.kill()
    server.wait()


def stand_in(home: Path, *arguments: str, cold: str = "/bin/echo", **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-IS", warm_start.__file__, "run", str(home), cold, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_fork_has_the_arguments_directory_environment_and_output(home: Path, tmp_path: Path) -> None:
    process = stand_in(home, "tell", "--token", "x y", cwd=tmp_path, env={**os.environ, "TOLD": "yes"})
    assert process.communicate(timeout=60)[0].split(maxsplit=3) == [
        "warm",
        str(tmp_path),
        "yes",
        "['--token', 'x y']\n",
    ]
    assert process.returncode == 0


@pytest.mark.parametrize("code", [0, 3, 200])
def test_it_ends_as_the_fork_ends(home: Path, code: int) -> None:
    process = stand_in(home, str(code))
    process.communicate(timeout=60)
    assert process.returncode == code


def test_the_fork_ends_when_the_stand_in_is_killed(home: Path, tmp_path: Path) -> None:
    process, told = stand_in(home, "sleep", str(tmp_path / "pid")), tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (told.is_file() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fork = psutil.Process(int(told.read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    fork.wait(timeout=20)
    # And the next one is answered.
    assert stand_in(home, "tell").communicate(timeout=60)[0].startswith("warm")


def test_the_stand_in_tells_when_the_fork_is_killed(home: Path, tmp_path: Path) -> None:
    process, told = stand_in(home, "sleep", str(tmp_path / "pid")), tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (told.is_file() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int(told.read_text()), signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == 256 - signal.SIGKILL


def test_two_messages_at_once(home: Path) -> None:
    processes = [stand_in(home, "tell", str(number)) for number in range(2)]
    assert all(process.communicate(timeout=60)[0].startswith("warm") for process in processes)


def test_without_a_warm_process_it_is_flowers_own(tmp_path: Path) -> None:
    process = stand_in(tmp_path, "--token", "secret")
    assert process.communicate(timeout=60)[0] == "--token secret\n"
    assert process.returncode == 0


def test_a_process_with_threads_or_with_code_of_this_project_serves_nobody(tmp_path: Path, packages: Path) -> None:
    """A fork must import the run's approved code, and never meet the installed one under its name."""
    threads = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    for damage in (threads, "import ot_federated"):
        (packages / "datasets.py").write_text(damage)
        path = os.pathsep.join([str(packages), str(Path(warm_start.__file__).parents[2])])
        command = [sys.executable, "-P", warm_start.__file__, "serve"]
        directory = tmp_path / str(len(damage))
        directory.mkdir()
        environment = {**os.environ, "PYTHONPATH": path}
        assert subprocess.run(command, cwd=directory, env=environment, timeout=60, check=False).returncode == 0
        assert stand_in(directory, "cold").communicate(timeout=60)[0] == "cold\n"
