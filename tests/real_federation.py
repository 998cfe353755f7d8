"""A real federation on loopback, for tests to run on, to break and to attack: the files of ``deploy/``, as processes.

SuperLink, nginx in front of it, and one SuperNode for each data owner, with TLS, node keys, approved code, and a
directory, a data file and a policy of each one's own. Ports are free ones; whatever was started ends with the block,
by process id::

    with RealFederation(tmp_path, model=llama_directory, num_nodes=3).running() as federation:
        outcome = federation.run({"num-server-rounds": 2})
        federation.nodes[0].kill()
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import ot_federated
from ot_federated.certificates import issue_server_certificate, make_authority, make_node_key
from ot_federated.settings import Scalar
from simulations.launcher import to_toml
from simulations.processes import end_processes, token_variable
from tests.federations import build_questions, small_settings, write_rows

checkout = Path(ot_federated.__file__).parents[1]
deploy = checkout / "deploy"
nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

needs_real_processes = [
    pytest.mark.skipif(os.name != "posix", reason="ends processes by POSIX signals"),
    pytest.mark.skipif(nginx is None, reason="nginx is missing (Debian: apt-get install nginx-light)"),
]


@dataclass(frozen=True)
class Outcome:
    """A run that ended.

    Attributes:
        output: The run's directory.
        status: As ``flwr list`` has it, such as ``finished:completed``.
        bytes_to_server: Bytes that Flower received from SuperNodes for this run.
        bytes_to_clients: Bytes that it sent to them.
    """

    output: Path
    run_id: str
    status: str
    bytes_to_server: int
    bytes_to_clients: int

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())

    @property
    def rounds(self) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.output / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line.get("clients")]


class Party:
    """One party's process: its directory, its log, its environment."""

    def __init__(self, federation: RealFederation, name: str) -> None:
        self.federation = federation
        self.name = name
        self.directory = federation.root / name
        self.directory.mkdir(parents=True)
        self.log = self.directory / "output.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **federation.environment,
            "XDG_STATE_HOME": str(self.directory / "state"),
            "OT_FEDERATED_CACHE": str(self.directory / "cache"),
            "FLWR_HOME": str(self.directory / "flower"),
        }

    def launch(self, command: Sequence[str], **environment: str) -> None:
        """Start the party's process; its output is appended to its log."""
        with self.log.open("ab") as output:
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

    def __init__(self, federation: RealFederation) -> None:
        super().__init__(federation, "superlink")
        self.port = find_free_port()

    def start(self) -> None:
        self.launch(
            [str(deploy / "owner" / "superlink.sh")],
            OT_FEDERATED_KEYS=str(self.federation.keys),
            OT_FEDERATED_STATE=str(self.directory),
            OT_FEDERATED_PORT=str(self.port),
        )
        wait_until(lambda: is_listening(self.port), seconds=300, what=self.federation.logs)


