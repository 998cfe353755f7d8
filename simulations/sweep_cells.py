"""What a sweep runs: a TOML file of base settings and axes, and the cells that their combinations make."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.settings import Scalar, check_value
from simulations.scenario_files import flatten_table, list_all_keys, load_scenario, simulation_keys

epsilon_key = "privacy.target-epsilon"
no_privacy = "none"
cell_file = "cell.json"
cell_format = 1
_tables = ("base", "grid", "override", "audit")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        settings: Flat keys and values of the run, the simulation's own among them.
        point: The values of the axes that make this cell, for tables.
    """

    settings: Mapping[str, Scalar]
    point: Mapping[str, Scalar]

    @property
    def private(self) -> bool:
        """Whether its clients train under differential privacy."""
        return self.settings.get("privacy.mode", "none") != "none"

    @property
    def name(self) -> str:
        """What it is called in the sweep's directory: readable, and different for different settings."""
        digest = hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode()).hexdigest()[:10]
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in self.point.items()]
        return "_".join("".join(c if c.isalnum() or c in "=.-" else "-" for c in word) for word in words) + f"_{digest}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, read and checked.

    Attributes:
        description: One line.
        cells: What to run, in order.
        num_candidates: Training examples of the first client whose membership is a coin's flip, to be attacked;
            0 for no attack.
    """

    description: str
    cells: tuple[Cell, ...]
    num_candidates: int


def load_sweep(path: Path, *, changes: Mapping[str, Scalar] | None = None) -> Sweep:
    """Read a sweep's file.

    Args:
        path: The TOML file: ``description``; ``[base]``, settings of every cell, with ``scenario`` to begin with a
            scenario's; ``[grid]``, lists of values by key, whose every combination is a cell; ``[[override]]``, tables
            with ``when``, axis values, and the settings of the cells that have them; ``[audit]`` with ``candidates``.
        changes: Settings that go over the base's, such as where the data is.

    Raises:
        ConfigError: If it is no TOML, or a key or a value is not allowed.
    """
    document = read_document(path, tables=_tables)
    description = document.pop("description", "")
    base = dict(flatten_table(document.get("base", {})))
    scenario = base.pop("scenario", None)
    if scenario is not None:
        base = {**load_scenario(str(scenario)).settings, **base}
    base |= changes or {}
    grid: dict[str, Any] = dict(flatten_table(document.get("grid", {})))
    if not grid:
        raise ConfigError(f'{path.name} has no [grid]: name at least one axis, such as "seed" = [0, 1, 2].')
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path.name}: grid.{key}={values!r} must be a list of values.")
    overrides = [read_override(table, path.name) for table in document.get("override", [])]
    cells = tuple(_build_cells(base, grid, overrides, path.name))
    audit = document.get("audit", {})
    num_candidates = audit.get("candidates", 0)
    if set(audit) - {"candidates"} or not isinstance(num_candidates, int) or num_candidates < 0:
        raise ConfigError(f"{path.name}: [audit] takes candidates, a number of examples, and has {audit!r}.")
    return Sweep(description=str(description), cells=cells, num_candidates=num_candidates)


def read_cell(directory: Path, cell: Cell) -> dict[str, Any] | None:
    """Return a finished cell's result, or None."""
    path = directory / cell.name / cell_file
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("format") == cell_format else None


def choose_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells with all of ``only`` in their names.

    Raises:
        ConfigError: If there is none.
    """
    chosen = [cell for cell in cells if all(text in cell.name for text in only)]
    if not chosen:
        raise ConfigError(f"--only={' '.join(only)!r} is in the name of no cell; --dry-run lists them.")
    return chosen


def list_cells(cells: Sequence[Cell], directory: Path) -> str:
    """Return a line for each cell, which says whether it is done."""
    lines = [f"{'done' if read_cell(directory, cell) else 'to do':6} {cell.name}\n" for cell in cells]
    return "".join([*lines, f"{len(cells)} cells in {directory}\n"])


def read_document(path: Path, *, tables: Sequence[str]) -> dict[str, Any]:
    """Return a TOML file's content, which has a ``description`` and ``tables``.

    Raises:
        ConfigError: If it is no TOML, or has another table.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} could not be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    for name in document:
        if name not in ("description", *tables):
            raise ConfigError(f"{path.name} has {name!r}, which is not a table{nearest_match(name, tables)}.")
    return document


def read_override(table: Mapping[str, Any], file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which points an ``[[override]]`` is for, and its settings.

    Raises:
        ConfigError: If it does not say for which.
    """
    rest = dict(table)
    when = rest.pop("when", None)
    if not isinstance(when, dict):
        raise ConfigError(f"{file}: an [[override]] needs when = {{ axis = value }}.")
    return dict(flatten_table(when)), dict(flatten_table(rest))


def applies(when: Mapping[str, Any], point: Mapping[str, Any], file: str) -> bool:
    """Say whether an override is for a point.

    Raises:
        ConfigError: If it asks for what is no axis.
    """
    unknown = set(when) - set(point)
    if unknown:
        raise ConfigError(f"{file}: an [[override]] asks for {unknown.pop()!r}, which is no axis of [grid].")
    return all(point[key] == value for key, value in when.items())


def _build_cells(
    base: Mapping[str, Any],
    grid: Mapping[str, list[Any]],
    overrides: list[tuple[dict[str, Any], dict[str, Any]]],
    file: str,
) -> Iterator[Cell]:
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        settings = {**base, **point}
        for when, changes in overrides:
            if applies(when, point, file):
                settings |= changes
        if settings.get(epsilon_key) == no_privacy:
            del settings[epsilon_key]
            settings["privacy.mode"] = "none"
        elif epsilon_key in point:
            settings["privacy.mode"] = "example"
        yield Cell(settings=check_settings(settings, file), point=point)


def check_settings(settings: Mapping[str, Any], file: str) -> dict[str, Scalar]:
    """Return a cell's settings, checked one by one and together.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    keys = list_all_keys()
    checked = {}
    for name, value in settings.items():
        if name not in keys:
            raise ConfigError(f"{file} sets {name!r}, which is not a key{nearest_match(name, keys)}.")
        try:
            checked[name] = check_value(keys[name], value)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    parse_run_config({name: value for name, value in checked.items() if name not in simulation_keys})
    return checked
