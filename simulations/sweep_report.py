"""What a sweep found: table, figures, and privacy_utility.json."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ot_federated.cache import atomic_write_text
from ot_federated.reporting.plots import plot_against_epsilon
from simulations.benchmarks.environment import write_results

json_fields = (
    *("task", "data", "model", "target_epsilon", "epsilon", "delta", "tuning", "partitioner", "num_clients", "seed"),
    *("rows", "gain", "audited_epsilon_lower_bound", "audit", "attacks", "seconds"),
)
# Two-sided 95 % quantiles of Student's t by degrees of freedom: seeds are few.
_t_quantiles = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Result = Mapping[str, Any]
Points = Callable[[Result], tuple[float, Sequence[float] | None]]


def gain_of(rows: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what tuning gained: the plug-in against the full model before, in loss (lower) and accuracy (higher)."""
    before, after = rows["full_zero_shot"], rows["plug_in"]
    accuracy = after["accuracy"] - before["accuracy"] if after.get("accuracy") is not None else None
    return {"loss": before["loss"] - after["loss"], "accuracy": accuracy}


def group_of(result: Result) -> tuple[str, ...]:
    """Return what a cell is besides its privacy and its seed."""
    return (result["data"], result["tuning"], f"{result['num_clients']} clients", result["partitioner"])


def kept_share(result: Result, results: Sequence[Result]) -> float | None:
    """Return the share of the non-private gain in loss, of the same seed if it is there, that a private cell keeps."""
    plain = [other for other in results if other["target_epsilon"] is None and group_of(other) == group_of(result)]
    same = [other for other in plain if other["seed"] == result["seed"]] or plain
    if result["target_epsilon"] is None or not same:
        return None
    return float(result["gain"]["loss"] / mean(other["gain"]["loss"] for other in same))


def interval_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and 95 % interval over seeds (Student's t); of one value, the value alone."""
    centre = mean(values)
    if len(values) < 2:
        return centre, centre, centre
    error = _t_quantiles[min(len(values) - 2, len(_t_quantiles) - 1)] * stdev(values) / len(values) ** 0.5
    return centre, centre - error, centre + error


def table_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return the cells as rows of text by column."""
    rows = []
    order = sorted(results, key=lambda r: (group_of(r), -(r["target_epsilon"] or float("inf")), r["seed"]))
    for result in order:
        plug_in, share = result["rows"]["plug_in"], kept_share(result, results)
        attack = result["attacks"].get("reference")
        bound = result["audited_epsilon_lower_bound"]
        rows.append(
            {
                "cell": ", ".join(group_of(result)),
                "seed": str(result["seed"]),
                "epsilon": "none" if result["target_epsilon"] is None else f"{result['epsilon'] or float('nan'):.2f}",
                "plug-in loss": f"{plug_in['loss']:.3f}",
                "accuracy": "" if plug_in.get("accuracy") is None else f"{plug_in['accuracy']:.1%}",
                "gain in loss": f"{result['gain']['loss']:.3f}",
                "kept": "" if share is None else f"{share:.0%}",
                "audited epsilon at least": "" if bound is None else f"{bound:.2f}",
                "attack AUC": "" if attack is None else f"{attack['auc']:.3f}",
                "TPR at 1 % FPR": "" if attack is None or attack["tpr_at_1%"] is None else f"{attack['tpr_at_1%']:.1%}",
                "seconds": f"{result['seconds']:.0f}",
            }
        )
    return rows


def describe_cells(results: Sequence[Result]) -> str:
    """Return a Markdown table of the cells."""
    return markdown_table(table_rows(results))


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of text by column as a Markdown table."""
    if not rows:
        return "no cell is done"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}

    def line(values: Mapping[str, str]) -> str:
        return "| " + " | ".join(values[name].ljust(width) for name, width in widths.items()) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    return "\n".join([line({name: name for name in widths}), rule, *map(line, rows)])


