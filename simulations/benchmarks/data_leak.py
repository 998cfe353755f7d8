"""What an update gives away of a data owner's examples: ``python -m simulations.benchmarks.data_leak``.

A cell is one rehearsal under every attack (see ``ot-federated audit data``) at one level of privacy with one seed: its
own coins, noise and batches. A cell that is done is not run again. Results go to ``simulations/results/data_leak.json``
with a table over the levels: whether the lower bound on epsilon stayed below the claim in every run, membership
inference, canary exposure, and tokens read from an update.

The examples that are attacked, and the model, are those of the settings; ``offsite.public-text`` must be no part of
``data.train``. Without privacy the attacks must succeed, or they prove nothing about the runs with it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text
from ot_federated.commands.audit import plan_training
from ot_federated.config import RunConfig, parse_run_config
from ot_federated.errors import ConfigError, DataError, OtFederatedError
from ot_federated.settings import Scalar
from ot_federated.tasks.base import Example
from simulations.benchmarks.data_leak_report import describe_levels, summarise_levels
from simulations.benchmarks.environment import write_results
from simulations.command_line import parse_settings

no_privacy = "none"
cell_format = 4  # 2: chance is what random spans recover; 3: with the scores, to pool over runs; 4: unrounded
# What the table is made of; curves and the claim's parts are not kept.
kept_fields = (
    "claimed_epsilon",
    "delta",
    "num_examples",
    "num_steps",
    "loss",
    "one_run_audit",
    "membership",
    "scores",
    "exposure",
    "token_recovery",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse what is not rehearsed yet and write the report; return 0, or 1 if a run refuted its claim or failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = build_parser().parse_args(words)
    command = shlex.join(["python", "-m", "simulations.benchmarks.data_leak", *words])
    try:
        settings = parse_settings(parsed.settings)
        plan = parse_levels(parsed.levels, num_seeds=parsed.seeds)
        cells = run_cells(
            settings,
            plan,
            parsed.output_dir / "data_leak_cells",
            num_candidates=parsed.candidates,
            num_examples=parsed.max_examples,
            num_leaked_examples=parsed.leaked_examples,
            canaries=parsed.canaries,
        )
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    levels = summarise_levels(cells)
    table = describe_levels(levels)
    asked = {
        "model": parse_run_config(settings).model.source,
        "candidates": parsed.candidates,
        "max_examples": parsed.max_examples,
        "leaked_examples": parsed.leaked_examples,
        "canaries": parsed.canaries,
    }
    # Scores are many, and pooled in the levels; each run's file keeps its own.
    told = [{name: value for name, value in cell.items() if name != "scores"} for cell in cells]
    write_results(parsed.output_dir / "data_leak.json", command=command, **asked, levels=levels, cells=told)
    atomic_write_text(parsed.output_dir / "data_leak.md", table + "\n")
    sys.stdout.write(table + "\n")
    return int(any(level["num_below_claim"] < level["num_runs"] for level in levels if level["level"] != no_privacy))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.data_leak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run-config keys; privacy.mode is set here")
    parser.add_argument(
        "--levels", default="none,8,3,1", help="claimed epsilons, each with its own :SEEDS if it should have others"
    )
    parser.add_argument("--seeds", type=int, default=20, help="runs of each level (default: 20)")
    parser.add_argument("--candidates", type=int, default=200, help="examples whose membership is a coin's flip")
    parser.add_argument("--max-examples", type=int, default=260, help="examples of data.train; 0: all")
    parser.add_argument("--canaries", choices=("natural", "mislabelled", "random"), default="natural")
    parser.add_argument(
        "--leaked-examples", type=int, default=2, help="examples behind the update that is searched for tokens"
    )
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    return parser


def parse_levels(text: str, *, num_seeds: int) -> list[tuple[str, int]]:
    """Return levels of privacy and how many seeds each has, from ``none:5,8:5,1``.

    Raises:
        ConfigError: If a level is neither ``none`` nor a positive number, or has no seeds.
    """
    plan = []
    for word in text.split(","):
        level, _, seeds = word.strip().partition(":")
        try:
            right = level == no_privacy or float(level) > 0
            number = int(seeds) if seeds else num_seeds
        except ValueError:
            right, number = False, 0
        if not right or number < 1:
            raise ConfigError(f"--levels has {word!r}: write none or an epsilon, and :SEEDS behind it if you like.")
        plan.append((level, number))
    return plan


def run_cells(
    settings: Mapping[str, Scalar],
    plan: Sequence[tuple[str, int]],
    directory: Path,
    *,
    num_candidates: int,
    num_examples: int,
    num_leaked_examples: int,
    canaries: str,
) -> list[dict[str, Any]]:
    """Return every cell's result, from its file where the same was measured before."""
    from tqdm import tqdm

    asked = {
        "format": cell_format,
        "settings": dict(settings),
        "candidates": num_candidates,
        "max_examples": num_examples,
        "leaked_examples": num_leaked_examples,
        "canaries": canaries,
    }
    results, prepared = [], None
    todo = [(level, seed) for level, num_seeds in plan for seed in range(num_seeds)]
    with tqdm(todo, unit="run") as bar:
        for level, seed in bar:
            bar.set_description(f"epsilon {level}, seed {seed}")
            path = directory / f"epsilon-{level}-seed-{seed}.json"
            cell = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if cell.get("asked") != asked:
                prepared = prepared or prepare(settings, num_examples=num_examples)
                report = rehearse(
                    *prepared,
                    settings=settings,
                    level=level,
                    seed=seed,
                    num_candidates=num_candidates,
                    num_leaked_examples=num_leaked_examples,
                    kind=canaries,
                )
                cell = {"asked": asked, "result": {"level": level, "seed": seed, **report}}
                directory.mkdir(parents=True, exist_ok=True)
                atomic_write_text(path, json.dumps(cell, indent=1) + "\n")
            results.append(dict(cell["result"]))
    return results


