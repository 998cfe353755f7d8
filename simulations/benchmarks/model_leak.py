"""What each emulator gives away: ``python -m simulations.benchmarks.model_leak``.

One cell is one emulator under every recovery attack and budget (see ``ot-federated audit model``). A cell that is done
is not measured again. Results go to ``simulations/results/model_leak.json``, with a table and a figure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text
from ot_federated.commands.audit_model import describe_leak, parse_budgets
from ot_federated.config import parse_run_config
from ot_federated.errors import OtFederatedError
from ot_federated.model_owner.release_audit import audit_release
from ot_federated.reporting.plots import plot_recovery
from simulations.benchmarks.environment import write_results
from simulations.command_line import parse_settings

emulators = ("influence+bridge:12", "influence+bridge:8", "uniform+empty:12", "uniform+empty:8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet and write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.model_leak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run-config keys")
    parser.add_argument("--emulators", default=",".join(emulators), help="KEEP+GAPS:BLOCKS, separated by commas")
    parser.add_argument("--budgets", default="0,8000,24000", help="tokens that attacks train on")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(words)
    try:
        reports = [
            measure(name, parsed.settings, parse_budgets(parsed.budgets), parsed.output_dir / "model_leak_cells")
            for name in parsed.emulators.split(",")
        ]
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    command = shlex.join(["python", "-m", "simulations.benchmarks.model_leak", *words])
    write_results(parsed.output_dir / "model_leak.json", command=command, cells=reports)
    plot_recovery({report["emulator_name"]: report["attacks"] for report in reports}, parsed.output_dir / "leak.png")
    table = "\n\n".join(f"{report['emulator_name']}\n{describe_leak(report)}" for report in reports)
    atomic_write_text(parsed.output_dir / "model_leak.txt", table + "\n")
    sys.stdout.write(table + "\n")
    return 0


def measure(name: str, settings: Sequence[str], budgets: Sequence[int], directory: Path) -> dict[str, Any]:
    """Return an emulator's report, from its file where it was measured before with the same settings and budgets."""
    from tqdm import tqdm

    compression, _, blocks = name.partition(":")
    keep, _, gaps = compression.partition("+")
    config = parse_run_config(
        parse_settings([*settings, f"offsite.keep={keep}", f"offsite.gaps={gaps}", f"offsite.emulator-blocks={blocks}"])
    )
    asked = {"settings": list(settings), "budgets": list(budgets)}
    path = directory / f"{name.replace(':', '-')}.json"
    if path.exists():
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if cell["asked"] == asked:
            return dict(cell["report"])
    with tqdm(desc=name, unit="step") as bar:
        report = audit_release(config, budgets=budgets, on_step=lambda _: bar.update())
    report["emulator_name"] = name
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps({"asked": asked, "report": report}, indent=1) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main())
