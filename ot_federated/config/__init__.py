"""Every setting of a run: its key, type, default, meaning and limits.

This is the only package that knows key names. ``[tool.flwr.app.config]`` in ``pyproject.toml`` repeats the keys
and defaults because Flower reads them there; a test keeps the two equal. Flower passes a run config as a flat
mapping with kebab-case keys (``train.learning-rate``) and scalar values, so this is what is parsed here.

Typed configs stop at the composition roots (``server_app``, ``client_app``, ``simulations``): the functions
below them take plain parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

from ot_federated.config.clients import PrivacyConfig, TrainConfig, TuningConfig
from ot_federated.config.contradictions import check_consistency, mean_aggregators
from ot_federated.config.offsite import OffsiteConfig
from ot_federated.config.problem import DataConfig, ModelConfig, TaskConfig
from ot_federated.config.run import RunConfig
from ot_federated.config.server import EvaluationConfig, StrategyConfig
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.settings import Key, Scalar, check_value

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OffsiteConfig",
    "PrivacyConfig",
    "RunConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "TuningConfig",
    "flatten",
    "list_keys",
    "mean_aggregators",
    "parse_run_config",
]


def list_keys() -> dict[str, Key]:
    """Return every run-config key by name, in the order of the config classes."""
    return {key.name: key for key in _all_keys()}


@cache
def _all_keys() -> tuple[Key, ...]:
    return tuple(_keys_of(RunConfig, ""))


def _keys_of(config_class: type, prefix: str) -> Iterator[Key]:
    for item, kind in _fields(config_class):
        name = prefix + item.name.replace("_", "-")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _keys_of(kind, name + ".")
        else:
            default: Any = item.default  # setting() gives every one a default
            yield Key(name=name, type=kind, default=default, **item.metadata)


@cache
def _fields(config_class: type) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """Return a config class's fields with their types, whose annotations are evaluated once in a process."""
    hints = get_type_hints(config_class)
    return tuple((item, hints[item.name]) for item in dataclasses.fields(config_class))


def parse_run_config(flat: Mapping[str, object]) -> RunConfig:
    """Build the typed run config from flat kebab-case keys; absent keys take their defaults.

    Raises:
        ConfigError: For an unknown key (the nearest match is named), a wrong type, a value out of range, or
            settings that contradict each other.
    """
    keys = list_keys()
    for name in flat:
        if name not in keys:
            raise ConfigError(f"Unknown run-config key {name!r}{nearest_match(name, keys)}. See --help for all keys.")
    values = {name: check_value(key, flat.get(name, key.default)) for name, key in keys.items()}
    config: RunConfig = _build(RunConfig, values, "")
    check_consistency(config)
    return config


def _build(config_class: type, values: Mapping[str, Scalar], prefix: str) -> Any:
    arguments: dict[str, Any] = {}
    for item, kind in _fields(config_class):
        name = prefix + item.name.replace("_", "-")
        nested = dataclasses.is_dataclass(kind)
        arguments[item.name] = _build(kind, values, name + ".") if nested else values[name]
    return config_class(**arguments)


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Return the config as flat kebab-case keys: the inverse of :func:`parse_run_config`."""
    flat: dict[str, Scalar] = {}
    for name in list_keys():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part.replace("-", "_"))
        flat[name] = value
    return flat
