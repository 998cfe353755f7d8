"""The units of ``deploy/systemd``, started by systemd on two machines, every file where ``deploy/README.md`` puts it.

nginx is Debian's own service. Nothing in the files of ``deploy/`` is replaced, so that what is tested is also what the
units forbid: both parties run as ``ot-federated``, with the disk read-only but for ``/var/lib/ot-federated``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ot_federated.certificates import issue_server_certificate, make_authority, make_node_key
from simulations.launcher import to_toml
from tests.federations import build_questions, small_settings, write_rows
from tests.machines import Machine
from tests.networks import network
from tests.parties import deploy, needs_real_processes, wait_until
from tests.real_federation import copy_release

pytestmark = [
    pytest.mark.slow,
    *needs_real_processes,
    pytest.mark.skipif(
        not Path("/lib/systemd/system/nginx.service").is_file(), reason="Debian's nginx service is missing"
    ),
]
superlink, supernode = "ot-federated-superlink.service", "ot-federated-supernode.service"


@dataclass(frozen=True)
class Machines:
    """Where each unit runs."""

    owner: Machine
    data_owner: Machine

    def __iter__(self) -> Iterator[tuple[Machine, str]]:
        return iter([(self.owner, superlink), (self.data_owner, supernode)])

    def logs(self) -> str:
        return "\n".join(f"== {machine.name}\n{machine.journal()[-8000:]}" for machine, _ in self)

    def wait_for_superlink(self) -> None:
        """Wait until it answers."""
        listens = ["sh", "-c", "ss -Hltn sport = :9093"]
        wait_until(lambda: self.owner.run(*listens).strip(), seconds=120, what=self.logs)

    def wait_for_node(self, *, seconds: float) -> None:
        """Wait until the SuperLink has taken the SuperNode as it runs now."""

        def taken() -> bool:
            started = self.data_owner.show(supernode, "InvocationID")
            return "SuperNode ID:" in self.data_owner.journal(f"_SYSTEMD_INVOCATION_ID={started}")

        wait_until(taken, seconds=seconds, what=self.logs)

    def find_run(self, run_id: str) -> str:
        """Return the status of a run."""
        runs = json.loads(self.owner.run("flwr", "list", "owner", "--format", "json"))["runs"]
        return next(run["status"] for run in runs if str(run["run-id"]) == run_id)


def set_up(machine: Machine, unit: str, *, address: str) -> None:
    """Copy what both sides have."""
    machine.write("/etc/hosts", f"127.0.0.1 localhost\n{address} fl.example.org\n")
    shutil.copytree(deploy, machine.path("/opt/ot-federated/deploy"))
    copy_release(machine.path("/opt/ot-federated/release"))
    shutil.copyfile(deploy / "systemd" / unit, machine.path(f"/etc/systemd/system/{unit}"))


def set_up_owner(machine: Machine, *, node_key: Path, model: Path) -> None:
    keys = machine.path("/etc/ot-federated/keys")
    make_authority(keys)
    issue_server_certificate(keys, authority=keys, hosts=["fl.example.org"])
    shutil.copyfile(deploy / "owner" / "nginx.conf", machine.path("/etc/nginx/conf.d/ot-federated.conf"))
    shutil.copyfile(deploy / "owner" / "flower-config.toml", machine.path("/root/.flwr/config.toml"))
    shutil.copyfile(node_key, machine.path("/root/hospital-a.pub"))
    shutil.copytree(model, machine.path("/srv/ot-federated/model"))
    data = write_rows(machine.path("/srv/ot-federated/questions.jsonl"), build_questions(8, start=1000))
    config = small_settings(Path("/srv/ot-federated/model"), data=data, output=Path("/var/lib/ot-federated/runs/first"))
    config |= {f"data.{part}": "/srv/ot-federated/questions.jsonl" for part in ("train", "validation", "test")}
    config |= {
        "strategy.min-nodes": 1,
        "strategy.node-timeout-seconds": 120.0,
        "strategy.round-timeout-seconds": 600.0,
    }
    machine.write("/root/run.toml", to_toml(config))


def set_up_data_owner(machine: Machine, *, authority: Path, node_key: Path) -> None:
    shutil.copyfile(authority, machine.path("/etc/ot-federated/ca.crt"))
    shutil.copyfile(node_key, machine.path("/etc/ot-federated/node.key"))
    machine.path("/etc/ot-federated/node.key").chmod(0o600)
    shutil.copyfile(deploy / "data-owner" / "node.toml", machine.path("/etc/ot-federated/node.toml"))
    machine.write("/etc/ot-federated/policy.toml", "format = 1\nrequire-privacy = false\n")
    machine.write("/etc/ot-federated/supernode.env", "OT_FEDERATED_SUPERLINK=fl.example.org:9443\n")
    write_rows(machine.path("/srv/ot-federated/train.jsonl"), build_questions(16))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, llama_directory: Path) -> Iterator[Machines]:
    root = tmp_path_factory.mktemp("machines")
    private_key, public_key = make_node_key(root / "node.key")
    with network("owner", "hospital-a") as hosts, contextlib.ExitStack() as stack:
        made = Machines(*(Machine(root, name, host=hosts[name]) for name in ("owner", "hospital-a")))
        for machine, unit in made:
            set_up(machine, unit, address=hosts["owner"].address)
        set_up_owner(made.owner, node_key=public_key, model=llama_directory)
        authority = made.owner.path("/etc/ot-federated/keys/ca.crt")
        set_up_data_owner(made.data_owner, authority=authority, node_key=private_key)
        for machine, _ in made:
            stack.enter_context(machine.booted())
            machine.run("useradd", "--system", "ot-federated")
        approve = ["ot-federated", "approve", "/opt/ot-federated/release", "--yes", "--differing"]
        made.data_owner.run(*approve, "--approved", "/etc/ot-federated/approved.json")
        for machine, _ in made:
            machine.run("chown", "-R", "ot-federated", "/etc/ot-federated", "/srv/ot-federated")
        made.owner.run("systemctl", "start", "nginx", superlink)
        made.wait_for_superlink()
        made.owner.run("/opt/ot-federated/deploy/owner/register.sh", "/root/hospital-a.pub")
        made.data_owner.run("systemctl", "start", supernode)
        made.wait_for_node(seconds=300)
        yield made


def test_both_units_come_up_and_a_run_completes(machines: Machines) -> None:
    for machine, unit in machines:
        assert machine.show(unit, "ActiveState") == "active"
        pid = machine.show(unit, "MainPID")
        assert machine.run("ps", "-o", "user=", "-p", pid).strip() == "ot-federated"
    command = ["flwr", "run", "/opt/ot-federated/release", "owner", "--run-config", "/root/run.toml"]
    run_id = str(json.loads(machines.owner.run(*command, "--format", "json"))["run-id"])
    wait_until(lambda: machines.find_run(run_id).startswith("finished"), seconds=600, what=machines.logs)
    assert machines.find_run(run_id) == "finished:completed", machines.logs()
    summary = json.loads(machines.owner.run("cat", "/var/lib/ot-federated/runs/first/summary.json"))
    assert summary["adapter_sha256"]


def test_they_come_back_after_they_were_killed(machines: Machines) -> None:
    before = {unit: machine.show(unit, "MainPID") for machine, unit in machines}
    for machine, unit in machines:
        machine.run("kill", "-KILL", before[unit])
    for machine, unit in machines:
        gone = ("0", before[unit])
        wait_until(
            lambda machine=machine, unit=unit, gone=gone: machine.show(unit, "MainPID") not in gone,
            seconds=60,
            what=machines.logs,
        )
    machines.wait_for_superlink()
    # Flower takes the killed one for online until two heartbeats are missing, and until then systemd tries in vain.
    machines.wait_for_node(seconds=200)
    for machine, unit in machines:
        assert machine.show(unit, "ActiveState") == "active"
        assert int(machine.show(unit, "NRestarts")) >= 1


def test_sigterm_ends_them_well(machines: Machines) -> None:
    for machine, unit in machines:
        group = Path("/sys/fs/cgroup") / machine.show(unit, "ControlGroup").lstrip("/")
        started = time.monotonic()
        machine.run("systemctl", "stop", unit)
        assert time.monotonic() - started < 60
        assert machine.show(unit, "ActiveState") == "inactive", machines.logs()
        assert machine.show(unit, "Result") == "success"
        assert not machine.run("cat", f"{group}/cgroup.procs", check=False)
