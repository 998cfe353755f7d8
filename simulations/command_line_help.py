"""What ``run_sim.py --help`` and ``--list`` say."""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
from collections.abc import Iterable

from ot_federated.config import list_keys
from ot_federated.settings import Key, describe_range
from simulations.scenario_files import list_scenarios, simulation_keys

_usage = """\
usage: python run_sim.py [SCENARIO] [key=value ...] [--output DIR] [--engine ray|in-process]
       python run_sim.py --list | --help

Simulate a federation on this machine: a model owner splits a model into adapter and emulator, data owners
fine-tune the adapter on their data, and the model owner plugs it back into the full model.

examples:
  python run_sim.py                                         the scenario "default"
  python run_sim.py num-clients=8 num-server-rounds=5       ... with other settings
  python run_sim.py default train.learning-rate=1e-4 --output runs/mine
  python run_sim.py data.train=train.jsonl data.test=test.jsonl
  python run_sim.py resume=true --output runs/mine          go on after an interruption

options:
  SCENARIO          a file of simulations/scenarios without .toml (default: default)
  key=value         settings, see below; values are TOML, quotes around strings may be left out
  --output DIR      directory of the run (default: runs/<scenario>-<UTC time>)
  --engine ENGINE   ray: Flower's simulation engine, clients train at once in processes of their own
                    in-process: one after the other in this process, for debugging
  --list            list the scenarios
  --help            show this text

exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 interrupted
"""


def describe_usage() -> str:
    """Return the help text: usage, examples, and every key with its default, limits and meaning."""
    run_keys = list_keys().values()
    sections = [("simulation", list(simulation_keys.values()))]
    sections += [(section, list(keys)) for section, keys in itertools.groupby(run_keys, key=_section_of)]
    return _usage + "".join(f"\n{section}:\n{_describe_keys(keys)}" for section, keys in sections)


def describe_scenarios() -> str:
    """Return one line for each scenario: its name and description."""
    scenarios = list_scenarios()
    width = max(map(len, scenarios), default=0)
    return "\n".join(f"{name:<{width}}  {scenario.description}" for name, scenario in scenarios.items())


def _section_of(key: Key) -> str:
    return key.name.partition(".")[0] if "." in key.name else "run"


def _describe_keys(keys: Iterable[Key]) -> str:
    width = min(shutil.get_terminal_size().columns, 110)
    lines = []
    for key in keys:
        lines.append(f"  {key.name}={_show_value(key.default)}")
        limits = f"One of {', '.join(key.choices)}. " if key.choices else describe_range(key)
        text = key.doc if key.choices or not limits else f"{key.doc} ({limits})"
        text = f"{limits}{text}" if key.choices else text
        lines += textwrap.wrap(text, width=width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _show_value(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
