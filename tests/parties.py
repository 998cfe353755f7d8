"""The parties of a real federation as processes: each with a directory, a log and an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

import ot_federated
from ot_federated.certificates import make_node_key
from ot_federated.settings import Scalar
from simulations.launcher import to_toml
from tests.networks import Host

if TYPE_CHECKING:
    from tests.real_federation import RealFederation

checkout = Path(ot_federated.__file__).parents[1]
deploy = checkout / "deploy"
nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

needs_real_processes = [
    pytest.mark.skipif(os.name != "posix", reason="ends processes by POSIX signals"),
    pytest.mark.skipif(nginx is None, reason="nginx is missing (Debian: apt-get install nginx-light)"),
]
temporary_kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Party:
    """One party's process: its host, its directory, its log, its environment."""

    def __init__(self, federation: RealFederation, name: str, *, host: Host) -> None:
        self.federation = federation
        self.name = name
        self.host = host
        self.directory = federation.root / name
        self.directory.mkdir(parents=True)
        self.log = self.directory / "output.log"
        self.launched_at = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **federation.environment,
            "XDG_STATE_HOME": str(self.directory / "state"),
            "OT_FEDERATED_CACHE": str(self.directory / "cache"),
            "FLWR_HOME": str(self.directory / "flower"),
        }

    def launch(self, command: Sequence[str], **environment: str) -> None:
        """Start the party's process; its output is appended to its log."""
        with self.log.open("ab") as output, self.host.entered():
            self.launched_at = output.tell()
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End the process as an operator would, and wait for it."""
        if self.process is not None:
            family = self.family()
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=20)
            _, alive = psutil.wait_procs(family, timeout=5)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def kill(self) -> None:
        """End the process and all that it started, without a word."""
        for process in [*self.family(), *([psutil.Process(self.process.pid)] if self.is_alive else [])]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.wait(timeout=20)

    @property
    def text(self) -> str:
        """What it has said since it was last started."""
        return self.log.read_bytes()[self.launched_at :].decode(errors="replace") if self.log.is_file() else ""

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process and all that it has started where they are, and let them go on after the block."""
        family = [*self.family(), *([psutil.Process(self.process.pid)] if self.process else [])]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)

    def is_listening(self, address: str, port: int) -> bool:
        """Say whether somebody takes connections there, as its host sees it."""
        with self.host.entered(), contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return True
        return False

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def family(self, command: str = "") -> list[psutil.Process]:
        """Return what the process has started; those whose command line has ``command`` in it."""
        found = []
        with contextlib.suppress(psutil.Error):
            if self.process is not None:
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if any(command in word for word in child.cmdline()):
                            found.append(child)
        return found


class SuperLink(Party):
    """The model owner's SuperLink, reachable on loopback alone."""

    def __init__(self, federation: RealFederation, *, host: Host) -> None:
        super().__init__(federation, "superlink", host=host)
        self.port = host.choose_port(9093)

    def start(self) -> None:
        self.launch(
            [str(deploy / "owner" / "superlink.sh")],
            OT_FEDERATED_KEYS=str(self.federation.keys),
            OT_FEDERATED_STATE=str(self.directory),
            OT_FEDERATED_PORT=str(self.port),
        )
        wait_until(lambda: self.is_listening("127.0.0.1", self.port), seconds=300, what=self.federation.logs)


