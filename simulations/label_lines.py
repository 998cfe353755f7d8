"""Turn files of ``label text`` lines, as SST-2 and TREC are often kept, into JSON lines for the classification task.

``python -m simulations.label_lines FOLDER/stsa.binary.{train,dev,test} --output-dir DIR`` writes
``DIR/stsa.binary.train.jsonl`` and so on, with the columns ``text`` and ``label``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ot_federated.cache import atomic_write_text
from ot_federated.errors import DataError, OtFederatedError


def read_label_lines(path: Path) -> list[dict[str, str]]:
    """Return a row for each line: what stands before the first space is its label.

    Raises:
        DataError: If the file cannot be read, or a line has no text behind its label; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        label, _, text = line.strip().partition(" ")
        if not text:
            raise DataError(f"{path}: line {number} is not a label, a space and a text.")
        rows.append({"text": text.strip(), "label": label})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert the files that are named; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.label_lines", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files of 'label text' lines")
    parser.add_argument("--output-dir", type=Path, required=True, help="where FILE.jsonl is written")
    parsed = parser.parse_args(arguments)
    try:
        tables = {path: read_label_lines(path) for path in parsed.files}
    except OtFederatedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    parsed.output_dir.mkdir(parents=True, exist_ok=True)
    for path, rows in tables.items():
        target = parsed.output_dir / f"{path.name}.jsonl"
        atomic_write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        sys.stdout.write(f"{target}  {len(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
