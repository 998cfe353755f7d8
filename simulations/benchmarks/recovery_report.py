"""What the recovery benchmark found: tables, figures, and recovery.json, all named after the plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ot_federated.cache import atomic_write_text
from ot_federated.model_owner.evaluation import share_of_gain
from ot_federated.reporting.plots import Panel, plot_points
from simulations.benchmarks.environment import write_results
from simulations.benchmarks.recovery_predictors import higher_is_better, rank_agreement
from simulations.sweep_report import interval_of, markdown_table

json_fields = (
    *("model", "task", "emulator", "emulator_bytes_fraction", "seed", "rows", "recovery", "value_gap"),
    *("exact_weight_fraction", "client_bytes", "seconds", "federation", "num_clients", "client_flops_fraction"),
    *("client_tokens", "kept_blocks", "compression", "predictors", "candidate", "delivered", "validation_loss"),
)
measures = ("loss", "accuracy")
Result = Mapping[str, Any]


def describe_results(results: Sequence[Result], shared: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables as Markdown: means over seeds, means over tasks, single cells, what was tried, predictors."""
    chosen = [result for result in results if result["chosen"]]
    tables = {
        "Recovery by task: mean over seeds (test questions; settings chosen on validation data)": task_table(chosen),
        "Recovery of the mean over tasks with answers, and seeds": mean_table(chosen),
        "Cells": cell_table(chosen),
        "What was tried, by the loss on validation data": choice_table(results, shared),
        "Rank correlation of cheap predictors with recovery over emulators (higher is better)": predictor_table(chosen),
    }
    return "\n\n".join(f"{title}\n\n{markdown_table(rows)}" for title, rows in tables.items() if rows)


