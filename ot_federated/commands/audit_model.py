"""``ot-federated audit model``: what a bundle gives away, before it is released."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ot_federated.commands.base import parse_settings, write_out

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers

model_help = """Make the bundle that a run with these settings would send, or look at one that is there, and attack it
as a client could, before anybody has it.

The report says which of the model's weights are in the bundle as they are, how alike the emulator's hidden states are
to the full model's, how good the emulator is by itself, and how much of the rest a client could rebuild with a given
effort: R1 repeats kept blocks, R2 trains them on public text, R3 trains the emulator on client data, R4 starts with
fresh blocks. The recovered share is 0 at the emulator and 1 at the full model; below 0 the attack made it worse.

Settings are the run config's, written key=value. data.validation is what models are scored on, the public text is
divided between the attacks and the score, and data.train stands in for a client's data."""


def add_model(commands: Subparsers) -> None:
    """Add ``audit model``, for a model owner."""
    model = commands.add_parser(
        "model",
        help="for a model owner: what a bundle gives away of the model",
        description=model_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model.add_argument("--bundle", type=Path, help="audit this bundle (default: make the one of the settings)")
    model.add_argument(
        "--previous", type=Path, action="append", default=[], help="a bundle released before (R6); may be repeated"
    )
    model.add_argument("--run", type=Path, dest="run_dir", help="a finished run's directory, for its value gap")
    model.add_argument(
        "--budgets", default="0,20000", metavar="TOKENS", help="tokens that attacks train on (default: 0,20000)"
    )
    model.add_argument("--output-dir", type=Path, help="write model_leak.json and recovery.png there")
    model.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="run-config keys, such as offsite.gaps=empty")
    model.set_defaults(run=audit_model)


def audit_model(parsed: argparse.Namespace) -> int:
    """Run the audit, write its table and files."""
    from tqdm import tqdm

    from ot_federated.cache import atomic_write_text
    from ot_federated.config import parse_run_config
    from ot_federated.model_owner.release_audit import audit_release

    config = parse_run_config(parse_settings(parsed.settings))
    budgets = parse_budgets(parsed.budgets)
    with tqdm(desc="recovery attacks", unit="step") as bar:
        report = audit_release(
            config, budgets=budgets, bundle=parsed.bundle, previous=parsed.previous, on_step=lambda _: bar.update()
        )
    if parsed.run_dir:
        from ot_federated.model_owner.release_audit import value_gap

        summary = json.loads((parsed.run_dir / "summary.json").read_text(encoding="utf-8"))
        report["rows"], report["value_gap"] = summary["rows"], value_gap(summary["rows"])
    if parsed.output_dir:
        from ot_federated.reporting.plots import plot_recovery

        parsed.output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(parsed.output_dir / "model_leak.json", json.dumps(report, indent=1) + "\n")
        plot_recovery({report["compression"]: report["attacks"]}, parsed.output_dir / "recovery.png")
    write_out(describe_leak(report))
    return 0


def parse_budgets(text: str) -> list[int]:
    """Return token budgets from ``0,20000,1e5``.

    Raises:
        ConfigError: If one is no number, or below 0.
    """
    from ot_federated.errors import ConfigError

    try:
        budgets = [int(float(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        budgets = [-1]
    if min(budgets) < 0:
        raise ConfigError(f"--budgets={text!r} must be numbers of tokens, such as 0,20000,1e5.")
    return sorted(set(budgets))


def describe_leak(report: dict[str, Any]) -> str:
    """Return the report as a table and a verdict."""
    emulator, full = report["emulator"], report["full"]
    exact = report["exact_weights"]
    middle = [entry for entry in report["cka"] if entry["role"] in ("emulator", "bridge")]
    lines = [
        f"bundle {report['bundle_digest'][:12]}  {report['compression']}",
        f"{exact['fraction']:.1%} of the model's weights are in it as they are; blocks "
        + ", ".join(str(block) for block, share in enumerate(exact["by_block"]) if share == 1.0),
        "CKA of the middle's states with the full model's: "
        + (f"lowest {min(entry['cka'] for entry in middle):.3f}" if middle else "the bundle has no middle"),
        "",
        f"{'':40}{'tokens':>10}{'public loss':>14}{'recovered':>11}{'task loss':>12}{'recovered':>11}{'accuracy':>10}",
        leak_line("full model", 0, full, None),
        leak_line("emulator as released", 0, emulator, None),
        *(leak_line(result["attack"], result["budget"], result, result["recovered"]) for result in report["attacks"]),
    ]
    if gap := report.get("value_gap"):
        lines += ["", f"value gap: the plug-in is better than the tuned emulator by {gap['loss']:.3f} in loss"]
    if releases := report.get("releases"):
        lines.append(
            f"with the releases before, a client holds {releases['fraction_of_blocks']:.0%} of the blocks exactly"
            + (f"; new since the first: {releases['new_since_first']}" if releases["new_since_first"] else "")
        )
        if releases["new_since_first"]:
            lines.append("Release one kept set per model: every other set reveals blocks that the first did not.")
    shares = [r["recovered"]["public_loss"] for r in report["attacks"] if r["recovered"]["public_loss"] is not None]
    if shares:
        verdict = f"The best attack closed {max(0.0, *shares):.0%} of the emulator's distance from the full model."
    else:
        verdict = "On this text the emulator is as good as the full model: there is nothing left to recover."
    lines += ["", verdict]
    return "\n".join(lines)


def leak_line(name: str, budget: int, scores: dict[str, Any], recovered: dict[str, Any] | None) -> str:
    """Return one line of the table."""

    def share(measure: str) -> str:
        value = None if recovered is None else recovered.get(measure)
        return "" if value is None else f"{value:.0%}"

    accuracy = "" if scores["task_accuracy"] is None else f"{scores['task_accuracy']:.1%}"
    return (
        f"{name:40}{budget:>10}{scores['public_loss']:>14.3f}{share('public_loss'):>11}"
        f"{scores['task_loss']:>12.3f}{share('task_loss'):>11}{accuracy:>10}"
    )
