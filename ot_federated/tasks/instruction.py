"""Instruction tuning: prompt and response, with the loss on the response alone.

Where the tokenizer has a chat template, a pair is worded as one turn of user and assistant, so that the tuned model
answers in chat as its tokenizer's users expect. Without one the response follows the prompt behind an empty line.
Either way the end of the response is a target: a model that never learns to stop is of no use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ot_federated.errors import DataError
from ot_federated.tasks.base import Example, Progress, Row, Score, mean_interval
from ot_federated.tasks.language_model import example_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

num_pairs_per_batch = 8


class Instruction:
    """The instruction task.

    Args:
        tokenizer: The model's tokenizer.
        prompt_column: Column with the prompt.
        response_column: Column with the response.
        max_length: Longest example in tokens; a longer one loses the beginning of its prompt, then the end of its
            response.
    """

    name = "instruction"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_column: str = "prompt",
        response_column: str = "response",
        max_length: int = 256,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.max_length = max_length

    def encode(self, rows: Iterable[Row]) -> list[Example]:
        """Return one example a pair: prompt as context, response as target."""
        return [self._encode(row, number) for number, row in enumerate(rows)]

    @torch.inference_mode()
    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on pairs: loss and perplexity per token of the responses."""
        examples = self.encode(rows)
        if not examples:
            raise DataError("There is no pair to score: the data set or its split is empty.")
        # Pairs of similar length share a batch, so little is padded.
        order = sorted(range(len(examples)), key=lambda index: examples[index].length)
        losses, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
        for start in range(0, len(order), num_pairs_per_batch):
            batch = order[start : start + num_pairs_per_batch]
            loss, count = example_losses(model, [examples[index] for index in batch])
            losses[batch], counts[batch] = loss.float().cpu(), count.float().cpu()
            if on_progress:
                on_progress(len(batch))
        mean, low, high = mean_interval(losses, counts)
        return Score(
            loss=mean,
            loss_interval=(low, high),
            num_examples=len(examples),
            perplexity=math.exp(min(mean, 700)),
        )

    def _encode(self, row: Row, number: int) -> Example:
        prompt, response = row[self.prompt_column], row[self.response_column]
        if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
            raise DataError(
                f"Row {number}: {self.prompt_column!r} must be a text and {self.response_column!r} one that is not "
                "empty. Set data.prompt-column and data.response-column, or leave the row out."
            )
        context, target = self._tokenise(prompt.strip(), response.strip())
        target = target[: self.max_length - 1]
        context = context[-(self.max_length - len(target)) :]
        return Example((*context, *target), len(context))

    def _tokenise(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and response, apart: joined as texts, the border could fall inside a token."""
        tokenizer: Any = self.tokenizer
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": prompt}]
            opening = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": response}], tokenize=False)
            if whole.startswith(opening):
                # What the template puts behind the response ends the turn: a target too, up to its last token.
                return self._ids(opening), self._ids(whole.removeprefix(opening).rstrip("\n"))
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        begin = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
        end = [] if eos is None else [eos]
        return begin + self._ids(f"{prompt}\n\n"), self._ids(response) + end

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return ids
