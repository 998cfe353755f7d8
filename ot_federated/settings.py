"""What a setting is: its type, default, meaning and limits, and how a value is checked against them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ot_federated.errors import ConfigError, nearest_match

type_names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
Scalar = bool | int | float | str


max_text_length = 10_000


def setting(
    default: Scalar,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare one setting: its default, its documentation and its limits (``above`` is exclusive)."""
    limits = {"doc": doc, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Key:
    """One run-config key as a user meets it."""

    name: str
    type: type
    default: Scalar
    doc: str
    choices: tuple[str, ...]
    minimum: float
    maximum: float
    above: float


def check_value(key: Key, value: object) -> Scalar:
    """Return ``value`` in the key's type.

    Raises:
        ConfigError: If the type is wrong or the value is out of range; the message says what is allowed.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key.name} is out of range: no setting has more than 64 bits.")
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not key.type:
        raise ConfigError(f"{key.name} must be {type_names[key.type]}, not {value!r:.200}.")
    if isinstance(value, str) and len(value) > max_text_length:
        # A prompt, for one, is joined with every example of a client.
        raise ConfigError(f"{key.name} has {len(value)} characters; at most {max_text_length} are accepted.")
    if isinstance(value, str) and key.choices and value not in key.choices:
        hint = nearest_match(value, key.choices)
        raise ConfigError(f"{key.name}={value!r} is not one of {', '.join(key.choices)}{hint}.")
    if isinstance(value, (int, float)) and not (
        math.isfinite(value) and key.minimum <= value <= key.maximum and value > key.above
    ):
        raise ConfigError(f"{key.name}={value} is out of range: it must be {describe_range(key)}.")
    return value  # type: ignore[return-value]  # narrowed by type() above, which mypy cannot follow


def describe_range(key: Key) -> str:
    """Return the allowed range of a numeric key in words, or an empty string where there is none."""
    parts = []
    if math.isfinite(key.above):
        parts.append(f"above {key.above:g}")
    if math.isfinite(key.minimum):
        parts.append(f"at least {key.minimum:g}")
    if math.isfinite(key.maximum):
        parts.append(f"at most {key.maximum:g}")
    return " and ".join(parts)
