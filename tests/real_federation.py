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
import ssl
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ot_federated.certificates import issue_server_certificate, make_authority
from ot_federated.data_owner.audit_trail import Entry, read_trail
from ot_federated.settings import Scalar
from simulations.launcher import to_toml
from simulations.processes import end_processes, token_variable
from tests.federations import build_questions, small_settings, write_rows
from tests.networks import Host, loopback
from tests.parties import Node, Party, Proxy, SuperLink, checkout, deploy, wait_until


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

    def checkpoint(self, server_round: int) -> dict[str, Tensor]:
        """The aggregated adapter after a round."""
        return load_file(self.output / "checkpoints" / f"round-{server_round:04d}" / "adapter.safetensors")


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
        hosts: Where the parties are: ``owner``, and data owners by name; who is not in it is on loopback.
    """

    root: Path
    model: Path
    num_nodes: int = 3
    num_rows: int = 16
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    app: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)

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
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
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
        owner = self.hosts.get("owner", loopback)
        issue_server_certificate(self.keys, authority=self.keys, hosts=[owner.address])
        self.superlink = SuperLink(self, host=owner)
        self.proxy = Proxy(self, host=owner, upstream=self.superlink.port)
        self.public_data = write_rows(self.root / "public.jsonl", build_questions(8, start=1000))
        self.nodes = [
            self.build_node(f"hospital-{chr(ord('a') + number)}", start=number * self.num_rows)
            for number in range(self.num_nodes)
        ]
        self.num_runs = 0
        self.approved: Path | None = None
        home = Path(self.superlink.environment["FLWR_HOME"])
        home.mkdir()
        text = (deploy / "owner" / "flower-config.toml").read_text()
        text = text.replace("127.0.0.1:9093", f"127.0.0.1:{self.superlink.port}")
        (home / "config.toml").write_text(text.replace("/etc/ot-federated/keys/", f"{self.keys}/"))

    def build_node(self, name: str, *, start: int = 0) -> Node:
        """Make a data owner with data, keys and policy; it is neither registered nor started."""
        data = write_rows(self.root / "data" / f"{name}.jsonl", build_questions(self.num_rows, start=start))
        return Node(self, name, host=self.hosts.get(name, loopback), data=data, node_config=self.node_config)

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
        with party.host.entered():
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
        for node in nodes:
            if self.approved is None:
                self.approved = node.etc / "approved.json"
                command = ["ot-federated", "approve", str(self.app), "--yes", "--differing"]
                self.execute(*command, "--approved", str(self.approved), party=node)
            else:
                shutil.copy2(self.approved, node.etc / "approved.json")

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
        deadline = time.monotonic() + 120
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


def refusal_of(federation: RealFederation, node: Node, *signs: str) -> str:
    """Wait until a node that was refused has ended, and return which of ``signs`` it has said; empty: none."""
    wait_until(lambda: not node.is_alive, seconds=120, what=federation.logs)
    assert not node.node_id, node.text
    return next((sign for sign in signs if sign in node.text), "")


def call(
    federation: RealFederation, port: int, path: str, *, method: str = "POST", body: bytes = b"", protobuf: bool = False
) -> tuple[int, str]:
    """Call nginx or the SuperLink as anybody could who has the authority's certificate."""
    context = ssl.create_default_context(cafile=str(federation.keys / "ca.crt"))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    headers = {"Content-Type": "application/protobuf", "Accept": "application/protobuf"} if protobuf else {}
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def examine(federation: RealFederation, side: str, *, node: Node | None = None, proxy: int = 0) -> dict[str, Any]:
    """Ask the doctor about one side."""
    door = f"127.0.0.1:{proxy}" if proxy else federation.proxy.address
    if side == "owner":
        options = ["--keys", str(federation.keys), "--superlink", f"127.0.0.1:{federation.superlink.port}"]
        options += ["--proxy", door, "--state", str(federation.superlink.directory), "--connection", "owner"]
    else:
        assert node is not None
        options = ["--etc", str(node.etc), "--superlink", door]
    done = federation.execute("ot-federated", "doctor", side, *options, "--json", party=node, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if found["errors"] else 0)
    return found


def trained(node: Node, *flower_runs: str) -> list[Entry]:
    """Return the updates that left a node in these runs."""
    entries = [entry for entry in read_trail(node.trail) if isinstance(entry, Entry)]
    return [entry for entry in entries if entry.message == "train" and entry.flower_run in flower_runs]


def copy_release(target: Path) -> Path:
    """Copy what a release consists of."""
    target.mkdir(parents=True)
    for name in ("ot_federated", "strategies"):
        shutil.copytree(checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(checkout / name, target / name)
    return target
