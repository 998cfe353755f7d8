"""Ledgers for tests: a plan that is paid round by round, and the file as lines."""

from __future__ import annotations

import dataclasses

from ot_federated.data_owner.ledger_entries import Release
from ot_federated.data_owner.privacy_ledger import PrivacyLedger

delta = 1e-5
plan = Release(
    run="run-a",
    server_round=1,
    client="hospital-1",
    noise_multiplier=1.1,
    sample_rate=0.05,
    num_steps=20,
    max_grad_norm=0.5,
    num_examples=2000,
)


def release(server_round: int = 1, **changes: object) -> Release:
    """Return the plan's round ``server_round``, with ``changes``."""
    return dataclasses.replace(plan, server_round=server_round, **changes)


def lines_of(ledger: PrivacyLedger) -> list[bytes]:
    """Return the ledger file's lines, with their ends."""
    return (ledger.directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def write_lines(ledger: PrivacyLedger, lines: list[bytes]) -> None:
    """Replace the ledger file behind the ledger's back."""
    (ledger.directory / "ledger.jsonl").write_bytes(b"".join(lines))
