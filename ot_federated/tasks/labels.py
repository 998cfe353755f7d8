"""Classes: their names, and the number of the class that a row's label means."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from ot_federated.errors import ConfigError, DataError


def find_class(label: Any, numbers: Mapping[str, int], *, column: str, row: int) -> int:
    """Return the number of the class that ``label`` means.

    Args:
        label: A key of ``numbers``, or what prints as one.
        numbers: The class's number by each of its names.
        column: The label's column, for the message.
        row: The row's number, for the message.

    Raises:
        DataError: If it means none. The label itself is private: only what was allowed is told.
    """
    if isinstance(label, float) and label.is_integer():  # pandas' integers, in a column with a gap
        label = int(label)
    found = None if isinstance(label, bool) or label is None else numbers.get(str(label).strip())
    if found is None:
        raise DataError(
            f"Row {row}: {column!r} must be one of {', '.join(numbers)}. Correct the row, or set data.label-column or "
            "the run's classes (task.label-words)."
        )
    return found


def number_classes(classes: Sequence[str]) -> dict[str, int]:
    """Return the number of each class by its name and, where no class is called so, by its number as text."""
    names = {name: number for number, name in enumerate(classes)}
    return {str(number): number for number in range(len(classes)) if str(number) not in names} | names


def list_classes(labels: Iterable[Hashable], *, column: str) -> tuple[str, ...]:
    """Return the classes that occur in public data: numbers in their order, else names in alphabetical order.

    Raises:
        ConfigError: If there are fewer than two, or one has no name.
    """
    found = {str(label).strip() for label in labels if label is not None}
    if "" in found:
        raise ConfigError(
            f"data.validation has an empty label in its column {column!r}. Label these rows, leave them out, or name "
            "the classes with task.label-words."
        )
    if len(found) < 2:
        raise ConfigError(
            f"data.validation has {len(found)} classes in its column {column!r}; two are needed. Give data of all "
            "classes, or name the classes with task.label-words."
        )
    if all(name.isascii() and name.isdigit() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))
