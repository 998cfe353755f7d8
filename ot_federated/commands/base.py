"""What every command needs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def write_out(text: str) -> None:
    """Write a line, or several, to standard output."""
    sys.stdout.write(text + "\n")
