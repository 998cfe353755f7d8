"""Multiple choice: rows as people write them, what is refused, and scores by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ot_federated.errors import ConfigError, DataError
from ot_federated.tasks import multiple_choice
from ot_federated.tasks.multiple_choice import MultipleChoice, TokenisedQuestion
from ot_federated.tasks.registry import build_task
from tests.families import byte_tokenizer


@pytest.fixture
def task() -> MultipleChoice:
    return MultipleChoice(byte_tokenizer(), max_length=64)


def row(answer: Any, choices: Any = ("red", "green", "blue"), question: Any = "Sky?") -> dict[str, Any]:
    return {"question": question, "choices": list(choices) if isinstance(choices, tuple) else choices, "answer": answer}


def answer_text(task: MultipleChoice, given: dict[str, Any]) -> str:
    """Return the text that the model is trained to say."""
    (example,) = task.encode([given])
    return task.tokenizer.decode(example.input_ids[example.num_context :])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *((0, " red"), (2, " blue"), ("A", " red"), ("c", " blue"), (" B ", " green"), ("0", " red"), ("2", " blue")),
        ("green", " green"),
    ],
)
def test_answer_as_index_letter_digit_or_text(task: MultipleChoice, answer: Any, text: str) -> None:
    assert answer_text(task, row(answer)) == text


@pytest.mark.parametrize(
    ("labels", "answer", "text"),
    [
        (["A", "B", "C"], "B", " green"),
        (["1", "2", "3"], "1", " red"),  # ARC has such questions: its "1" is the first choice, not the second
        (["1", "2", "3"], "3", " blue"),
        (["x", "y", "z"], "z", " blue"),
        (["A", "B", "C"], "red", " red"),
        (["A", "B", "C"], 1, " green"),
    ],
)
def test_labels_of_the_hubs_sets(task: MultipleChoice, labels: list[str], answer: Any, text: str) -> None:
    assert answer_text(task, row(answer, {"text": ["red", "green", "blue"], "label": labels})) == text


def test_text_of_a_choice_goes_before_its_reading_as_letter_or_digit(task: MultipleChoice) -> None:
    assert answer_text(task, row("B", ("B", "A", "C"))) == " B"
    assert answer_text(task, row("2", ("2", "1", "0"))) == " 2"


@pytest.mark.parametrize("answer", [3, -1, "D", "E", "3", "purple", "", None, 1.5, True, [0], "²", "Ⅷ", "é"])
def test_answer_out_of_range_names_the_row_and_what_is_allowed(task: MultipleChoice, answer: Any) -> None:
    with pytest.raises(DataError) as caught:
        task.encode([row(0), row(1), row(answer)])
    message = str(caught.value)
    assert message.startswith("Row 2: 'answer' must be")
    assert "one of its 3 choices (0 to 2)" in message
    assert "data.answer-column" in message


def test_integers_of_a_column_with_gaps_are_floats(task: MultipleChoice) -> None:
    assert answer_text(task, row(1.0, ("a", "b", "c"))) == " b"


def test_an_integer_is_an_index_even_where_choices_are_numbers(task: MultipleChoice) -> None:
    """ARC-Easy has such rows; in csv, where types are lost, a letter says it without doubt."""
    assert answer_text(task, row(1, ("1", "2", "3"))) == " 2"
    assert answer_text(task, row("B", ("1", "2", "3"))) == " 2"


def test_errors_never_quote_the_row(task: MultipleChoice) -> None:
    """A client sends these messages to the server."""
    secrets = [
        row("secret answer", question="secret question"),
        row(0, "secret choices"),
        row(0, {"text": "secret", "label": "secret"}),
        row(0, ("secret",)),
        row(0, question={"secret": 1}),
    ]
    for given in secrets:
        with pytest.raises(DataError, match=r"^Row 0: ") as caught:
            task.encode([given])
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("choices", ["red", None, 3, [], ["only"], {"text": None, "label": None}, {}])
def test_choices_that_are_none(task: MultipleChoice, choices: Any) -> None:
    with pytest.raises(DataError, match=r"Row 0: .*'choices' a list of at least two texts.*data\.choices-column"):
        task.encode([row(0, choices)])


@pytest.mark.parametrize("question", [None, 3, ["a"]])
def test_question_that_is_no_text(task: MultipleChoice, question: Any) -> None:
    with pytest.raises(DataError, match=r"Row 0: 'question' must be a text.*data\.question-column"):
        task.encode([row(0, question=question)])


def test_columns_have_the_names_that_were_given() -> None:
    columns = {"question": "stem", "choices": "options", "answer": "key"}
    task = build_task("multiple-choice", byte_tokenizer(), columns=columns, max_length=64)
    (example,) = task.encode([{"stem": "Sky?", "options": ["red", "blue"], "key": "B"}])
    assert byte_tokenizer().decode(example.input_ids) == "Question: Sky?\nAnswer: blue"
    with pytest.raises(DataError, match="'options' a list"):
        task.encode([{"stem": "Sky?", "options": "red", "key": "B"}])


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"multiple-choise.*did you mean 'multiple-choice'"):
        build_task("multiple-choise", byte_tokenizer(), columns={}, max_length=64)


def test_prompt_and_target(task: MultipleChoice) -> None:
    (example,) = task.encode([row(2, question="  Sky? ", choices=("red", "green", " blue "))])
    assert task.tokenizer.decode(example.input_ids[: example.num_context]) == "Question: Sky?\nAnswer:"
    # A choice keeps its own spaces, as lm-eval scores it.
    assert task.tokenizer.decode(example.input_ids[example.num_context :]) == "  blue "


def test_long_questions_lose_their_beginning_never_the_answer() -> None:
    task = MultipleChoice(byte_tokenizer(), max_length=20)
    (example,) = task.encode([row(1, question="x" * 100)])
    assert len(example.input_ids) == 20
    assert task.tokenizer.decode(example.input_ids) == "x" * 6 + "\nAnswer: green"


@pytest.mark.parametrize("max_length", [8, 9, 30])
def test_no_example_is_longer_than_allowed_nor_without_context_and_target(max_length: int) -> None:
    task = MultipleChoice(byte_tokenizer(), max_length=max_length)
    for answer in (0, 1):
        (example,) = task.encode([row(answer, choices=("y" * 50, "z"), question="x" * 50)])
        assert len(example.input_ids) <= max_length
        assert 1 <= example.num_context < len(example.input_ids)


def test_a_tokenizer_that_merges_across_the_border() -> None:
    """The context ends before the first token that differs, so every choice's tokens are behind it."""

    class Merging:
        """One token a character, but ": r" is one token (500)."""

        eos_token_id = None
        eos_token = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [500 if piece == ": r" else ord(piece) for piece in re.findall(": r|.", text, re.S)]}

    task = MultipleChoice(Merging(), max_length=64)  # type: ignore[arg-type]
    (red,) = task.encode([row(0)])
    (green,) = task.encode([row(1)])
    context = [ord(character) for character in "Question: Sky?\nAnswer"]
    assert list(red.input_ids) == [*context, 500, ord("e"), ord("d")]
    assert list(green.input_ids) == [*context, *map(ord, ": green")]
    assert red.num_context == green.num_context == len(context)


