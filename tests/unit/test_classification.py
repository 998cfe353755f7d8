"""Classification by verbaliser: labels as people write them, what is refused, and its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError, DataError
from ot_federated.label_words import parse_label_words
from ot_federated.tasks.classification import Classification
from ot_federated.tasks.multiple_choice import MultipleChoice
from ot_federated.tasks.registry import build_task
from simulations.label_lines import main as convert
from tests.families import build_family_model, byte_tokenizer

words = {"neg": "terrible", "pos": "great"}


@pytest.fixture
def task() -> Classification:
    return Classification(byte_tokenizer(), label_words=words, prompt="{text}\nIt was", max_length=64)


@pytest.mark.parametrize("label", [1, 1.0, "1", " pos ", "great"])
def test_label_as_number_name_or_word(task: Classification, label: Any) -> None:
    (example,) = task.encode([{"text": " A gem. ", "label": label}])
    assert task.tokenizer.decode(example.input_ids[: example.num_context]) == "A gem.\nIt was"
    assert task.tokenizer.decode(example.input_ids[example.num_context :]) == " great"


def test_names_go_before_numbers() -> None:
    task = Classification(byte_tokenizer(), label_words={"1": "bad", "0": "good"}, prompt="{text}:")
    (example,) = task.encode([{"text": "x", "label": 0}])
    assert task.tokenizer.decode(example.input_ids[example.num_context :]) == " good"


@pytest.mark.parametrize("label", [2, -1, True, None, "", "secret diagnosis", 0.5])
def test_unknown_label_is_refused_without_telling_it(task: Classification, label: Any) -> None:
    with pytest.raises(DataError, match="Row 1.*must be one of 0, 1, terrible, great, neg, pos") as caught:
        task.encode([{"text": "a", "label": 0}, {"text": "b", "label": label}])
    assert "secret" not in str(caught.value)


def test_a_text_that_is_none_is_refused(task: Classification) -> None:
    with pytest.raises(DataError, match="Row 0.*data.text-column"):
        task.encode([{"text": None, "label": 0}])


def test_a_long_text_loses_its_beginning_not_the_prompt(task: Classification) -> None:
    (example,) = task.encode([{"text": "x" * 200, "label": 0}])
    assert len(example.input_ids) == 64
    assert task.tokenizer.decode(example.input_ids).endswith("x\nIt was terrible")


def test_braces_in_the_text_are_text(task: Classification) -> None:
    (example,) = task.encode([{"text": "{text} {0}", "label": 0}])
    assert task.tokenizer.decode(example.input_ids[: example.num_context]) == "{text} {0}\nIt was"


def test_scores_are_those_of_the_multiple_choice_question(task: Classification) -> None:
    model = build_family_model("llama").eval()
    texts = ["fine", "dull and long", "odd"]
    score = task.score(model, [{"text": text, "label": index % 2} for index, text in enumerate(texts)])
    questions = MultipleChoice(byte_tokenizer(), prompt="{text}\nIt was", max_length=64)
    rows = [
        {"question": text, "choices": ["terrible", "great"], "answer": index % 2} for index, text in enumerate(texts)
    ]
    assert score == questions.score(model, rows)


@pytest.mark.parametrize("text", ["", "great", "a,a", "x=a,y=a", "a=,b=c", "x=a,x=b"])
def test_label_words_must_be_different_words(text: str) -> None:
    with pytest.raises(ConfigError, match="must name two or more different words"):
        parse_label_words(text)


def test_label_words_with_and_without_names() -> None:
    assert parse_label_words("neg=terrible, pos=great") == words
    assert parse_label_words("no, yes") == {"no": "no", "yes": "yes"}


def test_run_config_of_a_classification() -> None:
    config = parse_run_config({"task.name": "classification", "task.label-words": "no,yes", "data.text-column": "note"})
    assert config.columns == {"text": "note", "label": "label"}
    assert config.label_column == "label"
    with pytest.raises(ConfigError, match="task.label-words"):
        parse_run_config({"task.name": "classification"})
    with pytest.raises(ConfigError, match="must have {text} once"):
        parse_run_config({"task.name": "classification", "task.label-words": "no,yes", "task.prompt": "Label:"})


def test_task_by_name() -> None:
    task = build_task(
        "classification",
        byte_tokenizer(),
        columns={"text": "note", "label": "code"},
        max_length=64,
        label_words="no,yes",
        prompt="{text}?",
    )
    (example,) = task.encode([{"note": "ill", "code": 1}])
    assert task.tokenizer.decode(example.input_ids) == "ill? yes"


def test_label_lines_become_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "sst.train"
    source.write_text("1 a gem , truly\n0 dull\n")
    assert convert([str(source), "--output-dir", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "sst.train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "a gem , truly", "label": "1"},
        {"text": "dull", "label": "0"},
    ]
    source.write_text("1 fine\n0\n")
    assert convert([str(source), "--output-dir", str(tmp_path / "other")]) == 1
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
