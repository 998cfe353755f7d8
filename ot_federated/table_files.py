"""Reading local files into tables, in memory only.

A data owner's files are private. ``datasets.load_dataset`` writes an Arrow copy of every file it reads into a
cache below the user's home, also with ``keep_in_memory``, where it would outlive the run and the original. So
files are parsed here and nothing is written. Errors name the file, the line and the reason, never a row's
content: a client may send them to the server.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ot_federated.errors import DataError, SourceError

if TYPE_CHECKING:
    from pyarrow import Table


def read_tables(files: Iterable[Path]) -> Table:
    """Return the rows of all files in turn as one table; a column that a file lacks is null there.

    Raises:
        SourceError: If a file's name says no known format.
        DataError: If a file is damaged, or files disagree on a column's type.
    """
    import pyarrow

    tables = [read_table(path) for path in files]
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.lib.ArrowException:
        kinds: dict[str, set[str]] = {}
        for field in (field for table in tables for field in table.schema):
            kinds.setdefault(field.name, set()).add(str(field.type))
        mixed = "; ".join(f"{name}: {', '.join(sorted(kind))}" for name, kind in kinds.items() if len(kind) > 1)
        # "from None" here and below: the cause's text may quote a value.
        raise DataError(
            f"The files disagree on the type of a column ({mixed}). Write it the same way in all files."
        ) from None


def read_table(path: Path) -> Table:
    """Return one file's rows; the format follows from its name, with or without ``.gz``.

    Raises:
        SourceError: If the name says no known format.
        DataError: If the content is damaged or not of that format.
    """
    import pyarrow

    read = readers.get(format_of(path))
    if read is None:
        raise SourceError(
            f"{path} has no known format: its name must end in {', '.join(readers)}, or one of them with .gz."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} could not be read: {error.strerror}.") from error
    try:
        return read(gzip.decompress(data) if path.suffix.lower() == ".gz" else data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Convert it, say with iconv.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: not a whole gzip file. Copy or compress it again.") from None
    except (pyarrow.lib.ArrowException, OSError) as error:
        # pyarrow numbers the row, then quotes it: the number is taken and the rest is dropped.
        found = re.search(r"[Rr]ow #?(\d+)", str(error))
        place = f": row {found[1]} has another number of columns or broken quotes" if found else ""
        raise DataError(f"{path}: no valid {format_of(path)} file{place}. Write it again.") from None


def format_of(path: Path) -> str:
    """Return the format's suffix, such as ``.csv`` for ``a.csv.gz``; empty where there is none."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _read_lines(data: bytes) -> Table:
    import pyarrow

    lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    if lines[-1] == "":
        lines.pop()
    return pyarrow.table({"text": pyarrow.array(lines, type=pyarrow.string())})


def _read_json_lines(data: bytes) -> Table:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise DataError(f"line {number} is not JSON: {reason}. Write one JSON object a line.") from None
    return build_table(rows)


def _read_json(data: bytes) -> Table:
    text = data.decode("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_json_lines(data)
    try:
        return build_table(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise DataError(f"not JSON ({place}). Write a list of objects, or one object a line.") from None


def build_table(rows: list[Any]) -> Table:
    """Return JSON objects as a table over all their keys; what an object lacks is null.

    Raises:
        DataError: If an entry is no object, or a key's values have no common type.
    """
    import pyarrow

    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"entry {number} is not a JSON object but {type(row).__name__}.")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.lib.ArrowException, OverflowError, UnicodeEncodeError):
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise DataError(
                f"the values of {name!r} have no common type ({', '.join(kinds)}), nested ones included, "
                "or one is no valid text or 64-bit number. Write them all the same way."
            ) from None
    return pyarrow.table(columns)


def _read_csv(data: bytes) -> Table:
    import pyarrow
    from pyarrow import csv

    data.decode()  # pyarrow would read text that is not UTF-8 as bytes, and say nothing
    # One block for the whole file: a column's type then follows from all its values, not the first megabyte's.
    options = csv.ReadOptions(block_size=max(len(data) + 1, 2**16), use_threads=False)
    if not data.strip():
        return pyarrow.table({})
    return csv.read_csv(io.BytesIO(data), read_options=options, parse_options=csv.ParseOptions(newlines_in_values=True))


def _read_parquet(data: bytes) -> Table:
    import pyarrow
    from pyarrow import parquet

    return parquet.read_table(pyarrow.BufferReader(data))


readers: dict[str, Callable[[bytes], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
