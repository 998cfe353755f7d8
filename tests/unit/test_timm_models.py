"""EVA through timm: layouts, what a config may ask timm for, image processors, and what is said without timm."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from ot_federated import timm_models
from ot_federated.architectures import block_config, find_architecture, get_blocks
from ot_federated.bundle import read_tensors
from ot_federated.data_owner.per_example_gradients import PrivacyError
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.emulated_model import build_emulated_model, load_emulated_model
from ot_federated.errors import ArchitectureError, ConfigError, OtFederatedError, SourceError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.plug_in import plug_in
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.processors import load_bundle_processor, set_image_size
from ot_federated.tasks.classification_model import image_logits
from ot_federated.tuning import Tuning, prepare_tuning
from ot_federated.tuning.methods import check_family
from tests.families import get_head, needs_timm, num_blocks, save_image_model

classes = ("cat", "dog", "owl")
images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
small = {"depth": num_blocks, "embed_dim": 32, "num_heads": 4, "img_size": 28, "patch_size": 7}
# Fused and separate queries, keys and values; with and without rotary embeddings; three kinds of FFN.
layouts = (
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
)
dtypes = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def load(directory: Path, layout: str = layouts[1], *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a small model as its owner does, with a head that knows something."""
    source = save_image_model(directory / "source", "timm_wrapper", architecture=layout, model_args=small)
    model, processor = load_full_model(str(source), dtype=dtype, device="cpu", reads="image", classes=classes)
    get_head(model).weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return model, processor


def bundle(directory: Path, model: Any, processor: Any, *, kept: list[int], bridged: bool = False) -> Any:
    stack = plan_stack(num_blocks=num_blocks, bottom=1, top=2, kept=kept, bridged=bridged)
    gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    bridges = fit_bridges(model, images, gaps, ridge=0.01) if gaps else {}
    return write_bundle(directory, model=model, tokenizer=processor, stack=stack, bridges=bridges, compression="test")


@needs_timm
@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("layout", layouts)
def test_every_layout_comes_back_bit_for_bit(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, processor = load(tmp_path, layout, dtype=dtype)
    logits = image_logits(model, images)
    assert logits.dtype == dtype
    manifest = bundle(tmp_path / "whole", model, processor, kept=list(range(1, num_blocks - 2)))
    assert manifest.exact_weight_fraction == 1.0
    assert torch.equal(image_logits(load_emulated_model(tmp_path / "whole", manifest), images), logits)
    with torch.no_grad():
        for parameter in [*get_blocks(model, find_architecture(model.config))[-1].parameters(), get_head(model).bias]:
            parameter.normal_()
    assert not torch.equal(image_logits(model, images), logits)
    plug_in(model, read_tensors(tmp_path / "whole" / "adapter.safetensors"), manifest.stack)
    assert torch.equal(image_logits(model, images), logits)


@needs_timm
@pytest.mark.parametrize("layout", layouts)
def test_bridges_work_in_every_layout(layout: str, tmp_path: Path) -> None:
    model, processor = load(tmp_path, layout)
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3], bridged=True)
    emulated = load_emulated_model(tmp_path / "bundle", manifest)
    assert len(get_blocks(emulated, find_architecture(emulated.config))) == 6
    assert image_logits(emulated, images).isfinite().all()
    assert manifest.config["model_args"]["depth"] == 6
    assert manifest.config["id2label"] == {str(number): name for number, name in enumerate(classes)}


@needs_timm
def test_a_bundle_does_not_tell_where_the_hub_has_the_model(tmp_path: Path) -> None:
    source = write_timm_checkpoint(tmp_path, {"url": "https://example.org/secret", "hf_hub_id": "secret/model"})
    model, processor = load_full_model(str(source), dtype=torch.float32, device="cpu", reads="image", classes=classes)
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3])
    assert b"secret" not in manifest.to_bytes()


