"""Secure aggregation in whole federations: the mean, drop-outs, hostile servers and clients, privacy and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from safetensors.torch import load_file

from ot_federated.config import parse_run_config
from ot_federated.data_owner.secure_aggregation import check_step, flower_client
from ot_federated.errors import ConfigError, OtFederatedError, ProtocolError
from ot_federated.messages import arrays_key, metrics_key
from ot_federated.secure_masks import draw_masks, strengthen
from simulations.in_process import node_id_of
from strategies.secure_aggregation import (
    SecureAggregationError,
    choose_range,
    flower_workflow,
    plan_shares,
    quantisation_error,
)
from tests.families import save_family_model
from tests.federations import crash, partition_of, prepare_federation, run_federation, start

secure = {"strategy.secure-aggregation": True, "strategy.min-nodes": 3, "strategy.update-dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family_model(tmp_path_factory.mktemp("model"), "llama")


def stage_of(reply: Message) -> str:
    """Return which step of the protocol a reply answers."""
    if reply.has_error() or RECORD_KEY_CONFIGS not in reply.content.config_records:
        return ""
    record = reply.content.config_records[RECORD_KEY_CONFIGS]
    keys = {
        Key.PUBLIC_KEY_1: Stage.SETUP,
        Key.CIPHERTEXT_LIST: Stage.SHARE_KEYS,
        Key.MASKED_PARAMETERS: Stage.COLLECT_MASKED_VECTORS,
        Key.SHARE_LIST: Stage.UNMASK,
    }
    return next(stage for key, stage in keys.items() if key in record)


def test_the_mean_is_that_of_plain_replies_and_no_update_is_seen(model: Path, tmp_path: Path) -> None:
    plain = run_federation(
        tmp_path / "plain", model, num_clients=3, num_rows=12, settings={**secure, "strategy.secure-aggregation": False}
    )
    seen: list[Message] = []

    def watch(reply: Message) -> list[Message]:
        seen.append(reply)
        return [reply]

    masked = run_federation(tmp_path / "masked", model, num_clients=3, num_rows=12, settings=secure, on_reply=watch)
    # lr 1e-3, and one step: 4 examples of a client in a batch of 4. No limit on steps: the range is 1.
    bound = quantisation_error(1.0)
    assert plain.adapter.keys() == masked.adapter.keys()
    for name, tensor in plain.adapter.items():
        assert (tensor - masked.adapter[name]).abs().max() <= bound + 1e-6
    base = load_file(model / "model.safetensors")
    assert max((tensor - base[name]).abs().max() for name, tensor in masked.adapter.items()) > 1e-4
    secure_replies = [reply for reply in seen if stage_of(reply)]
    assert len(secure_replies) == 4 * 3
    for reply in secure_replies:
        assert not any(len(record) for record in reply.content.array_records.values())
        assert metrics_key not in reply.content
        assert arrays_key not in reply.content
        told = {key for record in reply.content.config_records.values() for key in record}
        assert not told & {"loss", "num-examples", "num-steps", "num-tokens", "seconds"}
        for record in reply.content.metric_records.values():
            assert dict(record) == {"num_examples": 1}
    line = masked.rounds[1]
    assert (line["num_replies"], line["failures"], line["train_loss"]) == (3, {}, None)
    assert line["num_steps"] == 0


def test_a_masked_update_looks_random(model: Path, tmp_path: Path) -> None:
    masked: list[np.ndarray] = []

    def watch(reply: Message) -> list[Message]:
        if stage_of(reply) == Stage.COLLECT_MASKED_VECTORS:
            data = reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            masked.append(np.concatenate([flower_workflow.bytes_to_ndarray(d).ravel() for d in data]))  # type: ignore[union-attr,arg-type]
        return [reply]

    run_federation(tmp_path, model, num_clients=3, num_rows=12, settings=secure, on_reply=watch)
    for vector in masked:
        counts = np.histogram(vector, bins=16, range=(0, 2**32))[0]
        expected = len(vector) / 16
        assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-squared with 15 degrees: 1e-6


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK])
def test_a_client_that_drops_out_of_four_is_recovered(
    stage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop(reply: Message) -> list[Message]:
        return [] if stage_of(reply) == stage and partition_of(reply) == 1 else [reply]

    settings = {**secure, "strategy.min-nodes": 4}
    result = run_federation(tmp_path / "a", model, num_clients=4, num_rows=16, settings=settings, on_reply=drop)
    line = result.rounds[1]
    # Who sent a masked update is in the mean, even if it is gone when the masks come off.
    assert line["num_replies"] == (4 if stage == Stage.UNMASK else 3)
    assert list(line["failures"]) == ([] if stage == Stage.UNMASK else ["client-0001"])
    assert result.summary["federation"]["num_failures"] == len(line["failures"])
    told = [
        text for text in capsys.readouterr().err.splitlines() if "client-0001" in text and "no reply in time" in text
    ]
    assert "is in the mean" in told[0] if stage == Stage.UNMASK else "dropped out" in told[0]

    def without(reply: Message) -> list[Message]:
        gone = partition_of(reply) == 1 and stage != Stage.UNMASK
        return [crash(reply)] if gone and reply.metadata.message_type == "train" else [reply]

    plain = {**settings, "strategy.secure-aggregation": False}
    same = run_federation(tmp_path / "b", model, num_clients=4, num_rows=16, settings=plain, on_reply=without)
    for name, tensor in same.adapter.items():
        assert (tensor - result.adapter[name]).abs().max() <= quantisation_error(1.0) + 1e-6


def test_too_few_clients_stay(model: Path, tmp_path: Path) -> None:
    def drop(reply: Message) -> list[Message]:
        return [] if stage_of(reply) == Stage.COLLECT_MASKED_VECTORS and partition_of(reply) > 0 else [reply]

    with pytest.raises(SecureAggregationError, match="too few stayed"):
        run_federation(tmp_path, model, num_clients=3, num_rows=12, settings=secure, on_reply=drop)


def test_two_clients_are_refused_before_anything_is_trained_or_spent(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))
    settings = {**secure, "privacy.mode": "example", "strategy.min-nodes": 2, "strategy.node-timeout-seconds": 0.2}
    federation = prepare_federation(tmp_path, model, num_clients=2, settings=settings)
    with pytest.raises(OtFederatedError, match="Secure aggregation needs 3 clients"):
        start(federation)
    assert federation.grid.num_messages["train"] == 0
    assert not (tmp_path / "ledgers").exists()


def change_masked(reply: Message, change: Any) -> list[Message]:
    if stage_of(reply) == Stage.COLLECT_MASKED_VECTORS and partition_of(reply) == 1:
        change(reply.content.config_records[RECORD_KEY_CONFIGS])
    return [reply]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record.update({Key.MASKED_PARAMETERS: [b"junk"]}), "another number of arrays"),
        (
            lambda record: record.update({Key.MASKED_PARAMETERS: [b"junk"] * len(record[Key.MASKED_PARAMETERS])}),
            "cannot be read",
        ),
        (lambda record: record.update({Key.MASKED_PARAMETERS: "x"}), "does not answer the step"),
        (lambda record: record.pop(Key.MASKED_PARAMETERS), "does not answer the step"),
    ],
)
def test_a_malformed_masked_update_is_a_drop_out(change: Any, reason: str, model: Path, tmp_path: Path) -> None:
    settings = {**secure, "strategy.min-nodes": 4}
    federation = prepare_federation(
        tmp_path, model, num_clients=4, settings=settings, on_reply=lambda reply: change_masked(reply, change)
    )
    start(federation)
    failures = federation.rounds[1]["failures"]
    assert list(failures) == ["client-0001"]
    assert reason in failures["client-0001"]
    assert rejected_rounds(federation.output) == {"client-0001": [1]}


def rejected_rounds(output: Path) -> dict[str, list[int]]:
    saved = json.loads((output / "rejections.json").read_text())["offenders"]
    return {offender["name"]: [rejection["round"] for rejection in offender["rejections"]] for offender in saved}


def test_who_spoils_masked_rounds_is_put_aside(model: Path, tmp_path: Path) -> None:
    """Also where it spoils the last step, when its update is in the mean already; silence is no offence."""

    def spoil(reply: Message) -> list[Message]:
        if stage_of(reply) == Stage.UNMASK and partition_of(reply) == 1:
            reply.content.config_records[RECORD_KEY_CONFIGS][Key.SHARE_LIST] = [b"x"] * 9
        return [] if stage_of(reply) == Stage.UNMASK and partition_of(reply) == 2 else [reply]

    settings = {**secure, "strategy.min-nodes": 4, "strategy.max-rejections": 1, "num-server-rounds": 2}
    federation = run_federation(tmp_path, model, num_clients=5, num_rows=20, settings=settings, on_reply=spoil)
    assert rejected_rounds(federation.output) == {"client-0001": [1]}
    first, second = federation.rounds[1], federation.rounds[2]
    assert (first["num_replies"], first["failures"], first["put_aside"]) == (5, {}, ["client-0001"])
    assert (second["num_replies"], second["failures"]) == (4, {})
    assert "client-0001" not in second["clients"]


def test_a_false_sender_of_a_masked_answer_is_who_was_asked(model: Path, tmp_path: Path) -> None:
    def lie(reply: Message) -> list[Message]:
        if stage_of(reply) == Stage.SETUP and partition_of(reply) == 1:
            reply.metadata.__dict__["_src_node_id"] = node_id_of(0)
        return [reply]

    settings = {**secure, "strategy.min-nodes": 4}
    federation = run_federation(tmp_path, model, num_clients=4, num_rows=16, settings=settings, on_reply=lie)
    assert rejected_rounds(federation.output) == {"client-0001": [1]}
    assert "claims to come from" in federation.rounds[1]["failures"]["client-0001"]
    assert federation.rounds[1]["num_replies"] == 3


def test_a_garbled_masked_update_is_noticed(model: Path, tmp_path: Path) -> None:
    def garble(record: ConfigRecord) -> None:
        arrays = [flower_workflow.bytes_to_ndarray(data) for data in record[Key.MASKED_PARAMETERS]]  # type: ignore[union-attr,arg-type]
        from flwr.common import ndarray_to_bytes

        record[Key.MASKED_PARAMETERS] = [ndarray_to_bytes((array + 2**31) % 2**32) for array in arrays]

    with pytest.raises(SecureAggregationError, match="no sum of updates"):
        run_federation(
            tmp_path, model, num_clients=3, num_rows=12, settings=secure, on_reply=lambda r: change_masked(r, garble)
        )


def setup_step(**changes: Any) -> ConfigRecord:
    fields: dict[str, Any] = {
        Key.STAGE: Stage.SETUP,
        Key.SAMPLE_NUMBER: 3,
        Key.SHARE_NUMBER: 3,
        Key.THRESHOLD: 2,
        Key.CLIPPING_RANGE: 0.1,
        Key.TARGET_RANGE: 2**22,
        Key.MOD_RANGE: 2**32,
        Key.MAX_WEIGHT: 1.0,
    }
    return ConfigRecord(fields | changes)


def test_a_client_takes_part_on_fair_terms_only() -> None:
    check_step(setup_step())
    for changes in (
        {Key.SAMPLE_NUMBER: 2},
        {Key.SHARE_NUMBER: 2},
        {Key.THRESHOLD: 1},
        {Key.THRESHOLD: 4},
        {Key.MAX_WEIGHT: 1000.0},
        {Key.CLIPPING_RANGE: float("inf")},
        {Key.CLIPPING_RANGE: 0.0},
        {Key.MOD_RANGE: 2**22},
        {Key.TARGET_RANGE: 2**32},
        {Key.SHARE_NUMBER: "3"},
    ):
        with pytest.raises(ProtocolError, match="refused"):
            check_step(setup_step(**changes))


def test_both_secrets_of_one_client_are_never_given() -> None:
    step = {Key.STAGE: Stage.UNMASK, Key.ACTIVE_NODE_ID_LIST: [1, 2], Key.DEAD_NODE_ID_LIST: [3]}
    check_step(ConfigRecord(step))
    with pytest.raises(ProtocolError, match="both secrets of one client"):
        check_step(ConfigRecord({**step, Key.DEAD_NODE_ID_LIST: [2]}))


def test_a_policy_can_ask_for_masks(model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("require-privacy = false\nrequire-secure-aggregation = true\n")
    node = {"policy": str(policy)}
    with pytest.raises(OtFederatedError, match="strategy.secure-aggregation=true"):
        run_federation(tmp_path / "a", model, num_clients=3, num_rows=12, node_config=node)
    run_federation(tmp_path / "b", model, num_clients=3, num_rows=12, settings=secure, node_config=node)


def test_masked_private_rounds_are_paid_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ot_federated.data_owner.privacy_ledger import PrivacyLedger, list_ledgers

    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))
    private = {
        **secure,
        "privacy.mode": "example",
        "privacy.engine": "loop",
        "train.max-steps": 2,
        "train.batch-size": 2,
    }
    stop = True

    def lose_the_end(reply: Message) -> list[Message]:
        return [] if stop and stage_of(reply) == Stage.UNMASK else [reply]

    federation = prepare_federation(
        tmp_path, model, num_clients=3, num_rows=24, settings={**private, "num-server-rounds": 1}, on_reply=lose_the_end
    )
    with pytest.raises(SecureAggregationError):
        start(federation)

    def entries() -> list[int]:
        root = tmp_path / "ledgers"
        return [len(PrivacyLedger(root / name, dataset_id=name).entries) for name in list_ledgers(root)]

    paid = entries()
    assert paid == [1, 1, 1]
    stop = False
    again = prepare_federation(tmp_path, model, num_clients=3, num_rows=24, settings={**private, "resume": True})
    start(again)
    assert entries() == paid
    assert again.rounds[1]["num_replies"] == 3
    # What was spent stays with the clients.
    told, config = again.summary["privacy"], parse_run_config(private).privacy
    assert (told["epsilon"], told["delta"], told["epsilon_is"]) == (
        config.target_epsilon,
        config.target_delta,
        "target",
    )
    assert told["largest_epsilon_reported"] is None


def test_the_mean_of_masked_private_updates_is_theirs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client noises its own update before the mask; the server gets the mean of exactly those."""
    from ot_federated.data_owner import client_app

    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))
    updates: list[list[np.ndarray]] = []
    tune = client_app.tune_masked

    def watch(*arguments: Any) -> list[np.ndarray]:
        arrays = tune(*arguments)
        updates.append([array.copy() for array in arrays])
        return arrays

    monkeypatch.setattr(client_app, "tune_masked", watch)
    private = {"privacy.mode": "example", "privacy.engine": "loop", "train.max-steps": 2, "train.batch-size": 2}
    result = run_federation(tmp_path, model, num_clients=3, num_rows=24, settings={**secure, **private})
    base = load_file(model / "model.safetensors")
    found = sorted((tensor - base[name]).abs().sum().item() for name, tensor in result.adapter.items() if name in base)
    mean = [np.mean(arrays, axis=0) for arrays in zip(*updates, strict=True)]
    assert len(updates) == 3
    # Every number has moved, by noise alone where the data says nothing.
    assert all((np.abs(array) > 0).mean() > 0.9 for array in updates[0])
    bound = quantisation_error(2 * 1e-3 * 2)
    sizes = sorted(float(np.abs(array).sum()) for array in mean)
    assert found == pytest.approx(sizes, abs=bound * max(array.size for array in mean) + 1e-4)


