"""Image classification from end to end on small models: the head is trained, aggregated, resumed and delivered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ot_federated.architectures import find_architecture
from ot_federated.model_owner import owner
from tests.families import family_param, get_head, save_image_model
from tests.federations import run_federation

pytest.importorskip("sklearn")
digits = {
    "task.name": "image-classification",
    "data.train": "sklearn:digits:train",
    "data.validation": "sklearn:digits:validation",
    "data.test": "sklearn:digits:test",
    "data.max-train-examples": 120,
    "data.partitioner": "dirichlet",
    "offsite.public-text": "sklearn:digits:public",
    "offsite.keep": "influence",
    "offsite.gaps": "bridge",
    "offsite.calibration-tokens": 512,
    "evaluation.max-examples": 60,
}


@pytest.mark.parametrize("family", ["vit", family_param("timm_wrapper")])
def test_a_head_is_tuned_and_delivered(family: str, tmp_path: Path) -> None:
    model = save_image_model(tmp_path / "model", family)
    run = run_federation(
        tmp_path, model, settings={**digits, "num-server-rounds": 2, "evaluation.full-fine-tuning": True}
    )
    summary = run.summary
    assert summary["federation"]["num_failures"] == 0
    # An untrained head would be at 10 %: the probe on public labels is not.
    assert summary["rows"]["full_zero_shot"]["accuracy"] > 0.3
    # Of a random model the emulator is poor, so that nothing follows for the plug-in; what was tuned must be better.
    assert summary["rows"]["emulator_fine_tuned"]["loss"] < summary["rows"]["emulator_zero_shot"]["loss"]
    assert summary["rows"]["plug_in"]["loss"] != summary["rows"]["full_zero_shot"]["loss"]
    assert summary["rows"]["full_fine_tuned"]["num_examples"] == 60
    delivered = AutoModelForImageClassification.from_pretrained(run.output / "model")
    assert delivered.config.id2label == {number: str(number) for number in range(10)}
    assert AutoImageProcessor.from_pretrained(run.output / "model").size["height"] == 28
    adapter = load_file(run.output / "adapter" / "adapter.safetensors")
    head = find_architecture(delivered.config).head
    assert (adapter[f"{head}.weight"] == get_head(delivered).weight).all()
    assert "AutoModelForImageClassification" in (run.output / "model" / "README.md").read_text()


def test_private_training_of_blocks_and_head(tmp_path: Path) -> None:
    private = {"privacy.mode": "example", "privacy.target-epsilon": 8.0, "train.max-steps": 2, "train.batch-size": 8}
    run = run_federation(tmp_path, save_image_model(tmp_path / "vit"), settings={**digits, **private})
    assert run.summary["federation"]["num_failures"] == 0
    assert run.summary["federation"]["num_replies"] == 2
    assert run.summary["privacy"]["mode"] == "example"


@pytest.mark.parametrize("head_start", ["probe", "zero"])
def test_the_gradient_chooses_blocks_that_are_shrunk_and_distilled(
    head_start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fitted head by its labels, with one that is still zero by what it reads."""
    changes = {
        "task.head-start": head_start,
        "offsite.keep": "gradient",
        "offsite.shrink": "svd+ffn",
        "offsite.distillation-steps": 3,
        "offsite.distillation-tokens": 512,
        "offsite.distillation-validation-steps": 1,
    }
    lines: list[str] = []
    monkeypatch.setattr(owner, "say", lambda line, *_: lines.append(line))
    run = run_federation(tmp_path, save_image_model(tmp_path / "vit"), settings=digits | changes)
    assert run.summary["federation"]["num_failures"] == 0
    assert run.summary["federation"]["num_replies"] == 2
    assert run.summary["offsite"]["compression"] == "gradient+bridge+svd+ffn+distilled-3"
    said = [line for line in lines if line.startswith("Distilled")]
    assert len(said) == 4
    assert all(("plug-in has a loss" if head_start == "probe" else "relative error") in line for line in said)


def test_the_gradient_chooses_blocks_of_a_text_model_with_a_head(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "labelled.jsonl"
    rows = [{"text": f"This is text number {number}.", "label": number % 2} for number in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task.name": "classification",
        "task.classifier": "head",
        **dict.fromkeys(("data.train", "data.validation", "data.test", "offsite.public-text"), str(data)),
        "offsite.keep": "gradient",
        "offsite.calibration-tokens": 256,
        "offsite.calibration-window": 64,
        "offsite.distillation-steps": 2,
        "offsite.distillation-tokens": 1024,
        "offsite.distillation-validation-steps": 1,
    }
    lines: list[str] = []
    monkeypatch.setattr(owner, "say", lambda line, *_: lines.append(line))
    run = run_federation(tmp_path, llama_directory, settings=settings)
    assert run.summary["federation"]["num_failures"] == 0
    assert run.summary["offsite"]["compression"] == "gradient+empty+distilled-2"
    said = [line for line in lines if line.startswith("Distilled")]
    assert said
    assert all("plug-in has a loss" in line for line in said)
