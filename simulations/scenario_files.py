"""Scenarios: named settings of a simulation, one TOML file each in ``scenarios/``.

A file has a ``description`` and any of the keys that the command line takes: run-config keys, flat
(``train.batch-size = 8``) or as tables (``[train]``), and the keys of the simulation itself.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ot_federated.config import list_keys
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.settings import Key, Scalar, check_value

scenario_dir = Path(__file__).with_name("scenarios")


def _simulation_key(name: str, default: float, doc: str, *, minimum: float) -> Key:
    return Key(
        name=name,
        type=type(default),
        default=default,
        doc=doc,
        choices=(),
        minimum=minimum,
        maximum=math.inf,
        above=-math.inf,
    )


simulation_keys = {
    key.name: key
    for key in (
        _simulation_key("num-clients", 4, "Simulated data owners.", minimum=1),
        _simulation_key(
            "client-num-cpus",
            1,
            "CPUs, and threads, of one client; as many clients train at once as fit on this machine. (ray)",
            minimum=1,
        ),
        _simulation_key(
            "client-num-gpus",
            -1.0,
            "Share of a GPU that one client takes: 0.25 lets four train at once on one. -1: all clients that train "
            "at once share the GPUs that are there. 0: clients train on the CPU. (ray)",
            minimum=-1,
        ),
    )
}


def list_all_keys() -> dict[str, Key]:
    """Return every key that a scenario or the command line may set: the simulation's own and the run config's."""
    return simulation_keys | list_keys()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A named set of settings.

    Attributes:
        name: The file's name without ``.toml``.
        description: One line for ``--list``.
        settings: Flat keys and their checked values; what is absent keeps its default.
    """

    name: str
    description: str
    settings: Mapping[str, Scalar]


def list_scenarios(directory: Path = scenario_dir) -> dict[str, Scenario]:
    """Return all scenarios by name, in alphabetical order."""
    return {path.stem: load_scenario(path.stem, directory=directory) for path in sorted(directory.glob("*.toml"))}


def load_scenario(name: str, *, directory: Path = scenario_dir) -> Scenario:
    """Read and check a scenario.

    Raises:
        ConfigError: If there is none of this name, the file is not TOML, lacks a description, or sets a key
            that does not exist or to a value that is not allowed.
    """
    names = sorted(path.stem for path in directory.glob("*.toml"))
    if name not in names:
        raise ConfigError(
            f"Unknown scenario {name!r}{nearest_match(name, names)}. Scenarios: {', '.join(names)}. "
            "Settings are written key=value."
        )
    path = directory / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}.") from error
    description = table.pop("description", None)
    if not isinstance(description, str) or not description.strip():
        raise ConfigError(f'{path.name} needs a description = "..." of one line, for --list.')
    keys = list_all_keys()
    settings = {}
    for key, value in flatten_table(table):
        if key not in keys:
            raise ConfigError(f"{path.name} sets {key!r}, which is not a key{nearest_match(key, keys)}.")
        try:
            settings[key] = check_value(keys[key], value)
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from error
    return Scenario(name=name, description=description.strip(), settings=settings)


def flatten_table(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of a TOML table and of those in it, by dotted keys."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flatten_table(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
