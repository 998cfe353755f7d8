"""Replies that are not what was asked for: rejected, counted, named; and the round goes on without them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from ot_federated.errors import OtFederatedError, ProtocolError
from ot_federated.messages import arrays_key, config_key, metrics_key
from strategies.offsite_tuning import AggregationError
from strategies.replies import count_metric
from tests.federations import Federation, crash, is_train_reply, partition_of, prepare_federation, run_federation, start

Spoil = Callable[[Message], "Message | None"]


def arrays_of(reply: Message) -> ArrayRecord:
    return reply.content.array_records[arrays_key]


def first_name(reply: Message) -> str:
    return sorted(arrays_of(reply))[0]


def replace_first(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def spoil(reply: Message) -> None:
        name = first_name(reply)
        arrays_of(reply)[name] = Array(change(arrays_of(reply)[name].numpy().copy()))

    return spoil


def fill(value: float) -> Spoil:
    def spoil(values: np.ndarray) -> np.ndarray:
        values.flat[-1] = value
        return values

    return replace_first(spoil)


def drop_array(reply: Message) -> None:
    del arrays_of(reply)[first_name(reply)]


def add_array(reply: Message) -> None:
    arrays_of(reply)["emulator.0.mlp.up_proj.weight"] = Array(np.zeros(3, np.float16))


def set_config(name: str, value: Any) -> Spoil:
    def spoil(reply: Message) -> None:
        record = dict(reply.content.config_records[config_key]) | {name: value}
        reply.content[config_key] = ConfigRecord({key: field for key, field in record.items() if field is not None})

    return spoil


def set_metric(name: str, value: Any) -> Spoil:
    def spoil(reply: Message) -> None:
        record = dict(reply.content.metric_records[metrics_key]) | {name: value}
        reply.content[metrics_key] = MetricRecord({key: field for key, field in record.items() if field is not None})

    return spoil


def drop_record(name: str) -> Spoil:
    def spoil(reply: Message) -> None:
        del reply.content[name]

    return spoil


def claim_another_node(reply: Message) -> None:
    reply.metadata.__dict__["_src_node_id"] = 5


# What a client does to its reply, and what the server then says of it.
bad_replies: list[tuple[str, Spoil, str]] = [
    ("not a number", fill(math.nan), "not finite"),
    ("infinite", fill(-math.inf), "not finite"),
    ("wrong shape", replace_first(lambda values: values[..., :-1]), "not float16"),
    ("more dimensions", replace_first(lambda values: values[None]), "not float16"),
    ("wrong type", replace_first(lambda values: values.astype(np.float32)), "is float32"),
    ("missing array", drop_array, "arrays are missing"),
    ("extra array", add_array, r"unknown \['emulator\.0\.mlp\.up_proj\.weight'\]"),
    ("no arrays", drop_record(arrays_key), "lacks its arrays"),
    ("wrong round", set_config("server-round", 7), "answers round 7"),
    ("round as text", set_config("server-round", "1"), "'server-round' is '1'"),
    ("wrong bundle", set_config("bundle-digest", "ab" * 32), "trained on the bundle abababababab"),
    ("other release", set_config("wire-version", 99), "wire version 99"),
    ("no status", set_config("status", None), "'status' is None"),
    ("refusal", lambda reply: set_config("status", "error")(set_reason(reply)), "no such column"),
    ("no config", drop_record(config_key), "no config record"),
    ("negative examples", set_metric("num-examples", -5), "num-examples is -5"),
    ("no examples", set_metric("num-examples", 0), "num-examples is 0"),
    ("fractional examples", set_metric("num-examples", 2.5), r"num-examples is 2\.5"),
    ("too many examples", set_metric("num-examples", 2**62), "num-examples is 46116"),
    ("examples missing", set_metric("num-examples", None), "num-examples is None"),
    ("loss not a number", set_metric("loss", math.nan), "loss is nan"),
    ("negative tokens", set_metric("num-tokens", -1), "num-tokens is -1"),
    ("no metrics", drop_record(metrics_key), "lacks its arrays or its metrics"),
    ("Flower error", crash, "error 2"),
    ("huge norm", fill(3e4), r"strategy\.max-norm-ratio=100 times"),
    ("claims a million examples more", set_metric("num-examples", 2_000_000), r"above strategy\.max-examples=1000000"),
    ("another node's name", claim_another_node, "claims to come from node 5"),
    ("text for a terminal", lambda reply: set_config("status", "error")(escape_reason(reply)), r"^done\?\[2J\?line$"),
]


def set_reason(reply: Message) -> Message:
    set_config("reason", "the file has no such column 'answer'")(reply)
    return reply


def escape_reason(reply: Message) -> Message:
    set_config("reason", "done\x1b[2J\nline")(reply)
    return reply


class SpoiledReplies:
    """Client 0 and the last client are honest; each one between spoils its reply in its own way."""

    def __init__(self) -> None:
        self.honest: dict[int, dict[str, np.ndarray]] = {}
        self.num_steps = self.num_examples = 0

    def __call__(self, reply: Message) -> list[Message]:
        if not is_train_reply(reply):
            return [reply]
        partition = partition_of(reply)
        if 1 <= partition <= len(bad_replies):
            return [bad_replies[partition - 1][1](reply) or reply]
        self.honest[partition] = {name: array.numpy() for name, array in arrays_of(reply).items()}
        metrics = reply.content.metric_records[metrics_key]
        self.num_steps += int(metrics["num-steps"])
        self.num_examples += int(metrics["num-examples"])
        return [reply]


@pytest.fixture(scope="module")
def spoiled() -> SpoiledReplies:
    return SpoiledReplies()


@pytest.fixture(scope="module")
def federation(spoiled: SpoiledReplies, llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """One round with every kind of bad reply at once."""
    num_clients = len(bad_replies) + 2
    return run_federation(
        tmp_path_factory.mktemp("bad-replies"),
        llama_directory,
        num_clients=num_clients,
        num_rows=4 * num_clients,
        on_reply=spoiled,
    )


@pytest.mark.parametrize("number", range(len(bad_replies)), ids=[name for name, _, _ in bad_replies])
def test_reply_is_rejected_with_its_clients_name_and_the_reason(federation: Federation, number: int) -> None:
    failures = federation.rounds[1]["failures"]
    assert failures.keys() >= {f"client-{number + 1:04d}"}
    reason = failures[f"client-{number + 1:04d}"]
    assert len(reason) < 500
    assert re.search(bad_replies[number][2], reason), reason


def test_the_round_goes_on_with_the_honest_replies_alone(federation: Federation, spoiled: SpoiledReplies) -> None:
    line = federation.rounds[1]
    last = len(bad_replies) + 1
    assert line["num_replies"] == 2
    assert set(line["failures"]) == {f"client-{number:04d}" for number in range(1, last)}
    assert len(line["clients"]) == last + 1
    assert sorted(spoiled.honest) == [0, last]
    # Both have four examples: the new adapter is the mean of the two.
    assert spoiled.num_examples == 8
    start_weights = {name: tensor for name, tensor in load_source(federation).items() if name in federation.adapter}
    for name, tuned in federation.adapter.items():
        role = role_name(name)
        mean = (spoiled.honest[0][role].astype(np.float64) + spoiled.honest[last][role]) / 2
        expected = start_weights[name].double().numpy() + mean
        # fp32: half a unit in the last place each for two sums and a mean of numbers below 1.
        np.testing.assert_allclose(tuned.numpy(), expected, rtol=0, atol=3e-7)


def load_source(federation: Federation) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    config = json.loads((federation.output / "run_config.json").read_text())
    return load_file(Path(config["model.source"]) / "model.safetensors")


def role_name(full_name: str) -> str:
    """Return a tensor's name on the wire in a 1-2-1 split of eight blocks."""
    _, _, block, rest = full_name.split(".", 3)
    return f"{'bottom' if block == '0' else 'top'}.0.{rest}"


