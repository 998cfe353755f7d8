"""The nearest allowed name: difflib's choice, found without its cost."""

from __future__ import annotations

import difflib

import pytest

from ot_federated.config import list_keys
from ot_federated.errors import nearest_match

keys = list(list_keys())


@pytest.mark.parametrize("value", [*keys, *(key[1:] for key in keys), *(key.replace("-", "_") for key in keys), "zz"])
def test_the_name_is_as_close_as_difflibs(value: str) -> None:
    shown = nearest_match(value, keys)
    close = difflib.get_close_matches(value, keys, n=1, cutoff=0.5)
    assert bool(shown) == bool(close)
    if close:
        name = shown.removeprefix(" (did you mean '").removesuffix("'?)")
        ratios = [difflib.SequenceMatcher(None, other, value).ratio() for other in (name, close[0])]
        assert ratios[0] == ratios[1]


def test_a_long_key_is_compared_with_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be no near match, and a stranger could send many."""
    monkeypatch.setattr(difflib, "SequenceMatcher", None)
    assert nearest_match("train.learning-rate" * 200, keys) == ""


def test_few_names_are_compared_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    ratio = difflib.SequenceMatcher.ratio
    monkeypatch.setattr(difflib.SequenceMatcher, "ratio", lambda self: compared.append(1) or ratio(self))
    assert nearest_match("privacy.noise-multiplyer", keys) == " (did you mean 'privacy.noise-multiplier'?)"
    assert len(compared) < len(keys) / 3


def test_nothing_is_near_where_nothing_is_allowed() -> None:
    assert nearest_match("x", ()) == ""