def test_end_token_that_a_tokenizer_adds_is_no_target() -> None:
    class Ending:
        eos_token_id = 2
        eos_token = "</s>"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text), 2]}

    (example,) = MultipleChoice(Ending(), max_length=64).encode([row(0)])  # type: ignore[arg-type]
    assert list(example.input_ids) == [ord(c) for c in "Question: Sky?\nAnswer: red"]


def test_score_by_hand(task: MultipleChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three questions of different lengths, so that scoring takes them in another order than they came.
    rows = [
        row(1, ("aa", "bbbbbbbb"), question="x" * 9),  # summed: 0, wrong; per character -1.0 and -0.5: 1, right
        row(0, ("cc", "dd"), question=""),  # right twice
        row(0, ("ee", "ffff"), question="xxx"),  # summed: 0, right; per character -1.5 and -1.0: 1, wrong
    ]
    log_probs = {9: [-2.0, -4.0], 0: [-1.0, -9.0], 3: [-3.0, -4.0]}
    seen = []

    def fake(model: Any, questions: Sequence[TokenisedQuestion]) -> list[torch.Tensor]:
        shortest = len("Question: \nAnswer:")
        seen.extend(len(question.context) - shortest for question in questions)
        return [torch.tensor(log_probs[len(question.context) - shortest]) for question in questions]

    monkeypatch.setattr(multiple_choice, "score_choices", fake)
    done: list[int] = []
    score = task.score(None, rows, on_progress=done.append)  # type: ignore[arg-type]
    assert sorted(seen) == [0, 3, 9]
    assert sum(done) == 3
    assert score.num_examples == 3
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.accuracy_normalised == pytest.approx(2 / 3)
    # Tokens are bytes: " bbbbbbbb" has 9, " cc" and " ee" 3.
    assert score.loss == pytest.approx((4 / 9 + 1 / 3 + 3 / 3) / 3)


def test_score_of_no_rows(task: MultipleChoice) -> None:
    with pytest.raises(DataError, match="no question to score"):
        task.score(None, [])  # type: ignore[arg-type]
