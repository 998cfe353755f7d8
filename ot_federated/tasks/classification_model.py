"""Class probabilities from models with a classification head, for texts and for images.

A text is read off its last token, as transformers' ``...ForSequenceClassification`` do for models that read from
left to right; an image off what its family pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ot_federated.architectures import block_config, find_architecture, find_head
from ot_federated.errors import DataError
from ot_federated.tasks.base import LabelledImage, LabelledText, Progress, Score, score_answers
from ot_federated.tasks.language_model import hidden_states, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def image_logits(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits ``(batch, classes)`` of images ``(batch, channels, height, width)``."""
    architecture = find_architecture(model.config)
    size = block_config(model.config, architecture).image_size
    own = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    arguments: dict[str, Any] = {}
    if architecture.size_argument and tuple(pixels.shape[-2:]) != own:
        arguments[architecture.size_argument] = True
    logits: torch.Tensor = model(pixel_values=pixels.to(model.device, model.dtype), **arguments).logits
    return logits


def text_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits ``(batch, classes)`` of token sequences: the head is applied to each one's last token."""
    ids, mask = pad(sequences, device=model.device)
    positions = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
    output = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    last = output.last_hidden_state[torch.arange(len(ids), device=model.device), mask.sum(dim=1) - 1]
    head = find_head(model, find_architecture(model.config))
    assert head is not None, "only models with a classification head are given labelled examples"
    logits: torch.Tensor = head(last)
    return logits


def class_logits(model: PreTrainedModel, examples: Sequence[LabelledText] | Sequence[LabelledImage]) -> torch.Tensor:
    """Return the logits ``(batch, classes)``, in fp32, of examples of one kind."""
    images = [example.read() for example in examples if isinstance(example, LabelledImage)]
    if images:
        return image_logits(model, torch.stack(images)).float()
    return text_logits(model, [e.input_ids for e in examples if isinstance(e, LabelledText)]).float()


def class_losses(
    model: PreTrainedModel, examples: Sequence[LabelledText] | Sequence[LabelledImage]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's cross-entropy ``(batch,)`` in nats, with gradient, and ones: each is one target."""
    logits = class_logits(model, examples)
    labels = torch.tensor([example.label for example in examples], device=logits.device)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return losses, torch.ones_like(labels)


@torch.inference_mode()
def score_classes(
    model: PreTrainedModel,
    examples: Sequence[LabelledText] | Sequence[LabelledImage],
    *,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Score:
    """Score a model with a classification head: mean cross-entropy in nats, and accuracy.

    Raises:
        DataError: If there is nothing to score.
    """
    if not examples:
        raise DataError("There is no example to score: the data set or its split is empty.")
    # Texts of similar length share a batch, so little is padded.
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)
    losses, right = torch.zeros(len(examples)), 0
    for start in range(0, len(order), batch_size):
        batch: Any = [examples[index] for index in order[start : start + batch_size]]
        logits = class_logits(model, batch).cpu()
        labels = torch.tensor([example.label for example in batch])
        losses[order[start : start + batch_size]] = functional.cross_entropy(logits, labels, reduction="none")
        right += int((logits.argmax(dim=1) == labels).sum())
        if on_progress:
            on_progress(len(batch))
    return score_answers(losses, right)
