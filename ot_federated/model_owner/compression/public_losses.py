"""A loss for each public example, for the gradient that a task's loss has below it.

Language models predict the next token. With a classification head the loss is the task's own where there are labelled
public examples and the head knows something. Without labels, or with a head that is still zero (whose gradient below
it is zero too), nothing is known of the gradient at the head's input but that the middle carries it down by the
transposed Jacobian J. So the loss is the projection of what the head reads on a random direction r of signs, another
one for each example: J'r has the covariance E[J'rr'J] = J'J, whatever the labels are (M. F. Hutchinson, "A Stochastic
Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines", Communications in Statistics 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ot_federated.architectures import find_architecture, find_head
from ot_federated.model_owner.compression.plug_in_validation import cut_windows
from ot_federated.model_owner.head_start import has_untrained_head
from ot_federated.tasks.base import AnyExample, Example
from ot_federated.tasks.classification_model import image_logits, text_logits
from ot_federated.tasks.losses import example_losses, predicts_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

projection_seed = 0


@dataclass(frozen=True)
class PublicLoss:
    """The loss of one public example.

    Attributes:
        compute: Runs the model on it and returns the loss, with its gradient.
        num_idle: Last tokens that the gradient does not reach: what predicts the next token has no use for the last.
    """

    compute: Callable[[], torch.Tensor]
    num_idle: int = 0


def uses_labels(model: PreTrainedModel, labelled: Sequence[AnyExample]) -> bool:
    """Whether the loss of labelled examples says something: there are some, and the head is not zero."""
    return bool(labelled) and not has_untrained_head(model)


def public_losses(
    model: PreTrainedModel, windows: torch.Tensor, labelled: Sequence[AnyExample] = ()
) -> Iterator[PublicLoss]:
    """Yield the losses of public examples, one by one.

    Args:
        model: The full model.
        windows: Token windows of public text, or public images; unused where labels are used.
        labelled: Labelled public examples.
    """
    if predicts_tokens(model, windows):
        for row in windows.tolist():
            yield PublicLoss(_Labelled(model, Example(tuple(row), 1)), num_idle=1)
    elif uses_labels(model, labelled):
        for example in labelled:
            yield PublicLoss(_Labelled(model, example))
    else:
        generator = torch.Generator().manual_seed(projection_seed)
        inputs = windows if windows.is_floating_point() else [piece.input_ids for piece in cut_windows(windows)]
        for item in inputs:
            yield PublicLoss(_Projected(model, item, generator))


@dataclass(frozen=True)
class _Labelled:
    """The summed loss of an example's targets."""

    model: PreTrainedModel
    example: AnyExample

    def __call__(self) -> torch.Tensor:
        losses, counts = example_losses(self.model, [self.example])
        return (losses * counts).sum()


@dataclass(frozen=True)
class _Projected:
    """What the head reads of an image or a text, on a random direction."""

    model: PreTrainedModel
    item: torch.Tensor | tuple[int, ...]
    generator: torch.Generator

    def __call__(self) -> torch.Tensor:
        head = find_head(self.model, find_architecture(self.model.config))
        assert head is not None, "a model without one predicts tokens"
        read: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            if isinstance(self.item, torch.Tensor):
                image_logits(self.model, self.item[None])
            else:
                text_logits(self.model, [self.item])
        finally:
            handle.remove()
        signs = torch.randint(0, 2, read[0].shape, generator=self.generator) * 2 - 1
        return (read[0].float() * signs.to(read[0].device)).sum()
