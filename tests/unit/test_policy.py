"""A data owner's policy: read strictly, applied to whatever a server asks."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from ot_federated.data_owner import policy as policy_module
from ot_federated.data_owner.ledger_entries import Release
from ot_federated.data_owner.policy import Policy, PolicyError, default_policy, load_policy
from ot_federated.errors import ConfigError

plan = Release(
    run="run-a",
    server_round=3,
    client="hospital-1",
    noise_multiplier=1.0,
    sample_rate=0.05,
    num_steps=20,
    max_grad_norm=1.0,
    num_examples=2000,
)
limits = Policy(
    max_epsilon=3,
    delta=1e-6,
    min_noise_multiplier=0.6,
    max_grad_norm=1,
    max_sample_rate=0.1,
    max_steps_per_round=200,
    max_rounds=50,
    allowed_tasks=("multiple-choice",),
    min_examples=500,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def check(policy: Policy, *, changes: dict[str, object] | None = None, **asked: object) -> None:
    release = asked.pop("release", dataclasses.replace(plan, **(changes or {})))
    request = {"task": "multiple-choice", "num_rounds": 10, "num_examples": 2000} | asked
    policy.check_request(release=release, **request)


def test_the_documented_example_is_read(tmp_path):
    example = re.search(r"::\n\n(.*?)\n\n\S", policy_module.__doc__, re.DOTALL).group(1)
    assert load_policy(write(tmp_path, example)) == Policy(
        max_epsilon=3.0,
        delta=1e-6,
        min_noise_multiplier=0.6,
        max_grad_norm=1.0,
        max_sample_rate=0.1,
        max_steps_per_round=200,
        max_rounds=50,
        require_privacy=True,
        require_secure_aggregation=True,
        allowed_tasks=("multiple-choice",),
        min_examples=500,
        reply_fields=("num-steps",),
    )
    keys = {line.split("=")[0].strip() for line in example.splitlines()}
    assert keys == {"format", *(item.name.replace("_", "-") for item in dataclasses.fields(Policy))}


def test_an_empty_file_keeps_the_defaults_and_requires_privacy(tmp_path):
    assert load_policy(write(tmp_path, "")) == Policy()
    assert Policy().require_privacy
    assert load_policy(write(tmp_path, "max-epsilon = 3")) == Policy(max_epsilon=3.0)


def test_without_a_file_plain_runs_are_allowed_and_private_ones_limited():
    check(default_policy(), release=None)
    check(default_policy())
    with pytest.raises(PolicyError):
        check(default_policy(), changes={"noise_multiplier": 0.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-epsilo = 3", r"unknown key 'max-epsilo' \(did you mean 'max-epsilon'\?\)"),
        ("max_epsilon = 3", "did you mean 'max-epsilon'"),
        ("[limits]\nmax-epsilon = 3", "unknown key 'limits'"),
        ("max-epsilon = 0", "max-epsilon = 0 is out of range: it must be above 0"),
        ("max-epsilon = inf", "out of range"),
        ("max-epsilon = nan", "out of range"),
        ("max-epsilon = '3'", "max-epsilon must be a number"),
        ("max-epsilon = true", "max-epsilon must be a number"),
        ("delta = 1.0", "delta = 1.0 is out of range: it must be at least 1e-12 and at most 0.1"),
        ("min-noise-multiplier = 0", "above 0"),
        ("max-sample-rate = 1.5", "above 0 and at most 1"),
        ("max-rounds = 2.0", "max-rounds must be an integer"),
        ("max-steps-per-round = 0", "at least 1"),
        ("require-privacy = 1", "require-privacy must be true or false"),
        ("allowed-tasks = 'causal-lm'", "must be a list of names"),
        ("allowed-tasks = ['causal']", r"holds 'causal'.*did you mean 'causal-lm'"),
        ("allowed-tasks = []", "allowed-tasks is empty"),
        ("reply-fields = ['los']", r"holds 'los'.*did you mean 'loss'"),
        ("max-epsilon = 3\nmax-epsilon = 4", "cannot be read"),
        ("max-epsilon", "cannot be read"),
    ],
)
def test_files_with_mistakes_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(write(tmp_path, text))
    assert "policy.toml" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path / "none.toml")


def test_what_is_within_the_limits_passes():
    check(limits)
    check(limits, target_epsilon=3.0, target_delta=1e-6, num_rounds=50, num_examples=500)
    edge = {"noise_multiplier": 0.6, "max_grad_norm": 1.0, "sample_rate": 0.1, "num_steps": 200, "server_round": 50}
    check(limits, changes=edge)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 0.59}, r"noise multiplier 0.59 \(min-noise-multiplier = 0.6\)"),
        ({"noise_multiplier": 0.0}, r"noise multiplier 0 "),
        ({"max_grad_norm": 100.0}, r"clipping norm 100 \(max-grad-norm = 1\)"),
        ({"sample_rate": 1.0}, r"sample rate 1 \(max-sample-rate = 0.1\)"),
        ({"num_steps": 201}, r"201 steps in a round \(max-steps-per-round = 200\)"),
        ({"server_round": 51}, r"round 51 \(max-rounds = 50\)"),
    ],
)
def test_a_server_that_weakens_privacy_is_refused(changes, message):
    with pytest.raises(PolicyError, match=message) as caught:
        check(limits, changes=changes)
    assert "Nothing was trained or spent" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"task": "causal-lm"}, r"task 'causal-lm' \(allowed: multiple-choice\)"),
        ({"num_rounds": 51}, r"51 rounds \(max-rounds = 50\)"),
        ({"release": None}, r"without example-level privacy \(require-privacy = true\)"),
        ({"target_epsilon": 8.0}, r"epsilon 8 \(max-epsilon = 3\)"),
        ({"target_epsilon": math.nan}, r"epsilon nan"),
        ({"target_delta": 1e-5}, r"delta 1e-05 \(delta = 1e-06\)"),
    ],
)
def test_a_server_that_asks_for_too_much_is_refused(asked, message):
    with pytest.raises(PolicyError, match=message):
        check(limits, **asked)


def test_too_little_data_is_refused_without_saying_how_much():
    with pytest.raises(PolicyError, match="fewer examples than min-examples = 500") as caught:
        check(limits, num_examples=437)
    assert "437" not in str(caught.value)


def test_everything_that_is_refused_is_named_at_once():
    with pytest.raises(PolicyError, match=r"task 'x'.*51 rounds.*noise multiplier 0 .*sample rate 1 "):
        check(limits, task="x", num_rounds=51, changes={"noise_multiplier": 0.0, "sample_rate": 1.0})


def test_only_the_allow_list_leaves_with_a_private_update():
    metrics = {"num-examples": 2000, "num-steps": 20, "num-tokens": 9, "loss": 0.5, "seconds": 1.0}
    assert limits.filter_metrics(metrics, private=True) == {"num-steps": 20}
    assert limits.filter_metrics(metrics, private=False) == metrics
    assert Policy(reply_fields=()).filter_metrics(metrics, private=True) == {}


def test_epsilon_never_leaves_without_its_delta():
    metrics = {"num-steps": 20, "epsilon": 1.5, "delta": 1e-5}
    assert Policy(reply_fields=("epsilon",)).filter_metrics(metrics, private=True) == {"epsilon": 1.5, "delta": 1e-5}
    assert Policy().filter_metrics(metrics, private=True) == {"num-steps": 20}


def test_another_format_names_the_remedy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("format = 1\nmax-epsilon = 2.0\n")
    assert load_policy(path).max_epsilon == 2.0
    path.write_text("format = 2\nmax-epsilon = 2.0\n")
    with pytest.raises(ConfigError, match=r"format 2; this release reads 1\. Install the release.*or write it anew"):
        load_policy(path)


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"batch_size": 1025}, r"batch-size 1025 \(max-batch-size = 1024\)"),
        ({"length": 2**40, "lora_r": 8}, r"length 1099511627776 \(max-length = 8192\)\."),
        ({"lora_r": 513}, "max-lora-r = 512"),
        ({"plain_steps_per_round": 10_001}, "max-plain-steps-per-round = 10000"),
        ({"length": 8193, "lora_r": 513}, "max-length = 8192.*; .*max-lora-r"),
    ],
)
def test_work_that_would_exhaust_the_client(asked: dict[str, int], refused: str) -> None:
    with pytest.raises(PolicyError, match=refused):
        default_policy().check_work(**asked)


def test_usual_work_is_allowed() -> None:
    default_policy().check_work(batch_size=1024, length=8192, lora_r=512, plain_steps_per_round=10_000)


def test_a_limit_of_more_than_64_bits_is_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f"max-rounds = {10**400}\n")
    with pytest.raises(ConfigError, match="max-rounds is out of range"):
        load_policy(tmp_path / "policy.toml")
