"""Clients that never answer, or whose process breaks: asked again, waited for as long as is set, and no longer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from ot_federated.errors import OtFederatedError
from strategies.offsite_tuning import AggregationError
from tests.federations import Federation, crash, is_train_reply, partition_of, prepare_federation, run_federation, start

fast = {"num-server-rounds": 2, "evaluation.max-examples": 1, "evaluation.max-validation-examples": 1}


class Broken:
    """Every client's first ``num`` replies of each kind are lost with its process."""

    def __init__(self, num: int, kind: str = "train") -> None:
        self.num, self.kind = num, kind
        self.seen: dict[tuple[int, str, Any], int] = {}

    def __call__(self, reply: Message) -> list[Message]:
        record = reply.content.config_records["config"] if reply.has_content() else {}
        key = (partition_of(reply), reply.metadata.message_type, record.get("server-round"))
        self.seen[key] = self.seen.get(key, 0) + 1
        if reply.metadata.message_type == self.kind and self.seen[key] <= self.num:
            return [crash(reply)]
        return [reply]


@pytest.mark.parametrize("kind", ["query.hello", "query.shard", "train"])
def test_a_client_that_broke_is_asked_again_and_nothing_is_lost(
    kind: str, llama_directory: Path, tmp_path: Path
) -> None:
    whole = run_federation(tmp_path / "whole", llama_directory, settings=fast)
    num = 1 if kind == "query.shard" else 2
    broken = run_federation(tmp_path / "broken", llama_directory, settings=fast, on_reply=Broken(num, kind))
    assert broken.grid.num_error_replies[kind] >= num
    assert broken.digest == whole.digest
    assert broken.summary["federation"]["num_failures"] == 0
    assert broken.summary["federation"]["num_replies"] == whole.summary["federation"]["num_replies"] == 4
    # A broken upload goes on at the shard that is missing: exactly one message more for each break.
    more = broken.grid.num_messages[kind] - whole.grid.num_messages[kind]
    assert more == broken.grid.num_error_replies[kind]


def test_a_client_that_breaks_too_often_is_given_up(llama_directory: Path, tmp_path: Path) -> None:
    broken = Broken(99)
    run = run_federation(
        tmp_path,
        llama_directory,
        settings=fast | {"num-server-rounds": 1, "strategy.max-retries": 1},
        on_reply=lambda reply: broken(reply) if partition_of(reply) == 0 else [reply],
    )
    assert run.summary["federation"]["num_failures"] == 1
    assert run.grid.num_messages["train"] == 3  # client 0 twice


def start_with_mute(
    directory: Path, model: Path, settings: dict[str, Any], *, num_clients: int = 3, mute: tuple[int, ...] = (0,)
) -> tuple[Federation, float]:
    """Run a federation in which some clients never answer ``train``; return it and its seconds in rounds."""

    def swallow(reply: Message) -> list[Message]:
        return [] if is_train_reply(reply) and partition_of(reply) in mute else [reply]

    federation = prepare_federation(
        directory,
        model,
        settings=fast | {"num-server-rounds": 1} | settings,
        num_clients=num_clients,
        on_reply=swallow,
    )
    began = time.monotonic()
    start(federation)
    return federation, time.monotonic() - began


def test_who_never_answers_is_waited_for_until_the_deadline(llama_directory: Path, tmp_path: Path) -> None:
    run, seconds = start_with_mute(tmp_path, llama_directory, {"strategy.round-timeout-seconds": 4.0})
    assert seconds > 4
    assert "no reply within 4 s" in run.rounds[1]["failures"]["client-0000"]


def test_once_enough_have_answered_the_others_have_a_little_longer(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"strategy.straggler-seconds": 0.5, "strategy.min-replies-fraction": 0.6}
    run, seconds = start_with_mute(tmp_path, llama_directory, settings)
    assert seconds < 30  # the round may take 60
    assert run.rounds[1]["num_replies"] == 2
    assert "after enough others had answered" in run.rounds[1]["failures"]["client-0000"]


def test_stragglers_are_waited_for_while_there_are_not_enough(llama_directory: Path, tmp_path: Path) -> None:
    settings = {
        "strategy.straggler-seconds": 0.1,
        "strategy.min-replies-fraction": 0.9,
        "strategy.round-timeout-seconds": 4.0,
    }
    with pytest.raises(AggregationError, match="brought 2 valid replies and needs 3.*no reply within 4 s"):
        start_with_mute(tmp_path, llama_directory, settings)


@pytest.mark.parametrize(("fraction", "num_needed"), [(0.0, 1), (0.34, 2), (1 / 3, 1), (0.7, 3), (1.0, 3)])
def test_fraction_of_the_asked_clients(fraction: float, num_needed: int, llama_directory: Path, tmp_path: Path) -> None:
    settings = {"strategy.min-replies-fraction": fraction, "strategy.round-timeout-seconds": 3.0}
    mute = tuple(range(3 - num_needed + 1))  # one more than may be missing
    with pytest.raises(OtFederatedError, match=f"needs {num_needed}"):
        start_with_mute(tmp_path, llama_directory, settings, mute=mute)


def test_a_late_answer_to_an_earlier_round_is_not_counted(llama_directory: Path, tmp_path: Path) -> None:
    """It arrives with the next round's answers; the result is that of a run in which it never came."""
    kept: list[Message] = []

    def delay(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=1, partition=0):
            kept.append(reply)
            return []
        if is_train_reply(reply, server_round=2) and kept:
            return [kept.pop(), reply]
        return [reply]

    def lose(reply: Message) -> list[Message]:
        return [] if is_train_reply(reply, server_round=1, partition=0) else [reply]

    settings = fast | {"strategy.straggler-seconds": 3.0, "strategy.min-replies-fraction": 0.6}
    late = run_federation(tmp_path / "late", llama_directory, settings=settings, num_clients=3, on_reply=delay)
    lost = run_federation(tmp_path / "lost", llama_directory, settings=settings, num_clients=3, on_reply=lose)
    assert not kept
    assert [late.rounds[number]["num_replies"] for number in (1, 2)] == [2, 3]
    assert late.digest == lost.digest
