"""``ot-federated audit``: what the other party could learn, measured before it is sent anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ot_federated.commands.audit_model import add_model
from ot_federated.commands.base import parse_settings, write_out

if TYPE_CHECKING:
    from ot_federated.commands.base import Subparsers
    from ot_federated.config import RunConfig
    from ot_federated.data_owner.audit import Training

data_help = """Rehearse a run on this machine with your own data, and attack the result as the model owner could.

Some of your examples, the candidates, train or do not train by the flip of a coin. Afterwards the attacks guess which
ones did, from the adapter alone: membership inference, canary exposure, a lower bound on epsilon from one run, and the
recovery of tokens from an update. Nothing leaves this machine and nothing is booked in the ledger: the result is yours
alone. Publishing it would be a release of its own.

Settings are the run config's, written key=value: audit what the model owner asks for, with and without
privacy.mode=example."""


def add_commands(subparsers: Subparsers) -> None:
    """Add ``audit data`` and ``audit model``."""
    audit = subparsers.add_parser("audit", help="measure what the other party could learn, before anything is sent")
    commands = audit.add_subparsers(metavar="COMMAND", required=True)
    add_data(commands)
    add_model(commands)


def add_data(commands: Subparsers) -> None:
    """Add ``audit data``, for a data owner."""
    data = commands.add_parser(
        "data",
        help="for a data owner: what an update would tell of your examples",
        description=data_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("--bundle", type=Path, required=True, help="the model owner's bundle: a directory")
    data.add_argument("--data", required=True, help="your data: a file, or any source that data.train takes")
    data.add_argument("--output-dir", type=Path, help="write audit.json and roc.png there")
    data.add_argument("--candidates", type=int, default=500, help="examples whose membership is a coin's flip")
    data.add_argument(
        "--canaries",
        choices=("natural", "mislabelled", "random"),
        default="natural",
        help="leave the candidates as they are, give them wrong answers, or random tokens: easier to notice, so that "
        "the bound on epsilon is sharper (default: natural)",
    )
    data.add_argument("--max-examples", type=int, default=0, help="use at most so many examples; 0: all")
    data.add_argument("--seed", type=int, default=0, help="of coins and canaries; noise is never seeded")
    data.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    data.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="run-config keys, such as privacy.mode=example")
    data.set_defaults(run=audit_data)


def audit_data(parsed: argparse.Namespace) -> int:
    """Run the audit, write its table and files; return 1 if it refutes the claimed epsilon."""
    from tqdm import tqdm

    from ot_federated.bundle import read_manifest
    from ot_federated.cache import atomic_write_text
    from ot_federated.config import parse_run_config
    from ot_federated.data_owner.audit import audit_data_owner
    from ot_federated.data_owner.fine_tuning import build_bundle_task
    from ot_federated.devices import choose_device
    from ot_federated.sources import load_table
    from ot_federated.tasks.losses import continuations
    from ot_federated.tuning import build_tuning

    config = parse_run_config(parse_settings(parsed.settings))
    read_manifest(parsed.bundle)
    rows = load_table(parsed.data, split="train", columns=list(config.columns.values()))
    if parsed.max_examples:
        rows = rows.select(range(min(parsed.max_examples, rows.num_rows)))
    examples = continuations(build_bundle_task(config, parsed.bundle).encode(rows))
    training = plan_training(config, num_examples=len(examples) - parsed.candidates // 2)
    with tqdm(total=training.num_steps, desc="rehearsal", unit="step") as bar:
        report = audit_data_owner(
            parsed.bundle,
            examples,
            training=training,
            tuning=build_tuning(config),
            device=choose_device(parsed.device),
            num_candidates=parsed.candidates,
            canaries=parsed.canaries,
            seed=parsed.seed,
            on_step=lambda step: advance(bar, step.step),
        )
    curves = report.pop("curves")
    if parsed.output_dir:
        from ot_federated.reporting.plots import plot_roc

        parsed.output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(parsed.output_dir / "audit.json", json.dumps(report, indent=1) + "\n")
        plot_roc(curves, parsed.output_dir / "roc.png", title=describe_claim(report))
    write_out(describe_report(report))
    claimed = report["claimed_epsilon"]
    return int(claimed is not None and report["one_run_audit"]["epsilon_lower_bound"] > claimed)


def plan_training(config: RunConfig, *, num_examples: int) -> Training:
    """Return how a client would train over a whole run with these settings."""
    from ot_federated.data_owner.audit import Training
    from ot_federated.data_owner.private_tuning import build_privacy_settings
    from ot_federated.training import build_optimizer_settings, plan_round

    train, privacy = config.train, config.privacy
    steps = config.num_server_rounds * plan_round(
        num_examples=num_examples,
        batch_size=train.batch_size,
        local_epochs=train.local_epochs,
        max_steps=train.max_steps,
    )
    return Training(
        batch_size=train.batch_size,
        num_steps=steps,
        optimizer=build_optimizer_settings(train),
        max_grad_norm=train.max_grad_norm,
        privacy=build_privacy_settings(privacy) if privacy.mode == "example" else None,
    )


def advance(bar: Any, step: int) -> None:
    """Move the bar on to a step of the rehearsal; the few steps behind the token search do not move it back."""
    if step > bar.n:
        bar.update(step - bar.n)


def describe_claim(report: dict[str, Any]) -> str:
    """Return what was claimed of the training, in a few words."""
    claimed = report["claimed_epsilon"]
    return "no privacy" if claimed is None else f"epsilon {claimed:.2f} at delta {report['delta']:g}"


def describe_report(report: dict[str, Any]) -> str:
    """Return the report as a table and a verdict."""
    audit, exposure, tokens = report["one_run_audit"], report["exposure"], report["token_recovery"]
    percent: Callable[[float], str] = "{:.1%}".format
    lines = [f"{report['num_examples']} examples, {report['num_steps']} steps, {describe_claim(report)}", ""]
    lines.append(f"{'membership inference':22}{'AUC (95 %)':>22}{'TPR at 1 % FPR':>18}{'at 0.1 %':>12}")
    for name, result in report["membership"].items():
        low, high = result["auc_interval"]
        area = f"{result['auc']:.3f} ({low:.3f}-{high:.3f})"
        at_1, at_01 = ("" if (rate := result[key]) is None else percent(rate) for key in ("tpr_at_1%", "tpr_at_0.1%"))
        lines.append(f"{name:22}{area:>22}{at_1:>18}{at_01:>12}")
    lines += [
        "",
        f"canary exposure       {exposure['mean_bits']:.2f} bits of {exposure['most_bits']:.1f} "
        f"(chance {exposure['chance_bits']:.2f})",
        f"epsilon is at least   {audit['epsilon_lower_bound']:.3f} with {audit['confidence']:.0%} confidence "
        f"({audit['num_right']} of {audit['num_guesses']} guesses right)",
    ]
    if tokens is None:
        lines.append("tokens recovered      nothing that reads the embeddings is trained")
    else:
        verdict = "no better than chance" if tokens["at_chance"] else "ABOVE CHANCE"
        lines.append(
            f"tokens recovered      {percent(tokens['recovered'])} of {tokens['num_tokens_used']} "
            f"(chance {percent(tokens['chance'])}): {verdict}"
        )
    claimed = report["claimed_epsilon"]
    if claimed is None:
        lines += ["", "Without privacy.mode=example there is no bound on what an update tells."]
    elif audit["epsilon_lower_bound"] > claimed:
        lines += ["", "REFUTED: the audit's bound is above the claim. Do not take part; report it as a bug."]
    else:
        lines += ["", "The audit does not refute the claim. An audit never proves one: the accountant does."]
    return "\n".join(lines)
