"""The lines of a privacy ledger: what an entry holds, how entries are chained, and how a damaged chain is told.

A line is one JSON object with sorted keys. ``previous`` is the SHA-256 of the line before (for the first line, of
the data set's id), ``sha256`` that of the line itself without this field.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.privacy_accounting import Mechanism
from ot_federated.privacy_guarantee import Guarantee

schema_version = 1
unit, adjacency, sampling = "example", "add-remove-one", "poisson"
_fixed = {"schema": schema_version, "unit": unit, "adjacency": adjacency, "sampling": sampling}
_types: dict[str, type] = {
    "schema": int,
    "time": str,
    "unit": str,
    "adjacency": str,
    "sampling": str,
    "noise_multiplier": float,
    "sample_rate": float,
    "num_steps": int,
    "max_grad_norm": float,
    "num_examples": int,
    "delta": float,
    "run": str,
    "round": int,
    "dataset": str,
    "client": str,
    "previous": str,
    "sha256": str,
}
restore_both = (
    "Restore ledger.jsonl and anchor.json together from a backup; until then nothing is trained on this data, as what "
    "was spent on it is not known."
)


class LedgerError(OtFederatedError):
    """A privacy ledger is damaged, was altered, or belongs to other data."""

    may_leave = False


@dataclass(frozen=True, kw_only=True)
class Release:
    """One round of noised training that is about to be released.

    Attributes:
        run: Id of the run, 1 to 200 printable characters.
        server_round: Round of the run, at least 1.
        client: This client's name.
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``, at least 0.
        sample_rate: Probability that an example is in a step's batch, in (0, 1].
        num_steps: Steps of the round, steps with an empty batch included, at least 0.
        max_grad_norm: Clipping norm of one example's gradient, above 0.
        num_examples: Examples of the data set, at least 1.

    Raises:
        ConfigError: If a value is out of its range.
    """

    run: str
    server_round: int
    client: str
    noise_multiplier: float
    sample_rate: float
    num_steps: int
    max_grad_norm: float
    num_examples: int

    def __post_init__(self) -> None:
        _ = self.mechanism  # checks its three values
        if not (1 <= len(self.run) <= 200 and self.run.isprintable()):
            raise ConfigError(f"run={self.run[:200]!r} must be 1 to 200 printable characters.")
        if self.server_round < 1:
            raise ConfigError(f"server_round={self.server_round} must be at least 1.")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ConfigError(f"max_grad_norm={self.max_grad_norm} must be a finite number above 0.")
        if self.num_examples < 1:
            raise ConfigError("num_examples must be at least 1: there is nothing to train on.")

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant needs to know of it."""
        return Mechanism(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, num_steps=self.num_steps)


@dataclass(frozen=True)
class Head:
    """How many entries a ledger has, and the SHA-256 of the last: what an anchor remembers."""

    num_entries: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger.

    Attributes:
        time: When it was written: UTC, ISO 8601, seconds.
        dataset: Id of the data set.
        delta: The delta at which the budget was checked.
        release: What was paid for.
        previous: SHA-256 of the entry before.
        sha256: SHA-256 of this entry.
    """

    time: str
    dataset: str
    delta: float
    release: Release
    previous: str
    sha256: str


def check_dataset_id(dataset_id: str) -> str:
    """Return ``dataset_id`` if it can name a directory.

    Raises:
        ConfigError: If it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", dataset_id):
        raise ConfigError(
            f"The data set's id {dataset_id!r} must be 1 to 100 letters, digits, dots, hyphens or underscores, and "
            "begin with a letter or digit."
        )
    return dataset_id


def empty_head(dataset_id: str) -> Head:
    """Return the head of a ledger without entries; the chain begins with the data set's id."""
    return Head(0, hashlib.sha256(f"ot-federated privacy ledger {dataset_id}".encode()).hexdigest())


def describe_epsilon(epsilon: float, *, delta: float) -> Guarantee:
    """Return what an epsilon of this ledger means."""
    return Guarantee(epsilon=epsilon, delta=delta, unit=unit, adjacency=adjacency, sampling=sampling)


def encode_entry(release: Release, *, dataset_id: str, delta: float, time: str, previous: str) -> bytes:
    """Return the line for ``release``, with its newline."""
    fields: dict[str, Any] = {
        **_fixed,
        "time": time,
        "noise_multiplier": float(release.noise_multiplier),
        "sample_rate": float(release.sample_rate),
        "num_steps": release.num_steps,
        "max_grad_norm": float(release.max_grad_norm),
        "num_examples": release.num_examples,
        "delta": float(delta),
        "run": release.run,
        "round": release.server_round,
        "dataset": dataset_id,
        "client": release.client,
        "previous": previous,
    }
    return _canonical({**fields, "sha256": _hash(fields)}) + b"\n"


