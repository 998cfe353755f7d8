"""The lines that tell what happens, on standard error: plain with the time, or JSON for a machine that collects them.

``OT_FEDERATED_LOG=json`` turns every line of this project's and of Flower's logger into one JSON object: ``time``
(UTC), ``level``, ``message``, ``run``, ``round`` and ``node`` where they are known, and ``traceback``. Lines that
Flower and its web server print by other means stay as they are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

from ot_federated.errors import ConfigError, nearest_match

form_variable = "OT_FEDERATED_LOG"
forms = ("text", "json")

logger = logging.getLogger("ot_federated")
_fields: ContextVar[Mapping[str, str | int]] = ContextVar("log_fields", default=MappingProxyType({}))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        values: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields.get(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


@contextmanager
def log_fields(**fields: str | int) -> Iterator[None]:
    """Give every line that is written inside the block, by this thread, these fields: run, round, node."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def show_lines() -> None:
    """Write this project's log lines to standard error, once, apart from Flower's own records.

    Raises:
        ConfigError: If ``OT_FEDERATED_LOG`` is not a form of lines.
    """
    form = os.environ.get(form_variable) or forms[0]
    if form not in forms:
        raise ConfigError(f"{form_variable}={form!r} is not one of {', '.join(forms)}{nearest_match(form, forms)}.")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    if form == "json":
        handler.setFormatter(JsonFormatter())
        for flowers in logging.getLogger("flwr").handlers:
            # Flower's handler has a format of its own and asks no formatter. Its empty lines are layout.
            flowers.format = JsonFormatter().format  # type: ignore[method-assign]
            flowers.addFilter(lambda record: bool(record.getMessage().strip()))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