def test_only_valid_replies_are_counted(federation: Federation, spoiled: SpoiledReplies) -> None:
    line = federation.rounds[1]
    assert line["num_examples"] == spoiled.num_examples
    assert line["num_steps"] == spoiled.num_steps
    assert line["bytes_to_server"] == sum(
        array.nbytes + 128 for arrays in spoiled.honest.values() for array in arrays.values()
    )
    assert math.isfinite(line["train_loss"])


def test_failures_are_in_the_summary(federation: Federation) -> None:
    shown = federation.summary["federation"]
    assert shown["num_failures"] == len(bad_replies)
    assert shown["num_replies"] == 2
    assert shown["num_clients"] == len(bad_replies) + 2


class Metrics(dict[str, Any]):
    """A record that holds what Flower's own would refuse."""


@pytest.mark.parametrize("value", [True, False, -1, 2**40, 1.0, "3", None, [1]])
def test_what_is_no_count(value: Any) -> None:
    with pytest.raises(ProtocolError, match="num-examples is"):
        count_metric(Metrics({"num-examples": value}), "num-examples")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1, 2**40 - 1])
def test_counts(value: int) -> None:
    assert count_metric(Metrics({"num-examples": value}), "num-examples") == value  # type: ignore[arg-type]


def test_all_replies_bad_ends_the_run_with_the_reasons(llama_directory: Path, tmp_path: Path) -> None:
    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply):
            (fill(math.nan) if partition_of(reply) == 0 else drop_array)(reply)
        return [reply]

    federation = prepare_federation(tmp_path, llama_directory, on_reply=spoil)
    with pytest.raises(AggregationError) as caught:
        start(federation)
    message = str(caught.value)
    assert "Round 1 brought 0 valid replies and needs 1" in message
    assert "client-0000: rejected: " in message
    assert "not finite" in message
    assert "client-0001: rejected: arrays are missing" in message
    assert (federation.output / "failure.txt").read_text().strip() == message
    for name in ("summary.json", "model", "adapter", "checkpoints"):
        assert not (federation.output / name).exists(), name


