"""Losses and choice scores against transformers' own full forward pass, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_federated.emulated_model import load_emulated_model
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses, pad
from ot_federated.tasks.multiple_choice import MultipleChoice, TokenisedQuestion, score_choices
from tests.families import build_family_model, byte_tokenizer, family_names


def tokens(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def loss_by_transformers(model: Any, example: Example) -> float:
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.num_context] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


examples = [Example(tokens(5, 1), 1), Example(tokens(30, 2), 27), Example(tokens(12, 3), 4), Example(tokens(2, 4), 1)]


@pytest.mark.parametrize("family", family_names)
def test_losses_are_those_of_the_full_forward_pass(family: str) -> None:
    model = build_family_model(family, tied=False)
    with torch.no_grad():
        losses, counts = example_losses(model, examples)
    assert counts.tolist() == [4, 3, 8, 1]
    expected = torch.tensor([loss_by_transformers(model, example) for example in examples])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("family", family_names)
def test_padding_never_changes_a_loss(family: str) -> None:
    model = build_family_model(family)
    with torch.no_grad():
        alone = torch.cat([example_losses(model, [example])[0] for example in examples])
        together = example_losses(model, examples)[0]
        # What stands in the padding must not matter either.
        longer = example_losses(model, [*examples, Example(tokens(60, 5), 1)])[0][: len(examples)]
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(longer, alone)


def test_padding_never_changes_a_gradient() -> None:
    model = build_family_model("llama").requires_grad_(True)
    gradients = []
    for batch in ([examples[2]], [examples[2], examples[1]]):
        example_losses(model, batch)[0][0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    # Small entries are sums of large ones that cancel: the error is that of the largest, in fp32.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5 * float(gradients[0].abs().max()))


def test_right_padding_and_its_mask() -> None:
    ids, mask = pad([(5, 6, 7), (8,)], device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def score_naively(model: Any, question: TokenisedQuestion) -> torch.Tensor:
    """Score each choice by a forward pass over the whole sequence, alone and unpadded, with all logits."""
    scores = []
    for choice in question.continuations:
        ids = torch.tensor([question.context + choice])
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]
        start = len(question.context)
        scores.append(sum(log_probs[start + i - 1, token] for i, token in enumerate(choice)))
    return torch.stack(scores)


# Contexts and choices of different lengths, and different numbers of choices.
questions = [
    TokenisedQuestion(tokens(20, 1), (tokens(3, 2), tokens(1, 3), tokens(7, 4)), (3, 1, 7), 0),
    TokenisedQuestion(tokens(3, 5), (tokens(2, 6), tokens(4, 7)), (2, 4), 1),
    TokenisedQuestion(tokens(9, 8), (tokens(1, 9), tokens(1, 10), tokens(2, 11), tokens(5, 12)), (1, 1, 2, 5), 2),
]


def assert_scores_are_naive(model: Any) -> None:
    with torch.inference_mode():
        found = score_choices(model, questions)
    for scores, question in zip(found, questions, strict=True):
        # Sums of up to seven log-probabilities near -5, through eight blocks in another order of additions.
        torch.testing.assert_close(scores, score_naively(model, question), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", family_names)
def test_choice_scores_are_those_of_whole_sequences(family: str) -> None:
    assert_scores_are_naive(build_family_model(family))


@pytest.fixture
def emulate(tmp_path: Path) -> Callable[..., Any]:
    def build(family: str, *, bottom: int, kept: list[int], top: int) -> Any:
        model = build_family_model(family)
        stack = plan_stack(num_blocks=8, bottom=bottom, top=top, kept=kept, bridged=True)
        windows = torch.tensor(tokens(512, 9)).view(8, 64)
        gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
        manifest = write_bundle(
            tmp_path / "bundle",
            model=model,
            tokenizer=byte_tokenizer(),
            stack=stack,
            bridges=fit_bridges(model, windows, gaps, ridge=0.1),
            compression="test",
        )
        return load_emulated_model(tmp_path / "bundle", manifest)

    return build


@pytest.mark.parametrize("family", family_names)
def test_choice_scores_of_an_emulated_model_with_bridges(family: str, emulate: Callable[..., Any]) -> None:
    assert_scores_are_naive(emulate(family, bottom=1, kept=[3, 4], top=1))


@pytest.mark.parametrize("family", family_names)
def test_choice_scores_where_the_stack_begins_with_a_bridge(family: str, emulate: Callable[..., Any]) -> None:
    """Without a bottom adapter the first position may be a bridge, which has no keys and values to cache."""
    assert_scores_are_naive(emulate(family, bottom=0, kept=[3, 5], top=1))


def test_a_sliding_window_shorter_than_the_question() -> None:
    model = build_family_model("mistral")
    model.config.sliding_window = 8
    model = type(model)._from_config(model.config).eval()
    assert_scores_are_naive(model)


def test_a_rigged_model_gets_the_accuracy_that_was_rigged() -> None:
    """A head that always wants the byte "a" next: the choice of most a's in its few tokens wins."""
    model = build_family_model("llama", tied=False)
    head = model.get_output_embeddings()
    favourite = byte_tokenizer()("a")["input_ids"][0]
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every hidden state becomes 0: all logits are equal
        head.weight.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(260).index_fill(0, torch.tensor([favourite]), 5.0))
    task = MultipleChoice(byte_tokenizer(), max_length=64)
    rows = [
        {"question": "?", "choices": ["aaaa", "abab", "bbbb"], "answer": 0},
        {"question": "?", "choices": ["aaaa", "abab", "bbbb"], "answer": 1},
        {"question": "?", "choices": ["b", "aab"], "answer": 1},
        {"question": "?", "choices": ["b", "aab"], "answer": 0},
    ]
    score = task.score(model, rows)
    # log-probability of "a": 5 - log(e^5 + 259) = -1.0111; of anything else: -6.0111.
    a, other = 5 - torch.tensor(5.0).exp().add(259).log().item(), -torch.tensor(5.0).exp().add(259).log().item()
    # Summed, rows 1-2: 0 wins (right once). Rows 3-4: " b" -12.02 against " aab" -14.04: 0 wins (right once).
    # Per character: 0 wins rows 1-2; " b" -12.02 / 1 against " aab" -14.04 / 3: 1 wins rows 3-4.
    assert score.accuracy == 0.5
    assert score.accuracy_normalised == 0.5
    by_hand = [(other + 4 * a) / 5, (other + 2 * a + 2 * other) / 5, (2 * other + 2 * a) / 4, (2 * other) / 2]
    assert score.loss == pytest.approx(-sum(by_hand) / 4, rel=1e-5)
