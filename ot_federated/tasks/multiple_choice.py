r"""Multiple choice: a question, its choices, the right answer.

Training is on the right answer's tokens behind ``Question: ...\nAnswer:``. Scoring follows lm-evaluation-harness
(Gao et al., https://github.com/EleutherAI/lm-evaluation-harness): the choice with the highest summed
log-probability (``acc``), and with the highest log-probability per character (``acc_norm``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ot_federated.errors import DataError
from ot_federated.tasks.base import Example, Progress, Row, Score, score_answers
from ot_federated.tasks.language_model import find_cache, hidden_states, pad, target_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

num_questions_per_batch = 16
num_choices_per_batch = 16
default_prompt = "Question: {text}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A checked row: the question's text, its choices, the right one's index."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TokenisedQuestion:
    """A question's tokens, each choice's tokens behind them, each choice's length in characters."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    num_characters: tuple[int, ...]
    answer: int


class MultipleChoice:
    """The multiple-choice task."""

    name = "multiple-choice"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        question_column: str = "question",
        choices_column: str = "choices",
        answer_column: str = "answer",
        prompt: str = default_prompt,
        max_length: int = 256,
    ) -> None:
        self.tokenizer = tokenizer
        self.question_column = question_column
        self.choices_column = choices_column
        self.answer_column = answer_column
        self.prompt = prompt
        self.max_length = max_length

    def encode(self, rows: Iterable[Row]) -> list[Example]:
        """Return one example a question: its context and the right answer's tokens."""
        examples = []
        for number, row in enumerate(rows):
            tokenised = self._tokenise(self._read(row, number))
            answer = tokenised.continuations[tokenised.answer]
            examples.append(Example(tokenised.context + answer, len(tokenised.context)))
        return examples

    @torch.inference_mode()
    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on questions; the loss is the mean over questions of the right answer's loss per token."""
        if not rows:
            raise DataError("There is no question to score: the data set or its split is empty.")
        questions = [self._tokenise(self._read(row, number)) for number, row in enumerate(rows)]
        # Questions of similar length share a batch, so little is padded.
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].context))
        right = right_normalised = 0
        losses = torch.zeros(len(questions))
        for start in range(0, len(order), num_questions_per_batch):
            batch = order[start : start + num_questions_per_batch]
            for index, log_probs in zip(batch, score_choices(model, [questions[i] for i in batch]), strict=True):
                question = questions[index]
                per_character = log_probs / torch.tensor(question.num_characters)
                right += int(log_probs.argmax()) == question.answer
                right_normalised += int(per_character.argmax()) == question.answer
                losses[index] = -log_probs[question.answer] / len(question.continuations[question.answer])
            if on_progress:
                on_progress(len(batch))
        return replace(score_answers(losses, right), accuracy_normalised=right_normalised / len(questions))

    def _read(self, row: Row, number: int) -> Question:
        question, choices, answer = (
            row[column] for column in (self.question_column, self.choices_column, self.answer_column)
        )
        if isinstance(choices, str):  # csv has no lists: a JSON list in a cell
            choices = _parse_list(choices)
        if isinstance(choices, dict):  # the hub's ARC and OpenBookQA: {"text": [...], "label": [...]}
            labels, choices = choices.get("label"), choices.get("text")
        else:
            labels = None
        if not isinstance(question, str) or not isinstance(choices, (list, tuple)) or len(choices) < 2:
            raise DataError(
                f"Row {number}: {self.question_column!r} must be a text and {self.choices_column!r} a list of at least "
                "two texts (in csv: a JSON list). Set data.question-column and data.choices-column."
            )
        choices = tuple(str(choice) for choice in choices)
        return Question(question.strip(), choices, self._find_answer(answer, choices, labels, number))

    def _find_answer(self, answer: Any, choices: tuple[str, ...], labels: Any, number: int) -> int:
        if isinstance(answer, str):
            if labels and answer in labels:
                return int(list(labels).index(answer))
            if answer in choices:
                return choices.index(answer)
            letter = answer.strip().upper()
            if len(letter) == 1 and letter.isalpha():
                answer = ord(letter) - ord("A")
            elif letter.isascii() and letter.isdigit():
                answer = int(letter)
        elif isinstance(answer, float) and answer.is_integer():  # pandas' integers, in a column with a gap
            answer = int(answer)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(
                f"Row {number}: {self.answer_column!r} must be the index of one of its {len(choices)} choices (0 to "
                f"{len(choices) - 1}), a letter from A, or a choice's text. Correct the row, or set data.answer-column."
            )
        return answer

    def _tokenise(self, question: Question) -> TokenisedQuestion:
        context_text = self.prompt.replace("{text}", question.text)
        context = self._ids(context_text)
        wholes = [self._ids(f"{context_text} {choice}") for choice in question.choices]
        # Where a tokenizer merges across the border, the context ends before the first token that differs.
        shared = len(context)
        for whole in wholes:
            agree = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
            shared = min(shared, agree, len(whole) - 1)
        keep = max(1, self.max_length - max(len(whole) - shared for whole in wholes))
        return TokenisedQuestion(
            context=tuple(wholes[0][:shared][-keep:]),
            continuations=tuple(tuple(whole[shared:][: self.max_length - 1]) for whole in wholes),
            num_characters=tuple(max(1, len(choice)) for choice in question.choices),
            answer=question.answer,
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]
        return ids


