"""What every command needs."""

from __future__ import annotations

import argparse
import sys
import tomllib
from typing import TYPE_CHECKING

from ot_federated.errors import ConfigError

if TYPE_CHECKING:
    from ot_federated.settings import Scalar

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def write_out(text: str) -> None:
    """Write a line, or several, to standard output."""
    sys.stdout.write(text + "\n")


def parse_settings(words: list[str]) -> dict[str, Scalar]:
    """Return ``key=value`` words as run-config settings; values are read as TOML, else as text.

    Raises:
        ConfigError: If a word has no ``=``.
    """
    settings: dict[str, Scalar] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"{word!r} is not key=value, such as privacy.mode=example.")
        try:
            settings[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = text
    return settings
