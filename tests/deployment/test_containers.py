"""``deploy/compose.yaml`` as containers: both parties up, one run, the killed one back, and each ended by SIGTERM.

It wants a Docker daemon and both images, and builds or pulls neither: ``docker compose --profile owner build`` in
``deploy/``. What the machine has in ``/etc`` and ``/srv`` is replaced by directories of the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ot_federated.certificates import issue_server_certificate, make_authority, make_node_key
from simulations.launcher import to_toml
from tests.federations import build_questions, small_settings, write_rows
from tests.parties import deploy, wait_until

user = 10001
release, srv, state = "/opt/ot-federated", Path("/srv/ot-federated"), "/var/lib/ot-federated"
images = ("ot-federated:0.1.0", "nginx:1.28")


def missing() -> str:
    """Return why this cannot run here, or nothing."""
    if shutil.which("docker") is None or os.geteuid():
        return "docker is missing, or this is not root, who gives the files to the containers' user"
    for command in (["compose", "version"], ["version"], *(["image", "inspect", image] for image in images)):
        if subprocess.run(["docker", *command], capture_output=True, timeout=60, check=False).returncode:
            return f"docker {' '.join(command)} fails: no compose plugin, no daemon, or no image"
    return ""


reason = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]


@dataclass(frozen=True)
class Compose:
    """The project of ``deploy/``, under another name and with other directories of the machine."""

    override: Path

    def run(self, *words: str) -> str:
        command = ["docker", "compose", "-p", "ot-federated-test", "-f", deploy / "compose.yaml", "-f", self.override]
        environment = {**os.environ, "OT_FEDERATED_SUPERLINK": "fl.example.org:9443", "OT_FEDERATED_MEMORY": "4g"}
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout

    def execute(self, *words: str) -> str:
        return self.run("exec", "-T", "superlink", *words)

    def logs(self) -> str:
        return self.run("--profile", "*", "logs", "--no-color", "--tail", "60")

    def inspect(self, service: str) -> dict[str, dict[str, int]]:
        name = self.run("ps", "-a", "-q", service).strip()
        return json.loads(subprocess.run(["docker", "inspect", name], capture_output=True, check=True).stdout)[0]

    def status_of(self, run_id: str) -> str:
        runs = json.loads(self.execute("flwr", "list", "owner", "--format", "json"))["runs"]
        return next(run["status"] for run in runs if str(run["run-id"]) == run_id)


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory, llama_directory: Path) -> Iterator[Compose]:
    root = tmp_path_factory.mktemp("containers")
    keys, etc, data = root / "keys", root / "etc", root / "srv"
    make_authority(keys)
    issue_server_certificate(keys, authority=keys, hosts=["fl.example.org"])
    etc.mkdir()
    shutil.copytree(llama_directory, data / "model")
    _, public_key = make_node_key(etc / "node.key")
    shutil.move(public_key, data / "hospital-a.pub")
    shutil.copyfile(keys / "ca.crt", etc / "ca.crt")
    shutil.copyfile(deploy / "data-owner" / "node.toml", etc / "node.toml")
    (etc / "policy.toml").write_text("format = 1\nrequire-privacy = false\n")
    write_rows(data / "train.jsonl", build_questions(16))
    rows = write_rows(data / "questions.jsonl", build_questions(8, start=1000))
    config = small_settings(srv / "model", data=rows, output=Path(state) / "runs/first")
    config |= {f"data.{part}": str(srv / rows.name) for part in ("train", "validation", "test")}
    (data / "run.toml").write_text(to_toml({**config, "strategy.min-nodes": 1}))
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    services = {
        "superlink": {"environment": threads, "volumes": [f"{keys}:/etc/ot-federated/keys:ro", f"{data}:{srv}:ro"]},
        "nginx": {"volumes": [f"{keys}:/etc/ot-federated/keys:ro"]},
        "supernode": {
            "environment": threads,
            "volumes": [f"{etc}:/etc/ot-federated:ro", f"{data}:{srv}:ro"],
            "extra_hosts": ["fl.example.org:host-gateway"],
        },
    }
    override = root / "override.yaml"
    override.write_text(yaml.safe_dump({"services": services}))
    made = Compose(override)
    approve = ["ot-federated", "approve", release, "--yes", "--approved", "/etc/ot-federated/approved.json"]
    mount = ["-u", "0", "-v", f"{etc}:/etc/ot-federated"]
    subprocess.run(["docker", "run", "--rm", *mount, images[0], *approve], capture_output=True, timeout=300, check=True)
    for path in (root, *root.rglob("*")):
        os.chown(path, user, user)
    # The directories above are pytest's, for its user alone; a bind mount needs no way to them.
    try:
        made.run("--profile", "owner", "up", "-d", "--no-build", "--pull", "never")
        wait_until(lambda: "Uvicorn running" in made.run("logs", "superlink"), seconds=120, what=made.logs)
        made.execute(f"{release}/deploy/owner/register.sh", str(srv / "hospital-a.pub"))
        made.run("--profile", "data-owner", "up", "-d", "--no-build", "--pull", "never")
        wait_until(lambda: "SuperNode ID:" in made.run("logs", "supernode"), seconds=300, what=made.logs)
        yield made
    finally:
        made.run("--profile", "*", "down", "--volumes")


def test_a_run_completes(compose: Compose) -> None:
    for service in ("superlink", "supernode"):
        assert compose.run("exec", "-T", service, "id", "-u").strip() == str(user)
    command = ["flwr", "run", release, "owner", "--run-config", str(srv / "run.toml"), "--format", "json"]
    run_id = str(json.loads(compose.execute(*command))["run-id"])
    wait_until(lambda: compose.status_of(run_id).startswith("finished"), seconds=900, what=compose.logs)
    assert compose.status_of(run_id) == "finished:completed", compose.logs()
    assert json.loads(compose.execute("cat", f"{state}/runs/first/summary.json"))["adapter_sha256"]


def test_a_killed_supernode_comes_back(compose: Compose) -> None:
    before = compose.inspect("supernode")
    assert before["HostConfig"]["Memory"] == 4 * 2**30
    os.kill(before["State"]["Pid"], 9)
    taken = 2
    wait_until(lambda: compose.run("logs", "supernode").count("SuperNode ID:") == taken, seconds=200, what=compose.logs)
    assert compose.inspect("supernode")["RestartCount"]


def test_sigterm_ends_them_well(compose: Compose) -> None:
    for service in ("supernode", "superlink"):
        started = time.monotonic()
        compose.run("stop", service)
        assert time.monotonic() - started < 60
        # Ended by itself, by the signal or after it, and not by SIGKILL.
        assert compose.inspect(service)["State"]["ExitCode"] in {0, 143}, compose.logs()
