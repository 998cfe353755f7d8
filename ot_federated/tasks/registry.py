"""Tasks by their name in the run config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ot_federated.config import RunConfig
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.label_words import check_prompt, parse_label_words
from ot_federated.tasks.base import Task

if TYPE_CHECKING:
    from ot_federated.processors import Processor

task_fields = {
    "multiple-choice": ("question", "choices", "answer"),
    "causal-lm": ("text",),
    "instruction": ("prompt", "response"),
    "classification": ("text", "label"),
    "image-classification": ("image", "label"),
}


def build_task(
    name: str,
    processor: Processor,
    *,
    columns: Mapping[str, str],
    max_length: int,
    label_words: str = "",
    prompt: str = "",
    classes: Sequence[str] = (),
) -> Task:
    """Build a task.

    Args:
        name: One of :data:`task_fields`.
        processor: The model's tokenizer or image processor.
        columns: The data's column for each field of the task.
        max_length: Longest example in tokens.
        label_words: The labels and their words, for classification by verbaliser.
        prompt: What the model reads, with ``{text}`` in it, for classification by verbaliser.
        classes: Names of the classes of the model's classification head; empty where it has none.

    Raises:
        ConfigError: If the name is unknown, or the label words or the prompt are not what they must be.
    """
    from ot_federated.tasks.causal_lm import CausalLanguageModelling
    from ot_federated.tasks.classification import Classification
    from ot_federated.tasks.head_classification import HeadClassification
    from ot_federated.tasks.image_classification import ImageClassification
    from ot_federated.tasks.instruction import Instruction
    from ot_federated.tasks.multiple_choice import MultipleChoice

    if name == "image-classification":
        return ImageClassification(
            processor, classes=classes, image_column=columns["image"], label_column=columns["label"]
        )
    tokenizer: Any = processor
    if name == "multiple-choice":
        return MultipleChoice(
            tokenizer,
            question_column=columns["question"],
            choices_column=columns["choices"],
            answer_column=columns["answer"],
            max_length=max_length,
        )
    if name == "causal-lm":
        return CausalLanguageModelling(tokenizer, text_column=columns["text"], max_length=max_length)
    if name == "instruction":
        return Instruction(
            tokenizer,
            prompt_column=columns["prompt"],
            response_column=columns["response"],
            max_length=max_length,
        )
    if name == "classification" and classes:
        return HeadClassification(
            tokenizer,
            classes=classes,
            text_column=columns["text"],
            label_column=columns["label"],
            max_length=max_length,
        )
    if name == "classification":
        return Classification(
            tokenizer,
            text_column=columns["text"],
            label_column=columns["label"],
            label_words=parse_label_words(label_words),
            prompt=check_prompt(prompt),
            max_length=max_length,
        )
    raise ConfigError(f"task.name={name!r} is unknown{nearest_match(name, task_fields)}.")


def build_configured_task(config: RunConfig, processor: Processor, *, classes: Sequence[str] = ()) -> Task:
    """Build the task of a run config; ``classes`` are those of the model's head, where the task has one.

    Raises:
        ConfigError: If model and config do not agree on a head.
    """
    if bool(classes) != config.has_head:
        wanted, found = ("a", "has none") if config.has_head else ("no", "has one")
        raise ConfigError(
            f"task.name={config.task.name!r} with task.classifier={config.task.classifier!r} wants a model with "
            f"{wanted} classification head, and the bundle's model {found}. Take the bundle of this run's settings."
        )
    return build_task(
        config.task.name,
        processor,
        columns=config.columns,
        max_length=config.data.max_length,
        label_words=config.task.label_words,
        prompt=config.task.prompt,
        classes=classes,
    )
