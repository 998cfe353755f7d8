"""The owner's public data: labels that belong to their images, texts that are kept apart, data without labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_federated.config import parse_run_config
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.owner import Parts, bundle_recipe
from ot_federated.model_owner.preparation import hold_out_labelled
from ot_federated.model_owner.public_data import find_labelled_public, read_public
from ot_federated.settings import Scalar
from ot_federated.tasks.base import LabelledImage
from ot_federated.tasks.registry import build_configured_task
from tests.families import byte_tokenizer, save_family_model, save_image_model

windows = torch.zeros(4, 16, dtype=torch.int64)


def build_parts(config: Any, source: Path, *, reads: Any, classes: tuple[str, ...]) -> Parts:
    model, processor = load_full_model(str(source), dtype=torch.float32, device="cpu", reads=reads, classes=classes)
    task = build_configured_task(config, processor, classes=classes)
    return Parts(model, processor, task, "cpu", torch.float32)


def text_parts(tmp_path: Path, rows: list[dict[str, Any]], **changes: Scalar) -> tuple[Any, Parts]:
    data = tmp_path / "public.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings: Mapping[str, Scalar] = {
        "task.name": "classification",
        "task.classifier": "head",
        "task.label-words": "a=a,b=b",
        "offsite.public-text": str(data),
        "offsite.distillation-steps": 1,
    }
    config = parse_run_config(settings | changes)
    source = save_family_model(tmp_path / "model")
    return config, build_parts(config, source, reads="text", classes=("a", "b"))


def test_labels_are_those_of_the_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = parse_run_config(
        {
            "task.name": "image-classification",
            "offsite.public-text": "sklearn:digits:public",
            "offsite.calibration-tokens": 320,
        }
    )
    classes = tuple(map(str, range(10)))
    parts = build_parts(config, save_image_model(tmp_path / "vit"), reads="image", classes=classes)
    images, labelled = read_public(config, parts), find_labelled_public(config, parts)
    assert isinstance(images, torch.Tensor)
    assert len(images) == len(labelled) == 20
    for image, example in zip(images, labelled, strict=True):
        assert isinstance(example, LabelledImage)
        assert torch.equal(example.read(), image)
    assert len({example.label for example in labelled if isinstance(example, LabelledImage)}) > 5


def test_texts_that_are_scored_are_not_distilled_on(tmp_path: Path) -> None:
    rows = [{"text": f"text number {number}", "label": "ab"[number // 20]} for number in range(40)]
    config, parts = text_parts(tmp_path, rows)
    texts, labelled = read_public(config, parts), tuple(find_labelled_public(config, parts))
    learnt, held_out = hold_out_labelled(labelled, windows)
    decode = byte_tokenizer().decode
    assert (len(learnt), len(held_out)) == (35, 5)
    assert texts == [decode(list(example.input_ids)) for example in learnt]
    assert not {decode(list(example.input_ids)) for example in held_out} & set(texts)
    # A table that lists one class after the other still gives both.
    assert {example.label for example in held_out} == {0, 1}


def test_data_without_labels_has_none(tmp_path: Path) -> None:
    rows = [{"text": f"text number {number}", "label": "another"} for number in range(10)]
    config, parts = text_parts(tmp_path, rows)
    assert find_labelled_public(config, parts) == []
    config, parts = text_parts(tmp_path, rows, **{"offsite.public-text-column": "text", "task.head-start": "zero"})
    assert find_labelled_public(config, parts) == []
    assert read_public(config, parts) == [row["text"] for row in rows]


def test_the_order_of_a_heads_public_data_is_part_of_the_recipe(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "a"}, {"text": "b", "label": "b"}]
    source = {"model.source": str(tmp_path / "model"), "offsite.distillation-steps": 0}
    recipes = [bundle_recipe(text_parts(tmp_path, rows, seed=seed, **source)[0], torch.float32) for seed in (0, 1)]
    assert recipes[0] != recipes[1]
