"""Plain text as windows."""

from __future__ import annotations

import pytest
import torch

from ot_federated.errors import DataError
from ot_federated.tasks.causal_lm import CausalLanguageModelling
from tests.families import build_family_model, byte_tokenizer


def build(max_length: int = 8) -> CausalLanguageModelling:
    return CausalLanguageModelling(byte_tokenizer(), text_column="t", max_length=max_length)


def test_rows_are_joined_and_cut_into_windows() -> None:
    examples = build().encode([{"t": "abcde"}, {"t": "fghij"}, {"t": "klm"}])
    texts = [byte_tokenizer().decode(example.input_ids) for example in examples]
    assert texts == ["abcde\n\nf", "ghij\n\nkl"]  # "m" alone has no target and is left out
    assert all(example.num_context == 1 for example in examples)


def test_no_rows_are_no_windows() -> None:
    assert build().encode([]) == []
    assert build().encode([{"t": ""}]) == []


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_row_that_is_no_text_is_named_and_not_quoted(text: object) -> None:
    with pytest.raises(DataError, match=r"Row 1: 't' holds \w+, not text. Set data.text-column"):
        build().encode([{"t": "fine"}, {"t": text}])


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="no text to score"):
        build().score(build_family_model("llama"), [])


def test_perplexity_is_that_of_transformers_on_the_same_windows() -> None:
    model = build_family_model("llama")
    rows = [{"t": "The quick brown fox jumps over the lazy dog."}, {"t": "And again, and again."}]
    done: list[int] = []
    score = build(max_length=16).score(model, rows, on_progress=done.append)
    ids = byte_tokenizer()("\n\n".join(row["t"] for row in rows))["input_ids"]
    windows = [torch.tensor([ids[start : start + 16]]) for start in range(0, len(ids), 16)]
    assert len(windows[-1][0]) not in (1, 16)  # else the weights of the windows do not show
    with torch.no_grad():
        losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    tokens = [window.shape[1] - 1 for window in windows]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert score.loss == pytest.approx(mean, rel=1e-5)
    assert score.perplexity == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
    assert score.num_examples == len(windows) == sum(done)
    assert score.accuracy is None
    assert score.loss_interval[0] < score.loss < score.loss_interval[1]