class Proxy(Party):
    """nginx with the configuration of ``deploy/``."""

    def __init__(self, federation: RealFederation, *, upstream: int) -> None:
        super().__init__(federation, "proxy")
        self.port = find_free_port()
        text = (deploy / "owner" / "nginx.conf").read_text()
        for old, new in {
            "listen 9443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
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

    def start(self) -> None:
        assert nginx is not None
        self.launch([nginx, "-p", f"{self.directory}/", "-c", "nginx.conf", "-e", "stderr"])
        wait_until(lambda: is_listening(self.port), seconds=120, what=self.federation.logs)


temporary_kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Node(Party):
    """A data owner's SuperNode."""

    def __init__(self, federation: RealFederation, name: str, *, data: Path, node_config: Mapping[str, Scalar]) -> None:
        super().__init__(federation, name)
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

    def start(self, *options: str) -> None:
        """Start it; ``options`` are further ones of ``flower-supernode``."""
        (self.etc / "node.toml").write_text(to_toml(self.node_config))
        self.launch(
            [str(deploy / "data-owner" / "supernode.sh"), *options],
            OT_FEDERATED_SUPERLINK=f"127.0.0.1:{self.federation.proxy.port}",
            OT_FEDERATED_ETC=str(self.etc),
            OT_FEDERATED_NODE_PORT=str(find_free_port()),
        )

    @property
    def node_id(self) -> str:
        """The id that the SuperLink knows it by, once it is connected."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return next((line.split()[-1] for line in lines if "SuperNode ID:" in line), "")

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


@dataclass
class RealFederation:
    """See the module's text.

    Attributes:
        root: An empty directory for everything.
        model: A ``save_pretrained`` directory.
        num_nodes: Data owners: ``hospital-a``, ``hospital-b``, ...
        num_rows: Rows of each one's own data file.
        node_config: Further keys of every node's config.
        app: The app that runs are submitted with: a directory or a FAB; by default the checkout as it is now.
        environment: Of every process.
    """

    root: Path
    model: Path
    num_nodes: int = 3
    num_rows: int = 16
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    app: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token = uuid.uuid4().hex
        # A copy: an edit while the federation runs would make another bundle of it, which nobody has approved.
        self.release = copy_release(self.root / "release")
        self.app = self.app or self.release
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "PYTHONPATH": str(self.release),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            token_variable: self.token,
            **self.environment,
        }
        for name in ("OT_FEDERATED_TRAIL", "OT_FEDERATED_LEDGERS", "OT_FEDERATED_BUNDLE_CACHE"):
            self.environment.pop(name, None)
        self.keys = self.root / "keys"
        make_authority(self.keys)
        issue_server_certificate(self.keys, authority=self.keys, hosts=["127.0.0.1"])
        self.superlink = SuperLink(self)
        self.proxy = Proxy(self, upstream=self.superlink.port)
        self.public_data = write_rows(self.root / "public.jsonl", build_questions(8, start=1000))
        self.nodes = [
            self.build_node(f"hospital-{chr(ord('a') + number)}", start=number * self.num_rows)
            for number in range(self.num_nodes)
        ]
        self.num_runs = 0
        home = Path(self.superlink.environment["FLWR_HOME"])
        home.mkdir()
        text = (deploy / "owner" / "flower-config.toml").read_text()
        text = text.replace("127.0.0.1:9093", f"127.0.0.1:{self.superlink.port}")
        (home / "config.toml").write_text(text.replace("/etc/ot-federated/keys/", f"{self.keys}/"))

    def build_node(self, name: str, *, start: int = 0) -> Node:
        """Make a data owner with data, keys and policy; it is neither registered nor started."""
        data = write_rows(self.root / "data" / f"{name}.jsonl", build_questions(self.num_rows, start=start))
        return Node(self, name, data=data, node_config=self.node_config)

    @contextlib.contextmanager
    def running(self) -> Iterator[RealFederation]:
        """Start all parties, register the nodes, and approve the app at each; end everything at the end."""
        try:
            self.superlink.start()
            self.proxy.start()
            self.register(*self.nodes)
            self.approve(*self.nodes)
            for node in self.nodes:
                node.start()
            for node in self.nodes:
                wait_until(lambda node=node: node.node_id, seconds=600, what=self.logs)
            yield self
        finally:
            for party in [*self.nodes, self.superlink, self.proxy]:
                party.stop()
            end_processes(self.token, grace_seconds=3)

    def execute(
        self, *command: str, party: Party | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as a party, by default the model owner."""
        party = party or self.superlink
        done = subprocess.run(
            command,
            cwd=party.directory,
            env=party.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def register(self, *nodes: Node) -> None:
        """Register nodes under their names, as the model owner."""
        directory = self.root / "public-keys"
        directory.mkdir(exist_ok=True)
        files = [str(shutil.copyfile(node.public_key, directory / f"{node.name}.pub")) for node in nodes]
        self.execute(str(deploy / "owner" / "register.sh"), *files)

    def approve(self, *nodes: Node) -> None:
        """Put the app on the nodes' lists; it is looked at once."""
        first, *others = nodes
        command = ["ot-federated", "approve", str(self.app), "--yes", "--differing"]
        self.execute(*command, "--approved", str(first.etc / "approved.json"), party=first)
        for node in others:
            shutil.copy2(first.etc / "approved.json", node.etc / "approved.json")

    def settings(self, **changes: Scalar) -> dict[str, Scalar]:
        """Return the run config of the next run."""
        self.num_runs += 1
        output = self.root / f"run-{self.num_runs}"
        settings = small_settings(self.model, data=self.public_data, output=output)
        settings |= {
            "strategy.min-nodes": self.num_nodes,
            # Each message is answered by a new process, and the machine may be busy.
            "strategy.node-timeout-seconds": 120.0,
            "strategy.round-timeout-seconds": 600.0,
            "strategy.shard-bytes": 2**20,
        }
        return settings | changes

    def submit(self, settings: Mapping[str, Scalar] | None = None) -> tuple[str, Path]:
        """Submit a run; return its id and its directory."""
        config = self.settings(**(settings or {}))
        output = Path(str(config["output-dir"]))
        config_file = self.root / f"{output.name}.toml"
        config_file.write_text(to_toml(config))
        done = self.execute("flwr", "run", str(self.app), "owner", "--run-config", str(config_file), "--format", "json")
        return str(json.loads(done.stdout)["run-id"]), output

    def run(self, settings: Mapping[str, Scalar] | None = None, *, seconds: float = 600) -> Outcome:
        """Submit a run and wait for its end."""
        run_id, output = self.submit(settings)
        return self.wait(run_id, output, seconds=seconds)

    def wait(self, run_id: str, output: Path, *, seconds: float = 600) -> Outcome:
        """Wait until a run has left its summary, or the reason of its failure, and is over."""
        ends = (output / "summary.json", output / "failure.txt")
        wait_until(lambda: any(path.is_file() for path in ends), seconds=seconds, what=self.logs)
        deadline = time.monotonic() + 30
        while not (found := self.find_run(run_id))["status"].startswith("finished"):
            assert time.monotonic() < deadline, self.logs()
        return Outcome(
            output=output,
            run_id=run_id,
            status=found["status"],
            bytes_to_server=int(found["network-traffic"]["inbound-bytes"]),
            bytes_to_clients=int(found["network-traffic"]["outbound-bytes"]),
        )

    def find_run(self, run_id: str) -> dict[str, Any]:
        """Return what ``flwr list`` tells of a run."""
        listing = json.loads(self.execute("flwr", "list", "owner", "--format", "json").stdout)
        return next(run for run in listing["runs"] if str(run["run-id"]) == run_id)

    def logs(self) -> str:
        """Return the end of every party's log."""
        logs = sorted(self.root.glob("*/output.log"))
        return "\n".join(f"== {log.parent.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs)


def copy_release(target: Path) -> Path:
    """Copy what a release consists of."""
    target.mkdir(parents=True)
    for name in ("ot_federated", "strategies"):
        shutil.copytree(checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(checkout / name, target / name)
    return target


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def is_healthy(port: int) -> bool:
    """Say whether a SuperLink without TLS answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    return False


def wait_until(condition: Callable[[], object], *, seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def freeze(process: psutil.Process) -> None:
    """Stop a process where it is; ``process.resume()`` lets it go on."""
    process.send_signal(signal.SIGSTOP)
