"""A client with too many rejected replies takes no further part, also after the run was stopped and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, Message

from ot_federated.messages import arrays_key
from tests.federations import is_train_reply, partition_of, prepare_federation, run_federation, start

settings = {"num-server-rounds": 3, "strategy.max-rejections": 2}


def poison(reply: Message) -> None:
    arrays = reply.content.array_records[arrays_key]
    name = sorted(arrays)[0]
    values = arrays[name].numpy().copy()
    values.flat[0] = math.nan
    arrays[name] = Array(values.astype(np.float16))


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
    (offender,) = json.loads((federation.output / "rejections.json").read_text())["offenders"]
    assert (offender["name"], offender["num_rejections"]) == ("client-0002", 2)
    assert "not finite" in offender["last_reason"]

    trained.clear()
    resumed = run_federation(tmp_path, llama_directory, settings=settings | {"resume": True}, num_clients=3)
    assert resumed.rounds[3]["clients"] == ["client-0000", "client-0001"]
    assert resumed.rounds[3]["put_aside"] == ["client-0002"]
    assert resumed.rounds[3]["failures"] == {}
