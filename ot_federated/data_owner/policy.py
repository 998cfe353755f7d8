"""The data owner's policy: what a server may ask of this client, whatever the run config says.

A TOML file on the data owner's disk (node config ``policy``). Every key is optional::

    format = 1                              # of this file; absent: the one that the installed release reads
    max-epsilon = 3.0                       # never spend more than this on the data set, over all runs
    delta = 1e-6                            # at this delta, which must be below 1 / number of examples
    min-noise-multiplier = 0.6              # sigma: noise over clipping norm
    max-grad-norm = 1.0                     # C: largest clipping norm
    max-sample-rate = 0.1                   # q: logical batch size over number of examples
    max-steps-per-round = 200               # of a round with privacy
    max-plain-steps-per-round = 10000       # of one without
    max-batch-size = 1024                   # examples in a step without privacy
    max-length = 8192                       # tokens of the longest example
    max-lora-r = 512                        # rank of LoRA
    max-rounds = 50                         # of one run
    require-privacy = true                  # refuse runs without example-level privacy
    require-secure-aggregation = true       # refuse runs in which the server would see this client's own update
    allowed-tasks = ["multiple-choice"]     # absent: every task
    min-examples = 500                      # refuse to take part with fewer
    reply-fields = ["num-steps"]            # metrics that leave with a private update, and no others

Keys that are absent keep the defaults of :class:`Policy`, ``require-privacy = true`` among them: a budget that
a server could pass by by not asking for privacy would be none. Without a policy file the same limits hold for
private runs, and runs without privacy are allowed: :func:`default_policy`.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_federated.config import list_keys
from ot_federated.data_owner.ledger_entries import Release
from ot_federated.errors import ConfigError, OtFederatedError, nearest_match
from ot_federated.privacy_accounting import smallest_delta

format_version = 1
# Metrics that a client can send. The others of a private round stay: losses, scores and counts of private data are
# not covered by the noise.
known_reply_fields = ("epsilon", "loss", "num-examples", "num-steps", "num-tokens", "seconds")


class PolicyError(OtFederatedError):
    """The server asks for something that the data owner's policy does not allow."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A data owner's limits.

    Attributes:
        max_epsilon: The most that may ever be spent on the data set, over all runs, above 0.
        delta: The delta that goes with it, in [1e-12, 0.1].
        min_noise_multiplier: Least noise over clipping norm, above 0.
        max_grad_norm: Largest clipping norm, above 0.
        max_sample_rate: Largest probability of an example to be in a batch, in (0, 1].
        max_steps_per_round: Most steps of a private round, at least 1.
        max_rounds: Most rounds of a run, at least 1.
        max_plain_steps_per_round: Most steps of a round without privacy, at least 1.
        max_batch_size: Most examples in a step of a round without privacy, at least 1.
        max_length: Longest example in tokens, at least 8.
        max_lora_r: Largest rank of LoRA, at least 1.
        require_privacy: Whether runs without example-level privacy are refused.
        require_secure_aggregation: Whether runs are refused in which an update leaves unmasked.
        allowed_tasks: Tasks that may be trained; empty: every task.
        min_examples: Least number of examples to take part with, at least 1.
        reply_fields: Metrics that leave with a private update.
    """

    max_epsilon: float = 8.0
    delta: float = 1e-5
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_sample_rate: float = 0.5
    max_steps_per_round: int = 1000
    max_rounds: int = 100
    max_plain_steps_per_round: int = 10_000
    max_batch_size: int = 1024
    max_length: int = 8192
    max_lora_r: int = 512
    require_privacy: bool = True
    require_secure_aggregation: bool = False
    allowed_tasks: tuple[str, ...] = ()
    min_examples: int = 1
    reply_fields: tuple[str, ...] = ("num-steps",)

    def check_masked(self, *, masked: bool) -> None:
        """Check that an update leaves as it may.

        Raises:
            PolicyError: If it would leave unmasked and may not.
        """
        if self.require_secure_aggregation and not masked:
            raise PolicyError(
                "The data owner's policy allows no update that leaves unmasked (require-secure-aggregation): set "
                "strategy.secure-aggregation=true."
            )

    def check_work(self, **asked: int) -> None:
        """Check how much work a server asks for, before anything is read or built for it.

        Args:
            asked: Any of ``plain_steps_per_round``, ``batch_size``, ``length`` and ``lora_r``.

        Raises:
            PolicyError: Naming everything that is more than the policy allows.
        """
        limits = {name: int(getattr(self, f"max_{name}")) for name in asked}
        refused = [
            f"{name.replace('_', '-')} {asked[name]} (max-{name.replace('_', '-')} = {limit})"
            for name, limit in limits.items()
            if asked[name] > limit
        ]
        if refused:
            raise PolicyError(
                f"The data owner's policy refuses so much work: {'; '.join(refused)}. Nothing was trained. Change the "
                "run config, or agree on another policy with the data owner."
            )

    def check_request(
        self,
        *,
        task: str,
        num_rounds: int,
        num_examples: int,
        release: Release | None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
    ) -> None:
        """Check what a server asks for, before anything is trained or spent.

        Args:
            task: Name of the task.
            num_rounds: Rounds of the run.
            num_examples: Examples that this client would train on. No message quotes it.
            release: The round that should be trained with privacy; None for a round without.
            target_epsilon: Epsilon that the server plans with, where it names one.
            target_delta: Delta that the server plans with, where it names one.

        Raises:
            PolicyError: Naming everything that was asked for and is not allowed, and what is.
        """
        refused = []
        if self.allowed_tasks and task not in self.allowed_tasks:
            refused.append(f"task {task!r} (allowed: {', '.join(self.allowed_tasks)})")
        if num_rounds > self.max_rounds:
            refused.append(f"{num_rounds} rounds (max-rounds = {self.max_rounds})")
        if num_examples < self.min_examples:
            refused.append(f"training on fewer examples than min-examples = {self.min_examples}")
        if release is not None:
            refused += self._refused_by_release(release)
            if target_epsilon is not None and not target_epsilon <= self.max_epsilon:
                refused.append(f"epsilon {target_epsilon:g} (max-epsilon = {self.max_epsilon:g})")
            if target_delta is not None and not target_delta <= self.delta:
                refused.append(f"delta {target_delta:g} (delta = {self.delta:g})")
        elif self.require_privacy:
            refused.append("training without example-level privacy (require-privacy = true)")
        if refused:
            raise PolicyError(
                f"The data owner's policy refuses what the server asks for: {'; '.join(refused)}. Nothing was trained "
                "or spent. Change the run config, or agree on another policy with the data owner."
            )

    def filter_metrics(self, metrics: Mapping[str, int | float], *, private: bool) -> dict[str, int | float]:
        """Return the metrics that may leave: all of a round without privacy, else those of ``reply_fields``.

        With an epsilon goes its delta, without which it means nothing.
        """
        allowed = {*self.reply_fields, *(["delta"] if "epsilon" in self.reply_fields else [])}
        return {name: value for name, value in metrics.items() if not private or name in allowed}

    def _refused_by_release(self, release: Release) -> list[str]:
        refused = []
        # "not at least", so that a value that is not a number is refused too.
        if not release.noise_multiplier >= self.min_noise_multiplier:
            refused.append(
                f"noise multiplier {release.noise_multiplier:g} (min-noise-multiplier = {self.min_noise_multiplier:g})"
            )
        if not release.max_grad_norm <= self.max_grad_norm:
            refused.append(f"clipping norm {release.max_grad_norm:g} (max-grad-norm = {self.max_grad_norm:g})")
        if not release.sample_rate <= self.max_sample_rate:
            refused.append(f"sample rate {release.sample_rate:g} (max-sample-rate = {self.max_sample_rate:g})")
        if release.num_steps > self.max_steps_per_round:
            refused.append(f"{release.num_steps} steps in a round (max-steps-per-round = {self.max_steps_per_round})")
        if release.server_round > self.max_rounds:
            refused.append(f"round {release.server_round} (max-rounds = {self.max_rounds})")
        return refused


def default_policy() -> Policy:
    """Return the policy of an owner without a policy file: runs without privacy are allowed, the limits are as usual.

    Who simulates, or trains on public data, needs no file; who has something to protect writes one.
    """
    return Policy(require_privacy=False)


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: If it cannot be read, or as :func:`parse_policy`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The policy file {path} cannot be read ({error}). Give a TOML file.") from error
    return parse_policy(data, place=str(path))


def parse_policy(data: bytes, *, place: str) -> Policy:
    """Read a policy from the bytes of its file, which errors call ``place``.

    Raises:
        ConfigError: If it is no TOML, is of another format, or has an unknown key (the nearest match is named), a
            value of the wrong type, or one out of range. A policy is never applied in part.
    """
    try:
        values = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The policy file {place} cannot be read ({error}). Give a TOML file.") from error
    if (version := values.pop("format", format_version)) != format_version:
        raise ConfigError(
            f"{place} has format {version!r}; this release reads {format_version}. Install the release of ot-federated "
            "that it was written for, or write it anew for this one."
        )
    fields = {item.name.replace("_", "-"): item for item in dataclasses.fields(Policy)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"{place}: unknown key {key!r}{nearest_match(key, fields)}. The keys are {known}.")
        arguments[fields[key].name] = _check_value(place, key, value, default=fields[key].default)
    return Policy(**arguments)


# Per numeric key: the lowest value, whether it is itself allowed, and the highest.
_ranges: dict[str, tuple[float, bool, float]] = {
    "max-epsilon": (0, False, math.inf),
    "delta": (smallest_delta, True, 0.1),
    "min-noise-multiplier": (0, False, math.inf),
    "max-grad-norm": (0, False, math.inf),
    "max-sample-rate": (0, False, 1),
    "max-steps-per-round": (1, True, math.inf),
    "max-rounds": (1, True, math.inf),
    "max-plain-steps-per-round": (1, True, math.inf),
    "max-batch-size": (1, True, math.inf),
    "max-length": (8, True, math.inf),
    "max-lora-r": (1, True, math.inf),
    "min-examples": (1, True, math.inf),
}


def _check_value(place: str, key: str, value: object, *, default: object) -> object:
    if isinstance(default, tuple):
        return _check_names(place, key, value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{place}: {key} must be true or false, not {value!r}.")
        return value
    if isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else (int, float)):
        kind = "an integer" if isinstance(default, int) else "a number"
        raise ConfigError(f"{place}: {key} must be {kind}, not {value!r}.")
    if abs(value) >= 2**63:
        raise ConfigError(f"{place}: {key} is out of range: no limit has more than 64 bits.")
    low, inclusive, high = _ranges[key]
    if not (math.isfinite(value) and (value >= low if inclusive else value > low) and value <= high):
        limits = f"{'at least' if inclusive else 'above'} {low:g}" + (
            f" and at most {high:g}" if math.isfinite(high) else ""
        )
        raise ConfigError(f"{place}: {key} = {value} is out of range: it must be {limits}.")
    return value if isinstance(default, int) else float(value)


def _check_names(place: str, key: str, value: object) -> tuple[str, ...]:
    allowed = known_reply_fields if key == "reply-fields" else list_keys()["task.name"].choices
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{place}: {key} must be a list of names, not {value!r}.")
    for name in value:
        if name not in allowed:
            raise ConfigError(
                f"{place}: {key} holds {name!r}, which is not one of {', '.join(allowed)}"
                f"{nearest_match(name, allowed)}."
            )
    if key == "allowed-tasks" and not value:
        raise ConfigError(f"{place}: {key} is empty, which would allow nothing. Name a task, or drop the key.")
    return tuple(value)
