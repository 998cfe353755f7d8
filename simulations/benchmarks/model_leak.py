"""What each emulator gives away: ``python -m simulations.benchmarks.model_leak``.

One cell is one emulator under every recovery attack and budget (see ``ot-federated audit model``): by default every way
of keeping blocks with every way of filling gaps that the config offers, and every way of shrinking and quantising them.
A cell that is done is not measured again; one that fails is reported and does not stop the others. Results go to
``simulations/results/model_leak.json``, with tables and a figure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text
from ot_federated.commands.audit_model import describe_leak, parse_budgets
from ot_federated.config import list_keys, parse_run_config
from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.model_owner.release_audit import audit_release
from ot_federated.reporting.plots import plot_recovery
from simulations.benchmarks.environment import write_results
from simulations.command_line import parse_settings

texts_at_once, tokens_per_text = 32, 256
num_distillation_steps = 100
quantised = ("int8", "int4")
measures = (("R1", "repeat"), ("R2", "repeat, train"), ("R3", "client data"), ("R4", "fresh blocks"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet and write the report; return 0, or 1 if a cell failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = build_parser().parse_args(words)
    command = shlex.join(["python", "-m", "simulations.benchmarks.model_leak", *words])
    names = parsed.emulators.split(",") if parsed.emulators else offered_emulators(parsed.blocks.split(","))
    reports, failed = [], 0
    cells = parsed.output_dir / "model_leak_cells"
    settings = list(parsed.settings)
    try:
        budgets = parse_budgets(parsed.budgets)
        if parsed.own_text:
            text = write_own_text(settings, cells / f"own-text-{parsed.own_text}.txt", num_tokens=parsed.own_text)
            settings += [f"offsite.public-text={text}", "offsite.public-text-column=text"]
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for name in names:
        try:
            reports.append(measure(name, settings, budgets, cells))
        except OtFederatedError as error:
            sys.stderr.write(f"FAILED {name}: {error}\n")
            failed += 1
            continue
        write_report(reports, parsed.output_dir, command=command)
    if reports:
        sys.stdout.write(describe_emulators(reports) + "\n")
    return int(failed > 0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.model_leak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run-config keys")
    parser.add_argument(
        "--emulators",
        default="",
        help="KEEP+GAPS:BLOCKS, with +SHRINK, +TRANSPORT and +distilled-STEPS before the colon where wanted, separated "
        "by commas (default: all that there are)",
    )
    parser.add_argument("--blocks", default="12", help="numbers of kept blocks, where --emulators is not given")
    parser.add_argument("--budgets", default="0,8000,24000", help="tokens that attacks train on")
    parser.add_argument(
        "--own-text",
        type=int,
        default=0,
        metavar="TOKENS",
        help="public text that the full model writes itself: for a model whose training text is not at hand, since on "
        "foreign text an attacker who trains on it soon does better than the full model",
    )
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    return parser


def write_own_text(settings: Sequence[str], path: Path, *, num_tokens: int, seed: int = 0) -> Path:
    """Write about ``num_tokens`` tokens that the full model samples, a text a line, unless they are there; return it.

    Raises:
        ConfigError: If the model writes no text.
    """
    import torch
    from transformers import PreTrainedTokenizerBase

    from ot_federated.model_owner.owner import load_parts

    if path.exists():
        return path
    parts = load_parts(parse_run_config(parse_settings(settings)))
    model, tokenizer = parts.model, parts.processor
    start: Any = getattr(tokenizer, "bos_token_id", None)
    if start is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError("--own-text needs a language model whose tokenizer has a token to begin with.")
    torch.manual_seed(seed)
    texts: list[str] = []
    for _ in range(max(1, num_tokens // (texts_at_once * tokens_per_text))):
        ids = torch.full((texts_at_once, 1), start, device=model.device)
        written: Any = model.generate(  # type: ignore[operator]  # transformers' mixins confuse mypy
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=tokens_per_text
        )
        texts += [" ".join(str(tokenizer.decode(row, skip_special_tokens=True)).split()) for row in written]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "\n".join(texts) + "\n")
    return path


def offered_emulators(blocks: Sequence[str]) -> list[str]:
    """Return every way of keeping blocks with every way of filling gaps, and of shrinking and sending, by name."""
    choices = {key: list_keys()[f"offsite.{key}"].choices for key in ("keep", "gaps", "shrink", "transport")}
    ways = [f"{keep}+{gaps}" for keep in choices["keep"] for gaps in choices["gaps"] if gaps != "trained-bridge"]
    ways.append(f"uniform+trained-bridge+distilled-{num_distillation_steps}")
    ways += [f"uniform+bridge+{shrink}" for shrink in choices["shrink"] if shrink != "none"]
    ways += [f"uniform+bridge+{transport}" for transport in choices["transport"] if transport in quantised]
    return [f"{way}:{number}" for number in blocks for way in ways]


def read_emulator(name: str) -> list[str]:
    """Return the settings of an emulator from its name, such as ``influence+bridge+svd+int8+distilled-200:12``.

    Raises:
        ConfigError: If a part is not the name of anything.
    """
    compression, _, blocks = name.partition(":")
    keep, _, rest = compression.partition("+")
    gaps, *others = rest.split("+")
    settings = [f"offsite.keep={keep}", f"offsite.gaps={gaps}", f"offsite.emulator-blocks={blocks}"]
    keys = list_keys()
    for word in others:
        if word in keys["offsite.transport"].choices:
            settings.append(f"offsite.transport={word}")
        elif word.startswith("distilled-"):
            settings.append(f"offsite.distillation-steps={word.removeprefix('distilled-')}")
        elif f"svd+{word}" in keys["offsite.shrink"].choices and "offsite.shrink=svd" in settings:
            settings[settings.index("offsite.shrink=svd")] = f"offsite.shrink=svd+{word}"
        else:
            settings.append(f"offsite.shrink={word}")
    return settings


def write_report(reports: Sequence[dict[str, Any]], directory: Path, *, command: str) -> None:
    """Write what is measured: JSON, the table over emulators, each emulator's own table, and the figure."""
    write_results(directory / "model_leak.json", command=command, cells=reports)
    plot_recovery({report["emulator_name"]: report["attacks"] for report in reports}, directory / "leak.png")
    details = "\n\n".join(f"{report['emulator_name']}\n{describe_leak(report)}" for report in reports)
    atomic_write_text(directory / "model_leak.txt", details + "\n")
    tables = (describe_emulators(reports), describe_releases(reports))
    atomic_write_text(directory / "model_leak.md", "\n\n".join(filter(None, tables)) + "\n")


