"""Figures of a run. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def plot_rounds(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw the plug-in's loss and accuracy on the owner's validation data, and the clients' loss, by round.

    Args:
        metrics: Lines of ``metrics.jsonl``.
        path: The PNG to write.
        title: The figure's title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    scored = [line for line in metrics if line.get("plug_in")]
    rounds = [line["round"] for line in scored]
    has_accuracy = any("accuracy" in line["plug_in"] for line in scored)
    figure, axes = pyplot.subplots(
        1, 2 if has_accuracy else 1, figsize=(9 if has_accuracy else 6, 3.8), squeeze=False, layout="constrained"
    )
    _draw(axes[0][0], rounds, [line["plug_in"] for line in scored], "loss", "plug-in, validation")
    trained = [line for line in metrics if line.get("train_loss") is not None]
    if trained:  # private clients keep their loss
        axes[0][0].plot(
            [line["round"] for line in trained],
            [line["train_loss"] for line in trained],
            "s--",
            color="tab:grey",
            label="emulated model, while the clients train",
        )
    axes[0][0].set_ylabel("loss per token (nats)")
    if has_accuracy:
        _draw(axes[0][1], rounds, [line["plug_in"] for line in scored], "accuracy", "plug-in, validation")
        axes[0][1].set_ylabel("accuracy")
        axes[0][1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes[0]:
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    # Below the axes, where no curve can run through it.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def plot_memory(traces: Mapping[str, Sequence[Sequence[float]]], path: Path, *, levels: Mapping[str, float]) -> None:
    """Draw the memory of processes over time.

    Args:
        traces: For each process its points: seconds, and resident MB.
        path: The PNG to write.
        levels: What to draw as horizontal lines, in MB, by name.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for name, points in traces.items():
        axis.plot([point[0] for point in points], [point[1] for point in points], label=name)
    for (name, level), style in zip(levels.items(), ("--", ":", "-.", "--"), strict=False):
        axis.axhline(level, color="tab:grey", linestyle=style, label=name)
    axis.set_xlabel("seconds since the process began its work")
    axis.set_ylabel("resident memory (MB)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def _draw(axis: Any, rounds: Sequence[int], scores: Sequence[Mapping[str, Any]], measure: str, label: str) -> None:
    values = [score[measure] for score in scores]
    intervals = [score[f"{measure}_interval"] for score in scores]
    axis.plot(rounds, values, "o-", label=label)
    axis.fill_between(
        rounds, [low for low, _ in intervals], [high for _, high in intervals], alpha=0.15, label="95 % interval"
    )


def plot_roc(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, title: str) -> None:
    """Draw ROC curves on logarithmic axes, where attacks on a few members show.

    Args:
        curves: False and true positive rates by the attack's name.
        path: The PNG to write.
        title: The figure's title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 4.4), layout="constrained")
    for name, (false_positives, true_positives) in curves.items():
        axis.step(false_positives, true_positives, where="post", label=name)
    smallest = 1e-3
    axis.plot([smallest, 1], [smallest, 1], ":", color="tab:grey", label="chance")
    axis.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1))
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    partial.replace(path)


Series = Mapping[str, Sequence[tuple[float | None, float, float, float]]]


def plot_against_epsilon(panels: Sequence[tuple[str, Series, float | None, str]], path: Path, *, claim: bool) -> None:
    """Draw measures against the target epsilon, with their intervals over seeds.

    Args:
        panels: For each panel: the measure's name; by the line's name its points (epsilon, None for no privacy; mean;
            interval); a reference value or None, and its name.
        path: The PNG to write.
        claim: Draw the line on which a bound equals the claim.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.0), squeeze=False, layout="constrained"
    )
    for axis, (measure, lines, reference, reference_name) in zip(axes[0], panels, strict=True):
        ticks = sorted({point[0] for points in lines.values() for point in points}, key=_epsilon_order)
        for index, (name, points) in enumerate(lines.items()):
            # Side by side where lines meet, so that every interval can be seen.
            places = [ticks.index(point[0]) + 0.07 * (index - (len(lines) - 1) / 2) for point in points]
            means = [point[1] for point in points]
            errors = [[m - p[2] for m, p in zip(means, points, strict=True)], [p[3] - p[1] for p in points]]
            drawn = axis.errorbar(places, means, yerr=errors, fmt="o", capsize=3, label=name)
            # No line leads to "none": there is no epsilon to go along.
            private = [i for i, point in enumerate(points) if point[0] is not None]
            axis.plot([places[i] for i in private], [means[i] for i in private], color=drawn[0].get_color())
        if claim:
            claimed = [(place, epsilon) for place, epsilon in enumerate(ticks) if epsilon is not None]
            axis.plot(*zip(*claimed, strict=True), "k--", label="claimed epsilon") if claimed else None
        if reference is not None:
            axis.axhline(reference, linestyle=":", color="tab:grey", label=reference_name)
        axis.set_xticks(range(len(ticks)), ["none" if tick is None else f"{tick:g}" for tick in ticks])
        axis.set(xlabel="target epsilon", ylabel=measure)
        axis.margins(x=0.12)
        if "accuracy" in measure:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(alpha=0.3)
    # Below the axes, where it hides no interval. What panels share is named once.
    named = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def _epsilon_order(epsilon: float | None) -> float:
    return float("inf") if epsilon is None else epsilon


