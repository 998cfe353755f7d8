"""Sequence classification by verbaliser: each label is a word that the language model could write.

Timo Schick, Hinrich Schütze, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
Inference", 2021, https://arxiv.org/abs/2001.07676, with a prompt that ends where the word belongs. A text becomes a
multiple-choice question whose choices are the label words, so training and scoring are those of
:mod:`ot_federated.tasks.multiple_choice`, and no classification head has to be trained, noised or aggregated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ot_federated.errors import DataError
from ot_federated.tasks.base import Row
from ot_federated.tasks.multiple_choice import MultipleChoice, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Classification(MultipleChoice):
    """The classification task.

    Args:
        tokenizer: The model's tokenizer.
        text_column: Column with the text.
        label_column: Column with the label: a label's name, its word, or its number from 0.
        label_words: The word of each label by the label's name, in the order of their numbers.
        prompt: What the model reads, with ``{text}`` where the text belongs; the label word follows a space.
        max_length: Longest example in tokens; a longer one loses its beginning.
    """

    name = "classification"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_column: str = "text",
        label_column: str = "label",
        label_words: Mapping[str, str],
        prompt: str,
        max_length: int = 256,
    ) -> None:
        super().__init__(
            tokenizer, question_column=text_column, answer_column=label_column, prompt=prompt, max_length=max_length
        )
        self.words = tuple(label_words.values())
        self._numbers = {
            **{str(number): number for number in range(len(label_words))},
            **{word: number for number, word in enumerate(label_words.values())},
            **{label: number for number, label in enumerate(label_words)},
        }

    def _read(self, row: Row, number: int) -> Question:
        text, label = row[self.question_column], row[self.answer_column]
        if not isinstance(text, str):
            raise DataError(f"Row {number}: {self.question_column!r} must be a text. Set data.text-column.")
        return Question(text.strip(), self.words, self._find_number(label, number))

    def _find_number(self, label: Any, number: int) -> int:
        if isinstance(label, float) and label.is_integer():  # pandas' integers, in a column with a gap
            label = int(label)
        found = None if isinstance(label, bool) else self._numbers.get(str(label).strip())
        if found is None:
            # The label itself is private: only what was allowed is told.
            raise DataError(
                f"Row {number}: {self.answer_column!r} must be one of {', '.join(self._numbers)}. Correct the row, or "
                "set data.label-column or task.label-words."
            )
        return found
