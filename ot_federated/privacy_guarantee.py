"""An epsilon with all that gives it a meaning: what is reported, wherever privacy is reported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ot_federated.privacy_accounting import check_delta


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a data owner can say of everything that ever left a data set. No field has a default.

    Attributes:
        epsilon: At least 0; inf where something left without noise.
        delta: The delta of (epsilon, delta), in [1e-12, 1).
        unit: What the noise hides: ``example``.
        adjacency: What neighbouring data sets are: ``add-remove-one``.
        sampling: How batches are drawn, which epsilon rests on: ``poisson``.

    Raises:
        ConfigError: If delta is out of its range.
        ValueError: If epsilon is no epsilon, or a name is empty.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampling: str

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if math.isnan(self.epsilon) or self.epsilon < 0 or not (self.unit and self.adjacency and self.sampling):
            raise ValueError(f"{self.epsilon=}, {self.unit=}, {self.adjacency=}, {self.sampling=} are no guarantee.")

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.4f} at delta {self.delta:g} (unit: {self.unit}, adjacency: {self.adjacency}, "
            f"sampling: {self.sampling})"
        )
