"""How much privacy a history of noised training costs: (epsilon, delta) by privacy loss distributions.

Unit: what the noise hides, one example (DP-SGD) or one client (client-level privacy at the server). Adjacency: add or
remove one. Mechanism: Poisson-subsampled Gaussian, composed over every step of every round and run. Composition of
privacy loss distributions (PLD) after Koskela, Jälkö and Honkela, "Computing Tight Differential Privacy Guarantees
Using FFT", AISTATS 2020 (https://arxiv.org/abs/1906.03049); discretised by "connect the dots", Doroshenko et al.,
PoPETs 2022 (https://arxiv.org/abs/2207.04380), as ``dp_accounting`` implements both. This is the only module that
imports it.

Without sampling (a rate of 1 throughout) the answer is exact: Gaussian mechanisms compose into one, and its epsilon is
that of Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018
(https://arxiv.org/abs/1805.06530).

Never below the truth: connecting the dots dominates the true distribution, so epsilon errs upwards (by the
discretisation, about 1e-4 of epsilon), and only floating-point rounding, below 1e-9, goes
either way.

Discretisation. Losses lie on a grid of width ``2**-k``. The width is the smallest that keeps one evaluation
within about 0.1 to 1 second: all single steps together take at most ``num_grid_points`` points, their composition
about ``num_composed_points``. Both counts only grow with what is added to a history, and the grids are nested
(a coarser one dominates a finer one), so epsilon never falls when a history grows. Equal mechanisms are
added up before anything is composed: twenty rounds cost exactly what one run of all their steps costs.

Opacus' Gaussian-DP accountant is no alternative: it is a central-limit approximation, and wrong on mixed histories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from ot_federated.errors import ConfigError

num_grid_points = 2**16
num_composed_points = 2**21
# The search for a noise multiplier begins on a coarser grid, which errs upwards a little more and is 16 times faster.
_coarsening = 16
_finest_width = 2.0**-20
# Beyond this many standard deviations the noise has a mass below exp(-50), which dp_accounting cuts off (upwards).
_tail_deviations = 10.0
smallest_delta = 1e-12
# Less noise than this costs more than a million epsilon a step, and overflows on the way there: called infinite.
_least_noise = 1e-3
# Below 0.05 a single step costs hundreds of epsilon, above 1e4 a model sees nothing but noise.
smallest_noise_multiplier, largest_noise_multiplier = 0.05, 1e4
_relative_precision = 1e-3


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm, at least 0.
        sample_rate: Probability that an example is in a step's batch, in (0, 1].
        num_steps: Steps, at least 0.

    Raises:
        ConfigError: If a value is out of its range or not finite.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"noise_multiplier={self.noise_multiplier} must be a finite number, at least 0.")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(
                f"sample_rate={self.sample_rate} must be above 0 and at most 1: it is the logical batch size over the "
                "number of examples."
            )
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 0:
            raise ConfigError(f"num_steps={self.num_steps!r} must be an integer, at least 0.")


def epsilon_of(history: Sequence[Mechanism], *, delta: float) -> float:
    """Return the epsilon of everything in ``history`` together; inf where a step had no noise.

    Args:
        history: What was released, in any order.
        delta: The delta of (epsilon, delta), in [1e-12, 1).

    Raises:
        ConfigError: If ``delta`` is out of its range.
    """
    check_delta(delta)
    return _epsilon_of_groups(_group(history), delta=delta, coarsening=1)


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    num_steps: int,
    history: Sequence[Mechanism] = (),
) -> float:
    """Return the smallest noise multiplier, to 0.1 %, that keeps history and plan within ``target_epsilon``.

    The result's own epsilon, as :func:`epsilon_of` computes it, is at most the target. It is never below 0.05:
    less noise than that protects nobody, whatever the target.

    Args:
        target_epsilon: Epsilon after all the planned steps, above 0.
        delta: The delta of (epsilon, delta), in [1e-12, 1).
        sample_rate: Probability that an example is in a step's batch, in (0, 1].
        num_steps: Steps of all planned rounds together, at least 1.
        history: What was released on this data before.

    Raises:
        ConfigError: If a value is out of range, or no noise can meet the target because of the history.
    """
    check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"target_epsilon={target_epsilon} must be a finite number above 0.")
    if num_steps < 1:
        raise ConfigError(f"num_steps={num_steps} must be at least 1: without a step there is nothing to calibrate.")
    spent = epsilon_of(history, delta=delta)
    if spent >= target_epsilon:
        raise ConfigError(
            f"target_epsilon={target_epsilon:g} cannot be met: earlier training on this data already cost "
            f"epsilon={spent:.4g} at delta={delta:g}. Raise the target, or use data that was not used yet."
        )

    def fits(noise_multiplier: float, *, coarsening: int = 1) -> bool:
        plan = Mechanism(noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps)
        groups = _group([*history, plan])
        return _epsilon_of_groups(groups, delta=delta, coarsening=coarsening) <= target_epsilon

    if fits(smallest_noise_multiplier):
        return smallest_noise_multiplier
    # What fits on the coarse grid fits on the fine one, which it contains.
    bracket = _bracket(partial(fits, coarsening=_coarsening)) or _bracket(fits)
    if bracket is None:
        raise ConfigError(
            f"target_epsilon={target_epsilon:g} at delta={delta:g} cannot be met with any useful noise (up to "
            f"{largest_noise_multiplier:g}); epsilon={spent:.4g} was spent on this data before. Raise the target, or "
            "plan fewer steps or a smaller sample rate."
        )
    return _refine(fits, _bisect(partial(fits, coarsening=_coarsening), *bracket))


def check_delta(delta: float) -> None:
    """Check that ``delta`` can be accounted.

    Raises:
        ConfigError: If it is not in [1e-12, 1).
    """
    if not smallest_delta <= delta < 1:
        raise ConfigError(
            f"delta={delta:g} must be at least {smallest_delta:g} and below 1; it should be well below 1 over the "
            "number of examples."
        )


def _group(history: Sequence[Mechanism]) -> dict[tuple[float, float], int]:
    """Return the steps of each (noise multiplier, sample rate), sorted: the order of a history changes nothing."""
    steps: dict[tuple[float, float], int] = {}
    for item in history:
        key = (float(item.noise_multiplier), float(item.sample_rate))
        steps[key] = steps.get(key, 0) + item.num_steps
    return {key: steps[key] for key in sorted(steps) if steps[key] > 0}


def _epsilon_of_groups(groups: Mapping[tuple[float, float], int], *, delta: float, coarsening: int) -> float:
    if not groups:
        return 0.0
    if any(noise_multiplier < _least_noise for noise_multiplier, _ in groups):
        return math.inf
    if all(sample_rate == 1 for _, sample_rate in groups):
        return _epsilon_without_sampling(groups, delta=delta)
    width = _grid_width(groups, coarsening=coarsening)
    composed: Any = None
    for (noise_multiplier, sample_rate), num_steps in groups.items():
        part = _single_step(noise_multiplier, sample_rate, width).self_compose(num_steps)
        composed = part if composed is None else composed.compose(part)
    return float(composed.get_epsilon_for_delta(delta))


def _epsilon_without_sampling(groups: Mapping[tuple[float, float], int], *, delta: float) -> float:
    """Return the exact epsilon of Gaussian mechanisms: together they are one, and their inverse variances add up."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    precision = sum(num_steps / noise_multiplier**2 for (noise_multiplier, _), num_steps in groups.items())
    return float(get_epsilon_gaussian(1 / math.sqrt(precision), delta))