def prepare(settings: Mapping[str, Scalar], *, num_examples: int) -> tuple[Path, list[Example]]:
    """Return the bundle and the local examples.

    Raises:
        DataError: If there are none.
    """
    from ot_federated.data_owner.fine_tuning import build_bundle_task
    from ot_federated.model_owner.owner import load_parts, make_bundle
    from ot_federated.sources import load_table
    from ot_federated.tasks.losses import continuations

    config = parse_run_config(settings)
    bundle, _ = make_bundle(config, load_parts(config))
    rows = load_table(config.data.train, split="train", columns=list(config.columns.values()))
    if num_examples:
        rows = rows.select(range(min(num_examples, rows.num_rows)))
    examples = continuations(build_bundle_task(config, bundle).encode(rows))
    if not examples:
        raise DataError(f"{config.data.train} has no examples to attack.")
    return bundle, examples


def rehearse(
    bundle: Path,
    examples: Sequence[Example],
    *,
    settings: Mapping[str, Scalar],
    level: str,
    seed: int,
    num_candidates: int,
    num_leaked_examples: int,
    kind: str,
) -> dict[str, Any]:
    """Rehearse one training at a level of privacy, and return what the attacks found."""
    from ot_federated.data_owner.audit import audit_data_owner
    from ot_federated.devices import choose_device
    from ot_federated.tuning import build_tuning

    config = configure(settings, level)
    report = audit_data_owner(
        bundle,
        examples,
        training=plan_training(config, num_examples=len(examples) - num_candidates // 2),
        tuning=build_tuning(config),
        device=choose_device(config.model.device),
        num_candidates=num_candidates,
        canaries=kind,
        num_leaked_examples=num_leaked_examples,
        seed=seed,
    )
    return {name: report[name] for name in kept_fields}


def configure(settings: Mapping[str, Scalar], level: str) -> RunConfig:
    """Return the run's config at a level of privacy."""
    if level == no_privacy:
        return parse_run_config({**settings, "privacy.mode": "none"})
    return parse_run_config({**settings, "privacy.mode": "example", "privacy.target-epsilon": float(level)})


if __name__ == "__main__":
    sys.exit(main())
