"""``ot-federated keys``: the federation's authority, the owner's certificate, and the key of a SuperNode."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.commands.base import write_out

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers


def add_commands(subparsers: Subparsers) -> None:
    """Add ``keys ca``, ``keys server`` and ``keys node``."""
    keys = subparsers.add_parser("keys", help="certificates of the model owner, keys of SuperNodes")
    commands = keys.add_subparsers(metavar="COMMAND", required=True)
    authority = commands.add_parser("ca", help="model owner: an authority of the federation's own (ca.key, ca.crt)")
    authority.add_argument("directory", type=Path)
    authority.add_argument("--name", default="ot-federated CA", help="how it is called (default: %(default)s)")
    authority.add_argument("--days", type=int, default=3650, help="validity (default: %(default)s)")
    authority.set_defaults(run=run_authority)
    server = commands.add_parser("server", help="model owner: a TLS certificate of that authority (server.key, .crt)")
    server.add_argument("directory", type=Path, help="where ca.key and ca.crt are, and the certificate goes")
    server.add_argument("hosts", nargs="+", metavar="HOST", help="name or address by which data owners reach it")
    server.add_argument("--days", type=int, default=397, help="validity (default: %(default)s)")
    server.set_defaults(run=run_server)
    node = commands.add_parser("node", help="data owner: the key pair of a SuperNode (FILE, FILE.pub)")
    node.add_argument("file", type=Path)
    node.set_defaults(run=run_node)


def run_authority(parsed: argparse.Namespace) -> int:
    """Make the authority."""
    from ot_federated.certificates import make_authority

    key, certificate = make_authority(parsed.directory, name=parsed.name, days=check_days(parsed.days))
    write_out(f"{key}  keep it secret: whoever has it can pose as the model owner\n{certificate}  for every data owner")
    return 0


def run_server(parsed: argparse.Namespace) -> int:
    """Issue the certificate."""
    from ot_federated.certificates import describe_certificate, issue_server_certificate

    key, certificate = issue_server_certificate(
        parsed.directory, authority=parsed.directory, hosts=parsed.hosts, days=check_days(parsed.days)
    )
    facts = describe_certificate(certificate)
    write_out(f"{key}\n{certificate}  for {', '.join(facts.hosts)} until {facts.not_after:%Y-%m-%d}")
    return 0


def run_node(parsed: argparse.Namespace) -> int:
    """Make the key pair."""
    from ot_federated.certificates import make_node_key

    private, public = make_node_key(parsed.file)
    write_out(f"{private}  never leaves this machine\n{public}  for the model owner, to be registered")
    return 0


def check_days(days: int) -> int:
    """Return a validity.

    Raises:
        ConfigError: If it is not at least a day, or beyond what certificates can say.
    """
    from ot_federated.errors import ConfigError

    if not 1 <= days <= 36500:
        raise ConfigError(f"--days={days} is out of range: 1 to 36500.")
    return days
