"""Whether tokenised examples fit the model that is to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ot_federated.errors import DataError
from ot_federated.tasks.base import AnyExample, LabelledImage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Above this share of unknown tokens there is nothing to learn from.
max_unknown = 0.5


def check_vocabulary(
    examples: Sequence[AnyExample], model: PreTrainedModel, *, what: str, unknown: int | None = None
) -> None:
    """Check that every token has an embedding, and that the tokenizer knows the text; images pass.

    On a GPU a token without an embedding ends the process with a message that says nothing.

    Args:
        examples: The examples.
        model: The model, or an emulated one.
        what: Where they come from, for the message.
        unknown: The tokenizer's unknown token, if it has one.

    Raises:
        DataError: If a token is none of the model's, or most of the text is unknown to the tokenizer.
    """
    texts = [example.input_ids for example in examples if not isinstance(example, LabelledImage)]
    if not texts:
        return
    check_token(max(max(ids) for ids in texts), model, what=what)
    num_tokens, num_unknown = sum(map(len, texts)), sum(ids.count(unknown) for ids in texts if unknown is not None)
    if num_unknown > max_unknown * num_tokens:
        raise DataError(
            f"Of {what}'s {num_tokens} tokens {num_unknown} are unknown to the tokenizer: it was made for other text. "
            "Take the model's own tokenizer, or a model for this language."
        )


def check_token(token: int, model: PreTrainedModel, *, what: str) -> None:
    """Check that a token has an embedding.

    Raises:
        DataError: If not.
    """
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = int(embeddings.weight.shape[0])
    if token >= num_embeddings:
        raise DataError(
            f"The tokenizer gives {what} the token {token}, and the model's vocabulary has {num_embeddings}: the "
            "tokenizer is another model's. Take the model's own, or resize its embeddings."
        )
