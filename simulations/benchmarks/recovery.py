"""How much of full fine-tuning each emulator recovers: ``python -m simulations.benchmarks.recovery [BENCHMARK.toml]``.

Every cell is a whole run in a process of its own: one client with all data (centralised), or a federation. A cell that
is done is not run again, one that was interrupted goes on from its last round, one that failed is reported and does
not stop the others. What the cells of a task and seed share, the full model before and after fine-tuning, is measured
once. Where an emulator has candidates (learning rates, say), they compete at the first task and seed by the plug-in's
loss on validation data; test data decides nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ot_federated.cache import atomic_write_text, file_lock
from ot_federated.config import parse_run_config
from ot_federated.errors import OtFederatedError
from ot_federated.model_owner.evaluation import recovery
from ot_federated.model_owner.owner import prepare
from ot_federated.reporting.run_directory import RunDirectory
from ot_federated.settings import Scalar
from ot_federated.tasks.base import Score
from simulations.benchmarks.recovery_plan import Plan, candidate_of, group_of, is_first, load_plan
from simulations.benchmarks.recovery_predictors import measure_predictors, training_flops_fraction
from simulations.benchmarks.recovery_report import describe_results, write_report
from simulations.benchmarks.recovery_rows import cut_set, shared_rows
from simulations.command_line import make_sources_absolute
from simulations.ending_signals import ending_signals_interrupt
from simulations.scenario_files import simulation_keys
from simulations.sweep import simulate
from simulations.sweep_cells import Cell, cell_file, cell_format, choose_cells, list_cells, read_cell

default_plan = Path(__file__).with_name("recovery.toml")
default_results = Path(__file__).parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 0 all done, 1 some cells failed, 2 the request is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = build_parser().parse_args(words)
    try:
        plan = load_plan(parsed.plan, seeds=parsed.seeds)
        cells = choose_cells(plan.cells, parsed.only)
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    directory: Path = parsed.output_dir or Path("runs") / f"benchmark-{parsed.plan.stem}"
    if parsed.dry_run:
        sys.stdout.write(list_cells(cells, directory))
        return 0
    # What was made is said by the plan and its seeds, not by where it was put or in how many goes.
    command = shlex.join(["python", "-m", "simulations.benchmarks.recovery", *describe_plan(parsed)])
    if parsed.report:
        cells = []
    try:
        # Whoever ends this process ends the cell's too, as Ctrl-C does.
        with ending_signals_interrupt():
            failed = run_benchmark(plan, cells, directory, command=command, results=parsed.results)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on\n")
        return 130
    return 1 if failed else 0


def describe_plan(parsed: argparse.Namespace) -> list[str]:
    """Return the words of the command that say what is measured."""
    words = [] if parsed.plan == default_plan else [str(parsed.plan)]
    return [*words, *(["--seeds", ",".join(map(str, parsed.seeds))] if parsed.seeds else [])]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="simulations/benchmarks/recovery_plan.py says what a BENCHMARK.toml holds.",
    )
    parser.add_argument("plan", nargs="?", type=Path, default=default_plan, metavar="BENCHMARK.toml")
    parser.add_argument("--output-dir", type=Path, help="the benchmark's directory (default: runs/benchmark-NAME)")
    parser.add_argument(
        "--results", type=Path, default=default_results, help="where NAME.json, NAME.md and the figures go"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cells with this in their names; given again: with all of them",
    )
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="0,1,2", help="these seeds, not the file's")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: write the report of the cells that are done"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cells and which are done")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def run_benchmark(
    plan: Plan, cells: Sequence[Cell], directory: Path, *, command: str, results: Path | None
) -> list[Cell]:
    """Run what is not done, write the report after every cell, and return the cells that failed."""
    from tqdm import tqdm

    directory.mkdir(parents=True, exist_ok=True)
    failed: list[Cell] = []
    num_waiting = 0
    with tqdm(cells, desc="recovery", unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name[:70])
            if read_cell(directory, cell) is not None:
                continue
            if not is_wanted(cell, plan.cells, directory):
                num_waiting += best_candidate(cell, plan.cells, directory) is None
                continue
            # Another process may be at work on the same cell.
            with file_lock(directory / cell.name / "lock"):
                if read_cell(directory, cell) is None:
                    try:
                        run_cell(cell, plan, directory)
                    except OtFederatedError as error:
                        failed.append(cell)
                        bar.write(f"FAILED {cell.name}: {error}", file=sys.stderr)
            report(plan, directory, command=command, results=results)
    done = report(plan, directory, command=command, results=results)
    sys.stdout.write(describe_results(done, read_shared(directory)) + "\n")
    waiting = f", {num_waiting} wait until settings are chosen at their first task and seed" if num_waiting else ""
    sys.stdout.write(f"{len(done)} cells done, {len(failed)} failed{waiting}; report in {results or directory}\n")
    return failed


def report(plan: Plan, directory: Path, *, command: str, results: Path | None) -> list[dict[str, Any]]:
    """Write the report of what is done, if anything is, and return it."""
    if done := finished(plan.cells, directory):
        write_report(done, results or directory, name=plan.name, command=command, shared=read_shared(directory))
    return done


def best_candidate(cell: Cell, cells: Sequence[Cell], directory: Path) -> dict[str, Scalar] | None:
    """Return the settings that were best on validation data where a cell's group chooses, so far; None: not known."""
    if not candidate_of(cell):
        return {}
    rivals = [c for c in cells if group_of(c) == group_of(cell) and is_first(c, cells)]
    found = [(result["validation_loss"], candidate_of(c)) for c in rivals if (result := read_cell(directory, c))]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def is_wanted(cell: Cell, cells: Sequence[Cell], directory: Path) -> bool:
    """Say whether a cell is to be run: all where settings are chosen, and elsewhere those with the chosen ones."""
    return is_first(cell, cells) or candidate_of(cell) == best_candidate(cell, cells, directory)


