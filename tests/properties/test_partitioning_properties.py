from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ot_federated.data_owner.partitioning import partition_indices

labels_strategy = st.lists(st.sampled_from(["a", "b", "c", 1, None]), min_size=1, max_size=60)


@given(
    labels=labels_strategy,
    method=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 2**32),
    alpha=st.floats(1e-300, 1e6),
    data=st.data(),
)
def test_every_example_is_in_exactly_one_shard_and_none_is_empty(
    labels: list[object], method: str, seed: int, alpha: float, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(labels)))
    shards, again = (
        partition_indices(len(labels), num_partitions=count, method=method, seed=seed, labels=labels, alpha=alpha)
        for _ in range(2)
    )
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    sizes = [len(shard) for shard in shards]
    assert len(sizes) == count
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


@given(labels=labels_strategy)
def test_column_shards_are_the_values(labels: list[object]) -> None:
    count = len(set(labels))
    shards = partition_indices(len(labels), num_partitions=count, method="column", seed=0, labels=labels)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert [len({labels[index] for index in shard}) for shard in shards] == [1] * count