def write_timm_checkpoint(directory: Path, settings: dict[str, Any]) -> Path:
    """Write a model as timm's own hub repositories hold it: bare names, sizes and image processor in config.json."""
    source = save_image_model(directory / "hub", "timm_wrapper", model_args=small)
    weights = load_file(source / "model.safetensors")
    bare = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    (source / "preprocessor_config.json").unlink()
    config = {
        "architecture": layouts[1],
        "num_classes": 2,
        "label_names": ["a", "b"],
        "model_args": small,
        "pretrained_cfg": {"input_size": [3, 28, 28], "num_classes": 2, **settings},
    }
    (source / "config.json").write_text(json.dumps(config))
    return source


@needs_timm
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"crop_pct": 0.875, "interpolation": "bicubic"}, id="center"),
        pytest.param({"crop_pct": 1.0, "crop_mode": "squash", "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}, id="squash"),
        pytest.param({"crop_pct": 0.875, "crop_mode": "squash", "interpolation": "bilinear"}, id="squash and crop"),
    ],
)
def test_timms_own_checkpoints_load_with_their_image_processor(settings: dict[str, Any], tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    source = write_timm_checkpoint(tmp_path, settings)
    model, processor = load_full_model(
        str(source), dtype=torch.float32, device="cpu", reads="image", classes=("a", "b")
    )
    plain = AutoModelForImageClassification.from_pretrained(source).eval()
    assert torch.equal(get_head(model).weight, get_head(plain).weight)  # for the very classes it is kept
    torch.testing.assert_close(image_logits(model, images), plain(images).logits)
    # Margins are even: of odd ones timm and transformers cut off halves that differ by a pixel.
    pixels = np.random.default_rng(0).integers(0, 256, size=(64, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = create_transform(
        **resolve_data_config(json.loads((source / "config.json").read_text())["pretrained_cfg"])
    )
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected(image))
    # It travels, as other families' do.
    bundle(tmp_path / "bundle", model, processor, kept=[3])
    received = load_bundle_processor(tmp_path / "bundle")
    assert torch.equal(received(image, return_tensors="pt")["pixel_values"][0], found)
    set_image_size(processor, 42, architecture=find_architecture(model.config), config=model.config)
    larger = processor(image, return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 42, 42)
    assert image_logits(model, larger).shape == (1, 2)


@needs_timm
def test_image_processors_of_another_kind_are_refused() -> None:
    with pytest.raises(SourceError, match="crop_mode='border'"):
        timm_models.describe_timm_processor({"input_size": [3, 28, 28], "crop_mode": "border"})


@needs_timm
def test_what_a_config_leaves_to_timm_is_written_into_it() -> None:
    config = SimpleNamespace(model_type="timm_wrapper", architecture="eva02_base_patch14_448", model_args=None)
    timm_models.complete_timm_config(config)
    fields = block_config(config, find_architecture(config))
    sizes = (fields.num_hidden_layers, fields.hidden_size, fields.image_size, fields.patch_size, fields.num_channels)
    assert sizes == (12, 768, 448, 14, 3)


@needs_timm
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "hf-hub:someone/eva02_tiny"}, "'hf-hub:someone/eva02_tiny' is none"),
        ({"architecture": "local-dir:/home/someone"}, "is none"),
        ({"architecture": "resnet50"}, "'resnet50' is none"),
        ({"architecture": "eva02_tiny_patch14_225"}, "did you mean 'eva02_tiny_patch14_224'"),
        ({"architecture": "vit_small_patch16_rope_mixed_224"}, "is none"),
        ({"architecture": "eva_large_patch14_196"}, "is none"),
        ({"architecture": None}, "None is none"),
        ({"architecture": ["eva02_tiny_patch14_224"]}, "is none"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path is not supported"),
        ({"model_args": {"pretrained_cfg": {"file": "x.pth"}}}, "not numbers, switches and names"),
        ({"model_args": {"pretrained_cfg": "x"}}, "pretrained_cfg is not supported"),
        ({"model_args": {"pretrained": True}}, "pretrained is not supported"),
        ({"model_args": {"drop_path_rate": 0.1}}, "drop_path_rate is not supported"),
        ({"model_args": {"rope_type": "mixed"}}, "rope_type is not supported"),
        ({"model_args": {"img_size": [28, 28, 28]}}, "not numbers, switches and names"),
        ({"model_args": [1]}, "not numbers, switches and names"),
    ],
)
def test_configs_that_ask_timm_for_more_are_refused(fields: dict[str, Any], message: str) -> None:
    config = SimpleNamespace(**{"model_type": "timm_wrapper", "architecture": layouts[1], "model_args": {}, **fields})
    with pytest.raises(ArchitectureError, match=message):
        find_architecture(config)


