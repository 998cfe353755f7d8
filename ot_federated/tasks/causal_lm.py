"""Causal language modelling on plain text, scored by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ot_federated.errors import DataError
from ot_federated.tasks.base import Example, Progress, Row, Score, mean_interval
from ot_federated.tasks.language_model import example_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

num_windows_per_batch = 4


class CausalLanguageModelling:
    """The language-modelling task: all rows joined by blank lines and cut into windows of ``max_length`` tokens.

    A window's first token is given and the others are targets, so each window is scored on its own.
    """

    name = "causal-lm"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, text_column: str = "text", max_length: int = 256) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.max_length = max_length

    def encode(self, rows: Iterable[Row]) -> list[Example]:
        """Return the windows of the joined rows."""
        texts = []
        for number, row in enumerate(rows):
            text = row[self.text_column]
            if not isinstance(text, str):
                raise DataError(
                    f"Row {number}: {self.text_column!r} holds {type(text).__name__}, not text. Set data.text-column."
                )
            texts.append(text)
        text = "\n\n".join(texts)
        ids = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"] if text else []
        # Where the tokenizer begins a text with a token of its own, each window begins with it: it is scored alone.
        begin = self.tokenizer("a")["input_ids"][:1]
        start_ids = begin if begin and begin == [self.tokenizer.bos_token_id] else []
        size = self.max_length - len(start_ids)
        windows = [start_ids + ids[start : start + size] for start in range(0, len(ids), size)]
        return [Example(tuple(window), 1) for window in windows if len(window) > 1]

    @torch.inference_mode()
    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on the windows of ``rows``; loss and perplexity are per token."""
        windows = self.encode(rows)
        if not windows:
            raise DataError("There is no text to score: the data set or its split is empty.")
        losses, counts = [], []
        for start in range(0, len(windows), num_windows_per_batch):
            batch = windows[start : start + num_windows_per_batch]
            loss, count = example_losses(model, batch)
            losses.append(loss.float().cpu())
            counts.append(count.float().cpu())
            if on_progress:
                on_progress(len(batch))
        mean, low, high = mean_interval(torch.cat(losses), torch.cat(counts))
        return Score(
            loss=mean,
            loss_interval=(low, high),
            num_examples=len(windows),
            perplexity=math.exp(min(mean, 700)),
        )
