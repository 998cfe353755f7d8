from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from ot_federated.certificates import (
    CertificateError,
    describe_certificate,
    is_signed_by,
    issue_server_certificate,
    make_authority,
    make_node_key,
    read_private_key,
)
from ot_federated.cli import main
from ot_federated.errors import ConfigError


def test_a_certificate_is_for_its_hosts_and_of_its_authority(tmp_path: Path) -> None:
    key, ca = make_authority(tmp_path)
    server_key, server = issue_server_certificate(tmp_path, authority=tmp_path, hosts=["fl.example.org", "10.0.0.7"])
    facts = describe_certificate(server)
    assert facts.hosts == ("fl.example.org", "10.0.0.7", "localhost", "127.0.0.1")
    assert not facts.is_authority
    assert timedelta(days=390) < facts.not_after - datetime.now(UTC) < timedelta(days=398)
    assert describe_certificate(ca).is_authority
    assert is_signed_by(server, ca)
    make_authority(tmp_path / "other")
    assert not is_signed_by(server, tmp_path / "other" / "ca.crt")
    for secret in (key, server_key):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_node_key_is_one_that_flower_takes(tmp_path: Path) -> None:
    private, public = make_node_key(tmp_path / "node.key")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert read_private_key(private).public_key() == load_ssh_public_key(public.read_bytes())
    assert public.name == "node.key.pub"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_authority(tmp_path)
    before = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(CertificateError, match=r"ca\.key exists"):
        make_authority(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == before


@pytest.mark.parametrize("host", ["https://fl.example.org", "fl.example.org:443", "a b", ""])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    make_authority(tmp_path)
    with pytest.raises(ConfigError, match="host"):
        issue_server_certificate(tmp_path, authority=tmp_path, hosts=[host])


def test_a_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    make_authority(tmp_path / "one")
    make_authority(tmp_path / "two")
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "two" / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match="two authorities"):
        issue_server_certificate(tmp_path / "one", authority=tmp_path / "one", hosts=["localhost"])


def test_the_commands_say_what_is_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "ca", str(tmp_path)]) == 0
    assert main(["keys", "server", str(tmp_path), "fl.example.org"]) == 0
    assert main(["keys", "node", str(tmp_path / "hospital-a")]) == 0
    shown = capsys.readouterr().out
    assert "keep it secret" in shown
    assert "fl.example.org, localhost" in shown
    assert "never leaves this machine" in shown
    assert main(["keys", "node", str(tmp_path / "hospital-a")]) == 1
    assert main(["keys", "server", str(tmp_path), "fl.example.org", "--days", "0"]) == 1
