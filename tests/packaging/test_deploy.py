"""Files of ``deploy/`` that few machines can run: compose file and units say the same as those that all run."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import ot_federated
from ot_federated.data_owner.doctor import known_keys
from ot_federated.data_owner.policy import load_policy

deploy = Path(ot_federated.__file__).parents[1] / "deploy"
units = sorted((deploy / "systemd").glob("*.service"))


def read_unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text())
    return parser


def test_the_compose_file_starts_the_scripts_that_are_there() -> None:
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())
    services = compose["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "superlink": ["owner"],
        "nginx": ["owner"],
        "supernode": ["data-owner"],
    }
    for name in ("superlink", "supernode"):
        (command,) = services[name]["command"]
        script = deploy / Path(command).relative_to("/opt/ot-federated/deploy")
        assert script.stat().st_mode & 0o111
        # What the script reads is what the file sets, but for ports, which have defaults.
        read = set(variables(script)) - {"OT_FEDERATED_PORT", "OT_FEDERATED_NODE_PORT"}
        assert read <= set(services[name]["environment"])
    for service in services.values():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            assert not source.startswith("./") or (deploy / source).is_file()
            named = not source.startswith((".", "/"))
            assert not named or source in compose["volumes"]
            assert target.startswith("/")
    # Models and data: the ServerApp runs in the SuperLink's container.
    for name in ("superlink", "supernode"):
        assert "/srv/ot-federated:/srv/ot-federated:ro" in services[name]["volumes"]
    # A directory that comes about for a file mounted into it is root's, and Flower writes the app beside its
    # configuration: it must be in the image, from which a new volume takes it with its owner.
    superlink, image = services["superlink"], (deploy / "Dockerfile").read_text()
    home = superlink["environment"]["FLWR_HOME"]
    assert f"mkdir -p {home} && chown -R ot-federated {superlink['working_dir']}" in image
    assert home.startswith(f"{superlink['working_dir']}/")
    # The SuperLink's port is published nowhere: only nginx's, which shares its network.
    assert services["superlink"]["ports"] == ["9443:9443"]
    assert services["nginx"]["network_mode"] == "service:superlink"
    assert "ports" not in services["supernode"]
    assert services["supernode"]["mem_limit"]


def variables(script: Path) -> list[str]:
    words = script.read_text().split("${")[1:]
    return [word.split(":")[0] for word in words if word.startswith("OT_FEDERATED_")]


@pytest.mark.parametrize("unit", units, ids=lambda path: path.stem)
def test_a_unit_starts_a_script_that_is_there(unit: Path) -> None:
    service = read_unit(unit)["Service"]
    script = deploy / Path(service["ExecStart"]).relative_to("/opt/ot-federated/deploy")
    assert script.stat().st_mode & 0o111
    assert service["User"] == "ot-federated"
    assert service["KillMode"] == "mixed"
    # A message that takes all memory ends its process, and neither the node nor the machine.
    if "supernode" in unit.stem:
        assert service["MemoryMax"]
        assert service["OOMPolicy"] == "continue"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("unit", units, ids=lambda path: path.stem)
def test_systemd_finds_no_fault_with_a_unit(unit: Path, tmp_path: Path) -> None:
    script = deploy / Path(read_unit(unit)["Service"]["ExecStart"]).relative_to("/opt/ot-federated/deploy")
    copy = tmp_path / unit.name
    # systemd looks whether the program exists, which is not installed here.
    copy.write_text(unit.read_text().replace(read_unit(unit)["Service"]["ExecStart"], str(script)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    # What it says of other units of the machine is not this one's fault.
    faults = [line for line in done.stderr.splitlines() if unit.stem in line]
    assert not faults
    broken = copy.with_name("broken.service")
    broken.write_text(copy.read_text().replace("KillMode=mixed", "KilMode=mixd"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(broken)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KilMode" in done.stderr


def test_the_data_owners_examples_are_read() -> None:
    node = tomllib.loads((deploy / "data-owner" / "node.toml").read_text())
    # By default the bundle comes from the server.
    assert set(node) == set(known_keys) - {"bundle-path"}
    policy = load_policy(deploy / "data-owner" / "policy.toml")
    assert policy.require_privacy


def test_the_owners_example_is_a_run_config_that_the_data_owners_example_allows() -> None:
    from ot_federated.config import parse_run_config

    tables = tomllib.loads((deploy / "owner" / "run.toml").read_text())
    flat = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    for table, values in tables.items():
        if isinstance(values, dict):
            flat |= {f"{table}.{name}": value for name, value in values.items()}
    config = parse_run_config(flat)
    policy = load_policy(deploy / "data-owner" / "policy.toml")
    assert config.privacy.mode == "example"
    assert config.privacy.target_epsilon <= policy.max_epsilon
    assert config.privacy.target_delta <= policy.delta
    assert config.num_server_rounds <= policy.max_rounds
    assert config.task.name in policy.allowed_tasks


def test_the_page_names_files_and_commands_that_exist() -> None:
    from ot_federated.cli import build_parser

    page = (deploy / "README.md").read_text()
    assert len(page.splitlines()) < 130
    for word in page.replace("`", " ").replace(":", " ").split():
        if word.startswith("deploy/") and not word.endswith("/"):
            assert (deploy.parent / word.rstrip(".,;)")).exists(), word
    commands = build_parser().format_help()
    for line in page.splitlines():
        if line.startswith("ot-federated "):
            assert line.split()[1] in commands
