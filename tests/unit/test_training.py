"""The training loop on losses whose gradients are known, and the schedule by hand.

What it does to a real model is compared with torch in reference/test_training_reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import nn

from ot_federated import training
from ot_federated.tasks.base import Example
from ot_federated.training import (
    OptimizerSettings,
    StepReport,
    TrainingResult,
    draw_batches,
    plan_round,
    scale_learning_rate,
    train,
)

LossFunction = Callable[[torch.Tensor], torch.Tensor]


class OneWeight(nn.Module):
    """A model of one weight; ``loss`` gives its loss."""

    def __init__(self, value: float, loss: LossFunction, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
        self.loss = loss
        self.device = torch.device("cpu")


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingResult]:
    """Return ``train`` for models of one weight, with plain settings unless others are given."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        return model.loss(model.weight).expand(len(batch)), torch.ones(len(batch))

    monkeypatch.setattr(training, "example_losses", losses)

    def run(
        model: OneWeight,
        *,
        num_steps: int,
        learning_rate: float,
        lr_schedule: str = "constant",
        warmup_fraction: float = 0.0,
        weight_decay: float = 0.0,
        proximal_mu: float = 0.0,
        **settings: Any,
    ) -> TrainingResult:
        plain = {"batches": iter(repeat([0], num_steps)), "total_steps": num_steps, "max_grad_norm": 0.0}
        optimizer = OptimizerSettings(
            learning_rate=learning_rate,
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            weight_decay=weight_decay,
            proximal_mu=proximal_mu,
        )
        return train(
            model,  # type: ignore[arg-type]
            {"w": model.weight},
            [Example((1, 2, 3), 1)],
            num_steps=num_steps,
            optimizer=optimizer,
            **(plain | settings),
        )

    return run


def adamw_by_hand(
    start: float,
    gradient: Callable[[float], float],
    rates: Sequence[float],
    *,
    weight_decay: float = 0.0,
) -> float:
    """Return the weight after AdamW (Loshchilov, Hutter 2019) with torch's defaults, in plain arithmetic."""
    weight, m, v = start, 0.0, 0.0
    for step, rate in enumerate(rates, start=1):
        g = gradient(weight)
        weight *= 1 - rate * weight_decay
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight -= rate * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return weight


