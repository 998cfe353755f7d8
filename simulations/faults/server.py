"""The server of a schedule: it notes what it aggregates, and is killed where the schedule says."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ot_federated.model_owner import owner, results, server_app
from ot_federated.reporting.run_directory import RunDirectory
from simulations.faults.faulty_grid import FaultyGrid, Happened
from simulations.faults.forked_grid import kill_this_process
from simulations.faults.schedules import Fault
from strategies.offsite_tuning import OffsiteTuning

# Where a stage is: the object, its function's name, and which argument tells the round.
stages: dict[str, tuple[Any, str, Callable[..., int]]] = {
    "prepare": (owner, "make_bundle", lambda *_, **__: 0),
    "distribute": (FaultyGrid, "push_messages", lambda *_, **__: 0),
    "train": (FaultyGrid, "_deliver", lambda _grid, message: _round_of(message)),
    "aggregate": (OffsiteTuning, "_join", lambda _strategy, server_round, _valid: server_round),
    "checkpoint": (server_app, "save_checkpoint", lambda *_, server_round, **__: server_round),
    "metrics": (RunDirectory, "append_metrics", lambda _run, line: int(line["round"])),
    "evaluate": (server_app, "evaluate_round", lambda _owner, server_round, _arrays: server_round),
    "deliver": (results, "deliver_model", lambda *_, **__: 0),
    "sum up": (RunDirectory, "write_json", lambda *_, **__: 0),
}


def _round_of(message: Any) -> int:
    if message.metadata.message_type != "train":
        return -1
    return int(message.content.config_records["config"]["server-round"])


def _is_meant(stage: str, arguments: tuple[Any, ...]) -> bool:
    """Say whether a call belongs to the stage: the bundle is distributed by shards alone."""
    return stage != "distribute" or any(
        message.metadata.message_type == "query.shard" for message in arguments[1] if message.has_content()
    )


def arm(happened: Happened) -> None:
    """Make this process die where the schedule says; it is no more good for anything else."""
    for fault in happened.faults:
        if fault.what == "server killed":
            _arm_stage(fault, happened)
        elif fault.what == "server killed at a disk operation":
            _arm_disk(fault, happened)


def _arm_stage(fault: Fault, happened: Happened) -> None:
    place, name, round_of = stages[fault.stage]
    call = getattr(place, name)

    @functools.wraps(call)
    def deadly(*arguments: Any, **keywords: Any) -> Any:
        strikes = _is_meant(fault.stage, arguments) and round_of(*arguments, **keywords) == fault.server_round
        if strikes and not fault.after and happened.claim(fault):
            kill_this_process()
        given = call(*arguments, **keywords)
        if strikes and fault.after and happened.claim(fault):
            kill_this_process()
        return given

    setattr(place, name, deadly)


def _arm_disk(fault: Fault, happened: Happened) -> None:
    left = fault.count

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and happened.claim(fault):
                kill_this_process()
            return call(*arguments, **keywords)

        return deadly

    os.fsync = counted(os.fsync)
    for name in ("rename", "replace"):
        setattr(Path, name, counted(getattr(Path, name)))


def note_aggregated(path: Path) -> None:
    """Let the strategy note in ``path`` whose updates it hands to the aggregator, each with a digest."""
    join = OffsiteTuning._join  # the last place where single updates are seen

    def noting(strategy: OffsiteTuning, server_round: int, valid: list[Any]) -> Any:
        updates = [(strategy.participants.name(reply.metadata.src_node_id), _digest(reply)) for reply in valid]
        line = json.dumps({"round": server_round, "updates": updates}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        return join(strategy, server_round, valid)

    OffsiteTuning._join = noting  # type: ignore[assignment, method-assign]


def _digest(reply: Any) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(reply.content.array_records["arrays"].items()):
        digest.update(name.encode() + array.data)
    return digest.hexdigest()[:16]


def count_updates(path: Path, *, names: list[str], num_rounds: int) -> tuple[int, int]:
    """Return how many updates the final result lacks, and how many are in it twice.

    A round that was done again counts as what it was the last time: the result descends from that.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = {line["round"]: [name for name, _ in line["updates"]] for line in lines}
    lost = sum(name not in last.get(number, []) for number in range(1, num_rounds + 1) for name in names)
    doubled = sum(len(found) - len(set(found)) for found in last.values())
    return lost, doubled
