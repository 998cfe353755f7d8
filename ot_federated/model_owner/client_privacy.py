"""The books of client-level privacy: what a run has released about its clients, and what that cost.

One file in the run's directory, ``client_privacy.jsonl``, one line a release, kept by the server, which is trusted.

*Write-ahead.* :meth:`ClientPrivacyBooks.pay` returns after the line is on the disk (fsync), and no noise is drawn
before it returns. A round that is done again after a crash is a second release, and has a second line: too much may
be counted, never too little. Nothing is ever removed, whatever becomes of checkpoints and metrics.

What is counted. Unit: one client, with all its data, in all rounds of this run. Adjacency: the client's updates are
in the sums, or left out of them; which clients are asked in a round is the same in both cases (it depends on nobody's
data), and so is the number that the sums are divided by. Every release counts for every client, as if it had been in
it (no amplification by sampling: the server knows who took part). Who took part, and how long it took, is not hidden.
Runs of the same clients add up, and each counts for itself alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_bytes, file_lock
from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.privacy_accounting import Mechanism, calibrate_noise_multiplier, check_delta, epsilon_of

books_file = "client_privacy.jsonl"
schema_version = 1
# A round with more noise than that, compared with the first, would undo what the run has learnt.
most_noise_growth = 2.0
unit, adjacency = "client", "add-remove-one, divisor and choice of clients fixed"
_fixed = {"schema": schema_version, "unit": unit, "adjacency": adjacency}


class ClientPrivacyError(OtFederatedError):
    """The books of client-level privacy are damaged, or do not belong to the run's checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ClientRelease:
    """One noised sum of updates, divided by a constant.

    Attributes:
        server_round: The round, at least 1.
        noise_multiplier: Noise of sum and clipped share together over their sensitivity, above 0.
        clipping_norm: The L2 norm to which each update was clipped.
        clients_per_round: What the sum was divided by.
    """

    server_round: int
    noise_multiplier: float
    clipping_norm: float
    clients_per_round: int

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant needs to know of it."""
        return Mechanism(noise_multiplier=self.noise_multiplier, sample_rate=1.0, num_steps=1)


class ClientPrivacyBooks:
    """The releases of the run in ``directory``, and their epsilon at ``delta``.

    Raises:
        ConfigError: If ``delta`` cannot be accounted.
    """

    def __init__(self, directory: Path, *, delta: float) -> None:
        check_delta(delta)
        self.path = directory / books_file
        self.delta = delta

    @property
    def releases(self) -> list[ClientRelease]:
        """Everything that was paid, oldest first.

        Raises:
            ClientPrivacyError: Naming the first bad line.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return [self._parse(line, number) for number, line in enumerate(data.splitlines(keepends=True), start=1)]

    def epsilon(self) -> float:
        """Return the epsilon of everything that was paid.

        Raises:
            ClientPrivacyError: If the books are damaged.
        """
        return epsilon_of([release.mechanism for release in self.releases], delta=self.delta)

    def pay(self, release: ClientRelease) -> float:
        """Write a release to the disk before it is made, and return the epsilon of all so far.

        Raises:
            ClientPrivacyError: If the books are damaged.
            OtFederatedError: If the disk is full or may not be written.
        """
        # Two processes that continue one run by mistake must not overwrite each other's lines.
        with file_lock(self.path.with_suffix(".lock")):
            number = len(self.releases) + 1
            fields = {**_fixed, "release": number, "time": datetime.now(UTC).isoformat(timespec="seconds")}
            line = json.dumps({**fields, **asdict(release)}) + "\n"
            before = self.path.read_bytes() if self.path.exists() else b""
            atomic_write_bytes(self.path, before + line.encode())
        return self.epsilon()

    def plan_noise(self, *, noise_multiplier: float, target_epsilon: float, num_rounds: int) -> float:
        """Return the noise multiplier of the rounds to come.

        It is calibrated once for all rounds, and stays when a run is continued. Only where a crash made a round cost
        twice does the rest get more noise, so that the run as a whole keeps its target.

        Args:
            noise_multiplier: The one that was asked for; 0: from ``target_epsilon``.
            target_epsilon: The most that the run may cost, repeated rounds included.
            num_rounds: Rounds to come, at least 0.

        Raises:
            ConfigError: If the noise asked for protects nobody, or so little is left of the target that the rest would
                need more than twice the noise.
            ClientPrivacyError: If the books are damaged.
        """
        releases = self.releases
        history = [release.mechanism for release in releases]
        known = noise_multiplier or (releases[-1].noise_multiplier if releases else 0.0)
        if known:
            plan = Mechanism(noise_multiplier=known, sample_rate=1.0, num_steps=num_rounds)
            planned = epsilon_of([*history, plan], delta=self.delta)
            if math.isinf(planned):
                raise ConfigError(
                    f"privacy.noise-multiplier={known:g} protects nobody: its epsilon is beyond counting. Ask for more "
                    "noise, or say privacy.mode=none."
                )
            if noise_multiplier or planned <= target_epsilon:
                return known
        needed = math.inf
        with suppress(ConfigError) if releases else nullcontext():
            needed = calibrate_noise_multiplier(
                target_epsilon=target_epsilon,
                delta=self.delta,
                sample_rate=1.0,
                num_steps=max(1, num_rounds),
                history=history,
            )
        if releases and needed > most_noise_growth * releases[0].noise_multiplier:
            raise ConfigError(
                f"privacy.target-epsilon={target_epsilon:g} does not allow {num_rounds} more rounds of useful noise: "
                f"{len(releases)} releases cost epsilon={self.epsilon():.4g} at delta={self.delta:g}, those included "
                "whose result was lost in a crash. Continue with a larger privacy.target-epsilon, or begin a new run."
            )
        return needed

    def check_rounds(self, last_round: int) -> None:
        """Check that each round up to ``last_round``, which the run's checkpoint has done, was paid.

        Raises:
            ClientPrivacyError: If one was not: lines are missing, and what was spent is not known.
        """
        paid = {release.server_round for release in self.releases}
        if missing := sorted(set(range(1, last_round + 1)) - paid):
            raise ClientPrivacyError(
                f"The run has done {last_round} rounds, and {self.path} does not have round {missing[0]}. {_remedy}"
            )

    def _parse(self, line: bytes, number: int) -> ClientRelease:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it is torn")
            fields: dict[str, Any] = json.loads(line)
            if {name: fields[name] for name in _fixed} != _fixed:
                raise ValueError(f"it counts in another schema, unit or adjacency than {list(_fixed.values())}")
            if fields["release"] != number:
                raise ValueError(f"it is release {fields['release']!r}: lines are missing or were moved")
            release = ClientRelease(
                server_round=int(fields["server_round"]),
                noise_multiplier=float(fields["noise_multiplier"]),
                clipping_norm=float(fields["clipping_norm"]),
                clients_per_round=int(fields["clients_per_round"]),
            )
            _ = release.mechanism  # checks the noise
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise ClientPrivacyError(
                f"{self.path}, line {number} cannot be read ({type(error).__name__}: {error}). {_remedy}"
            ) from error
        return release


_remedy = (
    "Restore this file from a backup, or begin a new run: what this one has spent is not known, so it cannot go on."
)


def describe_releases(releases: Sequence[ClientRelease], *, epsilon: float, delta: float) -> dict[str, Any]:
    """Return the guarantee for ``summary.json``, with all that gives its epsilon a meaning."""
    last = releases[-1] if releases else None
    return {
        "unit": unit,
        "adjacency": adjacency,
        "epsilon": epsilon,
        "delta": delta,
        "sampling": "none: every release counts for every client",
        "accountant": "exact composition of all Gaussian releases of this run, repeated rounds included",
        "trusted": "the server, which sees every update before it is noised",
        "num_releases": len(releases),
        "noise_multiplier": last.noise_multiplier if last else None,
        "last_clipping_norm": last.clipping_norm if last else None,
        "clients_per_round": last.clients_per_round if last else None,
    }
