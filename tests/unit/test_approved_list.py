"""The list of approved app bundles: its file, who may write it, and the command that changes it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from ot_federated.cli import main
from ot_federated.data_owner.approved_code import Approval, ApprovalError, ApprovedCode, max_kept_bundles
from tests.app_bundles import pack, release

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def build_approval(number: int = 1) -> Approval:
    return Approval(sha256=f"{number:064x}", name="ot-federated/ot-federated", version="0.1.0", num_differences=0)


@pytest.fixture
def approved(tmp_path: Path) -> ApprovedCode:
    return ApprovedCode(tmp_path / "owner" / "approved.json")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "release.fab"
    path.write_bytes(pack(release()))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.fab"
    path.write_bytes(pack(release(ot_federated__errors=b"import os  # \x1b[8m\xe2\x80\xae hidden\n")))
    return path


def test_nothing_is_approved_without_a_list(approved: ApprovedCode) -> None:
    assert approved.read() == ()
    assert approved.find(f"{1:064x}") is None


def test_what_was_approved_is_found_until_it_is_revoked(approved: ApprovedCode) -> None:
    first, second = build_approval(1), build_approval(2)
    assert approved.approve(first)
    assert approved.approve(second)
    assert not approved.approve(first)
    again = ApprovedCode(approved.path)
    assert again.read() == (first, second)
    assert again.find(first.sha256) == first
    assert again.revoke(second.sha256.upper()) == second
    assert approved.read() == (first,)


@pytest.mark.parametrize("prefix", ["", "00", "f"])
def test_revoking_needs_exactly_one(approved: ApprovedCode, prefix: str) -> None:
    approved.approve(build_approval(1))
    approved.approve(build_approval(2))
    with pytest.raises(ApprovalError, match="Give more of the digest"):
        approved.revoke(prefix)
    assert len(approved.read()) == 2


@posix
def test_the_list_is_for_its_owner_alone(approved: ApprovedCode) -> None:
    approved.approve(build_approval())
    assert stat.S_IMODE(approved.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(approved.path.parent.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o620, 0o602])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_list_that_others_can_write_is_refused(approved: ApprovedCode, mode: int, what: str) -> None:
    approved.approve(build_approval())
    place = approved.path if what == "file" else approved.path.parent
    place.chmod(mode | (0o500 if what == "directory" else 0))
    for question in (approved.read, lambda: approved.find("0"), lambda: approved.approve(build_approval(2))):
        with pytest.raises(ApprovalError, match=r"written by other users.*chmod go-w"):
            question()


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_list_of_another_user_is_refused(approved: ApprovedCode) -> None:
    approved.approve(build_approval())
    os.chown(approved.path, 12345, -1)
    with pytest.raises(ApprovalError, match="belongs to another user"):
        approved.read()


def test_another_format_names_the_remedy(approved: ApprovedCode) -> None:
    approved.approve(build_approval())
    approved.path.write_text(json.dumps(json.loads(approved.path.read_text()) | {"format": 2}))
    with pytest.raises(ApprovalError, match=r"format 2; this release reads 1\. Remove it, and approve"):
        approved.read()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": 1, "approved": 7}',
        '{"format": 1, "approved": [{"sha256": "x"}]}',
        '{"format": 1, "approved": [{"sha256": "", "name": "", "version": "", "num_differences": 0, "time": ""}]}',
        '{"format": 1, "approved": [{"sha256": 7, "name": "", "version": "", "num_differences": 0, "time": ""}]}',
    ],
)
def test_a_damaged_list_approves_nothing(approved: ApprovedCode, text: str) -> None:
    approved.path.parent.mkdir()
    approved.path.write_text(text)
    with pytest.raises(ApprovalError, match="is damaged, and nothing runs"):
        approved.find("")


def test_only_the_last_refused_bundles_are_kept(approved: ApprovedCode) -> None:
    places = [approved.keep_refused(b"bundle %d" % number) for number in range(max_kept_bundles + 2)]
    for age, place in enumerate(reversed(places)):
        if place.exists():
            os.utime(place, (10**9 - age, 10**9 - age))
    last = approved.keep_refused(b"the last")
    kept = {place.name for place in last.parent.iterdir()}
    assert len(kept) == max_kept_bundles
    assert {last.name, places[-1].name} <= kept
    assert places[0].name not in kept
    assert last.stem == hashlib.sha256(b"the last").hexdigest()


# ---- The command ----------------------------------------------------------------------------------------------


def test_the_installed_release_is_shown_and_approved(
    approved: ApprovedCode, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--approved", str(approved.path)]
    assert main(["approve", str(bundle), "--yes", *where]) == 0
    shown = capsys.readouterr().out
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    files = release()
    for name in ("pyproject.toml", "ot_federated/errors.py"):
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == [name])
        content = files[name]
        data = content.encode() if isinstance(content, str) else content
        assert line.split()[1:] == [f"{len(data):,}", "bytes", hashlib.sha256(data).hexdigest()[:16]]
    assert f"sha256 {digest}" in shown
    assert "it would run exactly the installed code" in shown
    (approval,) = approved.read()
    assert (approval.sha256, approval.num_differences) == (digest, 0)
    assert main(["approve", str(bundle), *where]) == 0
    assert "approved already" in capsys.readouterr().out
    assert main(["approve", "--list", *where]) == 0
    assert digest in capsys.readouterr().out
    assert main(["approve", "--revoke", digest[:10], *where]) == 0
    assert approved.read() == ()
    assert main(["approve", "--revoke", digest[:10], *where]) == 1


def test_differing_code_is_not_approved_by_yes_alone(
    approved: ApprovedCode, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--approved", str(approved.path)]
    assert main(["approve", str(other), "--yes", *where]) == 1
    shown = capsys.readouterr().out
    assert "CHANGED  ot_federated/errors.py" in shown
    assert "give --yes --differing" in shown
    assert approved.read() == ()
    assert main(["approve", str(other), "--yes", "--differing", *where]) == 0
    assert approved.read()[0].num_differences == 1


def test_changed_lines_are_shown_with_what_a_terminal_would_hide(
    approved: ApprovedCode, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["approve", str(other), "--diff", "--approved", str(approved.path)])
    shown = capsys.readouterr().out
    assert "+import os  # \\x1b[8m\\u202e hidden" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "-class OtFederatedError(Exception):" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("YES\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_a_person_is_asked(
    approved: ApprovedCode, other: Path, monkeypatch: pytest.MonkeyPatch, capsys, answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["approve", str(other), "--approved", str(approved.path)]) == code
    assert "DIFFERS from the installed release" in capsys.readouterr().out
    assert len(approved.read()) == 1 - code


def test_nobody_to_ask_approves_nothing(approved: ApprovedCode, bundle: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["approve", str(bundle), "--approved", str(approved.path)]) == 1
    assert "give --yes." in capsys.readouterr().out
    assert approved.read() == ()


@pytest.mark.parametrize("content", [None, b"", b"not a zip"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes | None, capsys) -> None:
    path = tmp_path / "x.fab"
    if content is not None:
        path.write_bytes(content)
    assert main(["approve", str(path), "--yes"]) == 1
    assert capsys.readouterr().err.startswith("ot-federated: ")


def test_a_directory_that_is_no_app_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["approve", str(tmp_path), "--yes"]) == 1
    assert "is not a Flower app" in capsys.readouterr().err


def test_the_place_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ApprovedCode().path == tmp_path / "ot-federated" / "approved-code.json"
    monkeypatch.setenv("OT_FEDERATED_APPROVED", str(tmp_path / "list"))
    assert ApprovedCode().path == tmp_path / "list"
    assert ApprovedCode(tmp_path / "mine").path == tmp_path / "mine"
