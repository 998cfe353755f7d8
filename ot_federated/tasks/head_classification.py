"""Sequence classification by a head on the text's last token, as transformers' ``...ForSequenceClassification``.

Beside :mod:`ot_federated.tasks.classification`, which needs no head but words that say the labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ot_federated.errors import DataError
from ot_federated.tasks.base import LabelledText, Progress, Row, Score
from ot_federated.tasks.classification_model import score_classes
from ot_federated.tasks.labels import find_class, number_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

num_texts_per_batch = 16


class HeadClassification:
    """The classification task, by a head.

    Args:
        tokenizer: The model's tokenizer.
        classes: Names of the classes, in the order of the head.
        text_column: Column with the text.
        label_column: Column with the label: a class's name or number.
        max_length: Longest example in tokens; a longer one loses its beginning, since the end is read off.
    """

    name = "classification"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        classes: Sequence[str],
        text_column: str = "text",
        label_column: str = "label",
        max_length: int = 256,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.label_column = label_column
        self.max_length = max_length
        self._numbers = number_classes(classes)

    def encode(self, rows: Iterable[Row]) -> list[LabelledText]:
        """Return one example a row."""
        examples = []
        for number, row in enumerate(rows):
            text = row[self.text_column]
            if not isinstance(text, str):
                raise DataError(
                    f"Row {number}: {self.text_column!r} holds {type(text).__name__}, not text. Set data.text-column."
                )
            ids: list[int] = self.tokenizer(text.strip(), verbose=False)["input_ids"]
            if not ids:
                raise DataError(f"Row {number}: the text is empty. Fill it in or leave the row out.")
            label = find_class(row[self.label_column], self._numbers, column=self.label_column, row=number)
            examples.append(LabelledText(tuple(ids[-self.max_length :]), label))
        return examples

    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on texts: cross-entropy and accuracy."""
        return score_classes(model, self.encode(rows), batch_size=num_texts_per_batch, on_progress=on_progress)
