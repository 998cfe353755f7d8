"""The family matrix: split, bundle, plug in, for every family, tied and untied, in both number types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ot_federated import architectures
from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.bundle import Manifest, adapter_prefixes, read_tensors, verify_files
from ot_federated.emulated_model import adapter_parameters, load_adapter, load_emulated_model
from ot_federated.errors import BundleError, ConfigError, PlugInError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.compression.keeping import keep_uniform
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.plug_in import full_model_names, plug_in, plugged_in
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.families import build_family_model, byte_tokenizer, family_names, num_blocks, save_family_model

dtypes = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
heads = [pytest.param(True, id="tied"), pytest.param(False, id="untied")]
token_ids = torch.randint(4, 260, (2, 14), generator=torch.Generator().manual_seed(0))


@dataclass
class Parts:
    """A full model, its bundle, and what was in it before anything happened."""

    model: Any
    directory: Path
    manifest: Manifest
    logits: torch.Tensor
    state: dict[str, torch.Tensor]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.directory / "adapter.safetensors")

    def changed(self) -> set[str]:
        """Return the names of the full model's tensors that are no longer what they were."""
        return {name for name, tensor in self.model.state_dict().items() if not torch.equal(tensor, self.state[name])}


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids, use_cache=False).logits


def divide(
    directory: Path,
    family: str = "llama",
    *,
    model: Any = None,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    bottom: int = 2,
    num_kept: int = 2,
    top: int = 2,
    bridged: bool = False,
    spread: tuple[int, ...] = (),
) -> Parts:
    model = model or build_family_model(family, tied=tied, dtype=dtype)
    others = [block for block in range(bottom, num_blocks - top) if block not in spread]
    kept = [others[n] for n in keep_uniform(first=0, last=len(others) - 1, num_kept=num_kept)] if num_kept else []
    stack = plan_stack(num_blocks=num_blocks, bottom=bottom, top=top, kept=kept, bridged=bridged, spread=spread)
    gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    windows = torch.randint(4, 260, (6, 40), generator=torch.Generator().manual_seed(1))
    manifest = write_bundle(
        directory,
        model=model,
        tokenizer=byte_tokenizer(),
        stack=stack,
        bridges=fit_bridges(model, windows, gaps, ridge=0.1) if gaps else {},
        compression="test",
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Parts(model, directory, manifest, run(model), state)


def scramble(model: Any, positions: list[int]) -> None:
    """Overwrite whole blocks, so that plugging in has something to do."""
    blocks = get_blocks(model, find_architecture(model.config))
    with torch.no_grad():
        for position in positions:
            for parameter in blocks[position].parameters():
                parameter.normal_()


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("tied", heads)
@pytest.mark.parametrize("family", family_names)
def test_untouched_adapter_plugs_in_bit_identically(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    parts = divide(tmp_path / "bundle", family, tied=tied, dtype=dtype)
    assert parts.logits.dtype == dtype
    scramble(parts.model, [0, 1, num_blocks - 2, num_blocks - 1])
    assert not torch.equal(run(parts.model), parts.logits)
    plug_in(parts.model, parts.adapter, parts.manifest.stack)
    assert torch.equal(run(parts.model), parts.logits)
    assert parts.changed() == set()


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("tied", heads)
@pytest.mark.parametrize("family", family_names)
def test_emulator_that_keeps_every_block_is_the_full_model_bit_for_bit(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_family_model(tmp_path / "model", family, tied=tied)
    model, _ = load_full_model(str(source), dtype=dtype, device="cpu")  # as an owner gets it
    parts = divide(tmp_path / "bundle", model=model, num_kept=num_blocks - 4)
    assert parts.logits.dtype == dtype
    verify_files(parts.directory, parts.manifest)
    assert parts.manifest.exact_weight_fraction == 1.0
    assert torch.equal(run(load_emulated_model(parts.directory, parts.manifest)), parts.logits)


@pytest.mark.parametrize("family", family_names)
def test_adapter_blocks_in_the_middle_work_in_every_family(family: str, tmp_path: Path) -> None:
    """One adapter block between two gaps, and nothing at the ends; it comes back to its place, and to no other."""
    parts = divide(tmp_path / "bundle", family, bottom=0, top=0, num_kept=3, bridged=True, spread=(2, 5))
    roles = [entry.role for entry in parts.manifest.stack]
    assert roles == ["emulator", "bridge", "spread", "emulator", "bridge", "spread", "bridge", "emulator"]
    assert run(load_emulated_model(parts.directory, parts.manifest)).isfinite().all()
    scramble(parts.model, [2, 5])
    plug_in(parts.model, parts.adapter, parts.manifest.stack)
    assert parts.changed() == set()
    whole = divide(tmp_path / "whole", family, model=parts.model, num_kept=2, spread=(3, 4))
    assert whole.manifest.exact_weight_fraction == 1.0
    assert torch.equal(run(load_emulated_model(whole.directory, whole.manifest)), parts.logits)


@pytest.mark.parametrize("family", family_names)
def test_bridges_work_in_every_family(family: str, tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle", family, bridged=True)
    roles = [entry.role for entry in parts.manifest.stack]
    assert roles == ["bottom", "bottom", "emulator", "bridge", "emulator", "top", "top"]
    emulated = load_emulated_model(parts.directory, parts.manifest)
    logits = run(emulated)
    assert logits.shape == parts.logits.shape
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, parts.logits)
    # The bridge is in use: another one gives other logits.
    with torch.no_grad():
        bridge = get_blocks(emulated, find_architecture(emulated.config))[3]
        bridge.bias.add_(1.0)  # type: ignore[operator, union-attr]
    assert not torch.equal(run(emulated), logits)


@pytest.mark.parametrize("family", family_names)
def test_gaps_left_empty_work_in_every_family(family: str, tmp_path: Path) -> None:
    """The emulated model is the full model with the dropped blocks taken out of its list."""
    parts = divide(tmp_path / "bundle", family, num_kept=2)
    kept = [0, 1, 2, 5, 6, 7]
    config = parts.model.config
    blocks = get_blocks(parts.model, find_architecture(config))
    remaining = [blocks[position] for position in kept]
    del blocks[:]
    blocks.extend(remaining)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):  # the forward pass looks up each position's kind of attention
        config.layer_types = [config.layer_types[position] for position in kept]
    assert torch.equal(run(load_emulated_model(parts.directory, parts.manifest)), run(parts.model))


@pytest.mark.parametrize("tied", heads)
@pytest.mark.parametrize("family", family_names)
def test_frozen_part_is_all_outside_the_blocks_and_nothing_travels_twice(
    family: str, tied: bool, tmp_path: Path
) -> None:
    parts = divide(tmp_path / "bundle", family, tied=tied)
    files = {part: read_tensors(parts.directory / f"{part}.safetensors") for part in ("adapter", "emulator", "frozen")}
    num_exact = sum(tensor.numel() for tensors in files.values() for tensor in tensors.values())
    blocks = get_blocks(parts.model, find_architecture(parts.model.config))
    num_dropped = sum(parameter.numel() for index in (3, 4) for parameter in blocks[index].parameters())
    # parameters() counts a tied head once.
    num_all = sum(parameter.numel() for parameter in parts.model.parameters())
    assert num_exact == num_all - num_dropped
    assert parts.manifest.exact_weight_fraction == pytest.approx(num_exact / num_all)
    has_head = any(torch.equal(t, parts.model.get_output_embeddings().weight) for t in files["frozen"].values())
    assert has_head  # a head that never travels would stay random at the client


@pytest.mark.parametrize("family", family_names)
def test_changed_adapter_changes_exactly_its_blocks_and_leaves_no_trace(family: str, tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle", family)
    tuned = {name: tensor.float() + 0.01 for name, tensor in parts.adapter.items()}
    inside = find_architecture(parts.model.config).blocks
    with plugged_in(parts.model, tuned, parts.manifest.stack) as model:
        assert model is parts.model
        assert not torch.equal(run(model), parts.logits)
        own = (f"{inside}.0.", f"{inside}.1.", f"{inside}.6.", f"{inside}.7.")
        assert parts.changed() == {name for name, _ in model.named_parameters() if name.startswith(own)}
    assert parts.changed() == set()
    assert torch.equal(run(parts.model), parts.logits)


@pytest.mark.parametrize("family", family_names)
def test_tuned_adapter_means_the_same_in_emulated_and_full_model(family: str, tmp_path: Path) -> None:
    """With an emulator that keeps all blocks, tuned emulator and plug-in are one model."""
    parts = divide(tmp_path / "bundle", family, num_kept=num_blocks - 4)
    tuned = {name: tensor + 0.01 for name, tensor in parts.adapter.items()}
    emulated = load_emulated_model(parts.directory, parts.manifest)
    load_adapter(emulated, tuned, parts.manifest)
    plug_in(parts.model, tuned, parts.manifest.stack)
    assert torch.equal(run(emulated), run(parts.model))


def test_a_registered_family_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_table", dict(architectures._table))
    architectures.register_architecture(
        architectures.Architecture(family="StableLM", model_types=("stablelm",), blocks="model.layers")
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_blocks, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=260, num_key_value_heads=4, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    parts = divide(tmp_path / "whole", model=model, num_kept=num_blocks - 4)
    assert torch.equal(run(load_emulated_model(parts.directory, parts.manifest)), parts.logits)
    parts = divide(tmp_path / "bridged", model=model, bridged=True)
    assert torch.isfinite(run(load_emulated_model(parts.directory, parts.manifest))).all()
    scramble(model, [0, 1, 6, 7])
    plug_in(model, parts.adapter, parts.manifest.stack)
    assert torch.equal(run(model), parts.logits)


def test_restored_after_an_exception_too(tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle")
    tuned = {name: tensor + 1.0 for name, tensor in parts.adapter.items()}

    def evaluate() -> None:
        with plugged_in(parts.model, tuned, parts.manifest.stack):
            assert parts.changed()
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        evaluate()
    assert parts.changed() == set()


@pytest.mark.parametrize(("placement", "own"), [("bottom", (0, 1)), ("top", (6, 7)), ("spread", (3, 4))])
def test_placement_changes_its_side_alone(placement: str, own: tuple[int, int], tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle", spread=(3, 4))
    prefixes = adapter_prefixes(parts.manifest.stack, placement=placement)
    tuned = {name: tensor + 1.0 for name, tensor in parts.adapter.items() if name.startswith(prefixes)}
    plug_in(parts.model, tuned, parts.manifest.stack, placement=placement)
    assert {int(name.split(".")[2]) for name in parts.changed()} == set(own)
    # The other side's tensors do not belong to this adapter.
    with pytest.raises(PlugInError, match="unknown"):
        plug_in(parts.model, parts.adapter, parts.manifest.stack, placement=placement)


Adapter = dict[str, torch.Tensor]


def without(adapter: Adapter, name: str) -> Adapter:
    return {key: tensor for key, tensor in adapter.items() if key != name}


weight = "top.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda a: without(a, weight), rf"missing \['{weight}'\], unknown nothing", id="missing name"),
        pytest.param(lambda a: {}, "missing", id="empty"),
        pytest.param(lambda a: {**a, "top.2.w": a[weight]}, r"unknown \['top\.2\.w'\]", id="unknown name"),
        pytest.param(
            lambda a: {**without(a, weight), weight.replace("up", "upp"): a[weight]}, "missing.*unknown", id="renamed"
        ),
        pytest.param(lambda a: {**a, "emulator.0.mlp.up_proj.weight": a[weight]}, "unknown", id="emulator tensor"),
        pytest.param(lambda a: {**a, weight: a[weight].T}, "has shape", id="transposed"),
        pytest.param(lambda a: {**a, weight: a[weight].flatten()}, "has shape", id="flattened"),
        pytest.param(
            lambda a: {**a, weight: torch.full_like(a[weight], float("nan"))}, "not finite", id="not a number"
        ),
        pytest.param(lambda a: {**a, weight: torch.full_like(a[weight], float("inf"))}, "not finite", id="infinite"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_and_the_model_unchanged(
    spoil: Callable[[Adapter], Adapter], message: str, tmp_path: Path
) -> None:
    parts = divide(tmp_path / "bundle")
    # Everything else is different, so that a half-done plug-in would show.
    adapter = spoil({name: tensor + 1.0 for name, tensor in parts.adapter.items()})
    with pytest.raises(PlugInError, match=message):
        plug_in(parts.model, adapter, parts.manifest.stack)
    assert parts.changed() == set()
    with pytest.raises(PlugInError, match=message), plugged_in(parts.model, adapter, parts.manifest.stack):
        pass
    assert parts.changed() == set()


def test_values_beyond_the_models_type_are_refused_and_the_model_unchanged(tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle", dtype=torch.float16)
    adapter = {name: tensor.float() + 1.0 for name, tensor in parts.adapter.items()}
    adapter[weight] = torch.full_like(adapter[weight], 1e6)  # finite in fp32, infinite in float16
    with pytest.raises(PlugInError, match="not finite"):
        plug_in(parts.model, adapter, parts.manifest.stack)
    assert parts.changed() == set()


def test_what_was_there_comes_back_as_memory_of_its_own(tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle")
    before = plug_in(parts.model, {n: t + 1.0 for n, t in parts.adapter.items()}, parts.manifest.stack)
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.adapter.items())
    plug_in(parts.model, before, parts.manifest.stack)
    assert parts.changed() == set()


def splits() -> st.SearchStrategy[tuple[int, int, int, bool]]:
    def rest(sides: tuple[int, int]) -> st.SearchStrategy[tuple[int, int, int, bool]]:
        bottom, top = sides
        kept = st.integers(0, num_blocks - bottom - top)
        return st.tuples(st.just(bottom), kept, st.just(top), st.booleans())

    sides = st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda sides: 1 <= sum(sides) < num_blocks)
    return sides.flatmap(rest)


@settings(max_examples=15)  # each one writes and reads a bundle
@given(split=splits())
def test_every_split_plugs_in_bit_identically_and_runs(
    split: tuple[int, int, int, bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bottom, num_kept, top, bridged = split
    parts = divide(
        tmp_path_factory.mktemp("split") / "bundle", bottom=bottom, num_kept=num_kept, top=top, bridged=bridged
    )
    adapter_blocks = [*range(bottom), *range(num_blocks - top, num_blocks)]
    covered: Iterator[int] = (
        block for entry in parts.manifest.stack for block in range(entry.first_block, entry.last_block + 1)
    )
    expected = range(num_blocks) if bridged else sorted({*adapter_blocks, *parts.manifest.kept_blocks})
    assert list(covered) == list(expected)
    emulated = load_emulated_model(parts.directory, parts.manifest)
    assert torch.isfinite(run(emulated)).all()
    assert adapter_parameters(emulated, parts.manifest).keys() == parts.adapter.keys()
    assert full_model_names(parts.model, parts.manifest.stack).keys() == parts.adapter.keys()
    scramble(parts.model, adapter_blocks)
    plug_in(parts.model, parts.adapter, parts.manifest.stack)
    assert torch.equal(run(parts.model), parts.logits)


def test_split_without_middle_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no middle"):
        plan_stack(num_blocks=4, bottom=2, top=2, kept=[], bridged=True)


def test_bundle_whose_tensors_do_not_fit_its_config(tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle")
    manifest = parts.manifest
    shallow = {**manifest.config, "num_hidden_layers": 5}
    wide = {**manifest.config, "intermediate_size": 50}
    with pytest.raises(BundleError, match="config has 5 blocks, its stack 6"):
        load_emulated_model(parts.directory, replace(manifest, config=shallow))
    with pytest.raises(BundleError, match="in the bundle; its config needs"):
        load_emulated_model(parts.directory, replace(manifest, config=wide))


def test_loading_an_adapter_refuses_what_the_bundle_does_not_have(tmp_path: Path) -> None:
    parts = divide(tmp_path / "bundle")
    emulated = load_emulated_model(parts.directory, parts.manifest)
    with pytest.raises(BundleError, match="no counterpart in the bundle"):
        load_adapter(emulated, {"top.9.w": torch.zeros(1)}, parts.manifest)
    with pytest.raises(BundleError, match="no counterpart in the bundle"):
        load_adapter(emulated, {weight: torch.zeros(1)}, parts.manifest)


def test_a_loaded_adapter_shares_memory_with_neither_side(tmp_path: Path) -> None:
    """The emulated model's weights are the bundle's file, memory-mapped; the adapter is the caller's."""
    parts = divide(tmp_path / "bundle")
    emulated = load_emulated_model(parts.directory, parts.manifest)
    tuned = {name: tensor + 1.0 for name, tensor in parts.adapter.items()}
    load_adapter(emulated, tuned, parts.manifest)
    logits = run(emulated)
    for tensor in tuned.values():
        tensor.zero_()
    assert torch.equal(run(emulated), logits)
    scramble(emulated, [0, 1])
    verify_files(parts.directory, parts.manifest)
