"""An epsilon is reported with all that gives it a meaning, or not at all."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ot_federated.data_owner.ledger_entries import describe_epsilon
from ot_federated.errors import ConfigError
from ot_federated.privacy_guarantee import Guarantee

whole = {"epsilon": 1.5, "delta": 1e-5, "unit": "example", "adjacency": "add-remove-one", "sampling": "poisson"}


@pytest.mark.parametrize("missing", list(whole))
def test_nothing_can_be_left_out(missing):
    assert [field.name for field in dataclasses.fields(Guarantee)] == list(whole)
    with pytest.raises(TypeError, match=missing):
        Guarantee(**{name: value for name, value in whole.items() if name != missing})


@pytest.mark.parametrize(
    "changes",
    [{"epsilon": math.nan}, {"epsilon": -1.0}, {"unit": ""}, {"adjacency": ""}, {"sampling": ""}, {"delta": 0.0}],
)
def test_nothing_can_be_left_empty(changes):
    with pytest.raises((ValueError, ConfigError)):
        Guarantee(**(whole | changes))


def test_all_of_it_is_shown():
    assert str(Guarantee(**whole)) == (
        "epsilon 1.5000 at delta 1e-05 (unit: example, adjacency: add-remove-one, sampling: poisson)"
    )
    assert "epsilon inf at" in str(Guarantee(**(whole | {"epsilon": math.inf})))


def test_a_ledger_reports_in_its_own_unit():
    assert describe_epsilon(1.5, delta=1e-5) == Guarantee(**whole)
