"""``ot-federated ledger``: what was spent on which data, and whether its record is intact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.commands.base import write_out
from ot_federated.errors import ConfigError, OtFederatedError

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers
    from ot_federated.data_owner.ledger_entries import Entry
    from ot_federated.data_owner.privacy_ledger import PrivacyLedger

columns = ("#", "time (UTC)", "run", "round", "client", "sigma", "q", "steps", "C", "N", "epsilon")


def add_commands(subparsers: Subparsers) -> None:
    """Add ``ledger show`` and ``ledger verify``."""
    ledger = subparsers.add_parser("ledger", help="privacy ledgers: what was spent on which data")
    commands = ledger.add_subparsers(metavar="COMMAND", required=True)
    show = commands.add_parser("show", help="every paid round, and epsilon after it")
    show.add_argument("--delta", type=float, help="delta of epsilon (default: that of the last entry)")
    show.add_argument("--last", type=int, default=20, help="rows to show; 0: all (default: 20)")
    show.set_defaults(run=show_ledgers)
    verify = commands.add_parser("verify", help="check every line and the chain; exit code 1 if a ledger was altered")
    verify.set_defaults(run=verify_ledgers)
    for command in (show, verify):
        which = command.add_mutually_exclusive_group()
        which.add_argument("--dataset", metavar="ID", help="the ledger of this data set (default: all of the root)")
        which.add_argument("--path", type=Path, help="the ledger in this directory, wherever it is")
        command.add_argument("--root", type=Path, help="directory of ledgers (default: $OT_FEDERATED_LEDGERS)")


def show_ledgers(parsed: argparse.Namespace) -> int:
    """Write a table of each chosen ledger."""
    if parsed.last < 0:
        raise ConfigError(f"--last={parsed.last} must be at least 0.")
    for ledger in choose_ledgers(parsed):
        write_out(describe_ledger(ledger, delta=parsed.delta, num_rows=parsed.last))
    return 0


def verify_ledgers(parsed: argparse.Namespace) -> int:
    """Check each chosen ledger; return 1 if one is bad."""
    code = 0
    for ledger in choose_ledgers(parsed):
        try:
            head = ledger.head
        except OtFederatedError as error:
            write_out(f"BAD  {ledger.dataset_id}\n     {error}")
            code = 1
        else:
            write_out(f"ok   {ledger.dataset_id}  {head.num_entries} entries, head {head.sha256}")
    return code


def choose_ledgers(parsed: argparse.Namespace) -> list[PrivacyLedger]:
    """Return the ledgers that ``--path``, ``--dataset`` and ``--root`` name.

    Raises:
        ConfigError: If there is none.
    """
    from ot_federated.data_owner.privacy_ledger import (
        PrivacyLedger,
        ledger_file,
        ledger_root,
        list_ledgers,
        read_anchored_dataset,
        root_variable,
    )

    if parsed.path is not None:
        directory = parsed.path.parent if parsed.path.name == ledger_file else parsed.path
        return [PrivacyLedger(directory, dataset_id=read_anchored_dataset(directory))]
    root = parsed.root or ledger_root()
    names = list_ledgers(root)
    if parsed.dataset is not None:
        if parsed.dataset not in names:
            known = f"It has those of {', '.join(names)}." if names else "It has none."
            raise ConfigError(f"{root} has no ledger of the data set {parsed.dataset!r}. {known}")
        names = [parsed.dataset]
    if not names:
        raise ConfigError(f"{root} has no ledgers. Give --root or --path, or set {root_variable}.")
    return [PrivacyLedger(root / name, dataset_id=name) for name in names]


def describe_ledger(ledger: PrivacyLedger, *, delta: float | None, num_rows: int) -> str:
    """Return a table of the last ``num_rows`` entries (0: all), each with epsilon of everything up to it."""
    from ot_federated.data_owner.ledger_entries import describe_epsilon
    from ot_federated.privacy_accounting import epsilon_of

    entries = ledger.entries
    if not entries:
        return f"data set {ledger.dataset_id}: nothing was spent"
    shown_delta = entries[-1].delta if delta is None else delta
    mechanisms = [entry.release.mechanism for entry in entries]
    first = max(0, len(entries) - num_rows) if num_rows else 0
    epsilons = [epsilon_of(mechanisms[: index + 1], delta=shown_delta) for index in range(first, len(entries))]
    rows = [columns, *(_cells(first + i, entries[first + i], value) for i, value in enumerate(epsilons))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            f"data set {ledger.dataset_id}: {len(entries)} entries, "
            f"{describe_epsilon(epsilons[-1], delta=shown_delta)}",
            *lines,
        ]
    )


def _cells(index: int, entry: Entry, epsilon: float) -> tuple[str, ...]:
    release = entry.release
    return (
        str(index + 1),
        entry.time.removesuffix("+00:00").replace("T", " "),
        release.run,
        str(release.server_round),
        release.client,
        f"{release.noise_multiplier:.4g}",
        f"{release.sample_rate:.4g}",
        str(release.num_steps),
        f"{release.max_grad_norm:g}",
        str(release.num_examples),
        f"{epsilon:.4f}",
    )