def parse_entries(data: bytes, *, dataset_id: str, name: str) -> list[Entry]:
    """Return the entries of a ledger file, after checking every line and the chain.

    Args:
        data: The file's content.
        dataset_id: The data set that it must belong to.
        name: How to call the file in an error.

    Raises:
        LedgerError: Naming the first bad line, and what is wrong with it.
    """
    entries: list[Entry] = []
    head = empty_head(dataset_id)
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            entry = _parse_line(line, dataset_id=dataset_id)
            if entry.previous != head.sha256:
                raise LedgerError(
                    "does not follow the line before it: a line was removed, inserted or moved here, or the line "
                    "before was rewritten"
                )
        except LedgerError as error:
            raise LedgerError(f"{name}, line {number} {error}. {restore_both}") from None
        entries.append(entry)
        head = Head(number, entry.sha256)
    return entries


def check_head(entries: list[Entry], anchor: Head, *, dataset_id: str, name: str) -> None:
    """Check a ledger's entries against what an anchor remembers; one entry more is a crash between the two.

    Raises:
        LedgerError: If entries are missing, were added, or are not those that the anchor knows.
    """
    if len(entries) < anchor.num_entries:
        raise LedgerError(
            f"{name} ends after line {len(entries)}, but had {anchor.num_entries} lines: line {len(entries) + 1} is "
            f"missing. {restore_both}"
        )
    known = entries[anchor.num_entries - 1].sha256 if anchor.num_entries else empty_head(dataset_id).sha256
    if known != anchor.sha256:
        raise LedgerError(f"{name}, line {anchor.num_entries} is not the one that its anchor remembers. {restore_both}")
    if len(entries) > anchor.num_entries + 1:
        raise LedgerError(
            f"{name}, line {anchor.num_entries + 2} was added without its anchor: it has {len(entries)} lines instead "
            f"of {anchor.num_entries}. {restore_both}"
        )


def encode_anchor(head: Head, *, dataset_id: str) -> bytes:
    """Return the content of an anchor file."""
    fields = {"dataset": dataset_id, "num_entries": head.num_entries, "sha256": head.sha256}
    return _canonical(fields) + b"\n"


def parse_anchor(data: bytes, *, name: str) -> tuple[str, Head]:
    """Return the data set's id and the head in an anchor file, which errors call ``name``.

    Raises:
        LedgerError: If the file is damaged.
    """
    try:
        fields = json.loads(data)
        owner, head = str(fields["dataset"]), Head(int(fields["num_entries"]), str(fields["sha256"]))
        if encode_anchor(head, dataset_id=check_dataset_id(owner)) != data or head.num_entries < 0:
            raise ValueError("not what this program writes")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, ConfigError) as error:
        raise LedgerError(f"{name} cannot be read ({type(error).__name__}: {error}). {restore_both}") from error
    return owner, head


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()


def _parse_line(line: bytes, *, dataset_id: str) -> Entry:
    if not line.endswith(b"\n"):
        raise LedgerError("is torn: it does not end in a newline, and this program never leaves that behind")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise LedgerError("is not JSON") from None
    if not isinstance(fields, dict):
        raise LedgerError("is not a JSON object")
    if (schema := fields.get("schema")) != schema_version:
        raise LedgerError(
            f"has schema {schema!r}; this release of ot-federated reads {schema_version}: install the one that wrote it"
        )
    if fields.keys() != _types.keys() or any(type(fields[key]) is not kind for key, kind in _types.items()):
        raise LedgerError("has missing, unknown or mistyped fields")
    digest = fields.pop("sha256")
    if not _matches(fields, digest) or _canonical({**fields, "sha256": digest}) + b"\n" != line:
        raise LedgerError("was edited: its content does not have the SHA-256 that it carries")
    if fields["dataset"] != dataset_id:
        raise LedgerError(f"belongs to the data set {fields['dataset']!r}, not to {dataset_id!r}")
    if any(fields[key] != value for key, value in _fixed.items()):
        raise LedgerError(f"counts in another unit, adjacency or sampling than {unit}, {adjacency}, {sampling}")
    return _build_entry(fields, digest)


def _matches(fields: Mapping[str, Any], digest: str) -> bool:
    try:
        return _hash(fields) == digest
    except ValueError:  # NaN or an infinity
        return False


def _build_entry(fields: Mapping[str, Any], digest: str) -> Entry:
    try:
        release = Release(
            run=fields["run"],
            server_round=fields["round"],
            client=fields["client"],
            noise_multiplier=fields["noise_multiplier"],
            sample_rate=fields["sample_rate"],
            num_steps=fields["num_steps"],
            max_grad_norm=fields["max_grad_norm"],
            num_examples=fields["num_examples"],
        )
    except ConfigError as error:
        raise LedgerError(f"holds a value that no entry can have ({error})") from error
    return Entry(
        time=fields["time"],
        dataset=fields["dataset"],
        delta=fields["delta"],
        release=release,
        previous=fields["previous"],
        sha256=digest,
    )
