"""Mutators: much of what they make passes the outer reader, and no input is longer than allowed."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable

import pytest
from flwr.proto.recorddict_pb2 import RecordDict

from tests.fuzzing import mutators
from tests.fuzzing.targets import targets


@pytest.fixture(autouse=True)
def flipped_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for libFuzzer, which works in its own process alone: one byte becomes another."""
    chance = random.Random(0)

    def flip(data: bytes, max_size: int) -> bytes:
        altered = bytearray(data[:max_size] or b"\0")
        altered[chance.randrange(len(altered))] = chance.randrange(256)
        return bytes(altered)

    monkeypatch.setattr(mutators, "_mutate_bytes", flip)


def read_safetensors_header(data: bytes) -> object:
    size = int.from_bytes(data[:8], "little")
    assert size <= len(data) - 8
    return json.loads(data[8 : 8 + size])


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("manifest", json.loads),
        ("config", json.loads),
        ("ledger", lambda data: [json.loads(line) for line in data.splitlines()]),
        ("policy", lambda data: tomllib.loads(data.decode())),
        ("train-reply", RecordDict.FromString),
        ("safetensors", read_safetensors_header),
    ],
)
def test_half_of_the_altered_inputs_keep_their_outer_form(name: str, read: Callable[[bytes], object]) -> None:
    target = targets[name]
    assert target.mutate is not None
    data, seen, num_read = target.seeds()[0], set(), 0
    for seed in range(400):
        altered = target.mutate(data, 4096, seed)
        assert len(altered) <= 4096
        seen.add(altered)
        try:
            read(altered)
        except Exception:
            continue
        num_read += altered != data
    assert num_read > 120
    assert len(seen) > 100


@pytest.mark.parametrize("name", [name for name, target in targets.items() if target.mutate])
@pytest.mark.parametrize("data", [b"", b"\n", b"[" * 5000, b"\xff" * 40, b'{"a": 1}\n\n', bytes(8)])
def test_any_bytes_are_altered_and_stay_within_the_limit(name: str, data: bytes) -> None:
    mutate = targets[name].mutate
    assert mutate is not None
    for seed in range(50):
        assert len(mutate(data, 64, seed)) <= 64
