"""Privacy-utility sweeps: ``python -m simulations.sweep SWEEP.toml``.

Every cell is a whole federation in a process of its own. A cell that is done is not run again; one that was
interrupted goes on from its last round; one that failed is reported and does not stop the others. Where the sweep asks
for it, some training examples of the first client are in by the flip of a coin, and the final adapter is attacked as
the model owner could.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ot_federated.cache import atomic_write_text, cache_root, file_lock
from ot_federated.config import parse_run_config
from ot_federated.errors import DataError, OtFederatedError
from ot_federated.settings import Scalar
from simulations.command_line import make_sources_absolute, parse_settings
from simulations.ending_signals import ending_signals_interrupt
from simulations.scenario_files import simulation_keys
from simulations.sweep_cells import (
    Cell,
    Sweep,
    cell_file,
    cell_format,
    choose_cells,
    list_cells,
    load_sweep,
    read_cell,
)
from simulations.sweep_report import describe_cells, gain_of, write_report

audit_delta = 1e-5
warning = (
    "WARNING: every private cell of a sweep is a release of its own. On one data set they compose: choose settings on "
    "public or proxy data, and run the choice once on the private data. Composed over this sweep: {}."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep and return the exit status: 0 all cells done, 1 some failed, 2 the request is wrong, 130 stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = build_parser().parse_args(words)
    try:
        changes = make_sources_absolute(parse_settings(parsed.settings), base=Path.cwd())
        sweep = load_sweep(parsed.sweep, changes=changes)
        cells = choose_cells(sweep.cells, [parsed.only])
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    directory: Path = parsed.output_dir or Path("runs") / f"sweep-{parsed.sweep.stem}"
    if parsed.dry_run:
        sys.stdout.write(list_cells(cells, directory))
        return 0
    if parsed.report:
        cells = [cell for cell in cells if read_cell(directory, cell)]
        if not cells:
            sys.stderr.write(f"error: no cell is done in {directory}: run the sweep without --report.\n")
            return 2
    command = shlex.join(["python", "-m", "simulations.sweep", *words])
    try:
        # Whoever ends this process ends the cell's too, as Ctrl-C does.
        with ending_signals_interrupt():
            failed = run_sweep(sweep, cells, directory, engine=parsed.engine, command=command, results=parsed.results)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on\n")
        return 130
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A SWEEP.toml of this project: simulations/sweeps/sst2.toml says what each table means.",
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.toml", help="base settings, axes, overrides, audit")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of the file's [base]")
    parser.add_argument("--output-dir", type=Path, help="the sweep's directory (default: runs/sweep-NAME)")
    parser.add_argument("--results", type=Path, help="also write privacy_utility.json and the figures there")
    parser.add_argument("--engine", choices=("ray", "in-process"), default="in-process", help="what runs a cell")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells with this in their names")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: write the report of the cells that are done"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cells and which are done")
    return parser


def run_sweep(
    sweep: Sweep, cells: Sequence[Cell], directory: Path, *, engine: str, command: str, results: Path | None
) -> list[Cell]:
    """Run what is not done, write the report after every cell, and return the cells that failed."""
    from tqdm import tqdm

    directory.mkdir(parents=True, exist_ok=True)
    failed = []
    targets = [directory] if results is None else [directory, results]
    with tqdm(cells, desc="sweep", unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name[:60])
            # Another sweep may be at work on the same cell.
            with file_lock(directory / cell.name / "lock"):
                is_new = read_cell(directory, cell) is None
                if is_new:
                    try:
                        run_cell(cell, directory / cell.name, num_candidates=sweep.num_candidates, engine=engine)
                    except OtFederatedError as error:
                        failed.append(cell)
                        bar.write(f"FAILED {cell.name}: {error}", file=sys.stderr)
            done = [result for other in cells if (result := read_cell(directory, other))]
            for target in targets if done and (is_new or cell is cells[-1]) else []:
                write_report(done, target, command=command)
    sys.stdout.write(describe_cells(done) + "\n")
    if composed := compose(done):
        sys.stdout.write(warning.format(composed) + "\n")
    sys.stdout.write(f"{len(done)} of {len(cells)} cells done, {len(failed)} failed; report in {targets[-1]}\n")
    return failed


def run_cell(cell: Cell, directory: Path, *, num_candidates: int, engine: str) -> None:
    """Run one federation, attack its adapter, and write the cell's result.

    Raises:
        OtFederatedError: If the run failed; the message says why and where its log is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run = directory / "run"
    settings = make_sources_absolute(cell.settings, base=Path.cwd())
    if num_candidates:
        settings |= write_candidates(settings, directory, num_candidates=num_candidates)
    if not (run / "summary.json").exists():
        simulate(settings, run, engine=engine, log=directory / "log.txt")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    result = describe_cell(cell, settings, summary, run)
    if num_candidates:
        result |= attack(directory, settings, summary)
    atomic_write_text(directory / cell_file, json.dumps(result, indent=1) + "\n")


