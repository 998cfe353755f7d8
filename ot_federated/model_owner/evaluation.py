"""The five rows of an Offsite-Tuning experiment, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ot_federated.tasks.base import Row, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

row_names = ("full_zero_shot", "emulator_zero_shot", "emulator_fine_tuned", "plug_in", "full_fine_tuned")


def choose_rows(table: Any, *, max_examples: int, seed: int, contiguous: bool = False) -> list[Row]:
    """Return at most ``max_examples`` rows (0: all), drawn without replacement, in their order.

    They are drawn, not the first ones: many sets are sorted by topic or difficulty. Running text is not to be torn
    apart: there ``contiguous`` takes the first ones.
    """
    if contiguous:
        return list(table.select(range(min(max_examples or table.num_rows, table.num_rows))))
    if max_examples and max_examples < table.num_rows:
        chosen = np.random.default_rng(seed).permutation(table.num_rows)[:max_examples]
        table = table.select(np.sort(chosen))
    return list(table)


def score_with_progress(task: Task, model: PreTrainedModel, rows: Sequence[Row], *, title: str) -> Score:
    """Score a model and show a progress bar meanwhile."""
    with tqdm(total=len(rows), desc=title, unit=" examples", leave=False, mininterval=1.0, disable=None) as bar:
        return task.score(model, rows, on_progress=bar.update)


def recovery(rows: Mapping[str, Score | None]) -> dict[str, float | None] | None:
    """Return which share of full fine-tuning's gain the plug-in reached, by loss and by accuracy.

    recovery = (plug-in - full zero-shot) / (full fine-tuned - full zero-shot). None without full fine-tuning; None
    for a measure in which full fine-tuning gained nothing.
    """
    start, reached, best = (rows.get(name) for name in ("full_zero_shot", "plug_in", "full_fine_tuned"))
    if start is None or reached is None or best is None:
        return None
    shares: dict[str, float | None] = {"loss": share_of_gain(start.loss, reached.loss, best.loss, sign=-1)}
    if start.accuracy is not None and reached.accuracy is not None and best.accuracy is not None:
        shares["accuracy"] = share_of_gain(start.accuracy, reached.accuracy, best.accuracy, sign=1)
    return shares


def share_of_gain(start: float, reached: float, best: float, *, sign: int) -> float | None:
    """Return which share of the gain from ``start`` to ``best`` was reached; None where there is no gain.

    Args:
        start: The measure before.
        reached: What the plug-in has.
        best: What full fine-tuning has.
        sign: 1 where more is better, -1 where less is.
    """
    gain = sign * (best - start)
    return sign * (reached - start) / gain if gain > 0 else None


def format_rows(rows: Mapping[str, Score | None]) -> Iterable[str]:
    """Yield the lines of the table of rows, with 95 % intervals."""
    yield f"{'':<22}{'loss (95 %)':>26}{'accuracy (95 %)':>28}{'normalised':>12}{'n':>6}"
    for name in row_names:
        score = rows.get(name)
        if score is None:
            continue
        loss = f"{score.loss:.3f} ({score.loss_interval[0]:.3f}-{score.loss_interval[1]:.3f})"
        accuracy = normalised = ""
        if score.accuracy is not None and score.accuracy_interval is not None:
            low, high = score.accuracy_interval
            accuracy = f"{score.accuracy:.1%} ({low:.1%}-{high:.1%})"
        elif score.perplexity is not None:
            accuracy = f"perplexity {score.perplexity:.2f}"
        if score.accuracy_normalised is not None:
            normalised = f"{score.accuracy_normalised:.1%}"
        yield f"{name.replace('_', ' '):<22}{loss:>26}{accuracy:>28}{normalised:>12}{score.num_examples:>6}"
