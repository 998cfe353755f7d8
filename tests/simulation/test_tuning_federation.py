"""Every tuning method through a whole federation: trained, aggregated, stopped, resumed, delivered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ot_federated.errors import ConfigError
from ot_federated.settings import Scalar
from ot_federated.tuning import load_bottlenecks
from tests.families import save_family_model
from tests.federations import run_federation
from tests.invariants.test_resume import resume, stop_in_round
from tests.reference.tuning_parts import logits

methods: dict[str, dict[str, Scalar]] = {
    "lora": {"tuning.method": "lora", "tuning.lora-r": 2, "train.learning-rate": 0.05},
    "ia3": {"tuning.method": "ia3", "train.learning-rate": 0.05},
    "bitfit": {"tuning.method": "bitfit", "train.learning-rate": 0.01},
    # LoRA in the middle alone, with a bridge at either side.
    "spread": {
        "tuning.method": "lora",
        "tuning.lora-r": 2,
        "train.learning-rate": 0.05,
        "offsite.bottom-blocks": 0,
        "offsite.top-blocks": 0,
        "offsite.spread-blocks": 2,
        "offsite.emulator-blocks": 2,
        "tuning.placement": "spread",
    },
    "bottleneck": {"tuning.method": "bottleneck", "tuning.bottleneck-size": 4, "train.learning-rate": 0.05},
}


@pytest.fixture(scope="module")
def opt_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family_model(tmp_path_factory.mktemp("model"), "opt")


@pytest.mark.parametrize("name", methods)
def test_a_method_learns_resumes_and_is_delivered(name: str, opt_directory: Path, tmp_path: Path) -> None:
    settings = {**methods[name], "num-server-rounds": 2}
    whole = run_federation(tmp_path / "whole", opt_directory, settings=settings)
    stop_in_round(2, tmp_path / "cut", opt_directory, settings)
    assert resume(tmp_path / "cut", opt_directory, settings).digest == whole.digest
    rows = whole.summary["rows"]
    assert rows["plug_in"]["loss"] < rows["full_zero_shot"]["loss"] - 0.01
    assert rows["emulator_fine_tuned"]["loss"] < rows["emulator_zero_shot"]["loss"] - 0.01
    # Little travels: that is what these methods are for.
    assert whole.summary["bytes"]["update_per_client_round"] < 0.1 * whole.summary["bytes"]["full_model"]

    full = AutoModelForCausalLM.from_pretrained(opt_directory, dtype=torch.float32).eval()
    before = logits(full)
    if name == "bottleneck":
        assert not (whole.output / "model").exists()
        assert "load_bottlenecks" in (whole.output / "adapter" / "README.md").read_text()
        tuned = logits(load_bottlenecks(full, whole.output / "adapter"))
    else:
        tuned = logits(AutoModelForCausalLM.from_pretrained(whole.output / "model", dtype=torch.float32).eval())
    assert (tuned - before).abs().max() > 1e-2
    if name in ("lora", "ia3", "spread"):
        loaded = PeftModel.from_pretrained(full, str(whole.output / "adapter"))
        torch.testing.assert_close(logits(loaded), tuned, rtol=1e-4, atol=1e-4)


def test_a_family_that_cannot_is_refused_before_anything_is_scored(llama_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains biases"):
        run_federation(tmp_path, llama_directory, settings={"tuning.method": "bitfit"})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