def plot_recovery(attacks: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw what recovery attacks closed of the emulator's distance from the full model, against their budget.

    Args:
        attacks: Results with ``attack``, ``budget`` in tokens and ``recovered``, by the emulator's name.
        path: The PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    columns = min(len(attacks), 4)
    rows = -(-len(attacks) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns + 1, 3.4 * rows + 0.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(attacks) :]:
        axis.set_visible(False)
    for axis, (emulator, results) in zip(axes.flat, attacks.items(), strict=False):
        for name in dict.fromkeys(result["attack"] for result in results):
            of_attack = [r for r in results if r["attack"] == name]
            shares = [r["recovered"]["public_loss"] for r in of_attack]
            # None, where there is nothing to recover, is a gap.
            heights = [float("nan") if share is None else share for share in shares]
            axis.plot([r["budget"] for r in of_attack], heights, "o-", label=name)
        axis.axhline(0, linestyle=":", color="tab:grey")
        axis.set(xlabel="tokens trained on", title=emulator)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("recovered of the loss on public text")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of points.

    Attributes:
        x_label: What is across.
        y_label: What is up.
        points: By the legend's name: x, y and y's interval.
        reference: Height of a dotted line, or None.
        percent: Whether x and y are shares, shown in percent.
        from_zero: Whether the x axis begins at zero.
    """

    x_label: str
    y_label: str
    points: Mapping[str, Sequence[tuple[float, float, float, float]]]
    reference: float | None = None
    percent: tuple[bool, bool] = (False, False)
    from_zero: bool = False


def plot_points(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels of points side by side, with one legend: a name has the same colour and mark in all of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1, 4.8), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for panel in panels for name in panel.points))
    colours, marks = pyplot.get_cmap("tab10"), "osD^vP*X<>"
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, points in panel.points.items():
            number = names.index(name)
            across, up, low, high = (list(values) for values in zip(*points, strict=True))
            errors = [[m - b for m, b in zip(up, low, strict=True)], [t - m for m, t in zip(up, high, strict=True)]]
            handles[name] = axis.errorbar(
                across,
                up,
                yerr=errors if any(map(any, errors)) else None,
                fmt=marks[number // 10 % len(marks)] if number >= 10 else marks[number],
                color=colours(number % 10),
                capsize=3,
                alpha=0.85,
            )
        if panel.reference is not None:
            axis.axhline(panel.reference, linestyle=":", color="tab:grey")
        axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.from_zero:
            # Points that lie close together leave a margin too small for their marks.
            axis.set_xlim(0, 1.05 * axis.dataLim.x1)
        for shown, own_axis in zip(panel.percent, (axis.xaxis, axis.yaxis), strict=True):
            if shown:
                own_axis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)
