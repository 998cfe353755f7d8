"""Federations under client-level privacy, for tests to run: settings, books, and what they should have spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ot_federated.model_owner.client_privacy import ClientPrivacyBooks
from ot_federated.privacy_accounting import Mechanism, epsilon_of
from ot_federated.secure_random import SecureRandom
from tests.federations import Federation, run_federation

delta = 1e-5
private = {
    "num-server-rounds": 3,
    "privacy.mode": "client",
    "privacy.noise-multiplier": 1.0,
    "privacy.target-delta": delta,
    "privacy.clients-per-round": 4,
    "privacy.update-norm": 0.01,
    "train.max-steps": 1,
}
arguments: dict[str, Any] = {"num_clients": 4}


class PowerCutError(BaseException):
    """Ends a run as a power cut would: nothing may catch it."""


class CountedRandom(SecureRandom):
    """Counts the noised sums: the first array of each is the first that is drawn for a round."""

    num_draws = 0

    def draw_normals(self, num: int) -> np.ndarray:
        CountedRandom.num_draws += 1
        return super().draw_normals(num)


def run(directory: Path, model: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> Federation:
    return run_federation(directory, model, settings=private | (settings or {}), **(arguments | changes))


def books_of(directory: Path) -> ClientPrivacyBooks:
    return ClientPrivacyBooks(directory / "run", delta=delta)


def gaussian(num_releases: int, noise_multiplier: float = 1.0) -> float:
    plan = Mechanism(noise_multiplier=noise_multiplier, sample_rate=1.0, num_steps=num_releases)
    return epsilon_of([plan], delta=delta)
