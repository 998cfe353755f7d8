from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ot_federated import health
from ot_federated.certificates import issue_server_certificate, make_authority, make_node_key
from ot_federated.cli import main
from ot_federated.data_owner.approved_code import Approval, ApprovedCode
from ot_federated.data_owner.audit_trail import Entry, append_entry
from ot_federated.data_owner.doctor import examine_data_owner
from ot_federated.health import Finding, check_certificate, check_clock, check_disk, check_pair, check_versions
from ot_federated.model_owner.doctor import check_loopback, examine_model_owner


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """What a data owner has when all is well."""
    directory = tmp_path / "etc"
    make_authority(directory)
    make_node_key(directory / "node.key")
    (tmp_path / "train.jsonl").write_text('{"question": "?"}\n')
    (directory / "policy.toml").write_text("max-epsilon = 3.0\n")
    approval = Approval(sha256="a" * 64, name="ot-federated/ot-federated", version="0.1.0", num_differences=0)
    ApprovedCode(directory / "approved.json").approve(approval)
    write_config(directory, name="hospital-a")
    return directory


def write_config(directory: Path, **changes: str | int) -> None:
    root = directory.parent
    config: dict[str, str | int] = {
        "data-path": str(root / "train.jsonl"),
        "policy": str(directory / "policy.toml"),
        "cache-dir": str(root / "bundles"),
        "trail": str(root / "trail.jsonl"),
        "device": "cpu",
        "dataset": "ward-7",
        "max-message-bytes": 2**30,
        "cache-max-bytes": 10**9,
        **changes,
    }
    (directory / "node.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))


def levels(findings: list[Finding]) -> dict[str, str]:
    """Return the worst level of each check."""
    order = ["ok", "warning", "error"]
    found: dict[str, str] = {}
    for finding in findings:
        found[finding.check] = max(found.get(finding.check, "ok"), finding.level, key=order.index)
        assert finding.remedy or finding.level == "ok", f"{finding.check}: no word of what to do"
    return found


def test_a_data_owner_with_everything_is_well(etc: Path) -> None:
    found = levels(examine_data_owner(etc, superlink=""))
    found.pop("time service", None)
    found.pop("bundle cache")  # the disk that tests run on may be small
    assert set(found.values()) == {"ok"}, found


@pytest.mark.parametrize(
    ("damage", "check", "level"),
    [
        (lambda etc: (etc.parent / "train.jsonl").unlink(), "data", "error"),
        (lambda etc: write_config(etc, **{"data-path": ""}), "data", "error"),
        (lambda etc: write_config(etc, **{"data-pth": "x"}), "node config", "error"),
        (lambda etc: write_config(etc, **{"max-message-bytes": 0}), "node config", "error"),
        (lambda etc: (etc / "node.toml").write_text("name = "), "node config", "error"),
        (lambda etc: write_config(etc, dataset=""), "data set", "warning"),
        (lambda etc: write_config(etc, dataset="../ward-7"), "data set", "error"),
        (lambda etc: (etc / "policy.toml").write_text("max-epsilon = -1\n"), "policy", "error"),
        (lambda etc: write_config(etc, policy=""), "policy", "warning"),
        (lambda etc: (etc / "policy.toml").write_text("require-privacy = false\n"), "policy", "warning"),
        (lambda etc: (etc / "approved.json").unlink(), "approved code", "error"),
        (lambda etc: (etc / "approved.json").chmod(0o666), "approved code", "error"),
        (lambda etc: (etc / "node.key").chmod(0o644), "node key", "error"),
        (lambda etc: (etc / "node.key").unlink(), "node key", "error"),
        (lambda etc: (etc / "ca.crt").write_text("none"), "authority", "error"),
        (lambda etc: write_config(etc, device="cuda:99"), "device", "error"),
    ],
)
def test_what_is_wrong_at_a_data_owner_is_found_and_nothing_else(
    etc: Path, damage: object, check: str, level: str
) -> None:
    before = levels(examine_data_owner(etc, superlink=""))
    damage(etc)  # type: ignore[operator]
    after = levels(examine_data_owner(etc, superlink=""))
    assert after[check] == level
    others = {name for name in before if after.get(name) != before[name]} - {check}
    # Where the config cannot be read, what it names cannot be looked at.
    assert not others or check == "node config"


def test_a_trail_that_was_cut_short_is_found(etc: Path) -> None:
    path = etc.parent / "trail.jsonl"
    append_entry(path, Entry(message="train", client="a", flower_run="1", status="ok"))
    assert levels(examine_data_owner(etc, superlink=""))["audit trail"] == "ok"
    path.write_text(path.read_text() + '{"format": 1, "mess')
    assert levels(examine_data_owner(etc, superlink=""))["audit trail"] == "warning"


def test_a_model_owner_that_nobody_answers_is_found(etc: Path) -> None:
    (finding,) = (f for f in examine_data_owner(etc, superlink="127.0.0.1:1") if f.check == "model owner")
    assert finding.level == "error"
    assert "firewall" in finding.remedy
    (finding,) = (f for f in examine_data_owner(etc, superlink="nowhere") if f.check == "model owner")
    assert "HOST:PORT" in finding.found


@pytest.mark.parametrize(
    ("days", "level"), [(0, "ok"), (360, "ok"), (370, "warning"), (396, "warning"), (400, "error"), (-1, "error")]
)
def test_a_certificates_dates(tmp_path: Path, days: int, level: str) -> None:
    make_authority(tmp_path)
    _, certificate = issue_server_certificate(tmp_path, authority=tmp_path, hosts=["localhost"])
    now = datetime.now(UTC) + timedelta(days=days)
    (finding,) = check_certificate(certificate, check="certificate", remedy="renew it", now=now)
    assert finding.level == level


def test_keys_and_certificates_of_two_makers_are_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_authority(tmp_path / name)
        issue_server_certificate(tmp_path / name, authority=tmp_path / name, hosts=["localhost"])
    one, two = tmp_path / "one", tmp_path / "two"
    assert check_pair(one / "server.key", one / "server.crt", one / "ca.crt")[0].level == "ok"
    assert check_pair(two / "server.key", one / "server.crt", one / "ca.crt")[0].level == "error"
    assert check_pair(one / "server.key", one / "server.crt", two / "ca.crt")[0].level == "error"


@pytest.mark.parametrize(
    ("ahead", "level"), [(0, "ok"), (-60, "ok"), (3, "warning"), (6, "error"), (-200, "warning"), (-301, "error")]
)
def test_a_clock_is_judged_as_flower_does(ahead: float, level: str) -> None:
    (finding,) = check_clock(ahead)
    assert finding.level == level


def test_a_port_that_is_open_to_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def listening(*addresses: str) -> None:
        found = [
            SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip=ip, port=9093)) for ip in addresses
        ]
        monkeypatch.setattr(psutil, "net_connections", lambda kind: found)

    listening("127.0.0.1", "::1")
    assert check_loopback(9093)[0].level == "ok"
    for address in ("0.0.0.0", "::", "10.0.0.7"):
        listening("127.0.0.1", address)
        assert check_loopback(9093)[0].level == "error"
        assert check_loopback(9094)[0].level == "ok"