def _grid_width(groups: Mapping[tuple[float, float], int], *, coarsening: int) -> float:
    """Return the grid's width: a power of two, so that every grid contains all coarser ones."""
    spans = [(_loss_span(noise_multiplier, rate), steps) for (noise_multiplier, rate), steps in groups.items()]
    single = sum(span for span, _ in spans) / num_grid_points
    # Independent losses add up like the root of their number.
    composed = math.sqrt(sum(steps * span**2 for span, steps in spans)) / num_composed_points
    return float(2.0 ** math.ceil(math.log2(coarsening * max(single, composed, _finest_width))))


def _loss_span(noise_multiplier: float, sample_rate: float) -> float:
    """Return the width of the privacy losses of one step, from the smallest to the largest that matters.

    The loss at x is log(1 - q + q exp((2x - 1) / 2 sigma^2)); x reaches 10 sigma beyond 0 and 1.
    """
    exponent = (1 + 2 * _tail_deviations * noise_multiplier) / (2 * noise_multiplier**2)
    largest = exponent + math.log(sample_rate + (1 - sample_rate) * math.exp(-exponent))
    smallest = -exponent if sample_rate == 1 else math.log1p(sample_rate * math.expm1(-exponent))
    return largest - smallest


@lru_cache(maxsize=32)
def _single_step(noise_multiplier: float, sample_rate: float, width: float) -> Any:
    """Return the privacy loss distribution of one step (most of the cost of an evaluation: kept)."""
    # Slow to import (scipy), and most messages to a client need no accounting.
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=width
    )


def _bracket(fits: Callable[[float], bool]) -> tuple[float, float] | None:
    """Return a noise multiplier that does not fit and twice it, which does; None if none fits."""
    high = 2 * smallest_noise_multiplier
    while not fits(high):
        high *= 2
        if high > largest_noise_multiplier:
            return None
    return high / 2, high


def _bisect(fits: Callable[[float], bool], low: float, high: float) -> float:
    """Return the smallest noise multiplier that fits, to 0.1 %; ``low`` does not fit and ``high`` does."""
    while high > low * (1 + _relative_precision):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _refine(fits: Callable[[float], bool], high: float) -> float:
    """Return the smallest noise multiplier that fits, given one that fits and is close to it."""
    step = 1.004
    while fits(high / step):
        high, step = high / step, step**2
    return _bisect(fits, high / step, high)
