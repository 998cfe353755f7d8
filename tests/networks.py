"""Hosts of their own for the parties of a real federation: network namespaces that a router joins, and can part.

Each host has one address and one link, to a router in a namespace of its own. A host that is cut off keeps its link:
the router drops what comes from it and what goes to it, without a word, as a network does that is broken somewhere on
the way. Nothing in it reaches the machine's own network: the namespaces have no other link::

    with network("owner", "hospital-a") as hosts, hosts["hospital-a"].cut_off():
        ...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import pytest

_clone_newnet = 0x40000000


class Host(Protocol):
    """Where a party is.

    Attributes:
        address: Under which others reach it.
    """

    address: str

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, sockets of this thread and processes that it starts are this host's."""

    def choose_port(self, usual: int) -> int:
        """Return a port that is free, ``usual`` if it may be."""


class Loopback:
    """This machine, which all parties share."""

    address = "127.0.0.1"

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def choose_port(self, usual: int) -> int:
        return find_free_port()


class Namespace:
    """A host of its own.

    Args:
        name: Of the namespace.
        router: Of the router's namespace.
        link: The router's end of the link.
        number: Tells the hosts of a network apart, from 0 to 63.
    """

    def __init__(self, name: str, *, router: str, link: str, number: int) -> None:
        self.name, self.router, self.link = name, router, link
        # A network for documentation (RFC 5737): four addresses for each link.
        self.address = f"192.0.2.{4 * number + 2}"
        self._gateway = f"192.0.2.{4 * number + 1}"

    def set_up(self) -> None:
        """Make it, and join it to the router."""
        ip("netns", "add", self.name)
        ip("-n", self.router, "link", "add", "name", self.link, "type", "veth", "peer", "eth0", "netns", self.name)
        ip("-n", self.router, "address", "add", f"{self._gateway}/30", "dev", self.link)
        ip("-n", self.router, "link", "set", self.link, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "address", "add", f"{self.address}/30", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "route", "add", "default", "via", self._gateway)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return entered(self.name)

    def choose_port(self, usual: int) -> int:
        return usual

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Lose every packet from it and to it within the block."""
        rules = (["iif", self.link], ["to", self.address])
        for rule in rules:
            ip("-n", self.router, "rule", "add", *rule, "blackhole")
        try:
            yield
        finally:
            for rule in rules:
                ip("-n", self.router, "rule", "delete", *rule, "blackhole")

    @contextlib.contextmanager
    def slowed(self, *, kbits_per_second: int) -> Iterator[None]:
        """Let what goes to it pass slowly within the block."""
        shape = ["root", "tbf", "rate", f"{kbits_per_second}kbit", "burst", "8kb", "latency", "2s"]
        run("tc", "-n", self.router, "qdisc", "add", "dev", self.link, *shape)
        try:
            yield
        finally:
            run("tc", "-n", self.router, "qdisc", "delete", "dev", self.link, "root")

    @property
    def received_bytes(self) -> int:
        """What has passed the router to it so far."""
        with entered(self.router):
            counters = Path("/proc/thread-self/net/dev").read_text()
        line = next(line for line in counters.splitlines() if line.strip().startswith(f"{self.link}:"))
        return int(line.split(":")[1].split()[8])

    def find_open_ports(self, *, seen_from: Namespace) -> set[int]:
        """Try every TCP port of it from another host, and return those that answer."""
        found = set()
        with seen_from.entered():
            for port in range(1, 2**16):
                with socket.socket() as probe:
                    probe.settimeout(5)
                    if probe.connect_ex((self.address, port)) == 0:
                        found.add(port)
        return found


@contextlib.contextmanager
def network(*names: str) -> Iterator[dict[str, Namespace]]:
    """Make hosts and a router between them; the test is skipped where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("hosts are network namespaces, which root on Linux may make")
    if shutil.which("ip") is None:
        pytest.skip("ip is missing (Debian: apt-get install iproute2)")
    remove_forgotten()
    prefix = f"ot-federated-{os.getpid()}"
    router = f"{prefix}-router"
    hosts = {
        name: Namespace(f"{prefix}-{name}", router=router, link=f"link{number}", number=number)
        for number, name in enumerate(names)
    }
    made = subprocess.run(["ip", "netns", "add", router], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces may be made here: {made.stderr.strip()}")
    try:
        with entered(router):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for host in hosts.values():
            host.set_up()
        yield hosts
    finally:
        for namespace in [router, *(host.name for host in hosts.values())]:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def remove_forgotten() -> None:
    """Remove the namespaces of test processes that were killed."""
    for path in Path("/run/netns").glob("ot-federated-*"):
        if not psutil.pid_exists(int(path.name.split("-")[2])):
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Put this thread, and so what it starts, into a network namespace for the length of the block."""
    with Path("/proc/thread-self/ns/net").open("rb") as outside, Path(f"/run/netns/{namespace}").open("rb") as inside:
        set_namespace(inside.fileno())
        try:
            yield
        finally:
            set_namespace(outside.fileno())


def set_namespace(descriptor: int) -> None:
    # os.setns is there from Python 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _clone_newnet):
        raise OSError(ctypes.get_errno(), "setns")


def ip(*words: str) -> None:
    run("ip", *words)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


loopback = Loopback()
