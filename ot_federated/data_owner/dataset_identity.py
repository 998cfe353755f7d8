"""What a data set is known by where its owner gives it no name: the digest of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ot_federated.errors import DataError


def identify_dataset(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a data set's content, whatever the order of its rows: a shuffled file is the same data.

    Equal rows count each. Give it all of the owner's rows, before any of them are left out.

    Raises:
        DataError: If a row holds something that JSON cannot.
    """
    digests = []
    for number, row in enumerate(rows):
        try:
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_name_bytes)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Row {number} holds a value that JSON cannot ({type(error).__name__}), so the data set cannot be "
                "identified by its content. Name the data set instead."
            ) from error
        digests.append(hashlib.sha256(text.encode()).digest())
    # Sorted, not added up: sums of hashes can be made to collide.
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _name_bytes(value: object) -> dict[str, str]:
    """Return what stands for an image file's bytes in a row's text."""
    if not isinstance(value, bytes):
        raise TypeError(type(value).__name__)
    return {"sha256": hashlib.sha256(value).hexdigest()}
