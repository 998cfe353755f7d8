"""The bounds on a reply that is valid by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from ot_federated.data_owner.client_app import app
from ot_federated.errors import ProtocolError
from ot_federated.messages import build_content
from simulations.in_process import InProcessGrid
from strategies.validation import Bounds, ValidReply, find_outliers, read_reply

reference = {"top.0.a": torch.zeros(3)}


def read(values: list[float], *, sent: float = 0.0, bounds: Bounds | None = None, num_examples: int = 1) -> ValidReply:
    InProcessGrid(app, run_config={}, num_clients=1)  # a message needs the identity that a grid gives
    content = build_content(
        {"server-round": 1, "bundle-digest": "d"},
        arrays=ArrayRecord({"top.0.a": Array(np.array(values, np.float16))}),
        metrics={"num-examples": num_examples},
    )
    return read_reply(
        Message(content, 1, "train"),
        server_round=1,
        bundle_digest="d",
        sent={"top.0.a": torch.full((3,), sent)},
        reference=reference,
        update_dtype="float16",
        bounds=bounds or Bounds(),
    )


def test_the_norm_is_that_of_the_update() -> None:
    assert read([3.0, 4.0, 0.0], sent=100.0).norm == pytest.approx(5.0)


def test_absolute_bound() -> None:
    assert read([3.0, 4.0, 0.0], bounds=Bounds(max_norm=5.0)).norm == 5.0
    with pytest.raises(ProtocolError, match=r"the norm 5, above strategy\.max-update-norm=4\.9"):
        read([3.0, 4.0, 0.0], bounds=Bounds(max_norm=4.9))


def test_a_claim_of_examples() -> None:
    assert read([1.0, 0.0, 0.0], num_examples=10, bounds=Bounds(max_examples=10)).num_examples == 10
    with pytest.raises(ProtocolError, match="num-examples is 11, above"):
        read([1.0, 0.0, 0.0], num_examples=11, bounds=Bounds(max_examples=10))


def test_a_sum_that_could_not_travel_would_end_the_run() -> None:
    with pytest.raises(ProtocolError, match="too large to travel as float16"):
        read([60000.0, 0.0, 0.0], sent=60000.0)


def outliers(norms: list[float], ratio: float = 3.0) -> list[int]:
    replies: list[Any] = [read([norm, 0.0, 0.0]) for norm in norms]
    return sorted(find_outliers(replies, bounds=Bounds(max_norm_ratio=ratio)))


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ([1, 1, 1, 1, 4], [4]),
        ([1, 1, 1, 4, 40], [3, 4]),
        ([1, 1, 3], []),
        ([1, 4], []),
        ([0, 0, 0, 5], []),
        ([0, 1, 5], [2]),
    ],
)
def test_relative_bound(norms: list[float], found: list[int]) -> None:
    assert outliers(norms) == found
    assert outliers(norms, ratio=0.0) == []