def simulate(settings: Mapping[str, Scalar], run: Path, *, engine: str, log: Path) -> None:
    """Run a federation in a process of its own, from its last checkpoint if it has one.

    Raises:
        OtFederatedError: If it fails.
    """
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    if any((run / "checkpoints").glob("round-*")):
        words = ["resume=true"]
    elif run.exists():
        # Stopped before its first round was done: there is nothing to go on from, and a new run wants a new directory.
        shutil.rmtree(run)
    command = [sys.executable, "-m", "run_sim", "--engine", engine, "--output", str(run), *words]
    # The checkout first: the sweep runs the code that it stands beside.
    checkout = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        raise OtFederatedError(f"{reason} (the log is {log})")


def write_candidates(settings: Mapping[str, Scalar], directory: Path, *, num_candidates: int) -> dict[str, Scalar]:
    """Write one training file per client, the first without the candidates whose coin says so.

    Candidates are drawn from the first client's shard. Everybody's examples come from ``data.train`` and are divided
    as the run would divide them.

    Returns:
        The settings that make a run use the files.
    """
    from ot_federated.data_owner.local_data import load_local_rows

    train = directory / "train"
    config = parse_run_config({key: value for key, value in settings.items() if key not in simulation_keys})
    num_clients = int(settings.get("num-clients", simulation_keys["num-clients"].default))
    if not (train / "coins.json").exists():
        rng = np.random.default_rng([config.seed, 2305])
        train.mkdir(exist_ok=True)
        for partition in range(num_clients):
            rows = load_local_rows(
                {"partition-id": partition, "num-partitions": num_clients},
                source=config.data.train,
                columns=list(config.columns.values()),
                partitioner=config.data.partitioner,
                partition_column=config.data.partition_column or config.label_column,
                dirichlet_alpha=config.data.dirichlet_alpha,
                max_train_examples=config.data.max_train_examples,
                seed=config.seed,
            ).to_list()
            if partition == 0:
                if len(rows) < 2 * num_candidates:
                    raise DataError(
                        f"The first client has {len(rows)} examples: too few for {num_candidates} candidates, of which "
                        "about half do not train. Lower audit.candidates to at most half of them."
                    )
                order = rng.permutation(len(rows))
                candidates = [rows[index] for index in order[:num_candidates]]
                included = (rng.random(num_candidates) < 0.5).tolist()
                rows = [rows[index] for index in order[num_candidates:]]
                rows += [row for row, is_in in zip(candidates, included, strict=True) if is_in]
                rows = [rows[index] for index in rng.permutation(len(rows))]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write_text(train / f"client-{partition:04d}.jsonl", text)
        atomic_write_text(train / "coins.json", json.dumps({"included": included, "candidates": candidates}))
    return {
        "data.train": str((train / "client-*.jsonl").absolute()),
        "data.partitioner": "files",
        "data.max-train-examples": 0,
    }


