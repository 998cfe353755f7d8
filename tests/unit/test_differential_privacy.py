"""One private step, piece by piece, on losses whose gradients are known; each test names the mistake it catches.

Statistical tests draw from a fixed test seed; the rates say how often another seed would fail them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ot_federated.data_owner import differential_privacy, per_example_gradients
from ot_federated.data_owner.differential_privacy import PrivacyError, train_privately
from ot_federated.data_owner.per_example_gradients import engine_names
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from ot_federated.training import MasterWeights, OptimizerSettings, StepReport, TrainingResult
from tests.families import build_family_model

Fit = Callable[..., TrainingResult]


class Slopes(nn.Module):
    """A model whose gradient is known: example (a, b, ...) has the loss ``a * (w_0 + w_1 + ...)``."""

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_weights))
        self.device = torch.device("cpu")


def repeatable(seed: bytes = b"tests") -> SecureRandom:
    with pytest.warns(UserWarning, match="test_seed"):
        return SecureRandom(test_seed=seed)


def build_examples(slopes: Sequence[int]) -> list[Example]:
    return [Example((slope, index), 1) for index, slope in enumerate(slopes)]


optimizer = OptimizerSettings(learning_rate=0.01, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.0)
settings: dict[str, Any] = {
    "num_steps": 1,
    "sample_rate": 0.5,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "engine": "loop",
    "micro_batch_size": 4,
    "optimizer": optimizer,
    "total_steps": 1,
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the loss by that of ``Slopes``; collect the index of every example that reaches the model."""
    indices: list[int] = []

    def losses(model: Slopes, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        indices.extend(example.input_ids[1] for example in batch)
        slopes = torch.tensor([float(example.input_ids[0]) for example in batch])
        return slopes * model.weight.sum(), torch.ones(len(batch))

    monkeypatch.setattr(per_example_gradients, "example_losses", losses)
    return indices


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collect the gradient of every step, as one vector."""
    collected: list[torch.Tensor] = []
    plain = MasterWeights.step

    def step(self: MasterWeights, gradients: Sequence[torch.Tensor], *, rate_factor: float) -> None:
        collected.append(torch.cat([gradient.flatten() for gradient in gradients]))
        plain(self, gradients, rate_factor=rate_factor)

    monkeypatch.setattr(MasterWeights, "step", step)
    return collected


def fit(examples: Sequence[Example], *, num_weights: int = 1, random: SecureRandom, **others: Any) -> TrainingResult:
    model: Any = Slopes(num_weights)
    return train_privately(model, {"w": model.weight}, examples, random=random, **(settings | others))


def test_step_by_hand(seen: list[int], steps: list[torch.Tensor]) -> None:
    """q = 1, no noise, C = 3: slopes 1, -2, 5 are clipped to 1, -2, 3; the step is their sum over q N = 3."""
    fit(build_examples([1, -2, 5]), random=repeatable(), sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=3.0)
    torch.testing.assert_close(steps, [torch.tensor([2 / 3])])
    assert sorted(seen) == [0, 1, 2]


def test_divisor_is_the_expected_batch_size(
    seen: list[int], steps: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches dividing by the realised batch size: forced batches of 0, 1 and 40 of q N = 8, the same noise."""
    examples = build_examples([1] * 80)
    for size in (0, 1, 40):
        monkeypatch.setattr(SecureRandom, "sample_indices", lambda self, num, size=size, **_: list(range(size)))
        fit(examples, random=repeatable(), sample_rate=0.1, noise_multiplier=0.5)
    noise = float(steps[0])
    assert noise != 0
    torch.testing.assert_close(torch.stack(steps).flatten(), noise + torch.tensor([0.0, 1.0, 40.0]) / 8)


def test_batches_are_poisson_samples(seen: list[int]) -> None:
    """Catches fixed and shuffled batches: inclusion counts are Bin(T, q), batch sizes Bin(N, q).

    Chi-squared on 20 counts and on 600 sizes, both tails; false alarms: 4e-4.
    """
    num_examples, num_steps, sample_rate = 20, 600, 0.2
    sizes: list[int] = []
    fit(
        build_examples([1] * num_examples),
        random=repeatable(),
        num_steps=num_steps,
        total_steps=num_steps,
        sample_rate=sample_rate,
        on_step=lambda report: sizes.append(len(seen) - sum(sizes)),
    )
    counts = Counter(seen)
    variance = sample_rate * (1 - sample_rate)
    for values, num_trials in (([counts[i] for i in range(num_examples)], num_steps), (sizes, num_examples)):
        statistic = sum((value - num_trials * sample_rate) ** 2 for value in values) / (num_trials * variance)
        assert min(stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values))) > 1e-4
    assert min(sizes) == 0
    assert max(sizes) > 7


def test_empty_batch_is_a_step_of_noise(seen: list[int], steps: list[torch.Tensor]) -> None:
    """Catches empty batches that are skipped: N = 5, q = 0.05, 77 % of 200 batches are empty, every step moves."""
    weights: list[float] = []
    model: Any = Slopes(1)
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        weights.append(float(model.weight.detach()))

    result = train_privately(
        model,
        {"w": model.weight},
        build_examples([1] * 5),
        random=repeatable(),
        on_step=on_step,
        **(settings | {"num_steps": 200, "total_steps": 200, "sample_rate": 0.05}),
    )
    assert len(seen) < 100
    assert result.num_steps == len(reports) == len(steps) == 200
    assert all(float(gradient) != 0 for gradient in steps)
    assert len({0.0, *weights}) == 201


