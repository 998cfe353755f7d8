"""What every task offers: examples from rows, a training loss, and a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Row = Mapping[str, Any]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Example:
    """One tokenised training example.

    Attributes:
        input_ids: All tokens.
        num_context: Leading tokens that are given; the loss is on the tokens behind them. At least 1.
    """

    input_ids: tuple[int, ...]
    num_context: int

    @property
    def length(self) -> int:
        """Tokens: examples of equal length are cheap to batch."""
        return len(self.input_ids)


@dataclass(frozen=True)
class LabelledText:
    """A tokenised text and the number of its class: for a model with a classification head."""

    input_ids: tuple[int, ...]
    label: int

    @property
    def length(self) -> int:
        """Tokens: examples of equal length are cheap to batch."""
        return len(self.input_ids)


@dataclass(frozen=True)
class LabelledImage:
    """An image and the number of its class.

    Attributes:
        read: Gives the image as the model wants it, ``(channels, height, width)``. It is decoded when it is used:
            a set of photographs fits into memory as files, not as numbers.
        label: Number of its class.
    """

    read: Callable[[], torch.Tensor]
    label: int

    @property
    def length(self) -> int:
        """All images are of one size."""
        return 1


# What a task may be learnt from; ``tasks.losses`` knows each kind's loss.
AnyExample = Example | LabelledText | LabelledImage


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a model does on a set of examples.

    Attributes:
        loss: Mean negative log-likelihood per target token, in nats.
        loss_interval: Its 95 % interval.
        num_examples: Examples scored.
        accuracy: Share of examples whose right choice has the highest summed log-probability, in [0, 1].
        accuracy_interval: Its 95 % interval (Wilson).
        accuracy_normalised: The same with log-probability per character of the choice.
        perplexity: exp(loss), for language modelling.
    """

    loss: float
    loss_interval: tuple[float, float]
    num_examples: int
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    accuracy_normalised: float | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the measured fields as JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }


class Task(Protocol):
    """A task: how rows become examples, and how a model is trained and scored on them."""

    name: str

    def encode(self, rows: Iterable[Row]) -> Sequence[AnyExample]:
        """Turn rows into training examples.

        Raises:
            DataError: If a row does not hold what the task needs; the message gives its number, not its text.
        """
        ...

    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on rows; ``on_progress`` is called with the number of examples done."""
        ...


def mean_interval(values: torch.Tensor, weights: torch.Tensor) -> tuple[float, float, float]:
    """Return the weighted mean of per-example values and its 95 % interval (ratio estimator)."""
    total = weights.sum()
    mean = (values * weights).sum() / total
    num = len(values)
    if num < 2:
        return float(mean), float(mean), float(mean)
    residuals = weights * (values - mean)
    error = 1.96 * math.sqrt(float((residuals**2).sum()) * num / (num - 1)) / float(total)
    return float(mean), float(mean) - error, float(mean) + error


def score_answers(losses: torch.Tensor, num_right: int) -> Score:
    """Return the score of examples that have one right answer each, from their losses and how many were right."""
    loss, low, high = mean_interval(losses, losses.new_ones(len(losses)))
    return Score(
        loss=loss,
        loss_interval=(low, high),
        num_examples=len(losses),
        accuracy=num_right / len(losses),
        accuracy_interval=wilson_interval(num_right, len(losses)),
    )


def wilson_interval(num_right: int, num_examples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (E. B. Wilson, JASA 1927)."""
    z = 1.96
    share = num_right / num_examples
    centre = (share + z * z / (2 * num_examples)) / (1 + z * z / num_examples)
    half = (
        z / (1 + z * z / num_examples) * math.sqrt(share * (1 - share) / num_examples + (z / (2 * num_examples)) ** 2)
    )
    return max(0.0, centre - half), min(1.0, centre + half)
