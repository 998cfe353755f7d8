"""What differs between models that read texts, that read images, and that end in a classification head.

Training, private training, calibration and the self-check come here; below them nobody asks what a model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ot_federated.architectures import block_config, find_architecture, find_head
from ot_federated.errors import ConfigError
from ot_federated.tasks import language_model
from ot_federated.tasks.base import AnyExample, Example, LabelledImage, LabelledText
from ot_federated.tasks.classification_model import class_losses, image_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def example_losses(model: PreTrainedModel, examples: Sequence[AnyExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's mean loss over its own targets ``(batch,)``, with gradient, and their number ``(batch,)``.

    The mean is over the example's own targets, never the batch's: one example's weight must not depend on the
    others, or per-example clipping would not bound its influence.

    Args:
        model: The model.
        examples: Examples of one kind: of one task.
    """
    if isinstance(examples[0], Example):
        return language_model.example_losses(model, continuations(examples))
    return class_losses(model, examples)  # type: ignore[arg-type]  # of one kind


def num_positions(examples: Sequence[AnyExample]) -> int:
    """Return the number of tokens, or of images, in all examples, padding not counted."""
    return sum(example.length for example in examples)


def continuations(examples: Sequence[AnyExample]) -> list[Example]:
    """Return examples that are tokens to be continued, for what looks at the tokens.

    Raises:
        ConfigError: If there are others.
    """
    found = [example for example in examples if isinstance(example, Example)]
    if len(found) < len(examples):
        raise ConfigError(
            "This reads a language model's tokens, and the task has a classification head. Use a task without one: "
            "multiple-choice, causal-lm, instruction, or classification with task.classifier=verbaliser."
        )
    return found


def predicts_tokens(model: PreTrainedModel, inputs: torch.Tensor) -> bool:
    """Whether a model predicts the next token of such inputs: it reads text and has no classification head."""
    return not inputs.is_floating_point() and find_head(model, find_architecture(model.config)) is None


def run_model(model: PreTrainedModel, batch: torch.Tensor) -> None:
    """Run the model on public inputs, for what hooks see.

    Args:
        model: The model.
        batch: Token windows ``(batch, window)``, integers, or images ``(batch, channels, height, width)``.
    """
    if batch.is_floating_point():
        image_logits(model, batch)
        return
    ids = batch.to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    language_model.hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)


def num_public_tokens(model: PreTrainedModel, windows: torch.Tensor) -> int:
    """Return the number of tokens in public inputs: of text, or of images' patches."""
    if not windows.is_floating_point():
        return windows.numel()
    patch: int = block_config(model.config, find_architecture(model.config)).patch_size
    return max(1, len(windows) * windows[0, 0].numel() // patch**2)


def make_up_examples(model: PreTrainedModel, *, shapes: Sequence[tuple[int, int]], seed: int) -> list[AnyExample]:
    """Return random examples of the kind that the model learns from.

    Args:
        model: The model.
        shapes: Length of each example and how much of it is given; of images only their number matters.
        seed: Seed of the content.
    """
    architecture = find_architecture(model.config)
    rng = np.random.default_rng(seed)
    classifies, num_classes = find_head(model, architecture) is not None, model.config.num_labels or 1
    if architecture.kind == "image":
        config = block_config(model.config, architecture)
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        images = [torch.from_numpy(rng.normal(size=(config.num_channels, *size))).float() for _ in shapes]
        return [_made_up_image(image, label=int(rng.integers(num_classes))) for image in images]
    vocabulary_size = model.config.get_text_config().vocab_size
    texts = [(tuple(int(t) for t in rng.integers(vocabulary_size, size=length)), num) for length, num in shapes]
    if classifies:
        return [LabelledText(ids, int(rng.integers(num_classes))) for ids, _ in texts]
    return [Example(ids, num) for ids, num in texts]


def _made_up_image(image: torch.Tensor, *, label: int) -> LabelledImage:
    return LabelledImage(lambda: image, label)
