from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from strategies.traffic import chunk_bytes, count_wire_bytes
from tests.federations import run_federation


def test_the_summary_has_the_bytes_of_the_wire(tmp_path: Path, llama_directory: Path) -> None:
    """Against the sum of Flower's serialised objects; the ids and requests around them are in the summary's alone."""
    federation = run_federation(tmp_path, llama_directory, settings={"num-server-rounds": 2})
    sizes = federation.summary["bytes"]
    for told, counted in (
        (sizes["wire_to_clients"], federation.grid.bytes_to_clients),
        (sizes["wire_to_server"], federation.grid.bytes_to_server),
    ):
        assert told == pytest.approx(sum(counted.values()), rel=0.12)
        assert told > sum(counted.values())
    bundles = federation.summary["bytes"]["bundle_per_client"]
    assert sizes["wire_to_clients"] > bundles


def test_equal_arrays_travel_once_and_large_ones_in_chunks() -> None:
    def content(*arrays: np.ndarray) -> RecordDict:
        record = ArrayRecord({f"a{index}": Array(array) for index, array in enumerate(arrays)})
        return RecordDict({"arrays": record, "config": ConfigRecord({"text": "x" * 100, "ids": [1, 2, 3]})})

    one, two = np.zeros(1000, np.float32), np.ones(1000, np.float32)
    assert count_wire_bytes(content(one, two)) - count_wire_bytes(content(one, one)) == len(Array(one).data)
    large = np.zeros(2 * chunk_bytes, np.uint8)
    assert count_wire_bytes(content(large)) > large.nbytes + 1000
