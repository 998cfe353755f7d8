"""Settings: what is accepted, what is refused, and that the refusal says what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ot_federated.config import RunConfig, flatten, list_keys, parse_run_config
from ot_federated.errors import ConfigError


def refusal(**flat: object) -> str:
    """Return the message with which one setting is refused; ``__`` stands for a dot, ``_`` for a dash."""
    settings = {name.replace("__", ".").replace("_", "-"): value for name, value in flat.items()}
    with pytest.raises(ConfigError) as caught:
        parse_run_config(settings)
    return str(caught.value)


def test_no_settings_give_the_defaults() -> None:
    assert parse_run_config({}) == RunConfig()
    assert {name: key.default for name, key in list_keys().items()} == flatten(RunConfig())


def test_every_key_is_kebab_case_documented_and_has_a_default_of_its_type() -> None:
    for name, key in list_keys().items():
        assert re.fullmatch(r"([a-z]+\.)?[a-z]+(-[a-z]+)*", name), name
        assert key.doc.endswith((".", ")")), name
        assert type(key.default) is key.type, name


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.lerning-rate", "train.learning-rate"),
        ("train.learning_rate", "train.learning-rate"),
        ("num-rounds", "num-server-rounds"),
        ("offsite.emulator-block", "offsite.emulator-blocks"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{re.escape(wrong)}'.*did you mean '{re.escape(meant)}'"):
        parse_run_config({wrong: 1})


def test_unknown_key_unlike_any_other_offers_none() -> None:
    with pytest.raises(ConfigError, match="Unknown run-config key 'zzzz'") as caught:
        parse_run_config({"zzzz": 1})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("num-server-rounds", "3", "an integer"),
        ("num-server-rounds", 3.0, "an integer"),
        ("num-server-rounds", True, "an integer"),
        ("resume", 1, "true or false"),
        ("resume", "true", "true or false"),
        ("train.learning-rate", "fast", "a number"),
        ("train.learning-rate", True, "a number"),
        ("model.source", 7, "a string"),
        ("model.source", None, "a string"),
    ],
)
def test_wrong_type_names_key_type_and_value(name: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} must be {wanted}, not {re.escape(repr(value))}"):
        parse_run_config({name: value})


def test_integer_is_a_number() -> None:
    rate = parse_run_config({"train.learning-rate": 1}).train.learning_rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num-server-rounds", 0, "at least 1"),
        ("train.learning-rate", 0.0, "above 0"),
        ("train.learning-rate", float("nan"), "above 0"),
        ("train.learning-rate", float("inf"), "above 0"),
        ("train.warmup-fraction", 1.01, "at least 0 and at most 1"),
        ("strategy.fraction-train", 0.0, "above 0 and at most 1"),
        ("strategy.trim-fraction", 0.5, "at least 0 and at most 0.49"),
        ("data.max-length", 7, "at least 8"),
        ("seed", -1, "at least 0"),
    ],
)
def test_out_of_range_says_the_range(name: str, value: float, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}=.* out of range: it must be {allowed}\.$"):
        parse_run_config({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num-server-rounds", 1),
        ("train.warmup-fraction", 0.0),
        ("train.warmup-fraction", 1.0),
        ("strategy.fraction-train", 1.0),
        ("data.max-length", 8),
    ],
)
def test_the_ends_of_a_range_are_in_it(name: str, value: float) -> None:
    assert flatten(parse_run_config({name: value}))[name] == value


def test_choice_lists_all_and_the_nearest() -> None:
    message = refusal(strategy__name="fedavgn")
    for name in ("fedavg", "krum", "bulyan", "fedyogi"):
        assert name in message
    assert re.search(r"did you mean 'fedavgm?'", message)


def test_no_adapter_is_refused() -> None:
    message = refusal(offsite__bottom_blocks=0, offsite__top_blocks=0)
    assert "no adapter to train" in message
    assert "at least one" in message


@pytest.mark.parametrize("side", ["bottom", "top", "spread"])
def test_placement_without_blocks_is_refused(side: str) -> None:
    message = refusal(**{f"offsite__{side}_blocks": 0, "tuning__placement": side})
    assert f"tuning.placement='{side}'" in message
    assert f"offsite.{side}-blocks is 0" in message


def test_adapter_blocks_in_the_middle_go_with_ways_that_leave_them_out() -> None:
    ends = {"offsite.bottom-blocks": 0, "offsite.top-blocks": 0, "offsite.spread-blocks": 2}
    assert parse_run_config(ends).offsite.spread_blocks == 2
    message = refusal(offsite__spread_blocks=2, offsite__keep="gradient")
    assert "offsite.keep='gradient'" in message
    assert "influence or uniform" in message


def test_one_sided_adapter_is_allowed() -> None:
    assert parse_run_config({"offsite.bottom-blocks": 0, "tuning.placement": "top"}).offsite.bottom_blocks == 0


def test_division_by_label_needs_a_column_where_the_task_has_no_answer() -> None:
    message = refusal(task__name="causal-lm", data__partitioner="dirichlet")
    assert "data.partition-column" in message


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        parse_run_config({}).train.learning_rate = 1.0  # type: ignore[misc]


def test_the_harness_needs_a_language_model() -> None:
    with pytest.raises(ConfigError, match="harness-tasks='piqa' needs a language model"):
        parse_run_config({"evaluation.harness-tasks": "piqa", "task.name": "image-classification"})


def test_ia3_with_an_engine_of_opacus_is_refused() -> None:
    private = {"tuning.method": "ia3", "privacy.mode": "example"}
    with pytest.raises(ConfigError, match=r"ia3.*privacy\.engine='hooks'.*Set privacy\.engine='loop'"):
        parse_run_config(private)
    assert parse_run_config(private | {"privacy.engine": "loop"}).tuning.method == "ia3"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("train.learning-rate", 10**400, "no setting has more than 64 bits"),
        ("train.max-steps", 2**63, "no setting has more than 64 bits"),
        ("task.prompt", "{text}" + "x" * 10_000, "at most 10000 are accepted"),
    ],
)
def test_values_beyond_any_use(name: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_run_config({name: value})


@pytest.mark.parametrize("other", [{"strategy.secure-aggregation": True}, {"privacy.mode": "client"}])
def test_no_norm_bound_where_no_single_update_is_seen(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max-update-norm=2 does not go with"):
        parse_run_config({"strategy.max-update-norm": 2.0, "privacy.clients-per-round": 5, **other})


def test_no_limit_for_stragglers_where_every_client_is_waited_for() -> None:
    stragglers = {"strategy.straggler-seconds": 2.5}
    with pytest.raises(
        ConfigError, match=r"straggler-seconds=2\.5 does not go with strategy\.secure-aggregation=true.*seconds=0"
    ):
        parse_run_config({"strategy.secure-aggregation": True, **stragglers})
    assert parse_run_config(stragglers).strategy.straggler_seconds == 2.5
