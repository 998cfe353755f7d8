"""Play a schedule: start the server, resume it as often as it dies or gives up, compare the end."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ot_federated.cache import file_sha256, partial_suffix
from ot_federated.data_owner.client_app import app as client_app
from ot_federated.model_owner import results, server_app
from ot_federated.settings import Scalar
from simulations.faults.faulty_grid import FaultyGrid, Happened, modules_file, note_modules
from simulations.faults.schedules import Schedule, num_clients, num_rounds
from simulations.faults.server import arm, count_updates, note_aggregated
from simulations.small_runs import small_settings

max_starts = 12
delivered = ("adapter/adapter.safetensors", "model/model.safetensors")
gave_up = 3


def build_run_config(directory: Path, *, model: Path, data: Path, aggregator: str) -> dict[str, Scalar]:
    """Return the run config of a schedule: three small rounds in which no update may be missing."""
    return small_settings(model, data=data, output=directory / "run") | {
        "num-server-rounds": num_rounds,
        "train.max-steps": 3,
        "strategy.name": aggregator,
        "strategy.min-nodes": num_clients,
        "strategy.min-replies-fraction": 1.0,
        "strategy.node-timeout-seconds": 60.0,
        "evaluation.max-examples": 1,
        "evaluation.max-validation-examples": 1,
    }


def in_new_process(work: Callable[[], None], *, log: Path) -> int:
    """Do ``work`` in a forked process and return its exit status; negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            status = gave_up
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def play(schedule: Schedule, directory: Path, *, model: Path, data: Path) -> dict[str, Any]:
    """Play a schedule in ``directory`` and return what happened and what came out.

    The server is started again with ``resume=true`` whenever it died or a round failed for want of a reply, as an
    operator would, until it ends well.
    """
    began = time.monotonic()
    happened = Happened(directory / "happened", schedule.faults)
    config = build_run_config(directory, model=model, data=data, aggregator=schedule.aggregator)
    statuses: list[int] = []

    def serve() -> None:
        os.environ["OT_FEDERATED_CACHE"] = str(directory / "cache")
        os.environ["XDG_STATE_HOME"] = str(directory / "state")
        results.plot_rounds = lambda *_, **__: None  # type: ignore[attr-defined]  # a figure takes longer than a round
        note_aggregated(directory / "aggregated.jsonl")
        resume = (directory / "run" / "run_config.json").exists()
        arm(happened)
        grid = FaultyGrid(
            client_app,
            run_config=config | {"resume": resume},
            num_clients=num_clients,
            directory=directory / "clients",
            happened=happened,
        )
        grid.run_server_app(server_app.app)
        note_modules(directory)

    while len(statuses) < max_starts and (not statuses or statuses[-1]):
        statuses.append(in_new_process(serve, log=directory / "log.txt"))
    names = [f"client-{number:04d}" for number in range(num_clients)]
    lost, doubled = count_updates(directory / "aggregated.jsonl", names=names, num_rounds=num_rounds)
    return {
        "seed": schedule.seed,
        "aggregator": schedule.aggregator,
        "events": happened.list(),
        "not_reached": [str(fault) for fault in schedule.faults if str(fault) not in happened.list()],
        "server_killed": sum(status == -9 for status in statuses),
        "server_gave_up": sum(status == gave_up for status in statuses),
        "ended": statuses[-1] == 0,
        "lost_updates": lost,
        "doubled_updates": doubled,
        "half_written": sorted(str(path.name) for path in (directory / "run").rglob(f"*{partial_suffix}")),
        "seconds": round(time.monotonic() - began, 1),
    }


def digest_delivered(directory: Path) -> dict[str, str]:
    """Return the digests of what a run delivered."""
    return {name: file_sha256(directory / "run" / name) for name in delivered if (directory / "run" / name).exists()}


def check(outcome: dict[str, Any], directory: Path, *, reference: dict[str, str]) -> dict[str, Any]:
    """Add to an outcome whether its end is correct: delivered bit for bit as without faults, every update once."""
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = directory / "run" / "summary.json"
    federation = json.loads(summary.read_text())["federation"] if summary.exists() else {}
    correct = (
        outcome["ended"]
        and digest_delivered(directory) == reference
        and not outcome["lost_updates"]
        and not outcome["doubled_updates"]
        and not outcome["half_written"]
        and [line["round"] for line in lines] == list(range(num_rounds + 1))
        and federation.get("num_replies") == num_rounds * num_clients
        and federation.get("num_failures") == 0
    )
    return {**outcome, "correct": bool(correct)}


def import_what_was_needed(directory: Path) -> None:
    """Import what the processes of a run had imported by its end, so that those forked from now on need not."""
    for name in sorted(set((directory / modules_file).read_text().split())):
        # Some modules cannot be imported by the name they have.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def clear(directory: Path) -> None:
    """Remove a schedule's files."""
    shutil.rmtree(directory, ignore_errors=True)
