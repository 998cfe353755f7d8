"""Hostile peers against the real apps: ``python -m simulations.benchmarks.hostile_peers --data FOLDER``.

Hostile clients attack a federation in one process, all at once, beside three honest ones; a hostile server sends one
client what no honest server sends. The table says of each attack what came of it and the reason that was logged. The
exit status is 1 where an attack was not refused. ``FOLDER`` is as for :mod:`simulations.benchmarks.poisoning`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ot_federated.config import parse_run_config
from ot_federated.data_owner.bundle_cache import cache_variable
from ot_federated.model_owner.owner import prepare
from ot_federated.reporting.run_directory import RunDirectory
from ot_federated.settings import Scalar
from simulations.benchmarks.fault_results import update_results
from simulations.benchmarks.hostile_clients import run_hostile_clients
from simulations.benchmarks.hostile_servers import Victim, run_hostile_servers
from simulations.benchmarks.poisoning import base_config, write_data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every attack and write the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.hostile_peers", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k/ and sentconv/")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(parsed.data.absolute(), directory / "data")
        train = str(directory / "data" / "honest-0.jsonl")
        config: dict[str, Scalar] = base_config(parsed.data.absolute(), directory / "data", train=train) | {
            "data.partitioner": "iid",
            "train.max-steps": 2,
            "train.batch-size": 4,
            "strategy.min-nodes": 1,
        }
        os.environ[cache_variable] = str(directory / "shared-cache")
        rows = run_hostile_clients(config, directory / "clients")
        bundle = prepare(parse_run_config(config), RunDirectory(directory / "server")).bundle
        (directory / "victim").mkdir()
        rows += run_hostile_servers(Victim(directory / "victim", bundle=bundle, config=config))
    for row in rows:
        print(f"{row['peer']:7} {row['attack']:38} {row['outcome']:34} {row['detail'][:110]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sum(row['refused'] for row in rows)} of {len(rows)} attacks refused; peak memory {peak:,.0f} MiB")
    update_results("hostile", rows, command="python -m simulations.benchmarks.hostile_peers --data FOLDER")
    return int(not all(row["refused"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
