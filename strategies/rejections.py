"""Clients whose replies are wrong: counted by node, put aside over a limit, remembered when the run goes on.

A rejection is a reply that no honest client of this release gives. A client that refuses with a reason, breaks down
or comes late has done nothing wrong, and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ot_federated.errors import CheckpointError

format_version = 2


@dataclass
class Offender:
    """A client with rejected replies.

    Attributes:
        node_id: Flower's id of its node.
        name: Its name.
        rounds: For each reply that was rejected its round; the one before, where the round failed for good.
        reasons: Why each was.
    """

    node_id: int
    name: str
    rounds: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def num_rejections(self) -> int:
        """Replies that were rejected, in all rounds of the run."""
        return len(self.rounds)

    def drop_after(self, last_round: int) -> bool:
        """Forget the replies of later rounds and return whether there were any."""
        kept = [index for index, number in enumerate(self.rounds) if number <= last_round]
        dropped = len(kept) < len(self.rounds)
        self.rounds, self.reasons = [self.rounds[i] for i in kept], [self.reasons[i] for i in kept]
        return dropped


class Rejections:
    """The rejections of a run.

    Args:
        limit: Rejected replies after which a client is put aside for the rest of the run; 0: never.
        saved: What :meth:`to_json` returned when the run was stopped.
        last_round: The round after which the run goes on. Later ones are done again: what was rejected in them is not
            counted twice.
        on_change: Called with :meth:`to_json` after each rejection: the place to save it.

    Raises:
        CheckpointError: If ``saved`` is damaged or of another format.
    """

    def __init__(
        self,
        *,
        limit: int = 0,
        saved: Mapping[str, Any] | None = None,
        last_round: int = 0,
        on_change: Callable[[dict[str, Any]], None] = lambda _saved: None,
    ) -> None:
        self.limit = limit
        self.offenders: dict[int, Offender] = {}
        self._on_change = on_change
        if saved is not None:
            self.offenders = _read(saved)
            dropped = [offender.drop_after(last_round) for offender in self.offenders.values()]
            self.offenders = {node_id: offender for node_id, offender in self.offenders.items() if offender.rounds}
            if any(dropped):
                on_change(self.to_json())
        # A simulation that goes on has new node ids; only then may a name stand for a node.
        self._unseen = set(self.offenders)

    def add(self, node_id: int, *, name: str, reason: str, server_round: int) -> bool:
        """Count a rejected reply and return whether its client is put aside from now on."""
        offender = self.offenders.setdefault(node_id, Offender(node_id, name))
        offender.name = name
        offender.rounds.append(server_round)
        offender.reasons.append(reason)
        self._unseen.discard(node_id)
        self._on_change(self.to_json())
        return self.is_aside(node_id)

    def keep(self, server_round: int) -> None:
        """Count what was rejected in a round that failed for good when the run goes on, which does that round again.

        Else a client whose replies make every round fail would never be put aside.
        """
        for offender in self.offenders.values():
            offender.rounds = [number - (number == server_round) for number in offender.rounds]
        if self.offenders:
            self._on_change(self.to_json())

    def is_aside(self, node_id: int) -> bool:
        """Say whether a node is put aside."""
        offender = self.offenders.get(node_id)
        return offender is not None and 0 < self.limit <= offender.num_rejections

    def recognise(self, names: Mapping[int, str]) -> None:
        """Find offenders from before the run was stopped among the connected nodes, by id, else by a name.

        A name counts where exactly one connected node has it and its offender's own node is not there.
        """
        self._unseen -= names.keys()
        for node_id in sorted(self._unseen):
            offender = self.offenders[node_id]
            namesakes = [other for other, name in names.items() if name == offender.name]
            if len(namesakes) == 1 and namesakes[0] not in self.offenders:
                self._unseen.discard(node_id)
                offender.node_id = namesakes[0]
                self.offenders[offender.node_id] = self.offenders.pop(node_id)

    def names_aside(self) -> list[str]:
        """Return the names of those that are put aside, sorted."""
        return sorted(offender.name for node_id, offender in self.offenders.items() if self.is_aside(node_id))

    def to_json(self) -> dict[str, Any]:
        """Return everything that must be remembered, as JSON values."""
        offenders = [
            {
                "node_id": offender.node_id,
                "name": offender.name,
                "rejections": [
                    {"round": number, "reason": reason}
                    for number, reason in zip(offender.rounds, offender.reasons, strict=True)
                ],
            }
            for offender in self.offenders.values()
        ]
        return {"format": format_version, "offenders": offenders}


def _read(saved: Mapping[str, Any]) -> dict[int, Offender]:
    try:
        if saved["format"] != format_version:
            raise CheckpointError(
                f"The run's rejections have format {saved['format']!r}; this release reads {format_version}. Go on "
                "with the release of ot-federated that began the run."
            )
        offenders = [
            Offender(
                node_id=int(entry["node_id"]),
                name=str(entry["name"]),
                rounds=[int(rejection["round"]) for rejection in entry["rejections"]],
                reasons=[str(rejection["reason"]) for rejection in entry["rejections"]],
            )
            for entry in saved["offenders"]
        ]
        return {offender.node_id: offender for offender in offenders}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The run's rejections cannot be read ({type(error).__name__}: {error}). Delete rejections.json in the "
            "run's directory to go on without them."
        ) from error