class Proxy(Party):
    """nginx with the configuration of ``deploy/``."""

    def __init__(self, federation: RealFederation, *, host: Host, upstream: int) -> None:
        super().__init__(federation, "proxy", host=host)
        self.port = host.choose_port(9443)
        text = (deploy / "owner" / "nginx.conf").read_text()
        for old, new in {
            "listen 9443 ssl;": f"listen {self.address} ssl;",
            "https://127.0.0.1:9093;": f"https://127.0.0.1:{upstream};",
            "/etc/ot-federated/keys/": f"{federation.keys}/",
        }.items():
            assert old in text, f"deploy/owner/nginx.conf has no {old!r}"
            text = text.replace(old, new)
        (self.directory / "site.conf").write_text(text)
        # What Debian's own nginx.conf has around it, with every path in this directory.
        user = "user root;\n" if os.geteuid() == 0 else ""
        temporary = "".join(f"{kind}_temp_path {kind};\n" for kind in temporary_kinds)
        (self.directory / "nginx.conf").write_text(
            f"{user}daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log stderr warn;\nevents {{}}\n"
            f"http {{\naccess_log access.log;\n{temporary}include site.conf;\n}}\n"
        )

    @property
    def address(self) -> str:
        """Host and port for SuperNodes."""
        return f"{self.host.address}:{self.port}"

    def start(self) -> None:
        assert nginx is not None
        self.launch([nginx, "-p", f"{self.directory}/", "-c", "nginx.conf", "-e", "stderr"])
        wait_until(lambda: self.is_listening(self.host.address, self.port), seconds=120, what=self.federation.logs)


class Node(Party):
    """A data owner's SuperNode."""

    def __init__(
        self, federation: RealFederation, name: str, *, host: Host, data: Path, node_config: Mapping[str, Scalar]
    ) -> None:
        super().__init__(federation, name, host=host)
        self.data = data
        self.etc = self.directory / "etc"
        self.etc.mkdir()
        self.private_key, self.public_key = make_node_key(self.etc / "node.key")
        shutil.copyfile(federation.keys / "ca.crt", self.etc / "ca.crt")
        self.trail = self.directory / "trail.jsonl"
        self.bundles = self.directory / "bundles"
        self.policy = self.etc / "policy.toml"
        self.policy.write_text("format = 1\nrequire-privacy = false\n")
        self.node_config: dict[str, Scalar] = {
            # Its own word for itself: not the name by which the model owner registered it.
            "name": f"self-named-{name}",
            "data-path": str(data),
            "policy": str(self.policy),
            "cache-dir": str(self.bundles),
            "trail": str(self.trail),
            **node_config,
        }

    def start(self, *options: str, before: Sequence[str] = ()) -> None:
        """Start it; ``options`` are further ones of ``flower-supernode``, ``before`` stands before the command."""
        (self.etc / "node.toml").write_text(to_toml(self.node_config))
        self.launch(
            [*before, str(deploy / "data-owner" / "supernode.sh"), *options],
            OT_FEDERATED_SUPERLINK=self.federation.proxy.address,
            OT_FEDERATED_ETC=str(self.etc),
            OT_FEDERATED_NODE_PORT=str(self.host.choose_port(9094)),
        )

    @property
    def node_id(self) -> str:
        """The id that the SuperLink knows it by, once it is connected."""
        return next((line.split()[-1] for line in self.text.splitlines() if "SuperNode ID:" in line), "")

    def come_back(self, *, seconds: float) -> None:
        """Start it again and again, as systemd and Docker do, until the SuperLink takes it.

        Flower takes a node for online until two heartbeats are missing, and starts none that is online: after it was
        killed, a minute goes by at most, and half of one at least.
        """
        deadline = time.monotonic() + seconds
        pauses = iter((30.0,))
        while True:
            self.start()
            wait_until(lambda: self.node_id or not self.is_alive, seconds=seconds, what=self.federation.logs)
            if self.node_id:
                return
            assert time.monotonic() < deadline, self.federation.logs()
            time.sleep(next(pauses, 5.0))

    def client_apps(self) -> list[psutil.Process]:
        """Return the processes that answer a message at this moment: forks of the warm process, or new ones."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                parent, words = process.parent(), process.cmdline()
                forked = parent is not None and "serve" in parent.cmdline() and "serve" in words
                cold = any(word.endswith("/flwr-clientapp") for word in words) and "run" not in words
                found += [process] if forked or cold else []
        return found


def wait_until(condition: Callable[[], object], *, seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
