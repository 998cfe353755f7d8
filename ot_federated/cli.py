"""The command line ``ot-federated``.

Each command is a file of :mod:`ot_federated.commands` with a function ``add_commands`` that takes the subparsers,
adds its own, and sets ``run`` to a function from the parsed arguments to an exit code. What a command needs is
imported when it runs, so that ``--help`` is quick. A command that hands options on to another program has the default
``rest``, and finds there what it did not know.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ot_federated.commands import approve, audit, doctor, keys, ledger, supernode, trail
from ot_federated.errors import OtFederatedError

command_files = (approve, ledger, supernode, trail, audit, keys, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 for success, 1 for an error, 2 for a wrong command."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and "rest" not in parsed:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.rest = rest
    try:
        code: int = parsed.run(parsed)
    except OtFederatedError as error:
        sys.stderr.write(f"ot-federated: {error}\n")
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="ot-federated", description="Federated Offsite-Tuning.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command_file in command_files:
        command_file.add_commands(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