def test_masks_are_those_of_the_whole_key() -> None:
    first, second = (
        draw_masks(b"a" * 32, 2**32, [(1000,), (3, 2), ()])[:2],
        draw_masks(b"a" * 31 + b"b", 2**32, [(1000,)]),
    )
    assert not np.array_equal(first[0], second[0])
    # Flower folds a key to 32 bits: these two would have given one mask.
    swapped = b"wxyz" + b"abcd"
    assert not np.array_equal(draw_masks(b"abcdwxyz", 2**32, [(10,)])[0], draw_masks(swapped, 2**32, [(10,)])[0])
    assert first[1].shape == (3, 2)
    again = draw_masks(b"a" * 32, 2**32, [(1000,)])[0]
    np.testing.assert_array_equal(first[0], again)
    assert 0 <= again.min() <= again.max() < 2**32
    assert flower_client.pseudo_rand_gen is flower_workflow.pseudo_rand_gen is draw_masks
    with pytest.raises(ValueError, match="power of two"):
        draw_masks(b"a", 3, [(1,)])
    with pytest.raises(AttributeError, match="pseudo_rand_gen"):
        strengthen(np)


def test_shares_and_range() -> None:
    assert [plan_shares(num) for num in (3, 4, 5, 17, 100)] == [(3, 2), (4, 3), (5, 3), (17, 9), (17, 9)]
    with pytest.raises(SecureAggregationError, match="at least 3"):
        plan_shares(2)
    assert choose_range(learning_rate=4e-4, max_steps=24) == pytest.approx(0.0192)
    assert choose_range(learning_rate=4e-4, max_steps=0) == 1.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy.name": "krum"}, "compares single updates"),
        ({"privacy.mode": "client", "privacy.clients-per-round": 5}, "does not see"),
    ],
)
def test_what_needs_single_updates_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_run_config({"strategy.secure-aggregation": True, **settings})
