"""Copies of the tree, and tests run in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.mistakes import Mistake, MistakeError

root = Path(__file__).resolve().parents[2]
copied = ("ot_federated", "strategies", "simulations", "tests", "run_sim.py", "pyproject.toml", "README.md", "LICENSE")
seconds_per_run = 900


@dataclass(frozen=True)
class Outcome:
    """How a test ended: ``passed``, ``failed`` (in the test itself), ``error`` or ``skipped``; and why."""

    outcome: str
    reason: str
    seconds: float


@contextmanager
def tree_copy(mistake: Mistake | None = None) -> Iterator[Path]:
    """Yield a copy of the tree, with ``mistake`` in it, that is removed in the end.

    Raises:
        MistakeError: If the mistake cannot be put in.
    """
    with tempfile.TemporaryDirectory(prefix="ot-mutation-") as directory:
        tree = Path(directory) / "tree"
        tree.mkdir()
        for name in copied:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.partial"))
            else:
                shutil.copy2(root / name, tree / name)
        if mistake is not None:
            mistake.apply(tree)
        yield tree


def run_tests(tree: Path, node_ids: Sequence[str], *, imported: str = "") -> dict[str, Outcome]:
    """Run tests of a tree in a process of its own and return how each node id ended, parameters put together.

    Args:
        tree: The tree.
        node_ids: What to run; without parameters in brackets it means all of them, and ends as the worst of them.
        imported: A file of the tree that the tests must have imported.

    Raises:
        MistakeError: If tests could not be run, or ran code of another tree.
    """
    report = tree.parent / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "tests.mutations.watch"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OT_MUTATION_REPORT": str(report),
    }
    try:
        done = subprocess.run(
            [*command, *dict.fromkeys(node_ids)],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds_per_run,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MistakeError(f"the tests did not end within {seconds_per_run} s: {node_ids}") from error
    if done.returncode not in (0, 1) or not report.exists():
        raise MistakeError(f"the tests could not be run (exit status {done.returncode}):\n{done.stdout[-3000:]}")
    found = json.loads(report.read_text(encoding="utf-8"))
    if found["foreign"]:
        raise MistakeError(f"the tests ran code of another tree: {found['foreign'][:3]}")
    if imported and imported not in found["files"]:
        raise MistakeError(f"the tests did not import {imported}")
    return {node_id: _worst(node_id, found["outcomes"]) for node_id in node_ids}


def _worst(node_id: str, outcomes: Mapping[str, Mapping[str, str | float]]) -> Outcome:
    cases = [case for name, case in outcomes.items() if name == node_id or name.startswith(f"{node_id}[")]
    if not cases:
        raise MistakeError(f"there is no test {node_id}")
    order = ("failed", "error", "skipped", "passed")
    worst = min(cases, key=lambda case: order.index(str(case["outcome"])))
    seconds = sum(float(case["seconds"]) for case in cases)
    return Outcome(str(worst["outcome"]), str(worst["reason"]), round(seconds, 2))
