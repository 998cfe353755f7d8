from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ot_federated
from ot_federated.data_owner.partitioning import encode_labels, partition_indices
from ot_federated.errors import ConfigError, DataError


def test_iid_sizes_differ_by_at_most_one_and_are_shuffled() -> None:
    shards = partition_indices(10, num_partitions=4, method="iid", seed=0)
    assert [len(shard) for shard in shards] == [3, 3, 2, 2]
    assert not np.array_equal(np.concatenate(shards), np.arange(10))


def test_seed_decides() -> None:
    first, again, other = (partition_indices(100, num_partitions=3, method="iid", seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_column_is_one_client_per_value_in_order_of_the_values() -> None:
    shards = partition_indices(5, num_partitions=3, method="column", seed=0, labels=["b", "c", "a", "b", "a"])
    assert [shard.tolist() for shard in shards] == [[2, 4], [0, 3], [1]]


@pytest.mark.parametrize("num_partitions", [2, 4])
def test_column_needs_as_many_values_as_clients(num_partitions: int) -> None:
    with pytest.raises(ConfigError, match=rf"3 distinct values.*num-clients={num_partitions}.*Set num-clients=3"):
        partition_indices(5, num_partitions=num_partitions, method="column", seed=0, labels=["b", "c", "a", "b", "a"])


def test_values_that_do_not_compare_are_sorted_by_kind() -> None:
    codes, values = encode_labels([None, "x", 2, 10, "x"])
    assert values == [None, 10, 2, "x"]
    assert codes.tolist() == [0, 3, 2, 1, 3]


def label_shares(*, alpha: float) -> np.ndarray:
    """Share of label 0 at each of 200 clients of 20 examples, where half of all have label 0."""
    labels = [0, 1] * 2000
    shards = partition_indices(4000, num_partitions=200, method="dirichlet", seed=3, labels=labels, alpha=alpha)
    assert {len(shard) for shard in shards} == {20}
    return np.array([np.mean(np.array(labels)[shard] == 0) for shard in shards])


def test_dirichlet_spread_is_the_one_of_the_distribution() -> None:
    # q ~ Dirichlet(1, 1) has variance 1/12. A share of 20 draws adds E[q(1-q)] / 20 = (1/4 - 1/12) / 20 = 1/120.
    # 200 clients estimate the sum to about 10 %, so 0.02 leaves more than two standard errors.
    assert np.var(label_shares(alpha=1.0)) == pytest.approx(1 / 12 + 1 / 120, abs=0.02)


def test_dirichlet_limits_are_one_label_and_even_mixes() -> None:
    skewed = label_shares(alpha=1e-9)
    assert np.mean((skewed == 0) | (skewed == 1)) > 0.8
    even = label_shares(alpha=1e9)
    assert np.var(even) == pytest.approx(1 / 80, rel=0.3)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.dirichlet-alpha"):
        partition_indices(4, num_partitions=2, method="dirichlet", seed=0, labels="abab", alpha=alpha)


@pytest.mark.parametrize("labels", [None, ["a"]])
def test_labels_must_cover_the_examples(labels: list[str] | None) -> None:
    with pytest.raises(ConfigError, match=r"data\.partition-column"):
        partition_indices(4, num_partitions=2, method="dirichlet", seed=0, labels=labels)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'dirichlett'.*iid, dirichlet, column.*did you mean 'dirichlet'"):
        partition_indices(4, num_partitions=2, method="dirichlett", seed=0)


@pytest.mark.parametrize("method", ["iid", "dirichlet", "column"])
def test_fewer_examples_than_clients(method: str) -> None:
    with pytest.raises(DataError, match=r"2 examples.*3 clients.*Lower num-clients"):
        partition_indices(2, num_partitions=3, method=method, seed=0, labels="ab")
    with pytest.raises(ConfigError, match="num-clients=0"):
        partition_indices(2, num_partitions=0, method=method, seed=0, labels="ab")


def test_importing_is_cheap() -> None:
    check = (
        "import sys\n"
        "import ot_federated.data_owner.partitioning, ot_federated.sources, ot_federated.package_assets\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'gguf', 'tqdm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ot_federated.__file__).parents[1])}
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
