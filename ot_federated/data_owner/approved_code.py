"""The app bundles (FABs) that a data owner allows to run, by the SHA-256 of the whole file.

Flower ships the client's code from the server. Policy, ledger and audit trail hold only while it is the code that the
data owner knows: :mod:`ot_federated.data_owner.approved_supernode` therefore runs no bundle that is not on this list.

A JSON file on the data owner's disk, replaced atomically. Whoever can write it decides what runs on the data; a list
that others than its owner can write is refused. Beside it, ``refused-bundles`` keeps the last bundles that a server
sent and that were refused, so that the data owner can look into them; they are files, never extracted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ot_federated.cache import atomic_write_bytes, explain_disk_errors, file_lock, state_root
from ot_federated.errors import OtFederatedError

approved_variable = "OT_FEDERATED_APPROVED"
format_version = 1
max_kept_bundles = 5


class ApprovalError(OtFederatedError):
    """Code is not approved, or the list of approved code cannot be trusted."""

    may_leave = False


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One approved app bundle.

    Attributes:
        sha256: Of the bundle.
        name: ``publisher/name``, as the bundle has it.
        version: Its version.
        num_differences: Files in which its code differed from the release that was installed at the time.
        time: When it was approved, in UTC.
    """

    sha256: str
    name: str
    version: str
    num_differences: int
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class ApprovedCode:
    """A data owner's list of approved app bundles.

    Args:
        path: The file; ``None`` for ``$OT_FEDERATED_APPROVED``, else ``approved-code.json`` in the user's state
            directory. It is read anew at every question, so that a change counts at once.
    """

    def __init__(self, path: Path | None = None) -> None:
        own = os.environ.get(approved_variable)
        default = Path(own).expanduser().absolute() if own else state_root() / "approved-code.json"
        self.path = path.expanduser().absolute() if path else default

    def read(self) -> tuple[Approval, ...]:
        """Return what is approved, in the order in which it was; nothing where there is no list.

        Raises:
            ApprovalError: If the list is damaged, of another format, or writable for others than its owner.
        """
        try:
            check_permissions(self.path)
            data = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ApprovalError(f"The list of approved code {self.path} cannot be read ({error}).") from error
        return parse_approvals(data, place=str(self.path))

    def find(self, sha256: str) -> Approval | None:
        """Return the approval of the bundle with this digest, or None: then it may not run.

        Raises:
            ApprovalError: If the list cannot be trusted.
        """
        return next((approval for approval in self.read() if approval.sha256 == sha256), None)

    def approve(self, approval: Approval) -> bool:
        """Add a bundle; return whether it was not on the list yet.

        Raises:
            OtFederatedError: If the list cannot be trusted or written.
        """
        with self._locked():
            approvals = self.read()
            if any(known.sha256 == approval.sha256 for known in approvals):
                return False
            self._write((*approvals, approval))
        return True

    def revoke(self, prefix: str) -> Approval:
        """Take the bundle whose digest begins with ``prefix`` off the list, and return what it was.

        Raises:
            ApprovalError: If no bundle's or more than one's does.
        """
        with self._locked():
            approvals = self.read()
            found = [approval for approval in approvals if prefix and approval.sha256.startswith(prefix.lower())]
            if len(found) != 1:
                raise ApprovalError(
                    f"{len(found)} approved bundles have a digest that begins with {prefix!r}. Give more of the digest "
                    "that ot-federated approve --list shows."
                )
            self._write(tuple(approval for approval in approvals if approval is not found[0]))
        return found[0]

    def keep_refused(self, data: bytes) -> Path:
        """Keep a refused bundle for the data owner to look into, and return its place; the oldest goes beyond five.

        Raises:
            OtFederatedError: If it cannot be written.
        """
        directory = self.path.parent / "refused-bundles"
        path = directory / f"{hashlib.sha256(data).hexdigest()}.fab"
        if not path.is_file():
            atomic_write_bytes(path, data)
        kept = sorted(directory.glob("*.fab"), key=lambda other: (other.stat().st_mtime, other.name))
        for old in kept[:-max_kept_bundles]:
            old.unlink(missing_ok=True)
        return path

    def _locked(self) -> AbstractContextManager[bool]:
        with explain_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return file_lock(self.path.with_name(f".{self.path.name}.lock"))

    def _write(self, approvals: tuple[Approval, ...]) -> None:
        values = {"format": format_version, "approved": [asdict(approval) for approval in approvals]}
        atomic_write_bytes(self.path, (json.dumps(values, indent=2) + "\n").encode(), mode=0o600)


def parse_approvals(data: bytes, *, place: str) -> tuple[Approval, ...]:
    """Read a list from the bytes of its file, which errors call ``place``.

    Raises:
        ApprovalError: If the list is damaged or of another format.
    """
    damaged = (
        f"{place} is damaged, and nothing runs until it is right. Restore it, or remove it and approve the bundles "
        "again (ot-federated approve)."
    )
    try:
        values = json.loads(data.decode())
        version, entries = values["format"], values["approved"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ApprovalError(damaged) from error
    if version != format_version:
        raise ApprovalError(
            f"{place} has format {version!r}; this release reads {format_version}. Remove it, and approve the bundles "
            "again with this release (ot-federated approve)."
        )
    try:
        approvals = tuple(Approval(**entry) for entry in entries)
        whole = all(re.fullmatch(r"[0-9a-f]{64}", approval.sha256) for approval in approvals)
    except TypeError as error:
        raise ApprovalError(damaged) from error
    if not whole:
        raise ApprovalError(damaged)
    return approvals


def check_permissions(path: Path) -> None:
    """Check that only its owner, who is this user or root, can write ``path`` or put another file in its place.

    Raises:
        ApprovalError: If others can.
        FileNotFoundError: If there is no such file.
    """
    if sys.platform == "win32":
        return
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise ApprovalError(
                f"{place} belongs to another user, who could approve code for this data. Give it to the user that runs "
                f"the SuperNode (chown), or use another list ({approved_variable})."
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ApprovalError(
                f"{place} can be written by other users, who could approve code for this data: chmod go-w {place}"
            )
