from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ot_federated.config import flatten, list_keys, parse_run_config
from ot_federated.errors import ConfigError
from ot_federated.settings import Key, check_value


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a key allows."""
    if key.type is bool:
        return st.booleans()
    if key.type is str:
        return st.sampled_from(key.choices) if key.choices else st.text(max_size=20)
    lowest = max(key.minimum, key.above)
    if key.type is int:
        return st.integers(
            math.ceil(lowest) if math.isfinite(lowest) else -(2**40),
            math.floor(key.maximum) if math.isfinite(key.maximum) else 2**40,
        )
    return st.floats(
        min_value=lowest if math.isfinite(lowest) else None,
        max_value=key.maximum if math.isfinite(key.maximum) else None,
        exclude_min=math.isfinite(key.above),
        allow_nan=False,
        allow_infinity=False,
    )


# These can contradict each other; unit/test_config.py shows that they are then refused.
contradictory = {
    "tuning.placement",
    "tuning.method",
    "offsite.realign-every-rounds",
    "offsite.realign-steps",
    "offsite.spread-blocks",
    "offsite.gaps",
    "evaluation.alphas",
    "evaluation.alpha-every-round",
    "tuning.lora-aggregation",
    "data.partitioner",
    "offsite.bottom-blocks",
    "offsite.public-text",
    "offsite.distillation-steps",
    "privacy.mode",
    "strategy.secure-aggregation",
    "task.name",
    "task.label-words",
    "task.prompt",
}
# A few keys at a time: drawing all 60 for each example would find no more.
settings_strategy = st.lists(
    st.sampled_from(sorted(list_keys().keys() - contradictory)), unique=True, max_size=8
).flatmap(lambda names: st.fixed_dictionaries({name: values_of(list_keys()[name]) for name in names}))


@given(settings_strategy)
def test_parse_and_flatten_are_inverse(settings: dict[str, Any]) -> None:
    config = parse_run_config(settings)
    flat = flatten(config)
    assert {name: flat[name] for name in settings} == settings
    assert all(type(flat[name]) is key.type for name, key in list_keys().items())
    assert parse_run_config(flat) == config


@given(key=st.sampled_from(sorted(list_keys())), value=st.one_of(st.none(), st.lists(st.integers()), st.binary()))
def test_nothing_but_scalars_is_accepted(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        check_value(list_keys()[key], value)