def attack(directory: Path, settings: Mapping[str, Scalar], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Attack the final adapter as the model owner could, and return what the attacks found."""
    from ot_federated.attacks.membership import judge_attacks, measure_signals, membership_scores
    from ot_federated.attacks.one_run_audit import audit_with_best
    from ot_federated.data_owner.audit import reset
    from ot_federated.data_owner.fine_tuning import build_bundle_task, load_model_once
    from ot_federated.devices import choose_device
    from ot_federated.model_owner.checkpoints import load_latest_checkpoint
    from ot_federated.tasks.losses import continuations
    from ot_federated.tuning import build_tuning

    config = parse_run_config({key: value for key, value in settings.items() if key not in simulation_keys})
    bundle = find_bundle(str(summary["offsite"]["bundle_digest"]))
    coins = json.loads((directory / "train" / "coins.json").read_text(encoding="utf-8"))
    examples = continuations(build_bundle_task(config, bundle).encode(coins["candidates"]))
    included = np.array(coins["included"], dtype=bool)
    tunable = load_model_once(str(bundle), choose_device(config.model.device), build_tuning(config))
    reset(tunable, tunable.reference)
    before = measure_signals(tunable.model, examples)
    checkpoint = load_latest_checkpoint(directory / "run" / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{directory / 'run'} has no checkpoint to attack: its directory was changed. Remove the cell.")
    reset(tunable, checkpoint.adapter)
    after = measure_signals(tunable.model, examples)
    outsiders = np.flatnonzero(~included)
    population = outsiders[: len(outsiders) // 5]
    attacked = np.setdiff1d(np.arange(len(included)), population)
    scores = membership_scores(after, before, population=population)
    delta = config.privacy.target_delta if config.privacy.mode != "none" else audit_delta
    audit = audit_with_best({name: scores[name] for name in ("loss", "reference")}, included, delta=delta)
    attacked_scores = {name: values[attacked] for name, values in scores.items()}
    return {
        "audited_epsilon_lower_bound": audit["epsilon_lower_bound"],
        "audit": audit,
        "attacks": judge_attacks(attacked_scores, included[attacked]),
    }


def find_bundle(digest: str) -> Path:
    """Return the owner's copy of a bundle.

    Raises:
        DataError: If it is no longer in the cache.
    """
    from ot_federated.bundle import manifest_name
    from ot_federated.cache import file_sha256

    for manifest in sorted((cache_root() / "bundles").glob(f"*/{manifest_name}")):
        if file_sha256(manifest) == digest:
            return manifest.parent
    raise DataError(f"The bundle {digest[:12]} is not in {cache_root() / 'bundles'} any more: run the cell again.")


def describe_cell(cell: Cell, settings: Mapping[str, Scalar], summary: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return what the report says of a finished run, attacks not counted."""
    config = parse_run_config({key: value for key, value in settings.items() if key not in simulation_keys})
    releases = read_releases(run / "ledgers") if cell.private else []
    return {
        "format": cell_format,
        "name": cell.name,
        "point": dict(cell.point),
        "task": config.task.name,
        "data": str(cell.settings.get("data.train", config.data.train)).rpartition("/")[2],
        "model": config.model.source,
        "target_epsilon": config.privacy.target_epsilon if cell.private else None,
        "epsilon": spent(releases, delta=config.privacy.target_delta) if releases else None,
        "delta": config.privacy.target_delta if cell.private else None,
        "tuning": describe_tuning(asdict(config.tuning)),
        "partitioner": str(cell.settings.get("data.partitioner", "iid")),
        "num_clients": int(cell.settings.get("num-clients", simulation_keys["num-clients"].default)),
        "seed": config.seed,
        "rows": summary["rows"],
        "gain": gain_of(summary["rows"]),
        "seconds": summary["seconds"]["total"],
        "releases": releases,
        "audited_epsilon_lower_bound": None,
        "attacks": {},
    }


def describe_tuning(tuning: Mapping[str, Any]) -> str:
    """Return what trained, in a word or two."""
    if tuning["method"] != "lora":
        return f"{tuning['method']} {tuning['placement']}"
    return f"{'ffa-' if tuning['freeze_lora_a'] else ''}lora r={tuning['lora_r']} {tuning['placement']}"


def read_releases(ledgers: Path) -> list[dict[str, float]]:
    """Return what the first client's ledger booked."""
    from ot_federated.data_owner.privacy_ledger import PrivacyLedger, list_ledgers

    found = []
    for name in list_ledgers(ledgers) if ledgers.exists() else []:
        for entry in PrivacyLedger(ledgers / name, dataset_id=name).entries:
            if entry.release.client in ("client-0000", "client-0"):
                found.append(asdict(entry.release.mechanism))
    return found


def spent(releases: Sequence[Mapping[str, Any]], *, delta: float) -> float:
    """Return epsilon of what a ledger booked."""
    from ot_federated.privacy_accounting import Mechanism, epsilon_of

    return epsilon_of([Mechanism(**release) for release in releases], delta=delta)


def compose(results: Sequence[Mapping[str, Any]]) -> str:
    """Return epsilon of all private cells together on the first client's data, or nothing where there is none."""
    private = [result for result in results if result["releases"]]
    if not private:
        return ""
    releases = [release for result in private for release in result["releases"]]
    delta = max(float(result["delta"]) for result in private)
    return f"epsilon {spent(releases, delta=delta):.2f} at delta {delta:g} for {len(private)} private cells"


if __name__ == "__main__":
    sys.exit(main())
