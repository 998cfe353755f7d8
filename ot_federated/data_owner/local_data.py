"""The data owner's rows: its own file in a deployment, its shard of a set in a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ot_federated.data_owner.partitioning import partition_indices
from ot_federated.errors import ConfigError, DataError
from ot_federated.sources import draw_rows, list_files, load_table

if TYPE_CHECKING:
    from datasets import Dataset

Scalar = bool | int | float | str


def load_local_rows(
    node_config: Mapping[str, Scalar],
    *,
    source: str,
    columns: Sequence[str],
    partitioner: str,
    partition_column: str,
    dirichlet_alpha: float,
    max_train_examples: int,
    seed: int,
) -> Dataset:
    """Return this data owner's training rows.

    Args:
        node_config: ``data-path`` names the owner's own data; else ``partition-id`` and ``num-partitions``, which
            a simulation sets, choose a shard of ``source``.
        source: The set that a simulation divides.
        columns: Columns that the task needs.
        partitioner: ``iid``, ``dirichlet``, ``column`` or ``files``.
        partition_column: Column for ``dirichlet`` and ``column``.
        dirichlet_alpha: Concentration for ``dirichlet``.
        max_train_examples: Rows of ``source`` to use in all; 0 for all.
        seed: Seed of the division; equal at all clients.

    Raises:
        ConfigError: If there is neither a data path nor a partition, or the division is impossible.
        DataError: If the shard is empty or lacks columns.
    """
    if path := node_config.get("data-path"):
        return load_table(str(path), split="train", columns=columns)
    partition, num_partitions = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(num_partitions, int):
        raise ConfigError(
            "This client has no data: start its SuperNode with --node-config 'data-path=\"/path/to/data.jsonl\"'."
        )
    if partitioner == "files":
        return _load_own_file(source, columns=columns, partition=partition, num_partitions=num_partitions)
    wanted = (*columns, partition_column) if partitioner in ("dirichlet", "column") else tuple(columns)
    table = load_table(source, split="train", columns=tuple(dict.fromkeys(wanted)))
    table = table.select(draw_rows(table.num_rows, max_rows=max_train_examples, seed=seed))
    shards = partition_indices(
        table.num_rows,
        num_partitions=num_partitions,
        method=partitioner,
        seed=seed,
        labels=table[partition_column][:] if partitioner in ("dirichlet", "column") else None,
        alpha=dirichlet_alpha,
    )
    return table.select(shards[partition])


def _load_own_file(source: str, *, columns: Sequence[str], partition: int, num_partitions: int) -> Dataset:
    files = list_files(source)
    if len(files) != num_partitions:
        raise DataError(
            f"data.partitioner=files: {source!r} matches {len(files)} files and there are {num_partitions} clients. "
            f"Set num-clients={len(files)}, or change the glob."
        )
    return load_table(str(files[partition]), split=None, columns=columns)
