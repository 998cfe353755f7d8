"""The owner's public data as the emulator is fitted on it: texts or images, and labelled examples for a head.

With a classification head the rows are drawn in random order: where a table lists one class after the other, any part
of it still has all of them. The same order gives images and their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ot_federated.config import RunConfig
from ot_federated.errors import ConfigError, DataError
from ot_federated.logs import logger
from ot_federated.model_owner.preparation import hold_out
from ot_federated.package_assets import is_package_source
from ot_federated.sources import load_table
from ot_federated.tasks.base import AnyExample, LabelledImage, LabelledText, Task
from ot_federated.tasks.image_classification import ImageClassification
from ot_federated.tasks.losses import num_public_tokens
from ot_federated.tasks.registry import build_task, task_fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ot_federated.model_owner.owner import Parts


def read_all_labelled(config: RunConfig, task: Task) -> Any:
    """Return the public data as labelled examples, for the head to be fitted to.

    Raises:
        ConfigError: If it has no such columns.
    """
    source = config.offsite.public_text
    try:
        table = load_table(source, split=None, columns=list(config.columns.values()))
    except DataError as error:
        raise ConfigError(
            f"task.head-start='probe' fits the new head to labelled public data, and offsite.public-text={source!r} is "
            f"none: {error} Give labelled data, or set task.head-start=zero."
        ) from error
    return task.encode(table)


def read_public(config: RunConfig, parts: Parts, *, num_tokens: int | None = None) -> list[str] | torch.Tensor:
    """Return what the emulator is fitted on: public texts, or images ``(num_images, channels, height, width)``.

    ``num_tokens`` bounds how much is read; without it, what calibration and distillation ask for.
    """
    if num_tokens is None:
        num_tokens = count_public_tokens(config)
    if not isinstance(parts.task, ImageClassification):
        tokenizer = cast("PreTrainedTokenizerBase", parts.processor)
        return read_public_text(config, parts.task, tokenizer, num_tokens=num_tokens)
    table = load_table(config.offsite.public_text, split=None, columns=[config.data.image_column])
    return parts.task.read_images(_draw_images(config, parts.model, parts.task, table, num_tokens=num_tokens))


def find_labelled_public(config: RunConfig, parts: Parts) -> Sequence[AnyExample]:
    """Return the public data as labelled examples, images in the order of :func:`read_public`'s.

    There are none where the model has no classification head, or the data no labels of its classes.
    """
    offsite = config.offsite
    if not config.has_head or offsite.public_text_column or not offsite.public_text:
        return []
    num_tokens = count_public_tokens(config)
    try:
        table = load_table(offsite.public_text, split=None, columns=list(config.columns.values()))
        if isinstance(parts.task, ImageClassification):
            table = _draw_images(config, parts.model, parts.task, table, num_tokens=num_tokens)
        else:
            table = table.select(_shuffle_rows(table.num_rows, max_rows=num_tokens, seed=config.seed))
        return parts.task.encode(table)
    except DataError as error:
        logger.info("the public data is used without labels: %s", error)
        return []


def count_public_tokens(config: RunConfig) -> int:
    """Return the number of tokens that calibration and distillation ask for."""
    offsite = config.offsite
    return max(offsite.calibration_tokens, offsite.distillation_tokens if offsite.distillation_steps else 0)


def read_public_text(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int = 10**7
) -> list[str]:
    """Return the public texts that the emulator is fitted on: a text column, or examples as the task words them.

    ``num_tokens`` bounds the examples that are looked at, each of which has a token at least. Of labelled examples
    those that distillation is scored on are left out.
    """
    source, column = config.offsite.public_text, config.offsite.public_text_column
    if column:
        return [str(text) for text in load_table(source, split=None, columns=[column])[column]]
    columns = config.columns
    if is_package_source(source):
        # Sets inside packages are multiple choice with columns of our own naming, whatever the run's data has.
        columns = {name: name for name in task_fields["multiple-choice"]}
        task = build_task("multiple-choice", tokenizer, columns=columns, max_length=config.data.max_length)
    table = load_table(source, split=None, columns=list(columns.values()))
    if config.has_head:
        rows = _shuffle_rows(table.num_rows, max_rows=num_tokens, seed=config.seed)
    else:
        rows = list(range(min(table.num_rows, num_tokens)))
    examples = task.encode(table.select(rows))
    if config.offsite.distillation_steps and isinstance(examples[0], LabelledText):
        examples, _ = hold_out(examples)
    return [
        str(tokenizer.decode(list(example.input_ids), skip_special_tokens=True))
        for example in examples
        if not isinstance(example, LabelledImage)
    ]


def _draw_images(
    config: RunConfig, model: PreTrainedModel, task: ImageClassification, table: Any, *, num_tokens: int
) -> Any:
    """Return the rows of a table of images that have about ``num_tokens`` patches."""
    max_rows = max(1, num_tokens // num_public_tokens(model, task.read_images([table[0]])))
    return table.select(_shuffle_rows(table.num_rows, max_rows=max_rows, seed=config.seed))


def _shuffle_rows(num_rows: int, *, max_rows: int, seed: int) -> list[int]:
    """Return at most ``max_rows`` row numbers in random order, without replacement."""
    return [int(row) for row in np.random.default_rng([seed, num_rows]).permutation(num_rows)[:max_rows]]
