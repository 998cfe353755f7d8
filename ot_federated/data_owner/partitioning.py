"""How a simulation divides one data set among its clients.

Real data owners bring their own data; these divisions imitate them. ``iid`` deals shuffled examples out
evenly. ``dirichlet`` skews the labels: each client's mix of labels is drawn from a Dirichlet distribution
around the whole set's mix (Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", 2019, https://arxiv.org/abs/1909.06335). ``column`` gives each value of a
column its own client.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ot_federated.errors import ConfigError, DataError, nearest_match

Indices = NDArray[np.int64]
methods = ("iid", "dirichlet", "column")


def partition_indices(
    num_examples: int,
    *,
    num_partitions: int,
    method: str,
    seed: int,
    labels: Sequence[Hashable] | None = None,
    alpha: float = 0.5,
) -> list[Indices]:
    """Divide ``range(num_examples)`` into ``num_partitions`` shards, each with at least one example.

    Every index is in exactly one shard, and the same arguments give the same shards. ``labels``, one an
    example, is what ``dirichlet`` and ``column`` go by; ``alpha``, above 0, is dirichlet's concentration
    (small: skewed).

    Raises:
        ConfigError: If the method, alpha or the number of partitions is not possible for these labels.
        DataError: If there are fewer examples than partitions.
    """
    if method not in methods:
        hint = nearest_match(method, methods)
        raise ConfigError(f"data.partitioner={method!r} is not one of {', '.join(methods)}{hint}.")
    if num_partitions < 1:
        raise ConfigError(f"num-clients={num_partitions} must be at least 1.")
    if num_examples < num_partitions:
        raise DataError(
            f"{num_examples} examples cannot be divided among {num_partitions} clients: some would be "
            "empty. Lower num-clients, raise data.max-train-examples, or give more data."
        )
    rng = np.random.default_rng(seed)
    if method == "iid":
        return [np.sort(shard) for shard in np.array_split(rng.permutation(num_examples), num_partitions)]
    if labels is None or len(labels) != num_examples:
        count = "no" if labels is None else len(labels)
        raise ConfigError(
            f"data.partitioner={method!r} needs a label for each of {num_examples} examples and got {count}. "
            "Set data.partition-column to a column that every row has."
        )
    if method == "column":
        return _divide_by_value(labels, num_partitions=num_partitions)
    return _divide_by_dirichlet(labels, num_partitions=num_partitions, alpha=alpha, rng=rng)


def encode_labels(labels: Sequence[Hashable]) -> tuple[Indices, list[Hashable]]:
    """Return each label's position among the distinct values, and those values sorted.

    Values of kinds that do not compare (a number, a text, None) are sorted by kind, then by their text.
    """
    distinct: list[Any] = list(dict.fromkeys(labels))
    try:
        values = sorted(distinct)
    except TypeError:
        values = sorted(distinct, key=lambda value: (type(value).__name__, str(value)))
    position = {value: index for index, value in enumerate(values)}
    return np.array([position[label] for label in labels], dtype=np.int64), values


def _divide_by_value(labels: Sequence[Hashable], *, num_partitions: int) -> list[Indices]:
    codes, values = encode_labels(labels)
    if len(values) != num_partitions:
        relation = "fewer" if len(values) < num_partitions else "more"
        raise ConfigError(
            f"data.partition-column has {len(values)} distinct values, {relation} than "
            f"num-clients={num_partitions}, and data.partitioner='column' gives each value one client. Set "
            f"num-clients={len(values)}, or choose another column or partitioner."
        )
    return [np.flatnonzero(codes == code) for code in range(num_partitions)]


def _divide_by_dirichlet(
    labels: Sequence[Hashable], *, num_partitions: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Give clients, equal in size to within one example, label mixes ``q ~ Dirichlet(alpha * L * p)``.

    ``p`` is the whole set's mix of ``L`` labels, so alpha counts for each label, as in Flower's
    DirichletPartitioner; the paper's, which counts for all labels together, is L times ours. As in the paper
    (section 3), clients draw without replacement and, once a label is used up, go on with the rest of their mix.
    Unlike there,
    they take turns of one example: if each filled up before the next, the last would get leavings whatever
    its mix.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"data.dirichlet-alpha={alpha} must be a finite number above 0.")
    codes, values = encode_labels(labels)
    left = np.bincount(codes, minlength=len(values))
    pools = [rng.permutation(np.flatnonzero(codes == code)) for code in range(len(values))]
    mixes = _draw_mixes(alpha * len(values) * left / left.sum(), size=num_partitions, rng=rng)
    shards: list[list[int]] = [[] for _ in range(num_partitions)]
    for turn in range(len(codes)):
        client = turn % num_partitions
        weights = mixes[client] * (left > 0)
        # A small alpha makes mixes of hardly more than one label: once it is used up, what is left is the mix.
        weights = weights if weights.sum() > 0 else left.astype(np.float64)
        code = int(rng.choice(len(values), p=weights / weights.sum()))
        left[code] -= 1
        shards[client].append(int(pools[code][left[code]]))
    return [np.sort(np.array(shard, dtype=np.int64)) for shard in shards]


def _draw_mixes(concentrations: NDArray[np.float64], *, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return ``(size, labels)`` Dirichlet draws; where one underflows, its limit: a single label."""
    mixes = rng.dirichlet(np.maximum(concentrations, np.finfo(np.float64).tiny), size=size)
    limit = np.eye(len(concentrations))[
        rng.choice(len(concentrations), size=size, p=concentrations / concentrations.sum())
    ]
    usable = np.isfinite(mixes).all(axis=1) & (mixes.sum(axis=1) > 0)
    return np.where(usable[:, None], mixes, limit)
