"""Intervals, recovery and the table of rows, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ot_federated.model_owner.evaluation import choose_rows, format_rows, recovery
from ot_federated.tasks.base import Score, mean_interval, wilson_interval


def score(loss: float, accuracy: float | None = None) -> Score:
    interval = None if accuracy is None else (accuracy - 0.1, accuracy + 0.1)
    return Score(
        loss=loss,
        loss_interval=(loss - 1, loss + 1),
        num_examples=100,
        accuracy=accuracy,
        accuracy_interval=interval,
    )


# Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, table I,
# method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(right: int, num: int, low: float, high: float) -> None:
    # The values are printed with four decimals.
    assert wilson_interval(right, num) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_symmetric_and_within_zero_and_one() -> None:
    for num in (1, 7, 300):
        for right in range(num + 1):
            low, high = wilson_interval(right, num)
            # 1e-12 is for the rounding of the last digit at 0 and 1.
            assert -1e-12 <= low <= right / num <= high + 1e-12 <= 1 + 2e-12
            assert wilson_interval(num - right, num) == pytest.approx((1 - high, 1 - low))


def test_mean_interval_by_hand() -> None:
    # Mean 2; the standard deviation of 1 and 3 is sqrt(2), that of their mean 1.
    found = mean_interval(torch.tensor([1.0, 3.0]), torch.ones(2))
    assert found == pytest.approx((2.0, 2.0 - 1.96, 2.0 + 1.96))


def test_mean_interval_weighs_by_tokens() -> None:
    mean, low, high = mean_interval(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]))
    assert mean == pytest.approx(1.5)
    # Ratio estimator: residuals 3 * -0.5 and 1 * 1.5, so sqrt((2.25 + 2.25) * 2 / 1) / 4 = 0.75.
    assert (low, high) == pytest.approx((1.5 - 1.96 * 0.75, 1.5 + 1.96 * 0.75))


def test_mean_of_one_has_no_spread() -> None:
    assert mean_interval(torch.tensor([1.5]), torch.ones(1)) == (1.5, 1.5, 1.5)


def test_recovery_by_hand() -> None:
    # The figures of a real run: 12 of 22 blocks with bridges, SmolLM2-135M on ARC-Easy.
    rows = {
        "full_zero_shot": score(5.73, 0.550),
        "plug_in": score(3.15, 0.623),
        "full_fine_tuned": score(2.61, 0.653),
    }
    found = recovery(rows)
    assert found is not None
    assert found["loss"] == pytest.approx((5.73 - 3.15) / (5.73 - 2.61))
    assert found["accuracy"] == pytest.approx(0.073 / 0.103)


def test_recovery_is_negative_for_a_plug_in_that_got_worse_and_above_one_for_a_better_one() -> None:
    rows = {"full_zero_shot": score(2.0, 0.5), "plug_in": score(2.5, 0.8), "full_fine_tuned": score(1.0, 0.7)}
    assert recovery(rows) == {"loss": pytest.approx(-0.5), "accuracy": pytest.approx(1.5)}


def test_recovery_needs_full_fine_tuning_that_gained() -> None:
    rows = {"full_zero_shot": score(2.0, 0.5), "plug_in": score(1.5, 0.6), "full_fine_tuned": None}
    assert recovery(rows) is None
    assert recovery({}) is None
    assert recovery(rows | {"full_fine_tuned": score(2.0, 0.5)}) == {"loss": None, "accuracy": None}
    assert recovery(rows | {"full_fine_tuned": score(3.0, 0.4)}) == {"loss": None, "accuracy": None}


def test_recovery_of_a_task_without_accuracy() -> None:
    rows = {"full_zero_shot": score(2.0), "plug_in": score(1.5), "full_fine_tuned": score(1.0)}
    found = recovery(rows)
    assert found is not None
    assert found["loss"] == pytest.approx(0.5)
    assert found.get("accuracy") is None


def test_score_as_json_values_leaves_out_what_was_not_measured() -> None:
    measured = Score(loss=1.0, loss_interval=(0.5, 1.5), num_examples=3, perplexity=math.e)
    assert measured.to_dict() == {
        "loss": 1.0,
        "loss_interval": [0.5, 1.5],
        "num_examples": 3,
        "perplexity": math.e,
    }


def test_table_has_a_line_for_each_measured_row() -> None:
    lines = list(format_rows({"plug_in": score(1.25, 0.5), "full_zero_shot": score(2.5, 0.25)}))
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["full", "zero", "shot"]
    assert "2.500 (1.500-3.500)" in lines[1]
    assert "50.0% (40.0%-60.0%)" in lines[2]


class Table:
    """The part of a data set that choosing rows needs."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.num_rows = len(rows)

    def select(self, indices: list[int]) -> Table:
        return Table([self.rows[index] for index in indices])

    def __iter__(self) -> object:
        return iter(self.rows)


def test_rows_are_drawn_without_replacement_in_their_order() -> None:
    chosen = choose_rows(Table(list(range(100))), max_examples=30, seed=1)
    assert len(set(chosen)) == 30
    assert chosen == sorted(chosen)
    assert chosen != list(range(30))
    assert choose_rows(Table(list(range(100))), max_examples=30, seed=1) == chosen
    assert choose_rows(Table(list(range(100))), max_examples=30, seed=2) != chosen


@pytest.mark.parametrize("max_examples", [0, 100, 1000])
def test_all_rows(max_examples: int) -> None:
    assert choose_rows(Table(list(range(100))), max_examples=max_examples, seed=1) == list(range(100))
