"""What the recovery benchmark runs: a TOML file of tasks, emulators and federations, and the cells they make.

Tables of the file::

    [base]             run-config keys of every cell
    [task.NAME]        keys of a task; cut = { source, train, validation, test } divides a set that has one split,
                       and cut:train, cut:validation and cut:test then name its parts; [task.NAME.full] is in place of
                       [full] there
    [emulator.NAME]    keys of an emulator; candidates = { KEY = [values] } are settings to choose from by the plug-in's
                       loss on validation data, at the first task and seed; all others take what was chosen there
    [federation.NAME]  keys of a way to run it, num-clients among them
    [full]             full fine-tuning: epochs, candidates (of which epochs may be one), and keys
    [[override]]       keys of the cells that ``when`` names, by task, emulator, federation or seed
    [[run]]            tasks, emulators, federations, seeds: every combination is a cell, in this order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ot_federated.errors import ConfigError, nearest_match
from ot_federated.settings import Scalar
from simulations.scenario_files import flatten_table
from simulations.sweep_cells import Cell, applies, check_settings, read_document, read_override

_tables = ("base", "task", "emulator", "federation", "full", "override", "run")
_axes = {"task": "tasks", "emulator": "emulators", "federation": "federations"}
_cut_fields = {"source": str, "train": int, "validation": int, "test": int}
cut_prefix = "cut:"


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """The upper bound.

    Attributes:
        settings: Run-config keys that go over the cell's.
        candidates: What to choose from on validation data: ``epochs``, passes over the training data, and settings.
    """

    settings: Mapping[str, Scalar] = field(default_factory=dict)
    candidates: tuple[Mapping[str, Scalar], ...] = ({"epochs": 1},)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A benchmark, read and checked.

    Attributes:
        name: The file's, without its ending; what is found is kept under it.
        description: One line.
        cells: What to run, in order.
        full: By task: how the full model is fine-tuned.
        cuts: By task: the source that is cut, and how many rows train, validate and test.
    """

    name: str
    description: str
    cells: tuple[Cell, ...]
    full: Mapping[str, FullFineTuning]
    cuts: Mapping[str, Mapping[str, Any]]


def load_plan(path: Path, *, seeds: Sequence[int] = ()) -> Plan:
    """Read a benchmark's file.

    Args:
        path: The TOML file.
        seeds: Run these seeds instead of the file's.

    Raises:
        ConfigError: If it is no TOML, or a name, a key or a value is not allowed.
    """
    document = read_document(path, tables=_tables)
    tables = {axis: {name: dict(table) for name, table in document.get(axis, {}).items()} for axis in _axes}
    cuts = {name: table.pop("cut") for name, table in tables["task"].items() if "cut" in table}
    for name, cut in cuts.items():
        if {key: type(value) for key, value in cut.items()} != _cut_fields:
            raise ConfigError(
                f"{path.name}: task.{name}.cut={cut!r} must give a source, and rows to train, validation, test."
            )
    full = {
        name: _read_full(dict(table.pop("full", document.get("full", {}))), path.name)
        for name, table in tables["task"].items()
    }
    candidates = {
        name: _read_candidates(table.pop("candidates", {}), f"{path.name}: emulator.{name}")
        for name, table in tables["emulator"].items()
    }
    flat = {axis: {name: dict(flatten_table(t)) for name, t in named.items()} for axis, named in tables.items()}
    overrides = [read_override(table, path.name) for table in document.get("override", [])]
    base = dict(flatten_table(document.get("base", {})))
    cells: dict[str, Cell] = {}
    for point in _points(document.get("run", []), flat, seeds, path.name):
        settings = {**base}
        for axis in _axes:
            settings |= flat[axis][point[axis]]
        for when, changes in overrides:
            if applies(when, point, path.name):
                settings |= changes
        for candidate in candidates[point["emulator"]]:
            checked = check_settings({**settings, **candidate, "seed": point["seed"]}, path.name)
            cell = Cell(settings=checked, point={**point, **candidate})
            cells[cell.name] = cell
    return Plan(
        name=path.stem,
        description=str(document.get("description", "")),
        cells=tuple(cells.values()),
        full=full,
        cuts=cuts,
    )


def _points(
    runs: Sequence[Mapping[str, Any]], tables: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], file: str
) -> Iterator[dict[str, Any]]:
    if not runs:
        raise ConfigError(f"{file} has no [[run]]: name tasks, emulators, federations and seeds.")
    for run in runs:
        if set(run) != {*_axes.values(), "seeds"}:
            raise ConfigError(f"{file}: a [[run]] has {sorted(run)}; it takes tasks, emulators, federations, seeds.")
        for axis, plural in _axes.items():
            for name in run[plural]:
                if name not in tables[axis]:
                    raise ConfigError(
                        f"{file}: a [[run]] names the {axis} {name!r}{nearest_match(name, tables[axis])}."
                    )
        for seed, *names in itertools.product(seeds or run["seeds"], *(run[plural] for plural in _axes.values())):
            yield {**dict(zip(_axes, names, strict=True)), "seed": seed}


def _read_candidates(table: Mapping[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    lists: dict[str, Any] = dict(flatten_table(table))
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{place}.candidates.{key}={values!r} must be a list of values.")
    return tuple(dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def _read_full(table: dict[str, Any], file: str) -> FullFineTuning:
    epochs, candidates = table.pop("epochs", 1), _read_candidates(table.pop("candidates", {}), f"{file}: full")
    checked = []
    for candidate in candidates:
        passes = candidate.pop("epochs", epochs)
        if not isinstance(passes, int) or passes < 1:
            raise ConfigError(f"{file}: full.epochs={passes!r} must be a number of passes, at least 1.")
        checked.append({"epochs": passes, **check_settings(candidate, file)})
    return FullFineTuning(settings=check_settings(dict(flatten_table(table)), file), candidates=tuple(checked))


def group_of(cell: Cell) -> tuple[Scalar, ...]:
    """Return what the cells have in common for which settings are chosen together."""
    return cell.point["emulator"], cell.point["federation"]


def candidate_of(cell: Cell) -> dict[str, Scalar]:
    """Return the settings of a cell that were to be chosen."""
    return {key: value for key, value in cell.point.items() if key not in (*_axes, "seed")}


def is_first(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Say whether a cell has the first task and seed of its group: there the candidates compete."""
    first = next(c for c in cells if group_of(c) == group_of(cell))
    return (cell.point["task"], cell.point["seed"]) == (first.point["task"], first.point["seed"])
