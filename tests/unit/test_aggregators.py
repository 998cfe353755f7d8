"""What is ours in the aggregators: the trimmed mean says when it trims nothing."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

from simulations.in_process import InProcessGrid
from strategies.aggregators import build_aggregator, describe_trimming


@pytest.fixture(autouse=True)
def server() -> None:
    """Messages can be made in a process that is a server, or a client, alone."""
    InProcessGrid(ClientApp(), run_config={}, num_clients=1)


def build_replies(*values: float) -> list[Message]:
    replies = []
    for node_id, value in enumerate(values, start=1):
        content = RecordDict(
            {
                "arrays": ArrayRecord({"a": Array(np.array([value], dtype=np.float32))}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), node_id, "train")))
    return replies


def test_a_fraction_that_cuts_nothing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    strategy = build_aggregator("fedtrimmedavg", trim_fraction=0.2).strategy
    with caplog.at_level(logging.WARNING, logger="ot_federated"):
        for server_round in (1, 2):
            arrays, _ = strategy.aggregate_train(server_round, build_replies(0.0, 1.0, 2.0, 9.0))
            assert arrays is not None
            assert arrays["a"].numpy() == 3.0  # the plain mean
    (record,) = [record for record in caplog.records if record.name == "ot_federated"]
    assert record.getMessage() == (
        "strategy.trim-fraction=0.2 cuts nothing off 4 replies, whose mean withstands no faulty client. It cuts "
        "from 5 replies on. Of 4 replies strategy.trim-fraction=0.25 cuts."
    )


def test_a_fraction_that_cuts_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    strategy = build_aggregator("fedtrimmedavg", trim_fraction=0.2).strategy
    with caplog.at_level(logging.WARNING, logger="ot_federated"):
        arrays, _ = strategy.aggregate_train(1, build_replies(-9.0, 1.0, 2.0, 3.0, 90.0))
    assert arrays is not None
    assert arrays["a"].numpy() == 2.0
    assert not [record for record in caplog.records if record.name == "ot_federated"]


def does_cut(fraction: float, *, num_replies: int) -> bool:
    values = np.arange(num_replies, dtype=np.float64)
    values[-1] = 1e9
    return float(trim_mean(values[:, None], fraction)[0]) < 1e5


def test_what_is_told_is_what_cuts() -> None:
    for num_replies in range(3, 400):
        found = re.search(r"trim-fraction=(.*) cuts", describe_trimming(0.0, num_replies=num_replies))
        assert found is not None
        fraction = float(found[1])
        assert does_cut(fraction, num_replies=num_replies)
        assert not does_cut(fraction - 1e-4, num_replies=num_replies)
    for fraction in (0.49, 1 / 3, 0.3, 0.25, 0.2, 0.1, 1 / 49, 0.01, 0.003):
        found = re.search(r"from (\d+) replies on", describe_trimming(fraction, num_replies=2))
        assert found is not None
        assert does_cut(fraction, num_replies=int(found[1]))
        assert not does_cut(fraction, num_replies=int(found[1]) - 1)


def test_of_two_replies_none_can_be_cut() -> None:
    assert describe_trimming(0.0, num_replies=2) == "Of fewer than 3 replies none can be cut."
    assert describe_trimming(5e-324, num_replies=1).endswith("Of fewer than 3 replies none can be cut.")
