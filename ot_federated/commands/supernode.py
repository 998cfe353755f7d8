"""``ot-federated supernode``: Flower's SuperNode, running approved code only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers


def add_commands(subparsers: Subparsers) -> None:
    """Add ``supernode``."""
    supernode = subparsers.add_parser(
        "supernode",
        help="Flower's SuperNode, running approved code only",
        description="Takes every option of flower-supernode (see flower-supernode --help), and this one:",
        allow_abbrev=False,
    )
    supernode.add_argument("--approved", type=Path, metavar="FILE", help="the list (default: $OT_FEDERATED_APPROVED)")
    supernode.add_argument(
        "--cold", action="store_true", help="a new Python for each message, as Flower does it: slower, less memory"
    )
    supernode.set_defaults(run=run_node, rest=[])


def run_node(parsed: argparse.Namespace) -> int:
    """Run the SuperNode until it is stopped."""
    from ot_federated.data_owner.approved_code import ApprovedCode
    from ot_federated.data_owner.approved_supernode import run_supernode

    run_supernode(parsed.rest, ApprovedCode(parsed.approved), warm=not parsed.cold)
    return 0
