"""Gaps, shrinking and packing, alone and together, in every family: from the full model to the emulated one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_federated import architectures
from ot_federated.architectures import find_architecture, find_layers, get_blocks
from ot_federated.block_layers import BlockLayers
from ot_federated.bundle import Manifest, read_manifest, read_tensors
from ot_federated.emulated_model import adapter_parameters, load_emulated_model
from ot_federated.errors import ArchitectureError, ConfigError, DataError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges, fit_low_rank_bridges
from ot_federated.model_owner.plug_in import plug_in
from ot_federated.model_owner.preparation import prepare_bundle
from ot_federated.model_owner.release_audit import describe_exposure
from ot_federated.tasks.classification_model import image_logits
from tests.families import (
    build_family_model,
    build_image_model,
    byte_tokenizer,
    family_names,
    image_families,
    image_family_names,
    image_processor,
    needs_timm,
)

text = ["The owner's public text, of which there is enough for a few windows. " * 40]
token_ids = torch.randint(4, 260, (2, 14), generator=torch.Generator().manual_seed(0))
images = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(0))
# Blocks that a config builds otherwise than its family's usual ones: EVA's queries, keys and values apart, the FFN
# plain, or with gate and value apart and a norm between; DINOv2's giant has a gated FFN.
odd_image_models = [
    *((family, {"use_swiglu_ffn": True}) for family in ("dinov2", "dinov2_with_registers")),
    *(
        pytest.param("timm_wrapper", {"architecture": layout}, marks=needs_timm)
        for layout in ("eva_giant_patch14_224", "eva02_base_patch14_224", "eva02_base_patch16_clip_224")
    ),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "cache"))


def prepare(model: Any, **changes: Any) -> tuple[Path, Manifest]:
    settings = {"bottom": 1, "emulator": 2, "top": 2, "keep": "uniform", "gaps": "bridge", "ridge": 0.01} | changes
    reads_images = find_architecture(model.config).kind == "image"
    return prepare_bundle(
        model,
        image_processor() if reads_images else byte_tokenizer(),
        read_public_text=lambda: images if reads_images else text,
        calibration_tokens=512,
        recipe=changes | {"model": id(model)},
        say=lambda _: None,
        **settings,
    )


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if find_architecture(model.config).kind == "image":
            return image_logits(model, images[:2])
        return model(input_ids=token_ids, use_cache=False).logits


combinations: list[dict[str, Any]] = [
    {"gaps": "share"},
    {"gaps": "bridge", "bridge_rank": 4},
    {"shrink": "svd"},
    {"shrink": "ffn"},
    {"shrink": "magnitude"},
    {"gaps": "share", "shrink": "svd+ffn", "transport": "int8"},
    {"gaps": "bridge", "bridge_rank": 4, "shrink": "magnitude", "transport": "int4"},
]


@pytest.mark.parametrize("settings", combinations, ids=lambda s: "+".join(map(str, s.values())))
@pytest.mark.parametrize("family", [*family_names, *image_families])
def test_every_combination_in_every_family(family: str, settings: dict[str, Any]) -> None:
    build = build_image_model if family in image_family_names else build_family_model
    check_combination(build(family, dtype=torch.bfloat16), settings)


@pytest.mark.parametrize("settings", [{"shrink": "svd+ffn"}, {"shrink": "magnitude"}], ids=["svd+ffn", "magnitude"])
@pytest.mark.parametrize(("family", "fields"), odd_image_models, ids=lambda value: str(value)[:60])
def test_image_blocks_of_other_layouts_shrink(family: str, fields: dict[str, Any], settings: dict[str, Any]) -> None:
    check_combination(build_image_model(family, dtype=torch.bfloat16, **fields), settings)


def check_combination(model: Any, settings: dict[str, Any]) -> None:
    """Prepare a bundle, build the emulated model from it, and plug the untouched adapter in."""
    full = run(model)
    directory, manifest = prepare(model, **settings)
    assert read_manifest(directory, digest=manifest.digest) == manifest
    emulated = load_emulated_model(directory, manifest)
    logits = run(emulated)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, full)
    assert 0 < manifest.exact_weight_fraction < 1
    assert manifest.exact_weight_fraction == pytest.approx(describe_exposure(directory, model)["fraction"], abs=1e-9)
    # What trains is untouched by all this.
    adapter = read_tensors(directory / "adapter.safetensors")
    assert adapter_parameters(emulated, manifest).keys() == adapter.keys()
    blocks = get_blocks(model, find_architecture(model.config))
    with torch.no_grad():
        for parameter in (p for index in (0, 6, 7) for p in blocks[index].parameters()):
            parameter.zero_()
    plug_in(model, adapter, manifest.stack)
    assert torch.equal(run(model), full)


def test_shared_blocks_travel_once_and_are_one_parameter() -> None:
    model = build_family_model("llama")
    directory, manifest = prepare(model, gaps="share")
    assert [(e.role, e.index, e.first_block) for e in manifest.stack[1:-2]] == [
        ("emulator", 0, 1),
        ("share", 0, 2),
        ("share", 0, 3),
        ("share", 1, 4),
        ("emulator", 1, 5),
    ]
    emulated = load_emulated_model(directory, manifest)
    layers = emulated.model.layers
    assert layers[2].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    assert layers[2].self_attn.layer_idx == 2  # its keys and values are its own
    lean, _ = prepare(model, gaps="empty")
    assert (directory / "emulator.safetensors").stat().st_size == (lean / "emulator.safetensors").stat().st_size
    # As the full model with the kept blocks' weights written over the dropped ones.
    for target, source in ((2, 1), (3, 1), (4, 5)):
        model.model.layers[target].load_state_dict(model.model.layers[source].state_dict())
    torch.testing.assert_close(run(emulated), run(model))


def test_shared_blocks_generate_with_a_cache() -> None:
    directory, manifest = prepare(build_family_model("llama"), gaps="share", shrink="svd+ffn")
    emulated: Any = load_emulated_model(directory, manifest)
    cached, plain = (
        emulated.generate(token_ids, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(cached, plain)


def test_low_rank_bridges_are_the_best_of_their_rank() -> None:
    """Against the projection on any other subspace, and equal to the whole matrix at full rank."""
    model = build_family_model("llama")
    windows = torch.randint(4, 260, (8, 48), generator=torch.Generator().manual_seed(0))
    (whole,) = fit_bridges(model, windows, [(2, 4)], ridge=0.01).values()
    (full,) = fit_low_rank_bridges(model, windows, [(2, 4)], ridge=0.01, rank=32).values()
    torch.testing.assert_close(full["up"] @ full["down"], whole[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(full["bias"], whole[1], rtol=1e-3, atol=1e-3)
    (low,) = fit_low_rank_bridges(model, windows, [(2, 4)], ridge=1e-6, rank=8).values()
    with torch.no_grad():
        states = model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states
    x, y = states[2].flatten(0, 1), (states[5] - states[2]).flatten(0, 1)
    token_weight = 1 / states[5].flatten(0, 1).square().mean(1)
    mean_x, mean_y = ((token_weight / token_weight.sum()) @ part for part in (x, y))

    def error(weight: torch.Tensor) -> float:
        residual = y - mean_y - (x - mean_x) @ weight.T
        return float((token_weight * residual.square().sum(1)).sum())

    generator = torch.Generator().manual_seed(1)
    (exact,) = fit_bridges(model, windows, [(2, 4)], ridge=1e-6).values()
    for _ in range(5):
        basis = torch.linalg.qr(low["up"] + 0.1 * torch.randn(32, 8, generator=generator)).Q
        assert error(low["up"] @ low["down"]) < error(basis @ basis.T @ exact[0])
    # The singular vectors of the matrix alone, which ignore the data, are worse.
    left, values, right = torch.linalg.svd(exact[0])
    assert error(low["up"] @ low["down"]) < error(left[:, :8] * values[:8] @ right[:8])


def test_svd_is_the_best_approximation_and_ffn_keeps_the_largest_neurons() -> None:
    model = build_family_model("opt")
    directory, manifest = prepare(model, gaps="empty", shrink="svd+ffn", shrink_keep=0.5)
    layer = load_emulated_model(directory, manifest).model.decoder.layers[1]
    ours = model.model.decoder.layers[1]
    (entry,) = [e for e in manifest.stack if e.role == "emulator" and e.index == 0]
    assert (entry.width, entry.rank) == (24, 8)
    left, values, right = torch.linalg.svd(ours.self_attn.q_proj.weight)
    best = left[:, :8] * values[:8] @ right[:8]
    torch.testing.assert_close(layer.self_attn.q_proj.up @ layer.self_attn.q_proj.down, best)
    norms = ours.fc1.weight.square().sum(1) + ours.fc2.weight.square().sum(0)
    chosen = norms.argsort(descending=True)[:24].sort().values
    assert torch.equal(layer.fc1.weight, ours.fc1.weight[chosen])
    assert torch.equal(layer.fc1.bias, ours.fc1.bias[chosen])
    assert torch.equal(layer.fc2.weight, ours.fc2.weight[:, chosen])


def test_pruning_of_neurons_that_do_nothing_changes_nothing() -> None:
    for family, (enter, leave, rows) in {
        "llama": ("mlp.up_proj", "mlp.down_proj", True),
        "gpt2": ("mlp.c_fc", "mlp.c_proj", False),
    }.items():
        model = build_family_model(family)
        with torch.no_grad():
            for block in get_blocks(model, find_architecture(model.config)):
                for path, is_enter in ((enter, True), (leave, False), ("mlp.gate_proj", True)):
                    if family == "gpt2" and path == "mlp.gate_proj":
                        continue
                    layer = block.get_submodule(path)
                    half = slice(0, 24 if family == "llama" else 64)
                    index = (half, slice(None)) if is_enter == rows else (slice(None), half)
                    layer.weight[index] = 0
                    if is_enter and layer.bias is not None:
                        layer.bias[half] = 0
        full = run(model)
        directory, manifest = prepare(model, emulator=5, shrink="ffn", gaps="empty", keep="uniform")
        torch.testing.assert_close(run(load_emulated_model(directory, manifest)), full)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("vit", {}),
        ("dinov2", {"use_swiglu_ffn": True}),
        *odd_image_models[2:3],
        pytest.param("timm_wrapper", {}, marks=needs_timm),
    ],
    ids=lambda value: str(value)[:60],
)
def test_images_ffn_loses_the_neurons_that_do_nothing(family: str, fields: dict[str, Any]) -> None:
    """Half of the neurons get zeros, among them those whose gate and value are one matrix: nothing changes."""
    model = build_image_model(family, **fields)
    architecture = find_architecture(model.config)
    for block in get_blocks(model, architecture):
        layers = find_layers(block, architecture)
        num_neurons = block.get_submodule(layers.ffn_out[0]).in_features
        idle = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(0))[: num_neurons // 2]
        with torch.no_grad():
            for path in layers.ffn_in:
                layer = block.get_submodule(path)
                rows = torch.cat([idle + start for start in range(0, layer.out_features, num_neurons)])
                layer.weight[rows], layer.bias[rows] = 0, 0
            for path in layers.ffn_out:
                block.get_submodule(path).weight[:, idle] = 0
    full = run(model)
    directory, manifest = prepare(model, emulator=5, shrink="ffn", gaps="empty", shrink_keep=0.51)
    torch.testing.assert_close(run(load_emulated_model(directory, manifest)), full)


@needs_timm
def test_a_fused_matrix_of_low_rank_is_the_best_of_its_rank() -> None:
    model = build_image_model("timm_wrapper")
    directory, manifest = prepare(model, emulator=5, gaps="empty", shrink="svd", shrink_keep=0.5)
    emulated = load_emulated_model(directory, manifest)
    (entry,) = [entry for entry in manifest.stack if entry.role == "emulator" and entry.index == 0]
    block, small = (get_blocks(m, find_architecture(m.config))[entry.first_block] for m in (model, emulated))
    left, values, right = torch.linalg.svd(block.attn.qkv.weight.detach(), full_matrices=False)
    rank = entry.rank
    assert small.attn.qkv.up.shape == (96, rank)
    torch.testing.assert_close(small.attn.qkv.weight, left[:, :rank] * values[:rank] @ right[:rank])
    # The block uses it: as the full model's with that matrix in its place.
    with torch.no_grad():
        for index in range(1, 6):
            for path in ("qkv", "proj"):
                target = model.timm_model.blocks[index].attn.get_submodule(path)
                target.weight.copy_(emulated.timm_model.blocks[index].attn.get_submodule(path).weight)
    torch.testing.assert_close(run(emulated), run(model))


def test_a_layout_that_the_table_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_image_model("vit")
    own = replace(find_architecture(model.config), layers=BlockLayers(attention=("attention.query",)))
    monkeypatch.setitem(architectures._table, "vit", own)
    with pytest.raises(ArchitectureError, match=r"ViTLayer has its layers elsewhere.*attention.query.*shrink=none"):
        prepare(model, shrink="svd")


def test_bytes_are_what_is_promised() -> None:
    model = build_family_model("llama", dtype=torch.bfloat16)
    sizes = {
        name: prepare(model, gaps="empty", **settings)[1].file_bytes("emulator.safetensors")
        for name, settings in {
            "plain": {},
            "int8": {"transport": "int8"},
            "int4": {"transport": "int4"},
            "magnitude": {"shrink": "magnitude"},
        }.items()
    }
    assert sizes["int4"] < sizes["int8"] < sizes["magnitude"] < sizes["plain"]


def test_bad_input_is_refused_with_the_choices() -> None:
    model = build_family_model("llama")
    with pytest.raises(ConfigError, match=r"bridge-rank=16 saves nothing.*below 16"):
        prepare(model, bridge_rank=16)
    with pytest.raises(ConfigError, match=r"there is no kept block to share"):
        prepare(model, gaps="share", emulator=0)
    small = build_family_model("llama")
    small.resize_token_embeddings(40)
    with pytest.raises(DataError, match=r"vocabulary has 40.*another model's"):
        prepare(small)
