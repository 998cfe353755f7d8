"""``ot-federated doctor``: what is wrong on this side, and what to do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.commands.base import write_out

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers
    from ot_federated.health import Finding

marks = {"ok": "ok   ", "warning": "WARN ", "error": "ERROR"}


def add_commands(subparsers: Subparsers) -> None:
    """Add ``doctor owner`` and ``doctor data-owner``."""
    doctor = subparsers.add_parser("doctor", help="look at one party's side of a deployment, and say what to do")
    commands = doctor.add_subparsers(metavar="SIDE", required=True)
    owner = commands.add_parser("owner", help="the model owner's: keys, SuperLink, and who can reach what")
    owner.add_argument("--keys", type=Path, default=Path("/etc/ot-federated/keys"), help="default: %(default)s")
    owner.add_argument("--superlink", default="127.0.0.1:9093", metavar="HOST:PORT", help="default: %(default)s")
    owner.add_argument("--proxy", default="", metavar="HOST:PORT", help="nginx, by the name that data owners use")
    owner.add_argument("--state", type=Path, default=Path("/var/lib/ot-federated"), help="default: %(default)s")
    owner.add_argument("--output", type=Path, default=Path("runs"), help="where runs write (default: %(default)s)")
    owner.add_argument("--connection", default="", metavar="NAME", help="in Flower's configuration: also look at nodes")
    owner.set_defaults(run=run_owner)
    data_owner = commands.add_parser("data-owner", help="a data owner's: data, policy, code, records, connection")
    data_owner.add_argument("--etc", type=Path, default=Path("/etc/ot-federated"), help="default: %(default)s")
    data_owner.add_argument("--superlink", default="", metavar="HOST:PORT", help="the model owner's nginx: try it")
    data_owner.set_defaults(run=run_data_owner)
    for command in (owner, data_owner):
        command.add_argument("--json", action="store_true", help="findings as JSON")


def run_owner(parsed: argparse.Namespace) -> int:
    """Examine the model owner's side; return 1 if something is wrong."""
    from ot_federated.model_owner.doctor import examine_model_owner

    findings = examine_model_owner(
        parsed.keys,
        superlink=parsed.superlink,
        proxy=parsed.proxy,
        state=parsed.state,
        output=parsed.output.absolute(),
        connection=parsed.connection,
    )
    return report(findings, as_json=parsed.json)


def run_data_owner(parsed: argparse.Namespace) -> int:
    """Examine a data owner's side; return 1 if something is wrong."""
    from ot_federated.data_owner.doctor import examine_data_owner

    return report(examine_data_owner(parsed.etc.absolute(), superlink=parsed.superlink), as_json=parsed.json)


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Write findings, and return 1 if one of them is an error."""
    num_errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        write_out(json.dumps({"errors": num_errors, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return 1 if num_errors else 0
    for finding in findings:
        write_out(f"{marks[finding.level]}  {finding.check}: {finding.found}")
        if finding.remedy:
            write_out(f"       -> {finding.remedy}")
    num_warnings = sum(finding.level == "warning" for finding in findings)
    write_out(f"{num_errors} errors, {num_warnings} warnings")
    return 1 if num_errors else 0
