"""Tasks by their name in the run config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ot_federated.config import RunConfig
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.label_words import check_prompt, parse_label_words
from ot_federated.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

task_fields = {
    "multiple-choice": ("question", "choices", "answer"),
    "causal-lm": ("text",),
    "classification": ("text", "label"),
}


def build_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str],
    max_length: int,
    label_words: str = "",
    prompt: str = "",
) -> Task:
    """Build a task.

    Args:
        name: One of :data:`task_fields`.
        tokenizer: The model's tokenizer.
        columns: The data's column for each field of the task.
        max_length: Longest example in tokens.
        label_words: The labels and their words, for classification.
        prompt: What the model reads, with ``{text}`` in it, for classification.

    Raises:
        ConfigError: If the name is unknown, or the label words or the prompt are not what they must be.
    """
    from ot_federated.tasks.causal_lm import CausalLanguageModelling
    from ot_federated.tasks.classification import Classification
    from ot_federated.tasks.multiple_choice import MultipleChoice

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


def build_configured_task(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Build the task of a run config."""
    return build_task(
        config.task.name,
        tokenizer,
        columns=config.columns,
        max_length=config.data.max_length,
        label_words=config.task.label_words,
        prompt=config.task.prompt,
    )