def test_a_bad_round_after_a_good_one_can_be_continued(llama_directory: Path, tmp_path: Path) -> None:
    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=2):
            fill(math.inf)(reply)
        return [reply]

    settings = {"num-server-rounds": 2}
    federation = prepare_federation(tmp_path, llama_directory, settings=settings, on_reply=spoil)
    with pytest.raises(AggregationError, match="Round 2"):
        start(federation)
    resumed = run_federation(tmp_path, llama_directory, settings=settings | {"resume": True})
    assert not (resumed.output / "failure.txt").exists()
    assert sorted(resumed.rounds) == [0, 1, 2]
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    assert resumed.digest == whole.digest


def test_min_replies_counts_valid_ones(llama_directory: Path, tmp_path: Path) -> None:
    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=1):
            fill(math.nan)(reply)
        return [reply]

    settings = {"strategy.min-replies": 2}
    federation = prepare_federation(tmp_path, llama_directory, settings=settings, on_reply=spoil)
    with pytest.raises(AggregationError, match="brought 1 valid replies and needs 2"):
        start(federation)


def test_reply_of_another_type_is_a_failure_of_its_client(llama_directory: Path, tmp_path: Path) -> None:
    """A client may answer ``train`` with a message that claims to answer something else."""

    def forge(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=1):
            reply.metadata.__dict__["_message_type"] = "query.shard"
        return [reply]

    federation = run_federation(tmp_path, llama_directory, on_reply=forge)
    assert set(federation.rounds[1]["failures"]) == {"client-0001"}
    assert federation.rounds[1]["num_replies"] == 1


def test_reply_with_a_hostile_payload_is_a_failure_of_its_client(llama_directory: Path, tmp_path: Path) -> None:
    """The header of the array is right; numpy would open its bytes as a zip archive."""

    def forge(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=1):
            name = first_name(reply)
            right = arrays_of(reply)[name]
            arrays_of(reply)[name] = Array(right.dtype, tuple(right.shape), right.stype, b"PK\x03\x04 no zip file")
        return [reply]

    federation = run_federation(tmp_path, llama_directory, on_reply=forge)
    assert set(federation.rounds[1]["failures"]) == {"client-0001"}
    assert federation.rounds[1]["num_replies"] == 1


def test_unexpected_errors_tell_the_server_nothing_of_the_data(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("patient 17 has diabetes")

    monkeypatch.setattr("ot_federated.data_owner.local_data.load_local_rows", fail)
    federation = prepare_federation(tmp_path, llama_directory)
    with pytest.raises(OtFederatedError) as caught:
        start(federation)
    assert "RuntimeError; the client's log has the details" in str(caught.value)
    assert "patient" not in str(caught.value)
    assert "patient" not in (federation.output / "failure.txt").read_text()