def test_bfloat16_weights_collect_updates_too_small_for_them(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(1.0, lambda w: w.sum(), dtype=torch.bfloat16)
    # A constant gradient moves AdamW by the learning rate, 1e-4: bfloat16's step below 1.0 is 2^-8 = 0.0039, so
    # each update alone rounds to nothing, and together they make 0.01.
    result = fit(model, num_steps=100, learning_rate=1e-4)
    assert result.weights["w"].dtype == torch.float32
    assert result.weights["w"].item() == pytest.approx(0.99, abs=1e-5)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 0.98828125  # 0.99 in bfloat16
    assert torch.tensor(1.0).bfloat16() - 1e-4 == 1.0  # what would have become of it without the fp32 copy


def test_master_weights_start_where_they_are_told(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(5.0, lambda w: (w * w).sum(), dtype=torch.bfloat16)
    start = {"w": torch.tensor([1.001953125])}  # not a bfloat16 number
    assert torch.equal(fit(model, num_steps=0, learning_rate=1.0, start=start).weights["w"], start["w"])
    assert model.weight.item() == 1.0
    start["w"].zero_()
    assert model.weight.item() == 1.0  # no memory is shared


def test_adamw_with_decay_and_schedule_by_hand(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(2.0, lambda w: ((w - 0.5) ** 2).sum())
    # Six steps, of which a third warms up: factors 1/3, 2/3, then 1 - 0/4, 1 - 1/4, 1 - 2/4, 1 - 3/4.
    rates = [0.1 * factor for factor in (1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25)]
    result = fit(model, num_steps=6, learning_rate=0.1, lr_schedule="linear", warmup_fraction=1 / 3, weight_decay=0.2)
    expected = adamw_by_hand(2.0, lambda w: 2 * (w - 0.5), rates, weight_decay=0.2)
    assert result.weights["w"].item() == pytest.approx(expected, rel=1e-6)  # fp32 against fp64


def test_schedule_goes_on_at_the_first_step(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(0.0, lambda w: w.sum())
    result = fit(
        model, num_steps=2, learning_rate=0.1, lr_schedule="linear", first_step=2, total_steps=4, warmup_fraction=0.0
    )
    # Steps 2 and 3 of 4: factors 1/2 and 1/4; a constant gradient moves AdamW by the rate.
    assert result.weights["w"].item() == pytest.approx(-0.1 * (0.5 + 0.25), rel=1e-5)


def test_proximal_term_by_hand(fit: Callable[..., TrainingResult]) -> None:
    mu, anchor = 3.0, 2.0
    model = OneWeight(anchor, lambda w: ((w - 0.5) ** 2).sum())
    result = fit(model, num_steps=5, learning_rate=0.1, proximal_mu=mu)
    expected = adamw_by_hand(anchor, lambda w: 2 * (w - 0.5) + mu * (w - anchor), [0.1] * 5)
    assert result.weights["w"].item() == pytest.approx(expected, rel=1e-6)
    without = adamw_by_hand(anchor, lambda w: 2 * (w - 0.5), [0.1] * 5)
    assert abs(expected - without) > 1e-3  # else the test shows nothing


def test_proximal_term_pulls_to_what_the_server_sent(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(9.0, lambda w: ((w - 0.5) ** 2).sum())
    result = fit(model, num_steps=5, learning_rate=0.1, proximal_mu=3.0, start={"w": torch.tensor([2.0])})
    expected = adamw_by_hand(2.0, lambda w: 2 * (w - 0.5) + 3.0 * (w - 2.0), [0.1] * 5)
    assert result.weights["w"].item() == pytest.approx(expected, rel=1e-6)


def test_gradient_is_clipped_to_the_norm(fit: Callable[..., TrainingResult]) -> None:
    # A gradient that changes sign and size: AdamW forgets a constant factor, so clipping shows only here.
    model = OneWeight(2.0, lambda w: (w**4).sum())
    result = fit(model, num_steps=8, learning_rate=0.4, max_grad_norm=1.5)

    def clipped(w: float) -> float:
        g = 4 * w**3
        return g * min(1.0, 1.5 / (abs(g) + 1e-6))  # torch adds 1e-6 to the norm

    expected = adamw_by_hand(2.0, clipped, [0.4] * 8)
    assert result.weights["w"].item() == pytest.approx(expected, rel=1e-5)
    assert abs(adamw_by_hand(2.0, lambda w: 4 * w**3, [0.4] * 8) - expected) > 1e-3


def test_result_and_reports_count_steps_tokens_and_losses(fit: Callable[..., TrainingResult]) -> None:
    reports: list[StepReport] = []
    model = OneWeight(1.0, lambda w: w.sum())
    batches = iter([[0, 0], [0]])
    result = fit(model, num_steps=2, learning_rate=0.5, batches=batches, on_step=reports.append)
    assert (result.num_steps, result.num_tokens) == (2, 9)  # three examples of three tokens
    assert [(report.step, report.num_steps) for report in reports] == [(1, 2), (2, 2)]
    assert [report.loss for report in reports] == pytest.approx([1.0, 0.5], rel=1e-6)
    assert result.loss == pytest.approx(0.75, rel=1e-6)


def test_afterwards_nothing_is_trainable(fit: Callable[..., TrainingResult]) -> None:
    model = OneWeight(1.0, lambda w: w.sum())
    fit(model, num_steps=1, learning_rate=0.5)
    assert not model.training
    assert not model.weight.requires_grad
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", [1 / 3, 2 / 3] + [1.0] * 8),
        ("cosine", [1 / 3, 2 / 3] + [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8)]),
    ],
)
def test_learning_rate_by_hand(schedule: str, factors: list[float]) -> None:
    found = [scale_learning_rate(step, num_steps=10, schedule=schedule, warmup_fraction=0.2) for step in range(10)]
    assert found == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_learning_rate_is_never_zero_nor_above_its_peak(schedule: str, warmup_fraction: float, num_steps: int) -> None:
    for step in range(num_steps):
        factor = scale_learning_rate(step, num_steps=num_steps, schedule=schedule, warmup_fraction=warmup_fraction)
        assert 0 < factor <= 1


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "local_epochs", "max_steps", "num_steps"),
    [(10, 4, 1, 0, 3), (10, 4, 2, 0, 6), (10, 4, 2, 5, 5), (10, 4, 1, 100, 3), (1, 16, 3, 0, 3), (16, 16, 1, 0, 1)],
)
def test_steps_of_a_round(
    num_examples: int, batch_size: int, local_epochs: int, max_steps: int, num_steps: int
) -> None:
    planned = plan_round(
        num_examples=num_examples, batch_size=batch_size, local_epochs=local_epochs, max_steps=max_steps
    )
    assert planned == num_steps


def draw(num: int, *, batch_size: int = 4, first: int = 0, steps: int, seed: Sequence[int] = (1, 2)) -> list[list[int]]:
    lengths = [5 + (7 * index) % 13 for index in range(num)]
    batches: Iterator[list[int]] = draw_batches(
        lengths, batch_size=batch_size, first_step=first, num_steps=steps, seed=seed
    )
    return list(batches)


@pytest.mark.parametrize("num", [1, 3, 4, 5, 99, 257])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_each_pass_visits_every_example_once(num: int, batch_size: int) -> None:
    per_pass = math.ceil(num / batch_size)
    batches = draw(num, batch_size=batch_size, steps=3 * per_pass)
    for start in range(0, 3 * per_pass, per_pass):
        visited = [index for batch in batches[start : start + per_pass] for index in batch]
        assert sorted(visited) == list(range(num))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_a_walk_in_parts_is_the_walk_in_one() -> None:
    whole = draw(37, steps=30)
    parts = draw(37, steps=7) + draw(37, first=7, steps=4) + draw(37, first=11, steps=19)
    assert parts == whole


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    batches = draw(64, steps=32)
    assert batches[:16] != batches[16:]
    assert draw(64, steps=16) == batches[:16]
    assert draw(64, steps=16, seed=(1, 3)) != batches[:16]
    assert [index for batch in batches[:16] for index in batch] != list(range(64))


def test_similar_lengths_share_a_batch() -> None:
    lengths = [5 + (7 * index) % 13 for index in range(256)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in draw(256, steps=64)]
    # At random, four of thirteen lengths span 7 on average.
    assert sum(spread) / len(spread) < 3
