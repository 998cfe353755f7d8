"""Epsilon against other accountants, against closed forms, and the search for the noise."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from ot_federated import privacy_accounting
from ot_federated.errors import ConfigError
from ot_federated.privacy_accounting import Mechanism, calibrate_noise_multiplier, epsilon_of


def steps(noise_multiplier: float, sample_rate: float, num_steps: int) -> Mechanism:
    return Mechanism(noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps)


def gaussian_epsilon(noise_multiplier: float, num_steps: int, delta: float) -> float:
    """The exact epsilon without sampling: Balle and Wang, ICML 2018, theorem 5."""
    mu = math.sqrt(num_steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 200)


@pytest.fixture
def coarse_grid(monkeypatch):
    """Sixteen times less work, for what does not need the last digits."""
    monkeypatch.setattr(privacy_accounting, "num_grid_points", 2**12)
    monkeypatch.setattr(privacy_accounting, "num_composed_points", 2**16)


@pytest.mark.parametrize(("noise_multiplier", "num_steps"), [(1.0, 1), (2.0, 10), (20.0, 1000), (0.5, 3)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_without_sampling_epsilon_is_the_exact_one_and_never_below(noise_multiplier, num_steps, delta):
    exact = gaussian_epsilon(noise_multiplier, num_steps, delta)
    found = epsilon_of([steps(noise_multiplier, 1.0, num_steps)], delta=delta)
    assert exact - 1e-9 <= found <= exact * (1 + 1e-9)


# dp-accounting's PLD on a grid of 1e-5.
@pytest.mark.parametrize(
    ("history", "delta", "pin"),
    [
        ([steps(1.0, 0.01, 1000)], 1e-5, 1.828237),
        ([steps(0.8, 0.05, 300)], 1e-4, 7.925748),
        ([steps(20, 0.5, 1000)], 1e-5, 3.347780),
        ([steps(0.6, 0.1, 300)], 1e-4, 32.668748),
    ],
)
def test_pinned_epsilons(history, delta, pin):
    assert epsilon_of(history, delta=delta) == pytest.approx(pin, rel=5e-5)
    assert epsilon_of(history, delta=delta) >= pin * (1 - 1e-6)


def test_the_reference_case_of_three_accountants():
    case = steps(1.0, 0.032, 300)
    assert epsilon_of([case], delta=1e-5) == pytest.approx(3.601, abs=1e-3)
    accountant = pytest.importorskip("opacus.accountants").RDPAccountant()
    accountant.history = [(case.noise_multiplier, case.sample_rate, case.num_steps)]
    assert accountant.get_epsilon(1e-5) == pytest.approx(4.07, abs=0.005)


@pytest.mark.parametrize(
    "history",
    [
        [steps(1.0, 0.02, 500)],
        [steps(0.7, 0.05, 60), steps(1.3, 0.01, 400)],
        [steps(2.0, 0.1, 200), steps(1.0, 0.01, 100), steps(4.0, 0.2, 50)],
    ],
)
def test_agrees_with_opacus(history):
    accountants = pytest.importorskip("opacus.accountants")
    prv, rdp = accountants.PRVAccountant(), accountants.RDPAccountant()
    for accountant in (prv, rdp):
        accountant.history = [(item.noise_multiplier, item.sample_rate, item.num_steps) for item in history]
    found = epsilon_of(history, delta=1e-5)
    # PRV is exact to its eps_error, RDP an upper bound that is never tighter than PLD.
    assert found == pytest.approx(prv.get_epsilon(1e-5, eps_error=0.01), abs=0.012)
    assert found <= rdp.get_epsilon(1e-5)


def test_twenty_rounds_cost_what_one_run_of_all_their_steps_costs():
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    rounds = [steps(1.1, 0.03, 25)] * 12 + [steps(0.9, 0.02, 40)] * 8
    found = epsilon_of(rounds, delta=1e-5)
    assert found == pytest.approx(epsilon_of([steps(1.1, 0.03, 300), steps(0.9, 0.02, 320)], delta=1e-5), abs=1e-9)
    # On the grid that is ours here the difference is rounding alone.
    width = privacy_accounting._grid_width({(1.1, 0.03): 300, (0.9, 0.02): 320}, coarsening=1)
    accountant = PLDAccountant(value_discretization_interval=width)
    for sigma, rate, count in ((1.1, 0.03, 300), (0.9, 0.02, 320)):
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), count)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon_of([], delta=1e-5) == 0
    assert epsilon_of([steps(0.0, 0.1, 0)], delta=1e-5) == 0
    assert epsilon_of([steps(1.0, 0.1, 5), steps(0.0, 0.1, 1)], delta=1e-5) == math.inf
    assert epsilon_of([steps(1e-6, 0.1, 1)], delta=1e-5) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1e-13, math.nan])
def test_delta_out_of_range_is_refused(delta):
    with pytest.raises(ConfigError, match="delta="):
        epsilon_of([steps(1.0, 0.1, 1)], delta=delta)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((-1.0, 0.1, 1), "noise_multiplier"),
        ((math.nan, 0.1, 1), "noise_multiplier"),
        ((math.inf, 0.1, 1), "noise_multiplier"),
        ((1.0, 0.0, 1), "sample_rate"),
        ((1.0, 1.1, 1), "sample_rate"),
        ((1.0, math.nan, 1), "sample_rate"),
        ((1.0, 0.1, -1), "num_steps"),
        ((1.0, 0.1, 1.5), "num_steps"),
        ((1.0, 0.1, True), "num_steps"),
    ],
)
def test_impossible_mechanisms_are_refused(values, name):
    with pytest.raises(ConfigError, match=name):
        steps(*values)


@pytest.mark.parametrize(
    ("target", "sample_rate", "num_steps", "history"),
    [(8.0, 0.05, 60, ()), (1.0, 0.01, 300, ()), (3.0, 1.0, 4, ()), (3.0, 0.02, 100, (steps(1.0, 0.02, 500),))],
)
def test_calibrated_noise_is_the_smallest_that_fits(coarse_grid, target, sample_rate, num_steps, history):
    sigma = calibrate_noise_multiplier(
        target_epsilon=target, delta=1e-5, sample_rate=sample_rate, num_steps=num_steps, history=history
    )
    assert epsilon_of([*history, steps(sigma, sample_rate, num_steps)], delta=1e-5) <= target
    assert epsilon_of([*history, steps(sigma / 1.0011, sample_rate, num_steps)], delta=1e-5) > target


def test_calibrated_noise_on_the_full_grid():
    sigma = calibrate_noise_multiplier(target_epsilon=8.0, delta=1e-5, sample_rate=0.05, num_steps=60)
    assert 7.95 < epsilon_of([steps(sigma, 0.05, 60)], delta=1e-5) <= 8.0


def test_calibration_never_goes_below_useful_noise():
    sigma = calibrate_noise_multiplier(target_epsilon=1000, delta=1e-5, sample_rate=0.001, num_steps=1)
    assert sigma == 0.05


def test_calibration_says_when_it_is_impossible(coarse_grid):
    plan = {"delta": 1e-5, "sample_rate": 0.5, "num_steps": 10}
    with pytest.raises(ConfigError, match=r"already cost epsilon=6\.\d+ at delta=1e-05.*Raise the target"):
        calibrate_noise_multiplier(target_epsilon=5, history=[steps(1.0, 1.0, 2)], **plan)
    with pytest.raises(ConfigError, match="any useful noise"):
        calibrate_noise_multiplier(target_epsilon=1e-4, delta=1e-9, sample_rate=1.0, num_steps=100_000)
    with pytest.raises(ConfigError, match="target_epsilon=0"):
        calibrate_noise_multiplier(target_epsilon=0, **plan)
    with pytest.raises(ConfigError, match="num_steps=0"):
        calibrate_noise_multiplier(target_epsilon=5, delta=1e-5, sample_rate=0.5, num_steps=0)


def test_importing_it_does_not_import_the_accounting_library():
    code = "import sys, ot_federated.data_owner.privacy_ledger; print([m for m in sys.modules if 'dp_acc' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