@needs_timm
def test_a_strangers_bundle_makes_timm_fetch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    model, processor = load(tmp_path)
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3])
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked for a model"))
    arguments = manifest.config["model_args"]
    for change in (
        {"architecture": "hf-hub:someone/eva02_tiny"},
        {"model_args": {**arguments, "checkpoint_path": "x.pth"}},
        {"model_args": {**arguments, "depth": 4000}},
        {"model_args": {**arguments, "img_size": 2**30}},
        {"model_args": None},
    ):
        with pytest.raises(OtFederatedError):
            build_emulated_model(replace(manifest, config={**manifest.config, **change}), {})


@needs_timm
@pytest.mark.parametrize("engine", ["hooks", "ghost", "loop"])
def test_every_engine_is_exact_for_eva_or_refuses(engine: str, tmp_path: Path) -> None:
    """Where queries, keys and values are one matrix, no layer is called with it that Opacus could watch."""
    for layout, method in (("eva02_base_patch14_224", "full"), (layouts[1], "lora"), (layouts[1], "full")):
        directory = tmp_path / f"{layout}-{method}"
        model, processor = load(directory, layout)
        manifest = bundle(directory / "bundle", model, processor, kept=[3], bridged=True)
        emulated = load_emulated_model(directory / "bundle", manifest)
        parameters = prepare_tuning(emulated, manifest, Tuning(method=method, lora_r=2))
        if engine != "loop" and (layout, method) == (layouts[1], "full"):
            with pytest.raises(PrivacyError, match=r"Set privacy\.engine=loop"):
                check_per_example_gradients(emulated, parameters, engine=engine, max_grad_norm=1.0)
            continue
        found = check_per_example_gradients(emulated, parameters, engine=engine, max_grad_norm=1.0)
        assert found.max_error < 1e-4


@needs_timm
def test_tuning_methods_reach_what_they_name(tmp_path: Path) -> None:
    """LoRA leaves alone what it would not change; BitFit finds the biases that stand beside the matrix."""
    model, processor = load(tmp_path)
    manifest = bundle(tmp_path / "bundle", model, processor, kept=[3])
    found = {
        method: {
            name.removeprefix("top.0.").removesuffix(".lora_B.default.weight")
            for name in prepare_tuning(
                load_emulated_model(tmp_path / "bundle", manifest), manifest, Tuning(method=method, placement="top")
            )
            if name.startswith("top.0.") and not name.endswith("lora_A.default.weight")
        }
        for method in ("lora", "bitfit")
    }
    assert found["lora"] == {"attn.proj", "mlp.fc1", "mlp.fc2"}
    assert found["bitfit"] >= {"attn.q_bias", "attn.v_bias", "attn.proj.bias", "norm1.bias"}
    with pytest.raises(ConfigError, match="timm_wrapper model get factors. Take full, lora or bottleneck"):
        check_family(model, Tuning(method="ia3"))


@pytest.mark.parametrize("described", [{"model_type": "timm_wrapper"}, {"pretrained_cfg": {}}])
def test_without_timm_the_extra_is_named(
    described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # makes its import fail
    timm_models.list_eva_models.cache_clear()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": layouts[1], **described}))
    with pytest.raises(SourceError, match=r"pip install 'ot-federated\[timm\]'"):
        load_full_model(str(tmp_path), dtype=torch.float32, device="cpu", reads="image", classes=classes)
    # A data owner who has received a bundle.
    with pytest.raises(SourceError, match=r"pip install 'ot-federated\[timm\]'"):
        find_architecture(SimpleNamespace(model_type="timm_wrapper", architecture=layouts[1], model_args={}))
