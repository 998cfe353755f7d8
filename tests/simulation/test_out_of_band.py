"""A data owner that brings the bundle itself is sent none of it; one whose copy is wrong is served as ever."""

from __future__ import annotations

import os
from pathlib import Path

from ot_federated.cache import file_sha256
from tests.federations import run_federation

quick = {"evaluation.max-examples": 1, "evaluation.max-validation-examples": 1}


def test_no_shard_travels_and_the_result_is_the_same(llama_directory: Path, tmp_path: Path) -> None:
    sent = run_federation(tmp_path / "sent", llama_directory, settings=quick)
    digest = sent.summary["offsite"]["bundle_digest"]
    place = next(
        path.parent
        for path in (Path(os.environ["OT_FEDERATED_CACHE"]) / "bundles").glob("*/manifest.json")
        if file_sha256(path) == digest
    )
    config = {"bundle-path": str(place)}
    brought = run_federation(tmp_path / "brought", llama_directory, settings=quick, node_config=config)
    assert sent.grid.num_messages["query.shard"] > 0
    assert brought.grid.num_messages["query.shard"] == 0
    assert brought.digest == sent.digest
    config = {"bundle-path": str(tmp_path / "nothing")}
    served = run_federation(tmp_path / "served", llama_directory, settings=quick, node_config=config)
    assert served.grid.num_messages["query.shard"] == sent.grid.num_messages["query.shard"]
    assert served.digest == sent.digest
