"""``ot-federated approve``: which app bundles the data owner's SuperNode may run."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.commands.base import write_out
from ot_federated.errors import ConfigError

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers
    from ot_federated.data_owner.app_bundle import AppBundle, Differences
    from ot_federated.data_owner.approved_code import ApprovedCode


def add_commands(subparsers: Subparsers) -> None:
    """Add ``approve``."""
    approve = subparsers.add_parser(
        "approve",
        help="the list of app bundles that may run on this data owner's data",
        description="Show what an app bundle contains and how its code differs from the installed release, and put "
        "it on the list that ot-federated supernode obeys.",
    )
    what = approve.add_mutually_exclusive_group(required=True)
    what.add_argument("bundle", nargs="?", type=Path, help="a .fab file, or a checkout to build one of as flwr does")
    what.add_argument("--list", action="store_true", help="show what is approved")
    what.add_argument("--revoke", metavar="DIGEST", help="take a bundle off the list, by the begin of its digest")
    approve.add_argument("--approved", type=Path, metavar="FILE", help="the list (default: $OT_FEDERATED_APPROVED)")
    approve.add_argument("--diff", action="store_true", help="also show every changed and added line")
    approve.add_argument("--yes", action="store_true", help="do not ask, if the code is that of the installed release")
    approve.add_argument("--differing", action="store_true", help="with --yes: approve code that differs, too")
    approve.set_defaults(run=run_approve)


def run_approve(parsed: argparse.Namespace) -> int:
    """List, revoke, or show and approve; return 1 where nothing was approved."""
    from ot_federated.data_owner.approved_code import ApprovedCode

    approved = ApprovedCode(parsed.approved)
    if parsed.list:
        return list_approved(approved)
    if parsed.revoke is not None:
        gone = approved.revoke(parsed.revoke)
        write_out(f"revoked {gone.name} {gone.version}  {gone.sha256}")
        return 0
    return approve_bundle(approved, parsed)


def list_approved(approved: ApprovedCode) -> int:
    """Write what is approved."""
    approvals = approved.read()
    write_out(f"{approved.path}: {len(approvals)} approved")
    for approval in approvals:
        differs = f"  differed in {approval.num_differences} files" if approval.num_differences else ""
        write_out(f"{approval.sha256}  {approval.name} {approval.version}  {approval.time}{differs}")
    return 0


def approve_bundle(approved: ApprovedCode, parsed: argparse.Namespace) -> int:
    """Show a bundle, ask, and approve it."""
    from ot_federated.data_owner.app_bundle import compare_to_installed, read_app_bundle
    from ot_federated.data_owner.approved_code import Approval

    bundle = read_app_bundle(load_bundle(parsed.bundle))
    differences = compare_to_installed(bundle)
    write_out(describe_bundle(bundle))
    write_out(describe_differences(differences))
    if parsed.diff:
        write_out(describe_lines(bundle, differences))
    if approved.find(bundle.sha256):
        write_out("It is approved already.")
        return 0
    if not (parsed.yes and (parsed.differing or not differences.any)) and not ask(parsed, differences):
        write_out("Nothing was approved.")
        return 1
    num_differences = len(differences.changed + differences.added + differences.missing) + bool(differences.client_app)
    approved.approve(
        Approval(sha256=bundle.sha256, name=bundle.name, version=bundle.version, num_differences=num_differences)
    )
    write_out(f"Approved {bundle.sha256} in {approved.path}.")
    return 0


def load_bundle(path: Path) -> bytes:
    """Return the bytes of a bundle, or of the one that a checkout makes; none of its code is run for that.

    Raises:
        ConfigError: If there is no such file or checkout.
    """
    if path.is_dir():
        from ot_federated.data_owner.approved_supernode import build_app_bundle

        return build_app_bundle(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}). Give a .fab file, or a checkout's directory.") from error


def ask(parsed: argparse.Namespace, differences: Differences) -> bool:
    """Ask the person at the terminal; without one, say what is missing."""
    if not sys.stdin.isatty() or parsed.yes:
        needed = "--yes --differing" if differences.any else "--yes"
        write_out(f"Nobody can be asked here: look at the above, then give {needed}.")
        return False
    question = (
        "Its code DIFFERS from the installed release. Approve it all the same?" if differences.any else "Approve?"
    )
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def describe_bundle(bundle: AppBundle) -> str:
    """Return a bundle's files with sizes and digests, and its own digest."""
    width = max(map(len, bundle.files))
    lines = [
        f"  {name.ljust(width)}  {len(content):>9,} bytes  {hashlib.sha256(content).hexdigest()[:16]}"
        for name, content in sorted(bundle.files.items())
    ]
    num_bytes = sum(map(len, bundle.files.values()))
    return "\n".join(
        [
            *lines,
            f"{bundle.name} {bundle.version}: {len(bundle.files)} files, {num_bytes:,} bytes",
            f"at a data owner Flower would run {bundle.client_app}",
            f"sha256 {bundle.sha256}",
        ]
    )


def describe_differences(differences: Differences) -> str:
    """Return how a bundle's code differs from the installed release."""
    lines = [f"Compared with {differences.installed}:", f"  {len(differences.same)} files are the same"]
    if differences.client_app:
        lines.append(f"  OTHER CLIENT APP  {differences.client_app}")
    lines += [f"  CHANGED  {name}" for name in differences.changed]
    lines += [
        f"  ADDED    {name}   (not in the release; may stand in for any installed module)" for name in differences.added
    ]
    lines += [f"  MISSING  {name}" for name in differences.missing]
    if not differences.any:
        lines.append("  it would run exactly the installed code")
    return "\n".join(lines)


def describe_lines(bundle: AppBundle, differences: Differences) -> str:
    """Return the changed and added lines; characters that a terminal would obey or hide are written out."""
    from ot_federated.data_owner.app_bundle import installed_release

    _, release = installed_release()
    lines: list[str] = []
    for name in (*differences.changed, *differences.added, *differences.missing):
        old, new = (files.get(name, b"").decode(errors="backslashreplace") for files in (release, bundle.files))
        lines += difflib.unified_diff(
            old.splitlines(), new.splitlines(), f"installed/{name}", f"bundle/{name}", lineterm=""
        )
    return "\n".join(map(_write_out_hidden, lines))


def _write_out_hidden(line: str) -> str:
    return "".join(
        character if character.isprintable() or character == "\t" else character.encode("unicode_escape").decode()
        for character in line
    )
