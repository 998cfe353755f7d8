"""A client with too many rejected replies takes no further part, also after the run was stopped and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message

from ot_federated.messages import arrays_key
from strategies.offsite_tuning import AggregationError
from tests.federations import is_train_reply, partition_of, prepare_federation, run_federation, start

settings = {"num-server-rounds": 3, "strategy.max-rejections": 2}


def poison(reply: Message) -> None:
    arrays = reply.content.array_records[arrays_key]
    name = sorted(arrays)[0]
    values = arrays[name].numpy().copy()
    values.flat[0] = math.nan
    arrays[name] = Array(values.astype(np.float16))


def rejected_rounds(output: Path) -> list[int]:
    (offender,) = json.loads((output / "rejections.json").read_text())["offenders"]
    assert offender["name"] == "client-0002"
    return [rejection["round"] for rejection in offender["rejections"]]


class StoppedError(Exception):
    pass


def test_put_aside_and_remembered(llama_directory: Path, tmp_path: Path) -> None:
    trained: list[tuple[int, int]] = []

    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply):
            trained.append((reply.content.config_records["config"]["server-round"], partition_of(reply)))
            if partition_of(reply) == 2:
                poison(reply)
            if len(trained) == 7:
                raise StoppedError
        return [reply]

    federation = prepare_federation(tmp_path, llama_directory, settings=settings, num_clients=3, on_reply=spoil)
    with pytest.raises(StoppedError):
        start(federation)
    assert (3, 2) not in trained
    rounds = federation.rounds
    assert rounds[1]["put_aside"] == []
    assert rounds[2]["put_aside"] == ["client-0002"]
    assert rounds[2]["failures"]["client-0002"].startswith("rejected: ")
    assert rejected_rounds(federation.output) == [1, 2]

    trained.clear()
    resumed = run_federation(tmp_path, llama_directory, settings=settings | {"resume": True}, num_clients=3)
    assert resumed.rounds[3]["clients"] == ["client-0000", "client-0001"]
    assert resumed.rounds[3]["put_aside"] == ["client-0002"]
    assert resumed.rounds[3]["failures"] == {}


def test_a_round_done_again_after_a_crash_counts_a_reply_once(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=2):
            poison(reply)
        return [reply]

    limit = settings | {"num-server-rounds": 2, "strategy.max-rejections": 3}
    arguments: dict[str, Any] = {"num_clients": 3, "on_reply": spoil}
    unbroken = run_federation(tmp_path / "unbroken", llama_directory, settings=limit, **arguments)

    def stop(_directory: Path, **_content: object) -> None:
        raise StoppedError

    federation = prepare_federation(tmp_path / "broken", llama_directory, settings=limit, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("ot_federated.model_owner.server_app.save_checkpoint", stop)
        with pytest.raises(StoppedError):
            start(federation)
    assert rejected_rounds(federation.output) == [1]
    resumed = run_federation(tmp_path / "broken", llama_directory, settings=limit | {"resume": True}, **arguments)
    assert rejected_rounds(resumed.output) == rejected_rounds(unbroken.output) == [1, 2]
    assert resumed.rounds[2]["put_aside"] == []


def test_a_client_that_makes_every_round_fail_is_put_aside(llama_directory: Path, tmp_path: Path) -> None:
    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=2):
            poison(reply)
        return [reply]

    strict = settings | {"num-server-rounds": 1, "strategy.max-rejections": 1, "strategy.min-replies-fraction": 1.0}
    federation = prepare_federation(tmp_path, llama_directory, settings=strict, num_clients=3, on_reply=spoil)
    with pytest.raises(AggregationError):
        start(federation)
    resumed = run_federation(tmp_path, llama_directory, settings=strict | {"resume": True}, num_clients=3)
    assert resumed.rounds[1]["clients"] == ["client-0000", "client-0001"]
    assert resumed.rounds[1]["put_aside"] == ["client-0002"]
