"""A pytest plugin for mutated trees: writes down how each test ended, and whose code it ran.

``OT_MUTATION_REPORT`` names the file to write. Modules must come from the current directory, which is the tree.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

packages = ("ot_federated", "simulations", "strategies", "tests")
_outcomes: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the worst phase of each test; only a failure of the test itself is ``failed``."""
    seen = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "seconds": 0.0})
    seen["seconds"] = round(float(str(seen["seconds"])) + report.duration, 2)
    if report.outcome == "passed":
        return
    seen["outcome"] = report.outcome if report.when == "call" or report.outcome == "skipped" else "error"
    lines = [line.removeprefix("E").strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    reason = (lines or report.longreprtext.splitlines()[-1:] or [""])[0]
    # A machine's directories say nothing to others.
    seen["reason"] = re.sub(r"(/[\w.+-]+){2,}/", ".../", reason).replace(tempfile.gettempdir(), "...")[:200]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report."""
    root = Path.cwd().resolve()
    files = {
        name: Path(file).resolve()
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and (file := getattr(module, "__file__", None))
    }
    report = {
        "outcomes": _outcomes,
        "files": sorted(str(path.relative_to(root)) for path in files.values() if path.is_relative_to(root)),
        "foreign": sorted(str(path) for path in files.values() if not path.is_relative_to(root)),
    }
    Path(os.environ["OT_MUTATION_REPORT"]).write_text(json.dumps(report), encoding="utf-8")
