"""The round protocol under any sequence of faults: the new adapter is the mean of exactly the valid replies.

A state machine arms faults (drop, duplicate, delay, corrupt, replay, crash, refuse), then lets the real strategy hold
a round over a grid whose clients answer by a formula, in an order that is drawn too. What must come of the round is
computed beside it, in fp64. Time is simulated, so that a reply that never comes costs nothing.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ot_federated.bundle import BundleFile, manifest_name
from ot_federated.data_owner.client_app import app
from ot_federated.errors import OtFederatedError
from ot_federated.messages import arrays_key, build_content, config_key, metrics_key
from simulations.in_process import InProcessGrid
from strategies.aggregators import build_aggregator
from strategies.conversation import BundleSource
from strategies.offsite_tuning import AggregationError, OffsiteTuning
from strategies.rejections import Rejections
from strategies.replies import tensors_record
from strategies.validation import Bounds
from tests.bundles import build_manifest
from tests.clocks import FakeClock

num_nodes, limit = 4, 3
reference = {"bottom.0.a": torch.zeros(2, 2), "top.0.b": torch.ones(3)}
nodes = st.integers(1, num_nodes)


def set_first_value(value: float) -> Callable[[RecordDict], None]:
    def corrupt(content: RecordDict) -> None:
        values = content.array_records[arrays_key]["top.0.b"].numpy().copy()
        values[0] = value
        content.array_records[arrays_key]["top.0.b"] = Array(values)

    return corrupt


def set_field(name: str, value: Any) -> Callable[[RecordDict], None]:
    def corrupt(content: RecordDict) -> None:
        content[config_key] = ConfigRecord({**content.config_records[config_key], name: value})

    return corrupt


def set_metric(name: str, value: Any) -> Callable[[RecordDict], None]:
    def corrupt(content: RecordDict) -> None:
        content[metrics_key] = MetricRecord({**content.metric_records[metrics_key], name: value})

    return corrupt


def set_array(name: str, array: np.ndarray | None) -> Callable[[RecordDict], None]:
    def corrupt(content: RecordDict) -> None:
        if array is None:
            del content.array_records[arrays_key][name]
        else:
            content.array_records[arrays_key][name] = Array(array)

    return corrupt


def drop_metrics(content: RecordDict) -> None:
    del content[metrics_key]


corruptions = [
    set_first_value(np.nan),
    set_first_value(np.inf),
    set_array("top.0.b", np.zeros(4, np.float16)),
    set_array("top.0.b", np.zeros(3, np.float32)),
    set_array("top.0.b", None),
    set_array("emulator.0.c", np.zeros(3, np.float16)),
    set_field("bundle-digest", "ab" * 32),
    set_field("server-round", 1000),
    set_field("wire-version", 99),
    set_metric("num-examples", 0),
    set_metric("num-examples", 10**9),
    set_metric("loss", float("nan")),
    drop_metrics,
]


def update_of(node_id: int, server_round: int) -> dict[str, np.ndarray]:
    """Return a client's update: numbers that fp16 holds exactly, others for each client and round."""
    step = (node_id + 10 * (server_round % 7)) / 256
    return {name: np.full(tuple(tensor.shape), step, np.float16) for name, tensor in reference.items()}


