"""Epsilon is monotone, does not depend on the order or the cut of a history, and is never below a lower bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ot_federated import privacy_accounting
from ot_federated.privacy_accounting import Mechanism, epsilon_of

mechanisms = st.builds(
    Mechanism,
    noise_multiplier=st.floats(0.5, 20),
    sample_rate=st.floats(1e-3, 1),
    num_steps=st.integers(1, 200),
)
histories = st.lists(mechanisms, min_size=1, max_size=3)
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])
rounding = 1e-7


@pytest.fixture(autouse=True)
def coarse_grid(monkeypatch):
    """What holds, holds on every grid: on this one it is checked sixteen times faster."""
    monkeypatch.setattr(privacy_accounting, "num_grid_points", 2**12)
    monkeypatch.setattr(privacy_accounting, "num_composed_points", 2**16)


@settings(max_examples=12)
@given(histories, mechanisms, deltas)
def test_epsilon_grows_with_the_history(history, more, delta):
    before, after = epsilon_of(history, delta=delta), epsilon_of([*history, more], delta=delta)
    assert after >= before - rounding


@settings(max_examples=12)
@given(histories, deltas, st.floats(1.05, 3))
def test_epsilon_falls_with_noise_and_with_delta(history, delta, factor):
    found = epsilon_of(history, delta=delta)
    quieter = [
        Mechanism(
            noise_multiplier=item.noise_multiplier * factor, sample_rate=item.sample_rate, num_steps=item.num_steps
        )
        for item in history
    ]
    assert epsilon_of(quieter, delta=delta) <= found + rounding
    assert epsilon_of(history, delta=delta * 10) <= found + rounding


@settings(max_examples=12)
@given(histories, deltas, st.data())
def test_order_and_cut_of_a_history_change_nothing(history, delta, data):
    pieces = []
    for item in history:
        cut = data.draw(st.integers(0, item.num_steps))
        for num_steps in (cut, item.num_steps - cut):
            pieces.append(
                Mechanism(noise_multiplier=item.noise_multiplier, sample_rate=item.sample_rate, num_steps=num_steps)
            )
    shuffled = data.draw(st.permutations(pieces))
    assert epsilon_of(shuffled, delta=delta) == epsilon_of(history, delta=delta)


@settings(max_examples=20)
@given(mechanisms, deltas)
def test_epsilon_is_never_below_what_one_attack_shows(mechanism, delta):
    # One step of the composition alone, attacked with every threshold t on its output: with X from D and Y from D',
    # epsilon >= log((P[X > t] - delta) / P[Y > t]).
    sigma, rate = mechanism.noise_multiplier, mechanism.sample_rate
    found = epsilon_of([mechanism], delta=delta)
    for threshold in [0.5 + sigma * step / 4 for step in range(-8, 25)]:
        without = norm.sf(threshold / sigma)
        within = rate * norm.sf((threshold - 1) / sigma) + (1 - rate) * without
        if within > delta:
            assert found >= math.log((within - delta) / without) - rounding