def finished(cells: Sequence[Cell], directory: Path) -> list[dict[str, Any]]:
    """Return the results there are, each with ``chosen``: whether its settings are those that were chosen."""
    found = []
    for cell in cells:
        if result := read_cell(directory, cell):
            found.append({**result, "chosen": candidate_of(cell) == best_candidate(cell, cells, directory)})
    return found


def read_shared(directory: Path) -> list[dict[str, Any]]:
    """Return what is known of full fine-tuning, with each one's task."""
    return [
        {"task": path.name.partition("_seed=")[0], **json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted((directory / "full").glob("*.json"))
    ]


def run_cell(cell: Cell, plan: Plan, directory: Path) -> None:
    """Run one cell and write its result; what is large is removed then.

    Raises:
        OtFederatedError: If the run failed; the message says why and where its log is.
    """
    task = str(cell.point["task"])
    place = directory / cell.name
    run = place / "run"
    place.mkdir(parents=True, exist_ok=True)
    settings = dict(cell.settings)
    if task in plan.cuts:
        files = cut_set(plan.cuts[task], directory / "data" / task)
        settings = {key: files.get(str(value), value) for key, value in settings.items()}
    settings = make_sources_absolute(settings, base=Path.cwd())
    if not (run / "summary.json").exists():
        simulate(settings, run, engine="in-process", log=place / "log.txt")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = parse_run_config({key: value for key, value in settings.items() if key not in simulation_keys})
    owner = prepare(config, RunDirectory(run))
    run_config = {key: value for key, value in settings.items() if key not in simulation_keys}
    shared = shared_rows(
        owner,
        run_config,
        plan.full[task],
        task=task,
        first_seed=int(next(c.point["seed"] for c in plan.cells if c.point["task"] == task)),
        zero_shot=summary["rows"]["full_zero_shot"],
        directory=directory / "full",
    )
    result = {
        **describe_cell(cell, summary, shared, RunDirectory(run).read_metrics()),
        "predictors": measure_predictors(owner),
        "client_flops_fraction": training_flops_fraction(owner),
    }
    atomic_write_text(place / cell_file, json.dumps(result, indent=1) + "\n")
    for name in ("model", "adapter", "checkpoints", "best-round"):
        shutil.rmtree(run / name, ignore_errors=True)


def describe_cell(
    cell: Cell,
    summary: Mapping[str, Any],
    shared: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a finished cell's result, but for what is measured on its bundle."""
    rows = {**summary["rows"], **shared["rows"]}
    scores = {name: read_score(row) for name, row in rows.items()}
    plug_in, tuned = rows["plug_in"], rows["emulator_fine_tuned"]
    sizes, offsite = summary["bytes"], summary["offsite"]
    num_rounds = summary["federation"]["num_rounds"]
    # As models are published, whatever type this machine computes in: fp32 would halve every emulator's share.
    middle_bytes = offsite["middle_bytes"] * 2 / getattr(torch, summary["dtype"]).itemsize
    return {
        "format": cell_format,
        "model": summary["model"]["source"],
        **{axis: cell.point[axis] for axis in ("task", "emulator", "federation", "seed")},
        "num_clients": int(cell.settings.get("num-clients", simulation_keys["num-clients"].default)),
        "emulator_bytes_fraction": offsite["emulator_bytes"] / middle_bytes,
        "rows": rows,
        "recovery": recovery(scores),
        "value_gap": {
            "loss": tuned["loss"] - plug_in["loss"],
            "accuracy": plug_in["accuracy"] - tuned["accuracy"] if "accuracy" in plug_in else None,
        },
        "exact_weight_fraction": offsite["exact_weight_fraction"],
        "client_bytes": sizes["bundle_per_client"]
        + sizes["realignment_per_client"]
        + 2 * num_rounds * sizes["update_per_client_round"],
        "client_tokens": sum(line.get("num_tokens", 0) for line in metrics),
        "seconds": summary["seconds"]["total"],
        "kept_blocks": offsite["kept_blocks"],
        "compression": offsite["compression"],
        "candidate": candidate_of(cell),
        "delivered": summary["delivered"],
        "validation_loss": read_validation_loss(summary["delivered"], metrics),
        "settings": dict(cell.settings),
    }


def read_validation_loss(delivered: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return the loss on validation data of what was delivered: of its round, and of its alpha where one was chosen."""
    of_round = next(line["plug_in"]["loss"] for line in metrics if line.get("round") == delivered["round"])
    return float(delivered["validation_losses"].get(f"{delivered['alpha']:g}", of_round))


def read_score(row: Mapping[str, Any]) -> Score:
    """Return a row of a summary as a score again."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Score(**fields)


if __name__ == "__main__":
    sys.exit(main())
