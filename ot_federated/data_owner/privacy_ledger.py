"""The privacy ledger: what was ever released about one data set, kept by its owner, checked before every training.

One directory per data set, on the data owner's disk::

    <root>/<dataset id>/
        ledger.jsonl    one line per paid round; each holds the SHA-256 of the line before and its own
        anchor.json     how many lines there are, and the hash of the last
        replies/        the updates of the last few rounds, so that a repeated round costs nothing
        lock

*Write-ahead.* :meth:`PrivacyLedger.spend` returns after the entry is on the disk (fsync), and nothing is trained
before it returns. A crash afterwards leaves a round that was paid for and perhaps never left: too much is
counted, never too little.

*Whole or absent.* Each change replaces the ledger file atomically, the anchor after it. A crash between the two
leaves the ledger one line ahead of its anchor: the line counts as spent, and the next :meth:`PrivacyLedger.spend`
puts the anchor right. So a torn last line never comes from a crash; where there is one, the file was damaged.

*Tamper-evident, not tamper-proof.* The chain shows edits, insertions, removals and another order; the anchor
shows a truncated or deleted file. Who puts back an older copy of ledger and anchor together, deletes both or rewrites
both cannot be caught from this directory: keep :attr:`PrivacyLedger.head` in a second place and pass it to
:meth:`PrivacyLedger.verify`.

*One data set, one ledger.* The key is the owner's name for the data, or its digest (``dataset_identity.py``). A digest
changes when one example is added, and a new ledger begins at zero although the old examples are still there:
data that grows needs a name.

Unit, adjacency and sampling: :mod:`ot_federated.privacy_accounting`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ot_federated.cache import atomic_write_bytes, explain_disk_errors, file_lock, partial_suffix, state_root
from ot_federated.data_owner.ledger_entries import (
    Entry,
    Head,
    LedgerError,
    Release,
    check_dataset_id,
    check_head,
    describe_epsilon,
    empty_head,
    encode_anchor,
    encode_entry,
    parse_anchor,
    parse_entries,
    restore_both,
)
from ot_federated.errors import ConfigError, OtFederatedError, ProtocolError
from ot_federated.privacy_accounting import check_delta, epsilon_of
from ot_federated.privacy_guarantee import Guarantee

root_variable = "OT_FEDERATED_LEDGERS"
ledger_file, anchor_file, lock_file = "ledger.jsonl", "anchor.json", "lock"
num_rounds_kept = 3
_num_read_attempts = 100


class BudgetError(OtFederatedError):
    """What the server asks for would spend more privacy than the data owner's budget."""


def ledger_root() -> Path:
    """Return where ledgers are: ``$OT_FEDERATED_LEDGERS``, else ``ot-federated/ledgers`` in the user's state directory.

    Never in the cache: a cache may be deleted at any time, and with a ledger goes all knowledge of what was spent.
    """
    if own := os.environ.get(root_variable):
        return Path(own).expanduser().absolute()
    return state_root() / "ledgers"


def list_ledgers(root: Path) -> list[str]:
    """Return the ids of the data sets that have a ledger below ``root``, sorted."""
    if not root.is_dir():
        return []
    names = (ledger_file, anchor_file)
    return sorted(path.name for path in root.iterdir() if any((path / name).exists() for name in names))


@dataclass(frozen=True)
class Receipt:
    """What :meth:`PrivacyLedger.spend` did.

    Attributes:
        guarantee: Of everything that was ever released, this round included.
        reply: None where the round was paid just now and may be trained. Else the round was paid before, and these
            are the bytes that left then: send them again, and train nothing.
    """

    guarantee: Guarantee
    reply: bytes | None = None

    @property
    def epsilon(self) -> float:
        """The guarantee's epsilon."""
        return self.guarantee.epsilon

    @property
    def already_spent(self) -> bool:
        """Whether the round was paid before, and its reply is at hand."""
        return self.reply is not None


