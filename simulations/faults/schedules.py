"""What goes wrong in a schedule, drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

num_rounds, num_clients = 3, 3
aggregators = ("fedavg", "fedadam", "fedavgm", "fedyogi")

# What happens to one client's message in one round.
client_faults = (
    "client killed before training",
    "client killed in training",
    "client killed in upload",
    "client loses its bundle",
    "reply lost, node reported gone",
    "reply lost in silence",
    "reply twice",
    "reply again in the next round",
    "reply late",
    "shard lost",
    "client killed with a shard",
)
# Where the server is killed: before or after what it does there.
server_stages = (
    "prepare",
    "distribute",
    "train",
    "aggregate",
    "checkpoint",
    "metrics",
    "evaluate",
    "deliver",
    "sum up",
)
round_stages = ("train", "aggregate", "checkpoint", "metrics", "evaluate")


@dataclass(frozen=True)
class Fault:
    """One fault; it happens once.

    Attributes:
        what: One of ``client_faults``; ``server killed``; ``server killed at a disk operation``.
        server_round: The round, where it belongs to one.
        client: The client's number, where it concerns one.
        stage: Where the server is killed.
        count: The how-manieth shard, step, or disk operation.
        after: Whether the server is killed after the stage and not before it.
    """

    what: str
    server_round: int = 0
    client: int = 0
    stage: str = ""
    count: int = 0
    after: bool = False

    def __str__(self) -> str:
        if self.what == "server killed":
            when = "after" if self.after else "before"
            return f"server killed {when} {self.stage}" + (
                f" of round {self.server_round}" if self.server_round else ""
            )
        if self.what == "server killed at a disk operation":
            return f"server killed at its disk operation {self.count}"
        place = f"round {self.server_round}" if self.server_round else f"shard {self.count}"
        return f"{self.what}, client {self.client}, {place}"


@dataclass(frozen=True)
class Schedule:
    """A seed's faults and the aggregator under them."""

    seed: int
    aggregator: str
    faults: tuple[Fault, ...]


def draw_schedule(seed: int) -> Schedule:
    """Draw a schedule: one to four faults of clients and messages, none to two deaths of the server."""
    dice = random.Random(seed)
    faults = []
    for _ in range(dice.randint(1, 4)):
        what = dice.choice(client_faults)
        of_shard = "shard" in what
        faults.append(
            Fault(
                what,
                server_round=0 if of_shard else dice.randint(1, num_rounds),
                client=dice.randrange(num_clients),
                count=dice.randint(0, 2),
            )
        )
    for _ in range(dice.choice((0, 1, 1, 2))):
        if dice.random() < 0.3:
            faults.append(Fault("server killed at a disk operation", count=dice.randint(1, 120)))
            continue
        stage = dice.choice(server_stages)
        faults.append(
            Fault(
                "server killed",
                stage=stage,
                server_round=dice.randint(1, num_rounds) if stage in round_stages else 0,
                after=dice.random() < 0.5,
            )
        )
    return Schedule(seed, dice.choice(aggregators), tuple(dict.fromkeys(faults)))


def stage_schedules() -> list[Schedule]:
    """Return a schedule for each stage at which the server can die, before it and after it, and nothing else."""
    found: list[Schedule] = []
    for stage in server_stages:
        server_round = 2 if stage in round_stages else 0
        for after in (False, True):
            fault = Fault("server killed", stage=stage, server_round=server_round, after=after)
            found.append(Schedule(1000 + len(found), "fedadam", (fault,)))
    return found
