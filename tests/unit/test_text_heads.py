"""Text classification by a head, and instruction pairs: what is learnt of, what is scored, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ot_federated.errors import DataError
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.plug_in import plug_in
from ot_federated.model_owner.splitting import plan_stack, split_tensors
from ot_federated.tasks.classification_model import text_logits
from ot_federated.tasks.head_classification import HeadClassification
from ot_federated.tasks.instruction import Instruction
from tests.families import build_family_model, byte_tokenizer, family_names, num_blocks, save_family_model

chat_template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("family", family_names)
def test_a_head_reads_the_last_token_as_transformers_does(family: str, tmp_path: Path) -> None:
    source = save_family_model(tmp_path / "model", family)
    classes = ("a", "b", "c")
    model, _ = load_full_model(str(source), dtype=torch.float32, device="cpu", classes=classes)
    with torch.no_grad():
        model.get_submodule("score").weight.normal_()
    texts = [(5, 6, 7, 8), (9, 10), (11, 12, 13)]
    found = text_logits(model, texts)
    model.config.pad_token_id = 0
    for row, ids in enumerate(texts):
        expected = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model, AutoModelForSequenceClassification._model_mapping[type(model.config)])
    stack = plan_stack(num_blocks=num_blocks, bottom=1, top=1, kept=[3], bridged=False)
    adapter = split_tensors(model, stack, bridges={})["adapter"]
    assert "head.weight" in adapter
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plug_in(model, adapter, stack)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_head_examples_and_what_is_refused() -> None:
    task = HeadClassification(byte_tokenizer(), classes=("neg", "pos"), max_length=8)
    first, second = task.encode([{"text": "A gem.", "label": "pos"}, {"text": "far too long", "label": 0}])
    assert (task.tokenizer.decode(first.input_ids), first.label) == ("A gem.", 1)
    assert (task.tokenizer.decode(second.input_ids), second.label) == ("too long", 0)
    for row, message in (
        ({"text": None, "label": 0}, "data.text-column"),
        ({"text": " ", "label": 0}, "empty"),
        ({"text": "a", "label": "secret"}, "must be one of 0, 1, neg, pos"),
    ):
        with pytest.raises(DataError, match=f"Row 0.*{message}"):
            task.encode([row])


def test_the_loss_is_on_the_response_alone() -> None:
    task = Instruction(byte_tokenizer(), max_length=64)
    (example,) = task.encode([{"prompt": " Add 2 and 3. ", "response": " 5 "}])
    decode = task.tokenizer.decode
    assert decode(example.input_ids[: example.num_context]) == "Add 2 and 3.\n\n"
    assert decode(example.input_ids[example.num_context :]) == "5</s>"


def test_a_chat_template_words_the_pair() -> None:
    tokenizer = byte_tokenizer().__deepcopy__({}) if hasattr(byte_tokenizer(), "__deepcopy__") else byte_tokenizer()
    tokenizer.chat_template = chat_template
    try:
        (example,) = Instruction(tokenizer, max_length=64).encode([{"prompt": "Add.", "response": "5"}])
        assert tokenizer.decode(example.input_ids[: example.num_context]) == "<user>Add.</s>\n<assistant>"
        assert tokenizer.decode(example.input_ids[example.num_context :]) == "5</s>"
    finally:
        tokenizer.chat_template = None


def test_long_pairs_keep_the_response() -> None:
    task = Instruction(byte_tokenizer(), max_length=16)
    (example,) = task.encode([{"prompt": "p" * 50, "response": "r" * 10}])
    assert len(example.input_ids) == 16
    assert task.tokenizer.decode(example.input_ids[example.num_context :]) == "r" * 10 + "</s>"
    (example,) = task.encode([{"prompt": "p" * 50, "response": "r" * 40}])
    assert (len(example.input_ids), example.num_context) == (16, 1)


@pytest.mark.parametrize("row", [{"prompt": None, "response": "a"}, {"prompt": "a", "response": " "}])
def test_pairs_that_are_none_are_refused(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match="Row 0.*data.prompt-column"):
        Instruction(byte_tokenizer()).encode([row])


def test_scores_do_not_depend_on_the_batch() -> None:
    model, task = build_family_model("llama"), Instruction(byte_tokenizer(), max_length=64)
    rows = [{"prompt": "p" * n, "response": "r" * (1 + n % 3)} for n in range(1, 12)]
    score = task.score(model, rows)
    alone = [task.score(model, [row]) for row in rows]
    counts = [2 + n % 3 for n in range(1, 12)]
    mean = sum(a.loss * count for a, count in zip(alone, counts, strict=True)) / sum(counts)
    assert score.loss == pytest.approx(mean, rel=1e-5)
    with pytest.raises(DataError, match="no pair"):
        task.score(model, [])