def describe_emulators(reports: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: what each emulator is, and what each attack recovered with its largest budget."""
    head = ["emulator", "exact weights", "lowest CKA", "public loss", "of the full model"]
    rows = [head + [f"{attack} {title}" for attack, title in measures] + ["most at any budget"]]
    for report in reports:
        middle = [entry["cka"] for entry in report["cka"] if entry["role"] in ("emulator", "bridge")]
        rows.append(
            [
                report["emulator_name"],
                f"{report['exact_weights']['fraction']:.0%}",
                f"{min(middle):.3f}" if middle else "",
                f"{report['emulator']['public_loss']:.3f}",
                f"{report['full']['public_loss']:.3f}",
                *(_percent(_last_share(report, attack)) for attack, _ in measures),
                _percent(max(_shares(report), default=None)),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def describe_releases(reports: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of R6: the middle blocks that a client who got two of the emulators holds exactly.

    Emulators that keep the same blocks reveal together what one reveals; without others the text is empty.
    """
    kept: dict[tuple[int, ...], dict[str, Any]] = {}
    for report in reports:
        kept.setdefault(tuple(report["kept_blocks"]), report)
    rows = []
    for (first, one), (second, other) in combinations(kept.items(), 2):
        ends = sum(entry["role"] in ("bottom", "top") for entry in one["cka"])
        middle = len(one["exact_weights"]["by_block"]) - ends
        names = " and ".join(report["emulator_name"] for report in (one, other))
        rows.append(f"| {names} | {len(first)} | {len(second)} | {len({*first, *second})} of {middle} |")
    head = "| R6: two releases | blocks of the first | of the second | middle blocks held exactly |\n|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else ""


def _shares(report: dict[str, Any], attack: str = "R") -> list[float]:
    found = [r["recovered"]["public_loss"] for r in report["attacks"] if r["attack"].startswith(attack)]
    return [share for share in found if share is not None]


def _last_share(report: dict[str, Any], attack: str) -> float | None:
    shares = _shares(report, attack)
    return shares[-1] if shares else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def measure(name: str, settings: Sequence[str], budgets: Sequence[int], directory: Path) -> dict[str, Any]:
    """Return an emulator's report, from its file where it was measured before with the same settings and budgets."""
    from tqdm import tqdm

    config = parse_run_config(parse_settings([*settings, *read_emulator(name)]))
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
