"""Every question of the real multiple-choice sets can be read: numbers among the choices, odd characters, all of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ot_federated.tasks.multiple_choice import MultipleChoice
from tests.families import byte_tokenizer

data = Path(__file__).parents[3] / "shared" / "data"
files = ("arc_easy/train", "arc_easy/validation", "arc_easy/test", "openbookqa/train", "sciq/validation")


@pytest.mark.skipif(not data.is_dir(), reason="the real sets are not beside the repository")
@pytest.mark.parametrize("name", files)
def test_every_row_is_read_and_its_answer_is_the_right_choice(name: str) -> None:
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    task = MultipleChoice(byte_tokenizer(), max_length=4096)
    examples = task.encode(rows)
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        answer = byte_tokenizer().decode(list(example.input_ids[example.num_context :]))
        assert answer.strip() == row["choices"][row["answer"]].strip()
