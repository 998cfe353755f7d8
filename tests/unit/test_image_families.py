"""Every image family: an untouched adapter changes nothing, the whole stack is the model, the head belongs to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from ot_federated.bundle import Manifest, read_tensors
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.emulated_model import adapter_parameters, load_emulated_model
from ot_federated.errors import ConfigError, SourceError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.compression.calibration import block_influence
from ot_federated.model_owner.delivery import deliver_model
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.head_start import has_untrained_head
from ot_federated.model_owner.plug_in import plug_in, plugged_in
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tasks.classification_model import image_logits
from ot_federated.tuning import Tuning, merge, prepare_tuning, start_state
from tests.families import get_head, image_families, image_family_names, num_blocks, save_image_model

classes = ("cat", "dog", "owl")
images = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def load(directory: Path, family: str, *, num_classes: int = 2):
    source = save_image_model(directory / "source", family, classes=num_classes)
    return load_full_model(str(source), dtype=torch.float32, device="cpu", reads="image", classes=classes)


def bundle(directory: Path, model, processor, *, kept: list[int], bridged: bool) -> Manifest:
    stack = plan_stack(num_blocks=num_blocks, bottom=1, top=2, kept=kept, bridged=bridged)
    gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    bridges = fit_bridges(model, images, gaps, ridge=0.01) if gaps else {}
    return write_bundle(directory, model=model, tokenizer=processor, stack=stack, bridges=bridges, compression="test")


@pytest.mark.parametrize("family", image_families)
def test_bundle_emulator_plug_in_and_delivery(family: str, tmp_path: Path) -> None:
    model, processor = load(tmp_path, family)
    assert has_untrained_head(model), "the source's head is for two other classes"
    with torch.no_grad():
        for parameter in get_head(model).parameters():
            parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = image_logits(model, images).detach()

    # With every block kept, the emulated model is the full one.
    whole = bundle(tmp_path / "whole", model, processor, kept=list(range(1, num_blocks - 2)), bridged=False)
    assert whole.classes == classes
    torch.testing.assert_close(image_logits(load_emulated_model(tmp_path / "whole", whole), images), logits)

    small = bundle(tmp_path / "small", model, processor, kept=[3], bridged=True)
    emulated = load_emulated_model(tmp_path / "small", small)
    assert image_logits(emulated, images).shape == (5, 3)
    adapter = read_tensors(tmp_path / "small" / "adapter.safetensors")
    assert {name for name in adapter if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert "head.weight" in adapter_parameters(emulated, small, placement="bottom")

    plug_in(model, adapter, small.stack)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tuned = {name: tensor + 0.1 for name, tensor in adapter.items()}
    with plugged_in(model, tuned, small.stack):
        assert not torch.equal(image_logits(model, images), logits)
    torch.testing.assert_close(image_logits(model, images), logits, rtol=0, atol=0)

    deliver_model(
        tmp_path / "model", model=model, tokenizer=processor, adapter=tuned, stack=small.stack, placement="both"
    )
    delivered = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(image_logits(delivered, images), image_logits(model, images), rtol=0, atol=0)
    assert delivered.config.id2label == dict(enumerate(classes))


@pytest.mark.parametrize("family", [family for family in image_family_names if family != "timm_wrapper"])
def test_per_example_gradients_are_right(family: str, tmp_path: Path) -> None:
    model, processor = load(tmp_path, family)
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3], bridged=True)
    emulated = load_emulated_model(tmp_path / "bundle", manifest)
    for engine in ("hooks", "ghost"):
        found = check_per_example_gradients(
            emulated, adapter_parameters(emulated, manifest), engine=engine, max_grad_norm=1.0
        )
        assert found.max_error < 1e-4


def test_lora_trains_the_whole_head(tmp_path: Path) -> None:
    model, processor = load(tmp_path, "vit")
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3], bridged=True)
    base = read_tensors(tmp_path / "bundle" / "adapter.safetensors")
    tuning = Tuning(method="lora", lora_r=2, placement="top")
    parameters = prepare_tuning(load_emulated_model(tmp_path / "bundle", manifest), manifest, tuning)
    assert {"head.weight", "head.bias"} < parameters.keys()
    state = start_state(parameters, base, tuning)
    merged = merge(state, base, tuning, conv1d=False)
    plug_in(model, merged, manifest.stack, placement="top")
    assert all(torch.equal(merged[name], base[name]) for name in merged)


@pytest.mark.parametrize("family", image_families)
def test_images_of_another_size_are_read(family: str, tmp_path: Path) -> None:
    model, _ = load(tmp_path, family)
    assert image_logits(model, torch.randn(2, 3, 42, 42)).shape == (2, 3)


def test_influence_counts_patches(tmp_path: Path) -> None:
    model, _ = load(tmp_path, "vit")
    assert all(0 <= influence <= 2 for influence in block_influence(model, images))


def test_a_head_for_the_very_classes_is_kept(tmp_path: Path) -> None:
    model, processor = load(tmp_path, "vit")
    with torch.no_grad():
        model.get_submodule("classifier").weight.normal_()
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    again, _ = load_full_model(
        str(tmp_path / "tuned"), dtype=torch.float32, device="cpu", reads="image", classes=classes
    )
    assert torch.equal(again.get_submodule("classifier").weight, model.get_submodule("classifier").weight)
    other, _ = load_full_model(
        str(tmp_path / "tuned"), dtype=torch.float32, device="cpu", reads="image", classes=("a", "b", "c")
    )
    assert has_untrained_head(other)


def test_models_that_do_not_read_the_tasks_data_are_refused(tmp_path: Path, llama_directory: Path) -> None:
    source = save_image_model(tmp_path / "vit")
    with pytest.raises(ConfigError, match="ViT model, which reads images"):
        load_full_model(str(source), dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="LLaMA model, which reads texts"):
        load_full_model(str(llama_directory), dtype=torch.float32, device="cpu", reads="image", classes=classes)


def test_other_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_image_model(tmp_path / "vit")
    weights = load_file(source / "model.safetensors")
    weights.pop(min(name for name in weights if "layer.0." in name or "layers.0." in name))
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="lacks 1 of its weights"):
        load_full_model(str(source), dtype=torch.float32, device="cpu", reads="image", classes=classes)