def _parse_list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@torch.inference_mode()
def score_choices(model: PreTrainedModel, questions: Sequence[TokenisedQuestion]) -> list[torch.Tensor]:
    """Return, for each question, the summed log-probability of each choice, ``(num_choices,)``.

    A question is encoded once; its choices continue from its keys and values.
    """
    device = model.device
    contexts, context_mask = pad([question.context for question in questions], device=device)
    owners = [row for row, question in enumerate(questions) for _ in question.continuations]
    choices, choice_mask = pad([c for question in questions for c in question.continuations], device=device)
    window = getattr(model.config, "sliding_window", None)
    if window is not None and contexts.shape[1] + choices.shape[1] > window:
        # A sliding window drops keys from the cache by position, padding included: encode each choice in full.
        return _score_in_full(model, questions)
    positions = torch.arange(contexts.shape[1], device=device).expand_as(contexts)
    prefix = hidden_states(
        model, input_ids=contexts, attention_mask=context_mask, position_ids=positions, use_cache=True
    )
    sums = torch.zeros(len(owners), device=device)
    # Choices of similar length share a batch, whichever questions they belong to: they vary more than contexts do.
    by_length = sorted(range(len(owners)), key=lambda row: int(choice_mask[row].sum()))
    for start in range(0, len(by_length), num_choices_per_batch):
        rows = torch.tensor(by_length[start : start + num_choices_per_batch], device=device)
        longest = int(choice_mask[rows[-1]].sum())
        # Encoding extends the cache in place; the next batch needs the contexts alone.
        cache = copy.deepcopy(find_cache(prefix))
        owner = torch.tensor(owners, device=device)[rows]
        cache.batch_select_indices(owner)
        sums[rows] = _continue_contexts(
            model,
            cache,
            context_mask[owner],
            prefix.last_hidden_state[owner, context_mask[owner].sum(dim=1) - 1],
            choices[rows, :longest],
            choice_mask[rows, :longest],
        )
    return list(sums.cpu().split([len(question.continuations) for question in questions]))


def _continue_contexts(
    model: PreTrainedModel,
    cache: Any,
    context_mask: torch.Tensor,
    last_states: torch.Tensor,
    choices: torch.Tensor,
    choice_mask: torch.Tensor,
) -> torch.Tensor:
    """Return the log-probability of each choice behind its encoded context, ``(num_choices,)``."""
    num_choices, length = choices.shape
    first_positions = context_mask.sum(dim=1)[:, None]
    rest = hidden_states(
        model,
        input_ids=choices,
        attention_mask=torch.cat([context_mask, choice_mask], dim=1),
        position_ids=first_positions + torch.arange(length, device=choices.device),
        cache=cache,
        use_cache=True,
    )
    # The context's last state predicts a choice's first token; each of its tokens predicts the next.
    states = torch.cat([last_states[:, None], rest.last_hidden_state[:, :-1]], dim=1)
    rows, columns = choice_mask.nonzero(as_tuple=True)
    log_probs = target_log_probs(model, states[rows, columns], choices[rows, columns])
    return torch.zeros(num_choices, device=choices.device).index_add(0, rows, log_probs)


def _score_in_full(model: PreTrainedModel, questions: Sequence[TokenisedQuestion]) -> list[torch.Tensor]:
    from ot_federated.tasks.language_model import example_losses

    results = []
    for question in questions:
        examples = [Example(question.context + choice, len(question.context)) for choice in question.continuations]
        losses, counts = example_losses(model, examples)
        results.append(-(losses * counts).cpu())
    return results