def write_report(results: Sequence[Result], directory: Path, *, command: str) -> None:
    """Write privacy_utility.json, .md, .csv and the figures."""
    directory.mkdir(parents=True, exist_ok=True)
    cells = [{name: result.get(name) for name in json_fields} for result in results]
    for cell, result in zip(cells, results, strict=True):
        cell["kept_share_of_gain"] = kept_share(result, results)
    write_results(directory / "privacy_utility.json", command=command, cells=cells)
    atomic_write_text(directory / "privacy_utility.md", describe_cells(results) + "\n")
    rows, text = table_rows(results), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(directory / "privacy_utility.csv", text.getvalue())
    draw(results, directory)


def draw(results: Sequence[Result], directory: Path) -> None:
    """Draw utility, audited epsilon and attacks against epsilon."""

    def of_plug_in(measure: str) -> Points:
        return lambda result: (result["rows"]["plug_in"][measure], result["rows"]["plug_in"].get(f"{measure}_interval"))

    losses = series(results, of_plug_in("loss"))
    zero_shot = mean(result["rows"]["full_zero_shot"]["loss"] for result in results)
    panels = [("plug-in loss (nats)", losses, zero_shot, "full model before")]
    if all(result["rows"]["plug_in"].get("accuracy") is not None for result in results):
        before = mean(result["rows"]["full_zero_shot"]["accuracy"] for result in results)
        panels.append(
            ("plug-in accuracy", series(results, of_plug_in("accuracy"), is_share=True), before, "full model before")
        )
    plot_against_epsilon(panels, directory / "utility.png", claim=False)
    audited = [result for result in results if result["audited_epsilon_lower_bound"] is not None]
    if not audited:
        return
    bounds = series(audited, lambda result: (result["audited_epsilon_lower_bound"], None))
    plot_against_epsilon([("audited epsilon, at least", bounds, None, "")], directory / "audit.png", claim=True)

    def of_attack(name: str) -> Points:
        return lambda result: (result["attacks"][name]["auc"], result["attacks"][name].get("auc_interval"))

    areas = {
        name: points
        for attack in audited[0]["attacks"]
        for name, points in series(audited, of_attack(attack), name=attack, is_share=True).items()
    }
    plot_against_epsilon([("membership inference, AUC", areas, 0.5, "chance")], directory / "attacks.png", claim=False)


def series(
    results: Iterable[Result], value: Points, *, name: str = "", is_share: bool = False
) -> dict[str, list[tuple[float | None, float, float, float]]]:
    """Return, for each kind of cell, target epsilon, mean and interval, by rising epsilon and none last.

    Args:
        results: The cells.
        value: Gives a cell's value and, where it has one, its own 95 % interval, which is shown where there is one
            seed; of several seeds the interval is that over seeds.
        name: What is drawn, where it is not the kind of cell alone.
        is_share: Whether the value lies between 0 and 1; an interval over few seeds is cut there.
    """
    groups: dict[tuple[str, ...], dict[float | None, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[group_of(result)][result["target_epsilon"]].append(value(result))
    kinds = list(groups)
    # What all kinds share says nothing in a legend.
    telling = [i for i in range(4) if len({kind[i] for kind in kinds}) > 1]

    def title(kind: tuple[str, ...]) -> str:
        words = [*([name] if name else []), *(kind[i] for i in telling)]
        return ", ".join(words) or kind[1]

    return {
        title(kind): [
            (epsilon, *_point(points[epsilon], is_share=is_share))
            for epsilon in sorted(points, key=lambda e: float("inf") if e is None else e)
        ]
        for kind, points in groups.items()
    }


def _point(found: Sequence[tuple[float, Sequence[float] | None]], *, is_share: bool) -> tuple[float, float, float]:
    if len(found) == 1 and found[0][1] is not None:
        centre, (low, high) = found[0][0], found[0][1]
        return centre, low, high
    centre, low, high = interval_of([centre for centre, _ in found])
    return (centre, max(0.0, low), min(1.0, high)) if is_share else (centre, low, high)
