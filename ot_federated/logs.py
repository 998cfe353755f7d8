"""The lines that a person who waits reads: plain, with the time, on standard error."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("ot_federated")


def show_lines() -> None:
    """Write this project's log lines to standard error, once, apart from Flower's own records."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