def group(results: Sequence[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    """Return the results by the values of ``names``, in the order in which they first occur."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[tuple(result[name] for name in names)].append(result)
    return dict(groups)


def average(results: Sequence[Result], *path: str) -> float | None:
    """Return the mean of a nested value over the results that have it."""
    values = []
    for result in results:
        value: Any = result
        for name in path:
            value = (value or {}).get(name)
        if value is not None:
            values.append(float(value))
    return mean(values) if values else None


def percent(value: float | None) -> str:
    """Return a share in percent; nothing for None."""
    return "" if value is None else f"{value:.0%}"


def number(value: float | None, form: str) -> str:
    """Return a formatted number; nothing for None."""
    return "" if value is None else format(value, form)


def task_table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return, for each task, emulator and federation, the means over seeds."""
    rows = []
    for (task, emulator, federation), cells in group(results, "task", "emulator", "federation").items():
        row = {
            "task": task,
            "emulator": emulator,
            "run": federation,
            "seeds": str(len(cells)),
            "bytes": percent(average(cells, "emulator_bytes_fraction")),
            "client FLOPs": percent(average(cells, "client_flops_fraction")),
        }
        for name in ("full_zero_shot", "emulator_fine_tuned", "plug_in", "full_fine_tuned"):
            accuracy = average(cells, "rows", name, "accuracy")
            shown = f"{number(average(cells, 'rows', name, 'loss'), '.3f')}"
            row[name.replace("_", " ")] = shown + (f" / {accuracy:.1%}" if accuracy is not None else "")
        row |= shares(cells)
        rows.append(row)
    return rows


def pooled_recovery(cells: Sequence[Result], measure: str) -> float | None:
    """Return the recovery of the mean: of rows that are averaged over the seeds of a task, then over tasks.

    A mean of single recoveries would be ruled by the cell in which full fine-tuning gained least.
    """
    means = []
    for name in ("full_zero_shot", "plug_in", "full_fine_tuned"):
        by_task = [average(part, "rows", name, measure) for part in group(cells, "task").values()]
        known = [value for value in by_task if value is not None]
        if not known:
            return None
        means.append(mean(known))
    return share_of_gain(*means, sign=-1 if measure == "loss" else 1)


def shares(cells: Sequence[Result]) -> dict[str, str]:
    """Return recovery and mean value gap as text by column."""
    return {
        "recovery loss": percent(pooled_recovery(cells, "loss")),
        "recovery accuracy": percent(pooled_recovery(cells, "accuracy")),
        "value gap loss": number(average(cells, "value_gap", "loss"), ".3f"),
        "value gap accuracy": number(average(cells, "value_gap", "accuracy"), ".1%"),
    }


def with_answers(results: Sequence[Result]) -> list[Result]:
    """Return the results of tasks that are answered right or wrong; losses of running text do not go with theirs.

    Where there is no such task, all results are returned.
    """
    return [result for result in results if "accuracy" in result["rows"]["plug_in"]] or list(results)


def mean_table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return the recovery of the mean over tasks with answers; a task counts once however many seeds it has."""
    rows = []
    for (federation, emulator), cells in group(with_answers(results), "federation", "emulator").items():
        tasks = group(cells, "task")
        row = {
            "run": federation,
            "emulator": emulator,
            "tasks": ", ".join(str(task) for (task,) in tasks),
            "bytes": percent(average(cells, "emulator_bytes_fraction")),
            "exact weights": percent(average(cells, "exact_weight_fraction")),
            "client MB": f"{(average(cells, 'client_bytes') or 0) / 1e6:.0f}",
        }
        row |= {f"recovery {measure}": percent(pooled_recovery(cells, measure)) for measure in measures}
        gaps = [(average(part, "value_gap", "loss") or 0.0) > 0 for part in tasks.values()]
        row["plug-in better than emulator"] = f"{sum(gaps)} of {len(gaps)} tasks"
        rows.append(row)
    return rows


def cell_table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return the single cells."""
    return [
        {
            **{name: str(result[name]) for name in ("task", "emulator", "federation", "seed")},
            **shares([result]),
            "settings": " ".join(f"{key}={value}" for key, value in result["candidate"].items()),
            "seconds": f"{result['seconds']:.0f}",
        }
        for result in results
    ]


def choice_table(results: Sequence[Result], shared: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the candidates that competed, of full fine-tuning and of emulators; test data was not looked at."""
    rows = []
    for part in shared:
        for candidate in part["candidates"] if len(part["candidates"]) > 1 else []:
            tried = {key: candidate[key] for key in part["chosen"]}
            rows.append(("full fine-tuning", part, tried, candidate["validation_loss"], tried == part["chosen"]))
    for (emulator, federation, _, _), cells in group(results, "emulator", "federation", "task", "seed").items():
        for cell in cells if len(cells) > 1 else []:
            loss = cell["validation_loss"]
            rows.append((f"{emulator}, {federation}", cell, cell["candidate"], loss, cell["chosen"]))
    return [
        {
            "task": part["task"],
            "what": what,
            "settings": " ".join(f"{key}={value}" for key, value in tried.items()),
            "validation loss": number(loss, ".3f"),
            "chosen": "yes" if is_chosen else "",
        }
        for what, part, tried, loss, is_chosen in rows
    ]


def agreement(results: Sequence[Result]) -> dict[str, dict[str, float | int | None]]:
    """Return, for each predictor, its mean rank correlation with recovery over the emulators of a task and seed.

    The sign is turned where a smaller value should be better, so that 1 is always perfect agreement. Only sets of at
    least three emulators count; ``num_sets`` is how many there are, ``num_emulators`` how many at most in one.
    """
    sets = [cells for cells in group(results, "task", "federation", "seed").values() if len(cells) > 2]
    found: dict[str, dict[str, float | int | None]] = {}
    for name, higher in higher_is_better.items():
        found[name] = {"num_sets": len(sets), "num_emulators": max(map(len, sets), default=0)}
        for measure in measures:
            values = []
            for cells in sets:
                known = [
                    cell
                    for cell in cells
                    if (cell["recovery"] or {}).get(measure) is not None and cell["predictors"][name] is not None
                ]
                sign = 1 if higher else -1
                predicted = [sign * cell["predictors"][name] for cell in known]
                values.append(rank_agreement(predicted, [cell["recovery"][measure] for cell in known]))
            there = [value for value in values if value is not None]
            found[name][measure] = round(mean(there), 3) if there else None
    return found


def predictor_table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return the predictors' agreement as text by column; nothing where there are too few emulators."""
    found = agreement(results)
    if all(values["loss"] is None for values in found.values()):
        return []
    return [
        {
            "predictor": name,
            **{f"recovery {measure}": number(values[measure], ".2f") for measure in measures},
            "task and seed sets": str(values["num_sets"]),
            "emulators": str(values["num_emulators"]),
        }
        for name, values in found.items()
    ]


def write_report(
    results: Sequence[Result], directory: Path, *, name: str, command: str, shared: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``<name>.json``, ``<name>.md`` and the figures ``<name>_bytes.png`` and ``<name>_value_gap.png``."""
    directory.mkdir(parents=True, exist_ok=True)
    chosen = [result for result in results if result["chosen"]]
    tuning = [
        {field: result[field] for field in ("task", "emulator", "federation", "seed", "candidate", "validation_loss")}
        for result in results
        if result["candidate"]
    ]
    write_results(
        directory / f"{name}.json",
        command=command,
        cells=[{field: result[field] for field in json_fields} for result in chosen],
        tuning=tuning,
        full_fine_tuning=[
            {"settings": without_places(part["settings"]), "chosen": part["chosen"], "candidates": part["candidates"]}
            for part in shared
        ],
        predictor_agreement=agreement(chosen),
    )
    atomic_write_text(directory / f"{name}.md", describe_results(results, shared) + "\n")
    draw(chosen, directory, name)


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which files of this machine are known by their names alone."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in settings.items()
    }


def draw(results: Sequence[Result], directory: Path, name: str) -> None:
    """Draw recovery against the emulator's bytes, and the value gap against recovery."""
    known = {m: [r for r in results if (r["recovery"] or {}).get(m) is not None] for m in measures}
    by_bytes = [
        Panel(
            x_label="emulator's bytes, share of the middle's",
            y_label=f"recovery, {measure}",
            points=mean_points(part, measure),
            reference=1.0,
            percent=(True, True),
            from_zero=True,
        )
        for measure, part in known.items()
        if part
    ]
    by_gap = [
        Panel(
            x_label=f"recovery, {measure}",
            y_label=f"value gap, {measure}" + (" (nats)" if measure == "loss" else ""),
            points=gap_points(part, measure),
            reference=0.0,
            percent=(True, measure == "accuracy"),
        )
        for measure, part in known.items()
        if part
    ]
    if by_bytes:
        plot_points(by_bytes, directory / f"{name}_bytes.png")
        plot_points(by_gap, directory / f"{name}_value_gap.png")


Points = dict[str, list[tuple[float, float, float, float]]]


def mean_points(results: Sequence[Result], measure: str) -> Points:
    """Return by emulator and federation its bytes, and the mean and interval over seeds of its tasks' recovery."""
    points = {}
    for (emulator, federation), cells in group(with_answers(results), "emulator", "federation").items():
        by_seed = [pooled_recovery(part, measure) for part in group(cells, "seed").values()]
        if known := [value for value in by_seed if value is not None]:
            size = mean(cell["emulator_bytes_fraction"] for cell in cells)
            # Of two seeds an interval is many times wider than what they differ by, and would be all that is seen.
            shown = interval_of(known) if len(known) > 2 else (mean(known),) * 3
            points[f"{emulator}, {federation}"] = [(size, *shown)]
    return points


def gap_points(results: Sequence[Result], measure: str) -> Points:
    """Return by emulator and federation the recovery and the value gap of every cell."""
    return {
        f"{emulator}, {federation}": [(cell["recovery"][measure], *[cell["value_gap"][measure]] * 3) for cell in cells]
        for (emulator, federation), cells in group(results, "emulator", "federation").items()
    }