class PrivacyLedger:
    """The ledger of one data set. Any number of processes may use it at once; one at a time spends."""

    def __init__(self, directory: Path, *, dataset_id: str) -> None:
        self.directory = directory
        self.dataset_id = check_dataset_id(dataset_id)
        self._ledger, self._anchor = directory / ledger_file, directory / anchor_file

    @classmethod
    def open(cls, root: Path, *, dataset_id: str) -> PrivacyLedger:
        """Return the ledger of ``dataset_id`` below ``root``. Nothing is written before the first spend.

        Raises:
            ConfigError: If the id cannot name a directory.
            LedgerError: If the ledger that is there is damaged, or belongs to other data.
        """
        ledger = cls(root / check_dataset_id(dataset_id), dataset_id=dataset_id)
        ledger.verify()
        return ledger

    @property
    def entries(self) -> list[Entry]:
        """Everything that was ever paid, oldest first."""
        return self._read()[0]

    @property
    def head(self) -> Head:
        """How many entries there are, and the hash of the last: to be remembered in a second place."""
        return self._head_of(self.entries)

    def verify(self, *, remembered: Head | None = None) -> None:
        """Check every line, the chain, and the anchor.

        Args:
            remembered: A head of this ledger that was kept elsewhere: it must still be part of the chain.

        Raises:
            LedgerError: Naming the first bad line.
        """
        entries = self.entries
        if remembered is not None:
            known = entries[: remembered.num_entries]
            check_head(known, remembered, dataset_id=self.dataset_id, name=str(self._ledger))

    def epsilon(self, *, delta: float) -> float:
        """Return the epsilon of everything that was ever released, at ``delta``.

        Raises:
            LedgerError: If the ledger is damaged.
            ConfigError: If ``delta`` is out of its range.
        """
        return epsilon_of([entry.release.mechanism for entry in self.entries], delta=delta)

    def spend(self, release: Release, *, budget_epsilon: float, delta: float) -> Receipt:
        """Pay for a round before it is trained: check the budget, and write the entry to the disk.

        A round of a run that this client paid before and whose reply was saved costs nothing: the receipt holds that
        reply. Another client of the same data set pays for its own. Without a saved reply (a crash, or long ago)
        training it again is a new release, and is paid again.

        Args:
            release: What is about to be trained and sent.
            budget_epsilon: The most that may ever be spent on this data; inf to keep books only.
            delta: The delta of the budget, below 1 over the number of examples.

        Raises:
            BudgetError: If history and release together cost more than the budget; nothing is written.
            ProtocolError: If this client paid the same round of the same run with other parameters.
            ConfigError: If ``delta`` or the budget is out of range.
            LedgerError: If the ledger is damaged, or the disk has no file locks.
            OtFederatedError: If the disk is full or may not be written.
        """
        check_delta(delta)
        # The message leaves this side: it must not say how many examples there are.
        if delta * release.num_examples >= 1:
            raise ConfigError(
                f"delta={delta:g} is not below 1 over this client's number of examples: such a delta would allow to "
                "publish a whole example. Nothing was trained or spent. Set a smaller delta in the data owner's policy "
                "file, and privacy.target-delta to at most that."
            )
        if not budget_epsilon > 0:
            raise ConfigError(f"The privacy budget epsilon={budget_epsilon} must be above 0.")
        with self._locked():
            entries, anchor = self._read()
            reply = self._repeated_reply(release, entries)
            history = [entry.release.mechanism for entry in entries]
            if reply is not None:
                return Receipt(describe_epsilon(epsilon_of(history, delta=delta), delta=delta), reply)
            epsilon = epsilon_of([*history, release.mechanism], delta=delta)
            if epsilon > budget_epsilon:
                raise BudgetError(
                    f"Round {release.server_round} of run {release.run!r} would bring this data set to "
                    f"epsilon={epsilon:.4g} at delta={delta:g}, over its budget of {budget_epsilon:g}; "
                    f"{epsilon_of(history, delta=delta):.4g} is spent. Nothing was trained or spent. Ask for more "
                    "noise, fewer steps or a smaller sample rate, or let the data owner raise max-epsilon."
                )
            self._append(release, entries, anchor, delta=delta)
        return Receipt(describe_epsilon(epsilon, delta=delta))

    @contextmanager
    def round_turn(self, release: Release) -> Iterator[None]:
        """Let one process at a time pay for a client's rounds of a run, train, and keep the reply.

        A server that asks again while the first process trains would have the round paid twice: whoever comes second
        waits here, and then finds the reply.
        """
        name = hashlib.sha256(json.dumps([release.run, release.client]).encode()).hexdigest()[:32]
        with explain_disk_errors(self.directory):
            _create_directory(self.directory)
        with file_lock(self.directory / "turns" / name):
            yield

    def save_reply(self, data: bytes, *, run: str, server_round: int, client: str) -> None:
        """Keep what is about to leave for a paid round, so that asking again costs nothing; the last three rounds stay.

        Raises:
            LedgerError: If this client never paid the round: it must not leave.
            OtFederatedError: If the disk is full or may not be written.
        """
        with self._locked():
            paid = [_reply_key(entry.release) for entry in self.entries]
            if (run, server_round, client) not in paid:
                raise LedgerError(
                    f"Round {server_round} of run {run!r} is not in {self._ledger} for {client!r}: it must not be sent."
                )
            atomic_write_bytes(self._reply_path(run, server_round, client), hashlib.sha256(data).digest() + data)
            # Of all clients: where several share the data set, none's reply makes another's go.
            latest = list(dict.fromkeys(key[:2] for key in reversed(paid)))[:num_rounds_kept]
            kept = {self._reply_path(*key) for key in paid if key[:2] in [*latest, (run, server_round)]}
            for path in (self.directory / "replies").iterdir():
                if path not in kept:
                    path.unlink(missing_ok=True)

    def load_reply(self, *, run: str, server_round: int, client: str) -> bytes | None:
        """Return what left this client for a round; None where nothing was saved, or it was dropped or is damaged."""
        try:
            data = self._reply_path(run, server_round, client).read_bytes()
        except FileNotFoundError:
            return None
        digest, reply = data[:32], data[32:]
        return reply if hashlib.sha256(reply).digest() == digest else None

    def _repeated_reply(self, release: Release, entries: list[Entry]) -> bytes | None:
        key = _reply_key(release)
        paid = [entry.release for entry in entries if _reply_key(entry.release) == key]
        if not paid:
            return None
        changed = [
            f"{name}={getattr(paid[-1], name)!r} before, {getattr(release, name)!r} now"
            for name in ("noise_multiplier", "sample_rate", "num_steps", "max_grad_norm")
            if getattr(paid[-1], name) != getattr(release, name)
        ]
        if paid[-1].num_examples != release.num_examples:
            changed.append("another number of examples")
        if changed:
            raise ProtocolError(
                f"Round {release.server_round} of run {release.run!r} was already paid with other parameters "
                f"({'; '.join(changed)}). Repeat it unchanged, or start a new run."
            )
        return self.load_reply(run=release.run, server_round=release.server_round, client=release.client)

    def _append(self, release: Release, entries: list[Entry], anchor: Head, *, delta: float) -> None:
        head = self._head_of(entries)
        # Also mends an anchor that a crash left one entry behind: the ledger must never be two ahead.
        if head != anchor or not self._anchor.exists():
            self._write_anchor(head)
        line = encode_entry(
            release,
            dataset_id=self.dataset_id,
            delta=delta,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            previous=head.sha256,
        )
        data = (self._ledger.read_bytes() if self._ledger.exists() else b"") + line
        # What could not be read again is never written.
        after = self._head_of(parse_entries(data, dataset_id=self.dataset_id, name=str(self._ledger)))
        atomic_write_bytes(self._ledger, data)
        self._write_anchor(after)

    def _write_anchor(self, head: Head) -> None:
        atomic_write_bytes(self._anchor, encode_anchor(head, dataset_id=self.dataset_id))

    def _head_of(self, entries: list[Entry]) -> Head:
        return Head(len(entries), entries[-1].sha256) if entries else empty_head(self.dataset_id)

    def _read(self) -> tuple[list[Entry], Head]:
        """Return the entries and the anchor, after checking them against each other."""
        with explain_disk_errors(self._ledger):
            # Without the lock, so that a copy on a read-only disk can be checked: as long as the anchor stayed the
            # same, the ledger is the one that belongs to it, or one entry ahead.
            for _ in range(_num_read_attempts):
                anchor_bytes, data = _read_if_there(self._anchor), _read_if_there(self._ledger)
                if anchor_bytes == _read_if_there(self._anchor):
                    break
        entries = parse_entries(data or b"", dataset_id=self.dataset_id, name=str(self._ledger))
        anchor = empty_head(self.dataset_id)
        if anchor_bytes is not None:
            owner, anchor = parse_anchor(anchor_bytes, name=str(self._anchor))
            if owner != self.dataset_id:
                raise LedgerError(f"{self._anchor} belongs to the data set {owner!r}, not to {self.dataset_id!r}.")
        elif entries:
            raise LedgerError(
                f"{self._anchor} is missing: whether {self._ledger} is complete is not known. {restore_both}"
            )
        check_head(entries, anchor, dataset_id=self.dataset_id, name=str(self._ledger))
        return entries, anchor

    def _reply_path(self, run: str, server_round: int, client: str) -> Path:
        # The run's id comes from the server: it must not choose a path.
        name = hashlib.sha256(json.dumps([run, server_round, client]).encode()).hexdigest()[:32]
        return self.directory / "replies" / f"{name}.reply"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with explain_disk_errors(self.directory):
            _create_directory(self.directory)
        with file_lock(self.directory / lock_file) as locked:
            if not locked:
                # Two processes could pay for one round with the same money.
                raise LedgerError(
                    f"The disk of {self.directory} has no file locks, so a privacy ledger cannot be kept there. Set "
                    f"{root_variable} to a directory on a local disk (of a system other than Windows)."
                )
            for leftover in self.directory.glob(f".*{partial_suffix}"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
            yield


def _reply_key(release: Release) -> tuple[str, int, str]:
    """Return what makes a release a repetition of another: two clients of one data set must not send one update."""
    return release.run, release.server_round, release.client


def read_anchored_dataset(directory: Path) -> str:
    """Return the id of the data set that the ledger in ``directory`` says it belongs to.

    Raises:
        LedgerError: If there is no ledger, or its anchor cannot be read.
    """
    data = _read_if_there(directory / anchor_file)
    if data is None:
        raise LedgerError(f"{directory} holds no privacy ledger: {anchor_file} is missing.")
    return parse_anchor(data, name=str(directory / anchor_file))[0]


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _create_directory(directory: Path) -> None:
    """Create ``directory`` durably: a new directory is lost with the power if its parent is not flushed."""
    if directory.is_dir():
        return
    _create_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot flush a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
