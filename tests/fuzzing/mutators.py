"""How inputs are altered where altered bytes alone are refused by a reader that is not this project's.

Most inputs keep their outer form: one value inside is altered, dropped, or doubled, and what stands around it
(brackets, lengths) is made right again. So the checks behind the JSON reader and the protobuf reader are reached. The
others are libFuzzer's own alterations of the bytes. Each mutator takes the input, the longest size that is allowed,
and a seed, as atheris calls it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, int, int], bytes]

# libFuzzer alters an input up to five times in a row, so that with a sixth half of all inputs keep their form.
bytes_fraction = 1 / 6

odd_values: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "\ud800",
    "\x1b[31m", "../x", "a" * 200, [], {}, [[]], {"": None},
)  # fmt: skip

odd_toml = (
    b"true", b"0", b"-1", b"9223372036854775808", b"1e400", b"-0.0", b"nan", b"inf", b'""', b'"x"', b"[]", b"[[]]",
    b"{}", b"{a = 1}", b"2030-01-01", b"0x10", b'["num-steps", "loss"]', b'["classification"]',
)  # fmt: skip


def _mutate_bytes(data: bytes, max_size: int) -> bytes:
    import atheris

    altered: bytes = atheris.Mutate(data, max_size)
    return altered


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Alter JSON, or one line of JSON lines."""
    chance = random.Random(seed)
    if chance.random() < bytes_fraction:
        return _mutate_bytes(data, max_size)
    lines = [data]
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        lines = data.splitlines(keepends=True)
        try:
            value = json.loads(chosen := chance.choice(lines))
        except (ValueError, RecursionError, IndexError):
            return _mutate_bytes(data, max_size)
        data = chosen
    try:
        altered = json.dumps(_alter_value(value, chance, max_size)).encode()
    except (ValueError, RecursionError):
        return _mutate_bytes(data, max_size)
    if data.endswith(b"\n"):
        altered += b"\n"
    whole = b"".join(altered if line is data else line for line in lines)
    return whole if len(whole) <= max_size else _mutate_bytes(data, max_size)


def _alter_value(value: Any, chance: random.Random, max_size: int) -> Any:
    """Walk to a random place in ``value`` and alter what is there."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        match chance.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[_alter_text(key, max_size)] = value[key]
            case 2:
                value[key] = value[chance.choice(list(value))]
            case _:
                value[key] = _alter_value(value[key], chance, max_size)
        return value
    if isinstance(value, list) and value and chance.random() < 0.9:
        index = chance.randrange(len(value))
        match chance.randrange(8):
            case 0:
                del value[index]
            case 1:
                value.append(value[index])
            case _:
                value[index] = _alter_value(value[index], chance, max_size)
        return value
    if chance.random() < 0.5:
        return chance.choice(odd_values)
    if isinstance(value, str):
        return _alter_text(value, max_size)
    if isinstance(value, int):
        return value + chance.choice((-1, 1, 2**16, -(2**32)))
    return [value]


def _alter_text(text: str, max_size: int) -> str:
    return _mutate_bytes(text.encode(errors="surrogatepass"), max_size).decode(errors="replace")


def mutate_toml(data: bytes, max_size: int, seed: int) -> bytes:
    """Alter one line of a TOML file: its value, the whole line, or its place."""
    chance = random.Random(seed)
    lines = data.split(b"\n")
    index, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    key, equals, value = lines[index].partition(b"=")
    match chance.randrange(8):
        case 0:
            del lines[index]
        case 1:
            lines.insert(other, lines[index])
        case 2:
            lines[index], lines[other] = lines[other], lines[index]
        case 3 | 4 if equals and len(value) < max_size:
            lines[index] = key + equals + b" " + chance.choice(odd_toml)
        case 5 if equals and len(value) < max_size:
            lines[index] = key + equals + _mutate_bytes(value, max_size)
        case _:
            return _mutate_bytes(data, max_size)
    altered = b"\n".join(lines)
    return altered if len(altered) <= max_size else _mutate_bytes(data, max_size)


def mutate_safetensors(data: bytes, max_size: int, seed: int) -> bytes:
    """Alter a safetensors file: its JSON header, to which the length before it fits, or its bytes."""
    size = int.from_bytes(data[:8], "little")
    if seed % 4 == 0 or size > len(data) - 8 or max_size < 100:
        return _mutate_bytes(data, max_size)
    header = mutate_json(data[8 : 8 + size], max_size - 8, seed)
    return (len(header).to_bytes(8, "little") + header + data[8 + size :])[:max_size]


def mutate_records(data: bytes, max_size: int, seed: int) -> bytes:
    """Alter a protobuf message: one field somewhere in its tree, with the lengths around it made right."""
    chance = random.Random(seed)
    if chance.random() < bytes_fraction:
        return _mutate_bytes(data, max_size)
    altered = _alter_message(data, chance, max_size)
    return altered if altered is not None and len(altered) <= max_size else _mutate_bytes(data, max_size)


def _alter_message(data: bytes, chance: random.Random, max_size: int) -> bytes | None:
    """Return a message with one field altered, or None where ``data`` is none."""
    fields = _split_fields(data)
    if not fields:
        return None
    start, content, end = chance.choice(fields)
    before, field, after = data[:start], data[start:end], data[end:]
    choice = chance.randrange(10)
    if choice == 0:
        return before + after
    if choice == 1:
        return before + field + field + after
    if data[start] & 7 != 2:  # a number: its bytes
        inner = _mutate_bytes(data[content:end], 10)
        return data[:content] + inner + after
    tag = data[start : _read_varint(data, start)[1]]
    inner_data = data[content:end]
    inner = _alter_message(inner_data, chance, max_size) if choice > 2 else None
    if inner is None:
        inner = _mutate_bytes(inner_data, max_size)
        if inner_data.isascii() and chance.random() < 0.8:
            inner = inner.decode(errors="replace").encode()  # Flower reads no text that is not UTF-8
    return before + tag + _varint(len(inner)) + inner + after


def _split_fields(data: bytes) -> list[tuple[int, int, int]]:
    """Return where each field of a message, its content and its end are; nothing where it is no message."""
    fields = []
    place = 0
    try:
        while place < len(data):
            start = place
            tag, content = _read_varint(data, start)
            kind = tag & 7
            if kind == 2:
                size, content = _read_varint(data, content)
                place = content + size
            elif kind == 0:
                place = _read_varint(data, content)[1]
            else:
                place = content + {1: 8, 5: 4}[kind]
            if tag < 8 or place > len(data):
                return []
            fields.append((start, content, place))
    except (IndexError, KeyError):
        return []
    return fields


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