class FaultyGrid(InProcessGrid):
    """A grid of made-up clients, and a network that does what the machine has armed."""

    def __init__(self, order: random.Random) -> None:
        super().__init__(app, run_config={}, num_clients=1)
        self.order = order
        self.armed: dict[int, Any] = {}
        self.inbox: list[Message] = []
        self.late: list[Message] = []
        self.history: dict[int, RecordDict] = {}
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(range(1, num_nodes + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for number, message in enumerate(messages):
            message_id = f"{len(self.asked)}-{number}-{self.order.random()}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            self.inbox += self.answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # What comes late or was never asked for comes too: it is the strategy that must tell.
        replies = [*self.inbox, *self.late]
        self.inbox, self.late = [], []
        self.order.shuffle(replies)
        return replies

    def answer(self, message: Message) -> list[Message]:
        node_id = message.metadata.dst_node_id
        if message.metadata.message_type == "query.hello":
            fields = {"status": "ok", "name": f"client-{node_id}", "cache-id": f"{node_id}", "missing-shards": []}
            return [self.reply(message, build_content(fields))]
        self.asked.append(node_id)
        asked = message.content.config_records[config_key]
        server_round = int(asked["server-round"])
        content = build_content(
            {"status": "ok", "bundle-digest": asked["bundle-digest"], "server-round": server_round},
            arrays=ArrayRecord({name: Array(values) for name, values in update_of(node_id, server_round).items()}),
            metrics={"num-examples": node_id, "num-steps": 1, "loss": 1.0},
        )
        kind, what = self.armed.pop(node_id, ("none", None))
        old, self.history[node_id] = self.history.get(node_id), content
        if kind == "crash":
            return [self.reply(message, Error(code=2, reason="killed"))]
        if kind == "refuse":
            return [self.reply(message, build_content({"status": "error", "reason": "no data today"}))]
        if kind == "drop":
            return []
        if kind == "corrupt":
            what(content)
        if kind == "replay":
            content = old or content
        reply = self.reply(message, content)
        if kind == "delay":
            self.waiting.append(reply)
            return []
        return [reply, reply] if kind == "duplicate" else [reply]

    waiting: list[Message]

    @staticmethod
    def reply(message: Message, content: Any) -> Message:
        return Message(content, reply_to=message)


class RoundProtocol(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32 - 1), retries=st.integers(0, 1))
    def begin(self, seed: int, retries: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("strategies.exchange.time", FakeClock())
        self.directory = tempfile.TemporaryDirectory()
        manifest = build_manifest(files=(BundleFile("adapter.safetensors", 10, "ab" * 32),))
        (Path(self.directory.name) / manifest_name).write_bytes(manifest.to_bytes())
        self.grid = FaultyGrid(random.Random(seed))
        self.grid.waiting = []
        self.retries = retries
        self.strategy = OffsiteTuning(
            aggregator=build_aggregator("fedavg"),
            source=BundleSource(Path(self.directory.name), manifest, 65536),
            reference=reference,
            min_nodes=1,
            max_retries=retries,
            node_timeout_seconds=5.0,
            bounds=Bounds(max_norm_ratio=100.0, max_examples=1000),
            rejections=Rejections(limit=limit),
            on_progress=lambda _line: None,
        )
        self.arrays = tensors_record(reference)
        self.server_round = 1
        self.last: dict[int, tuple[int, str]] = {}
        self.rejected = dict.fromkeys(range(1, num_nodes + 1), 0)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            self.directory.cleanup()

    @rule(node_id=nodes, kind=st.sampled_from(["drop", "duplicate", "delay", "crash", "refuse", "replay"]))
    def arm(self, node_id: int, kind: str) -> None:
        self.grid.armed[node_id] = (kind, None)

    @rule(node_id=nodes, corruption=st.sampled_from(corruptions))
    def corrupt(self, node_id: int, corruption: Callable[[RecordDict], None]) -> None:
        self.grid.armed[node_id] = ("corrupt", corruption)

    @rule()
    def release_late_replies(self) -> None:
        """What was delayed in an earlier round arrives in the next one."""
        self.grid.late += self.grid.waiting
        self.grid.waiting = []

    @precondition(lambda self: any(count < limit for count in self.rejected.values()))
    @rule()
    def hold_round(self) -> None:
        armed = dict(self.grid.armed)
        taking_part = [node_id for node_id, count in self.rejected.items() if count < limit]
        valid, wrong, failed = [], [], []
        for node_id in taking_part:
            kind = armed.get(node_id, ("none", None))[0]
            # A repeated round may get its own earlier reply again: that one is right.
            stale = kind == "replay" and self.last.get(node_id, (self.server_round, ""))
            if kind == "corrupt" or (stale and (stale[0] != self.server_round or stale[1] == "corrupt")):
                wrong.append(node_id)
            elif kind in ("drop", "delay", "refuse") or (kind == "crash" and not self.retries):
                failed.append(node_id)
            else:
                valid.append(node_id)
            self.last[node_id] = (self.server_round, kind)
        before = {name: array.numpy().copy() for name, array in self.arrays.items()}
        self.grid.asked.clear()
        self.strategy.first_round = self.server_round
        try:
            result = self.strategy.start(self.grid, self.arrays, num_rounds=self.server_round, timeout=60.0)
        except AggregationError:
            assert not valid
        else:
            self.check_mean(before, result.arrays, valid)
            self.arrays = result.arrays
        for node_id in wrong:
            self.rejected[node_id] += 1
        record = self.strategy.record
        assert record.num_replies == len(valid)
        assert record.num_examples == sum(valid)
        assert record.num_steps == len(valid)
        assert set(record.failures) == {f"client-{node_id}" for node_id in wrong + failed}
        named = {name for name, reason in record.failures.items() if reason.startswith("rejected: ")}
        assert named == {f"client-{node_id}" for node_id in wrong}
        assert set(self.grid.asked) == set(taking_part)
        assert len(self.grid.asked) == len(taking_part) + sum(
            armed.get(node_id, ("", None))[0] == "crash" for node_id in taking_part if self.retries
        )
        assert {n: o.num_rejections for n, o in self.strategy.participants.rejections.offenders.items()} == {
            n: count for n, count in self.rejected.items() if count
        }
        self.server_round += bool(valid)

    def check_mean(self, before: dict[str, np.ndarray], after: ArrayRecord, valid: list[int]) -> None:
        assert valid
        total = sum(valid)
        for name, base in reference.items():
            change = sum(node_id * update_of(node_id, self.server_round)[name].astype(np.float64) for node_id in valid)
            # What travels to a client is rounded to fp16 once; the mean is in fp32.
            sent = base.numpy() + (before[name] - base.numpy()).astype(np.float16)
            np.testing.assert_allclose(after[name].numpy(), sent + change / total, rtol=0, atol=1e-5)

    @precondition(lambda self: all(count >= limit for count in self.rejected.values()))
    @rule()
    def nobody_is_left(self) -> None:
        self.strategy.first_round = self.server_round
        with pytest.raises(OtFederatedError):
            self.strategy.start(self.grid, self.arrays, num_rounds=self.server_round, timeout=60.0)
        assert self.strategy.record.num_replies == 0


TestRoundProtocol = RoundProtocol.TestCase
TestRoundProtocol.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