def test_losses_and_counts_are_withheld(seen: list[int]) -> None:
    """Catches more than the noised update in what leaves the loop."""
    reports: list[StepReport] = []
    result = fit(build_examples([1] * 5), random=repeatable(), num_steps=3, total_steps=3, on_step=reports.append)
    assert math.isnan(result.loss)
    assert result.num_tokens == 0
    assert [(report.step, report.num_steps) for report in reports] == [(1, 3), (2, 3), (3, 3)]
    assert all(math.isnan(report.loss) for report in reports)


def test_noise_does_not_come_from_a_seed(seen: list[int]) -> None:
    """Catches a shared or configured seed: with every generator seeded alike, noise differs, and so do batches."""
    examples = build_examples([1] * 64)

    def repeat(**settings: Any) -> tuple[torch.Tensor, list[int]]:
        seen.clear()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        result = fit(examples, num_weights=50, random=SecureRandom(), num_steps=2, total_steps=2, **settings)
        return result.weights["w"], list(seen)

    # All examples are in every batch: what differs is noise. AdamW's first steps have nearly one size, so weights may
    # agree; all 50 do so with chance 2^-50.
    assert not torch.equal(repeat(sample_rate=1.0)[0], repeat(sample_rate=1.0)[0])
    assert repeat()[1] != repeat()[1]


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [(engine, torch.float32) for engine in engine_names] + [("loop", torch.bfloat16)],
)
def test_noise_has_the_accounted_size(
    engine: str, clipping: str, dtype: torch.dtype, steps: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a wrong sigma or C in one mode, and noise added for every micro-batch: zero gradients, sigma C = 1.5.

    The standard deviation of 15 488 normals is within 2 % (false alarms: 5e-4), the mean within 3.9 of its errors.
    """

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        return 0 * values, counts

    monkeypatch.setattr(per_example_gradients, "example_losses", losses)
    model = build_family_model("llama", dtype=dtype)
    parameters = {name: p for name, p in model.named_parameters() if ".0." in name or ".7." in name}
    examples = [Example((5, 6, 7, 8), 2)] * 6
    train_privately(
        model,
        parameters,
        examples,
        random=repeatable(),
        **(
            settings
            | {"sample_rate": 1.0, "noise_multiplier": 3.0, "max_grad_norm": 0.5, "micro_batch_size": 2}
            | {"engine": engine, "clipping": clipping}
        ),
    )
    noise = steps[0].double() * 6
    assert noise.numel() == 15_488
    assert abs(float(noise.std()) / 1.5 - 1) < 0.02
    assert abs(float(noise.mean())) < 3.9 * 1.5 / math.sqrt(noise.numel())
    assert len(set(noise.tolist())) > 0.99 * noise.numel()


def test_proximal_gradient_is_added_after_the_noise(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a proximal term that is dropped, clipped, or divided by the batch: AdamW sees mu (w - w_start)."""
    gradients: list[torch.Tensor] = []
    plain = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        gradients.append(self.param_groups[0]["params"][0].grad.clone())
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for mu in (0.0, 1000.0):
        # No example moves anything: what is left is noise, and the pull towards the start.
        fit(
            build_examples([0] * 4),
            num_weights=3,
            random=repeatable(),
            noise_multiplier=100.0,
            num_steps=2,
            total_steps=2,
            optimizer=replace(optimizer, proximal_mu=mu),
        )
    # sigma C / (q N) = 50, where a clip of the noisy sum would leave 1.
    assert float(gradients[0].norm()) > 20
    torch.testing.assert_close(gradients[2], gradients[0])
    # The first step moved each weight by the learning rate, against its gradient, but for AdamW's epsilon.
    expected = -1000.0 * 0.01 * gradients[0].sign()
    torch.testing.assert_close(gradients[3] - gradients[1], expected, rtol=1e-4, atol=0)


def test_schedule_continues_at_the_first_step(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    plain = MasterWeights.step

    def step(self: MasterWeights, gradients: Sequence[torch.Tensor], *, rate_factor: float) -> None:
        factors.append(rate_factor)
        plain(self, gradients, rate_factor=rate_factor)

    monkeypatch.setattr(MasterWeights, "step", step)
    linear = replace(optimizer, lr_schedule="linear")
    fit(build_examples([1]), random=repeatable(), num_steps=2, first_step=2, total_steps=4, optimizer=linear)
    assert factors == [0.5, 0.25]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": math.nan}, "sample_rate=nan"),
        ({"noise_multiplier": -1.0}, "noise-multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise-multiplier=nan"),
        ({"max_grad_norm": 0.0}, "max-grad-norm=0.0"),
        ({"max_grad_norm": math.inf}, "max-grad-norm=inf"),
        ({"max_grad_norm": math.nan}, "max-grad-norm=nan"),
    ],
)
def test_settings_without_meaning_are_refused(bad: dict[str, float], named: str, seen: list[int]) -> None:
    with pytest.raises(PrivacyError, match=f"^The client refuses to train.*{named}"):
        fit(build_examples([1]), random=repeatable(), **bad)
    assert not seen


def test_no_examples_are_refused() -> None:
    with pytest.raises(PrivacyError, match="no examples"):
        fit([], random=repeatable())


def test_noise_is_added_in_float64() -> None:
    """Catches noise rounded before it is added: a sum far below the noise still decides the last bits."""
    total = [torch.full((1000,), 1e-7)]
    first = differential_privacy.add_noise(total, noise_multiplier=1.0, max_grad_norm=1.0, random=repeatable())[0]
    exact = repeatable().draw_normals(1000) + np.float64(np.float32(1e-7))
    np.testing.assert_array_equal(first.numpy(), exact.astype(np.float32))
