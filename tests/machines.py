"""Machines that systemd has booted: the host of a party with a disk, processes and services of its own.

A machine is a set of Linux namespaces with systemd as its first process. Its disk is this machine's, with a layer over
it that takes every change; of the units that are installed here it starts none by itself. The Python environment of the
tests is where ``deploy/`` has it, in ``/opt/ot-federated/venv``, with a copy of the release in it::

    machine = Machine(tmp_path, "owner", host=hosts["owner"])
    machine.write("/etc/systemd/system/it.service", "...")
    with machine.booted():
        machine.run("systemctl", "start", "it")
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.networks import Namespace
from tests.real_federation import copy_release

systemd = Path("/lib/systemd/systemd")
# What is mounted goes with the namespace. What systemd could set for the whole kernel is read-only, and devices are a
# few harmless ones.
_boot = """
set -eu
cd "$1"
mount -t overlay -o lowerdir=/,upperdir=disk,workdir=work overlay root
mount -t overlay -o "lowerdir=$2,upperdir=venv,workdir=work-venv" overlay root/opt/ot-federated/venv
mount --bind "$3" root/opt/python
# A shared libpython is found there, too.
echo /opt/python/lib > root/etc/ld.so.conf.d/python.conf
chroot root ldconfig
mount -t proc proc root/proc
mount --bind root/proc/sys root/proc/sys
mount -o remount,bind,ro root/proc/sys
mount -t sysfs -o ro sysfs root/sys
mount -t cgroup2 cgroup2 root/sys/fs/cgroup
for directory in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs root/$directory; done
chmod 1777 root/tmp
for device in null zero full random urandom tty; do
    touch root/dev/$device
    mount --bind /dev/$device root/dev/$device
done
mkdir root/dev/shm root/dev/pts
mount -t tmpfs -o mode=1777 tmpfs root/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts root/dev/pts
ln -s pts/ptmx root/dev/ptmx
ln -s /proc/self/fd root/dev/fd
find -L root/etc/systemd/system root/lib/systemd/system -maxdepth 1 -name '*.wants' -exec rm -rf {} +
cd root
pivot_root . mnt
umount -l /mnt
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=machine.target --log-target=console --show-status=no
"""


class Machine:
    """A machine that can be booted.

    Args:
        directory: For its disk, on a file system that can be a layer of another.
        name: A word for it.
        host: Its place in a network.
    """

    def __init__(self, directory: Path, name: str, *, host: Namespace) -> None:
        self.directory = directory / name
        self.name = name
        self.host = host
        self.disk = self.directory / "disk"
        for part in ("disk", "work", "venv", "work-venv", "root"):
            (self.directory / part).mkdir(parents=True)
            (self.directory / part).chmod(0o755)
        for part in ("opt/ot-federated/venv", "opt/python"):
            (self.disk / part).mkdir(parents=True)
        self.write("/etc/systemd/system/machine.target", "[Unit]\nWants=systemd-journald.socket\n")
        self.move_environment()
        self.process: subprocess.Popen[bytes] | None = None

    def path(self, path: str) -> Path:
        """Return where a file of its disk is before it is booted; the directory is made."""
        place = self.disk / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write(self, path: str, text: str) -> None:
        """Write a file before it is booted."""
        self.path(path).write_text(text)

    def move_environment(self) -> None:
        """Make this Python environment one that stands in /opt, under other paths than here."""
        base = Path(sys.base_prefix)
        layer = self.directory / "venv"
        programs = layer / "bin"
        programs.mkdir()
        executable = Path(os.path.realpath(sys.executable)).relative_to(base.resolve())
        (layer / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
        for name in ("python", "python3"):
            (programs / name).symlink_to(Path("/opt/python") / executable)
        for program in Path(sysconfig.get_path("scripts")).iterdir():
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = program.read_text()
                if sys.prefix in text and not program.is_symlink():
                    (programs / program.name).write_text(text.replace(sys.prefix, "/opt/ot-federated/venv"))
                    (programs / program.name).chmod(0o755)
        packages = layer / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        # As the wheel installs them; they come before the checkout that `pip install -e` names.
        release = copy_release(packages / "release")
        for package in ("ot_federated", "strategies"):
            (release / package).rename(packages / package)
        shutil.rmtree(release)

    @contextlib.contextmanager
    def booted(self) -> Iterator[Machine]:
        """Boot it, and turn it off after the block; the test is skipped where that is not allowed."""
        group = make_control_group(f"ot-federated-{os.getpid()}-{self.name}")
        script = 'echo $$ > "$1/cgroup.procs"; shift; exec unshare --mount --pid --uts --ipc --cgroup --fork "$@"'
        options = ["--kill-child", "--propagation", "private", "sh", "-c", _boot, "boot"]
        arguments = [str(self.directory), sys.prefix, sys.base_prefix]
        try:
            with (self.directory / "output.log").open("wb") as output, self.host.entered():
                self.process = subprocess.Popen(
                    ["sh", "-c", script, "enter", str(group), *options, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            deadline = time.monotonic() + 60
            while self.run("systemctl", "is-active", "machine.target", check=False).strip() != "active":
                if self.process.poll() is not None:
                    pytest.skip(f"no systemd can be booted here: {(self.directory / 'output.log').read_text()}")
                assert time.monotonic() < deadline, (self.directory / "output.log").read_text()
                time.sleep(0.2)
            yield self
        finally:
            if self.process is not None:
                # With systemd, which it takes along, all processes of its namespace end.
                self.process.kill()
                self.process.wait(timeout=20)
            remove_control_group(group)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command on it as root, and return what it prints."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        if not children:
            return ""
        path = "PATH=/opt/ot-federated/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        quiet = ["HOME=/root", "LANG=C.UTF-8", "FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"]
        inside = ["nsenter", "--all", "--target", str(children[0].pid), "env", "-i", path, *quiet]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}\n{self.journal()}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).strip()

    def journal(self, *options: str) -> str:
        """Return what its services have said."""
        return self.run("journalctl", "--no-pager", "--output", "cat", *options, check=False)


def make_control_group(name: str) -> Path:
    """Make a control group for a machine; the test is skipped where that is not allowed."""
    if not systemd.is_file() or shutil.which("nsenter") is None:
        pytest.skip("systemd or util-linux is missing (Debian: apt-get install systemd)")
    for root in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (root / "cgroup.controllers").is_file():
            try:
                (root / name).mkdir()
            except OSError as error:
                pytest.skip(f"no control group may be made here: {error}")
            return root / name
    pytest.skip("there are no control groups of version 2")


def remove_control_group(group: Path) -> None:
    deadline = time.monotonic() + 20
    while group.exists():
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        assert time.monotonic() < deadline, f"{group} is still in use"
        time.sleep(0.1)
