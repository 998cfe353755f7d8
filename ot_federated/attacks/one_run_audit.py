"""A lower bound on epsilon from a single training run.

Thomas Steinke, Milad Nasr, Matthew Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
https://arxiv.org/abs/2305.08846. Each of m examples is put into the training data by the flip of a coin. After
training, an attacker who sees a score for each guesses "in" for the highest and "out" for the lowest and abstains on
the rest. Under (epsilon, delta) differential privacy only so many guesses can be right; more of them refute it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ot_federated.errors import DataError

largest_epsilon = 50.0


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """What a one-run audit found.

    Attributes:
        epsilon_lower_bound: With the stated confidence, the training's epsilon is at least this; 0 says nothing.
        delta: The delta that epsilon is stated at.
        confidence: Chance, over coins and noise, that the bound is not too high.
        num_examples: m, the examples whose coin was flipped.
        num_guesses: r, the guesses that gave the bound.
        num_right: v, how many of them were right.
    """

    epsilon_lower_bound: float
    delta: float
    confidence: float
    num_examples: int
    num_guesses: int
    num_right: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def refute(epsilon: float, *, num_examples: int, num_guesses: int, num_right: int, delta: float) -> float:
    """Return the largest chance of ``num_right`` right guesses under (epsilon, delta), Theorem 5.2 of the paper.

    ``P[V >= v] <= beta + 2 m delta alpha`` with ``beta = P[Bin(r, q) >= v]``, ``alpha = max over i of
    P[v > Bin(r, q) >= v - i] / i`` and ``q = e^epsilon / (1 + e^epsilon)``.
    """
    from scipy.stats import binom

    chance = 1.0 / (1.0 + np.exp(-epsilon))
    # tail[k] = P[Bin >= k], for k = 0 .. v
    tail = binom.sf(np.arange(num_right + 1) - 1, num_guesses, chance)
    beta = float(tail[num_right])
    if num_right == 0:
        return beta
    steps = np.arange(1, num_right + 1)
    alpha = float(np.max((tail[num_right - steps] - beta) / steps))
    return min(1.0, beta + 2 * num_examples * delta * alpha)


def bound_epsilon(
    *, num_examples: int, num_guesses: int, num_right: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that ``num_right`` of ``num_guesses`` right guesses refute; 0 if they refute none."""
    significance = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        chance = refute(epsilon, num_examples=num_examples, num_guesses=num_guesses, num_right=num_right, delta=delta)
        return chance < significance

    if num_guesses == 0 or not refuted(0.0):
        return 0.0
    low, high = 0.0, largest_epsilon
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit_with_best(
    scores: Mapping[str, np.ndarray[Any, Any]],
    included: Sequence[bool] | np.ndarray[Any, Any],
    *,
    delta: float,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Audit with several scores, each at its share of the error, and return the sharpest bound and its score's name."""
    each = 1.0 - (1.0 - confidence) / len(scores)
    audits = {
        name: audit_one_run(values, included, delta=delta, confidence=each).to_dict() for name, values in scores.items()
    }
    best = max(audits, key=lambda name: audits[name]["epsilon_lower_bound"])
    return {**audits[best], "confidence": confidence, "score": best}


def audit_one_run(
    scores: Sequence[float] | np.ndarray[Any, Any],
    included: Sequence[bool] | np.ndarray[Any, Any],
    *,
    delta: float,
    confidence: float = 0.95,
    guess_fractions: Sequence[float] = (0.05, 0.2, 1.0),
) -> OneRunAudit:
    """Guess which examples were in the training data, and bound epsilon by how many guesses were right.

    How many guesses serve best is not known beforehand: few sure ones against a strong attack, many unsure ones
    against a weak one. Every fraction is tried at its share of the error (Bonferroni), so that the best of them is
    still right with the stated confidence.

    Args:
        scores: ``(m,)``, higher where membership seems likelier.
        included: ``(m,)``, whether the example was in; each by an independent fair coin.
        delta: The delta of the claim.
        confidence: Of the bound.
        guess_fractions: Shares of the m examples to guess on, half "in" and half "out"; fixed before looking.

    Raises:
        DataError: If the lengths differ, a score is not a number, or there are fewer than 10 examples.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(f"{values.size} scores do not go with {truth.size} coins: one of each an example.")
    if np.isnan(values).any():
        raise DataError("A score is not a number: the model that gave it has diverged.")
    num = len(values)
    if num < 10:
        raise DataError(f"A one-run audit of {num} examples can say nothing: give it at least 10, better 1000.")
    order = np.argsort(-values, kind="stable")
    each = 1.0 - (1.0 - confidence) / len(guess_fractions)
    audits = []
    for fraction in guess_fractions:
        half = max(1, round(num * fraction / 2))
        half = min(half, num // 2)
        right = int(truth[order[:half]].sum() + (~truth[order[num - half :]]).sum())
        bound = bound_epsilon(num_examples=num, num_guesses=2 * half, num_right=right, delta=delta, confidence=each)
        audits.append((bound, 2 * half, right))
    bound, num_guesses, num_right = max(audits)
    return OneRunAudit(
        epsilon_lower_bound=bound,
        delta=delta,
        confidence=confidence,
        num_examples=num,
        num_guesses=num_guesses,
        num_right=num_right,
    )