def test_packages_of_other_versions_and_full_disks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_versions()[0].level == "ok"
    monkeypatch.setattr(health.importlib.metadata, "requires", lambda _: ["flwr<1.0", "no-such-package>=1"])
    (finding,) = check_versions()
    assert finding.level == "error"
    assert "flwr" in finding.found
    assert "no-such-package is missing" in finding.found
    for free, level in ((10**8, "error"), (5 * 10**9, "warning"), (10**11, "ok")):
        monkeypatch.setattr(health.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert check_disk(tmp_path / "not" / "there", check="disk")[0].level == level


def test_an_owner_without_keys_or_superlink_hears_of_all_of_it(tmp_path: Path) -> None:
    found = examine_model_owner(tmp_path, superlink="127.0.0.1:1", proxy="127.0.0.1:1", state=tmp_path, output=tmp_path)
    wrong = {finding.check for finding in found if finding.level == "error"}
    assert {"authority", "certificate", "certificate's key", "superlink", "door"} <= wrong


def test_the_command_ends_with_what_it_found(etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "data-owner", "--etc", str(etc)]) == 0
    assert "0 errors" in capsys.readouterr().out
    (etc / "approved.json").unlink()
    assert main(["doctor", "data-owner", "--etc", str(etc)]) == 1
    shown = capsys.readouterr().out
    assert "ERROR  approved code" in shown
    assert "-> Take the release's .fab file" in shown
    assert main(["doctor", "data-owner", "--etc", str(etc), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] == 1
