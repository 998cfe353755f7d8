"""Image classification from end to end on small models: the head is trained, aggregated, resumed and delivered."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ot_federated.architectures import find_architecture
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
