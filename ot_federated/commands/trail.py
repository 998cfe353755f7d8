"""``ot-federated trail``: what left this data owner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.commands.base import write_out
from ot_federated.errors import ConfigError

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers
    from ot_federated.data_owner.audit_trail import Entry

columns = ("time (UTC)", "run", "round", "client", "message", "status", "arrays", "bytes", "epsilon", "delta", "sha256")


def add_commands(subparsers: Subparsers) -> None:
    """Add ``trail show``."""
    trail = subparsers.add_parser("trail", help="the audit trail: what left this data owner")
    commands = trail.add_subparsers(metavar="COMMAND", required=True)
    show = commands.add_parser("show", help="every message that was answered, and what left with the reply")
    show.add_argument("--path", type=Path, help="the trail (default: $OT_FEDERATED_TRAIL, else that of this user)")
    show.add_argument("--run", dest="run_id", metavar="RUN", help="only this run: Flower's id, or the model owner's")
    show.add_argument("--last", type=int, default=20, help="rows to show; 0: all (default: 20)")
    show.add_argument("--fields", action="store_true", help="also the names of the fields that left")
    show.set_defaults(run=show_trail)


def show_trail(parsed: argparse.Namespace) -> int:
    """Write a table of the trail, its sums first."""
    from ot_federated.data_owner.audit_trail import default_trail, read_trail

    if parsed.last < 0:
        raise ConfigError(f"--last={parsed.last} must be at least 0.")
    path = parsed.path or default_trail()
    lines = list(read_trail(path))
    entries = [line for line in lines if not isinstance(line, str)]
    if parsed.run_id:
        entries = [entry for entry in entries if parsed.run_id in (entry.flower_run, entry.run)]
    num_bytes = sum(entry.content.num_bytes for entry in entries)
    write_out(f"{path}: {len(entries)} messages answered, {num_bytes:,} bytes left")
    if guarantees := [entry.guarantee for entry in entries if entry.guarantee]:
        write_out(f"last guarantee, for everything that ever left its data set: {guarantees[-1]}")
    for damaged in (line for line in lines if isinstance(line, str)):
        write_out(f"  {damaged}")
    shown = entries[-parsed.last :] if parsed.last else entries
    rows = [columns, *(_cells(entry) for entry in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row, entry in zip(rows, [None, *shown], strict=True):
        write_out("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if entry and entry.reason:
            write_out(f"    {_printable(entry.reason)}")
        if entry and parsed.fields:
            write_out(f"    fields: {_printable(', '.join(entry.content.fields))}")
    return 0


def _cells(entry: Entry) -> tuple[str, ...]:
    content = entry.content
    # An update without differential privacy can tell anything of the data: its epsilon is no number.
    unbounded = "unbounded" if content.num_arrays else ""
    cells = (
        entry.time.partition("+")[0].replace("T", " "),
        entry.run or entry.flower_run,
        "" if entry.server_round is None else str(entry.server_round),
        entry.client,
        entry.message,
        entry.status,
        str(content.num_arrays),
        f"{content.num_bytes:,}",
        unbounded if entry.guarantee is None else f"{entry.guarantee.epsilon:.4f}",
        "" if entry.guarantee is None else f"{entry.guarantee.delta:g}",
        content.sha256[:12],
    )
    return tuple(map(_printable, cells))


def _printable(text: str) -> str:
    """Return what a server may have written without anything that moves a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
