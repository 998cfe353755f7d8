"""The recovery report: means that no single cell rules, and predictors that are told with their sign."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.benchmarks.recovery_report import agreement, mean_table, pooled_recovery, task_table


def cell(task: str, emulator: str, *, seed: int = 0, plug_in: float, full: float, error: float = 0.1) -> dict[str, Any]:
    """Return a cell with a loss before of 4 and the predictors of an emulator with the error ``error``."""
    gain, reached = 4.0 - full, 4.0 - plug_in
    return {
        "task": task,
        "emulator": emulator,
        "federation": "centralised",
        "seed": seed,
        "rows": {
            "full_zero_shot": {"loss": 4.0, "accuracy": 0.5},
            "emulator_fine_tuned": {"loss": plug_in + 1, "accuracy": 0.4},
            "plug_in": {"loss": plug_in, "accuracy": 0.55},
            "full_fine_tuned": {"loss": full, "accuracy": 0.6},
        },
        "recovery": {"loss": reached / gain, "accuracy": 0.5},
        "value_gap": {"loss": 1.0, "accuracy": 0.15},
        "emulator_bytes_fraction": 0.35,
        "client_flops_fraction": 0.5,
        "exact_weight_fraction": 0.6,
        "client_bytes": 2e8,
        "predictors": {
            "gradient_cosine_bottom": 1 - error,
            "gradient_cosine_top": None,
            "middle_error": error,
            "emulator_loss": -error,
        },
    }


def test_recovery_of_the_mean_is_not_the_mean_of_recoveries() -> None:
    cells = [
        cell("large gain", "bridge", plug_in=2.0, full=1.0),
        cell("large gain", "bridge", seed=1, plug_in=2.0, full=1.0),
        cell("no gain to speak of", "bridge", plug_in=5.0, full=3.9),
    ]
    assert cells[2]["recovery"]["loss"] == pytest.approx(-10)
    # Before 4, reached (2 + 5) / 2, best (1 + 3.9) / 2: a task counts once, however many seeds it has.
    assert pooled_recovery(cells, "loss") == pytest.approx((4 - 3.5) / (4 - 2.45))
    assert pooled_recovery(cells, "accuracy") == pytest.approx(0.5)
    (row,) = mean_table(cells)
    assert row["recovery loss"] == "32%"
    assert row["plug-in better than emulator"] == "2 of 2 tasks"
    assert [row["recovery loss"] for row in task_table(cells)] == ["67%", "-1000%"]
    assert pooled_recovery([cell("worse", "bridge", plug_in=2.0, full=4.5)], "loss") is None


def test_running_text_does_not_go_into_the_mean_of_questions() -> None:
    questions = cell("questions", "bridge", plug_in=2.0, full=1.0)
    text = cell("text", "bridge", plug_in=3.9, full=1.0)
    for row in text["rows"].values():
        del row["accuracy"]
    (mixed,), (alone,) = mean_table([questions, text]), mean_table([text])
    assert (mixed["tasks"], mixed["recovery loss"]) == ("questions", "67%")
    assert (alone["tasks"], alone["recovery loss"]) == ("text", "3%")


def test_a_predictor_agrees_where_it_ranks_emulators_as_recovery_does() -> None:
    cells = [
        cell("task", name, plug_in=plug_in, full=1.0, error=error)
        for name, plug_in, error in (("a", 3.0, 0.9), ("b", 2.0, 0.5), ("c", 1.5, 0.1))
    ]
    found = agreement(cells)
    assert found["middle_error"]["loss"] == 1.0  # less error, more recovery
    assert found["gradient_cosine_bottom"]["loss"] == 1.0
    assert found["emulator_loss"]["loss"] == -1.0
    assert found["gradient_cosine_top"]["loss"] is None  # not measured
    assert found["middle_error"]["accuracy"] is None  # recovery does not vary
    assert agreement(cells[:2])["middle_error"] == {"num_sets": 0, "num_emulators": 0, "loss": None, "accuracy": None}
