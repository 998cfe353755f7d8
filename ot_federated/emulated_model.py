"""The model that a data owner trains: bottom adapter, emulator, top adapter, in one transformers model.

It is built from a bundle alone, by the same function on both sides, so what the owner scores is what a client
trains. Tensors carry role names (``top.0.mlp.up_proj.weight``) in files and messages; only this module and
``model_owner.plug_in`` translate them into a model's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.architectures import Architecture, block_config, choose_auto_class, find_architecture, get_blocks
from ot_federated.bundle import (
    Manifest,
    adapter_prefixes,
    check_config,
    head_prefix,
    read_tensors,
    realignment_file,
    weight_files,
)
from ot_federated.emulated_blocks import Bridge, reshape_block
from ot_federated.errors import BundleError, OtFederatedError
from ot_federated.packed_tensors import unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_names(manifest: Manifest, architecture: Architecture) -> dict[str, str]:
    """Return role prefix -> prefix in the emulated model, for each position of the stack and then the head's."""
    names = {
        entry.prefix: f"{architecture.blocks}.{position}."
        for position, entry in enumerate(manifest.stack)
        if entry.role != "share"
    }
    return names | ({head_prefix: f"{architecture.head}."} if manifest.classes else {})


def read_bundle_tensors(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return a bundle's tensors by role name: memory-mapped, but for those that had to be unpacked.

    Raises:
        BundleError: If a file cannot be read, or a packed tensor does not fit its entry.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in weight_files:
        tensors.update(read_tensors(directory / name))
    return unpack(tensors, manifest.packed, dtype=weight_type(manifest)) if manifest.packed else tensors


def weight_type(manifest: Manifest) -> torch.dtype:
    """Return the type of a bundle's weights.

    Raises:
        BundleError: If the manifest names none.
    """
    dtype = getattr(torch, manifest.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BundleError(f"The manifest's type {manifest.dtype!r:.100} is none that weights have.")
    return dtype


def load_emulated_model(directory: Path, manifest: Manifest, *, device: str = "cpu") -> PreTrainedModel:
    """Build the emulated model from a verified bundle directory, its weights memory-mapped and frozen.

    Raises:
        BundleError: If the tensors are not exactly those that the manifest's config needs.
        ArchitectureError: If the model type is not in the table.
    """
    tensors = {**read_bundle_tensors(directory, manifest), **read_realignment(directory, manifest)}
    model = build_emulated_model(manifest, tensors)
    return model.to(device)  # type: ignore[arg-type, no-any-return]  # transformers annotates .to loosely


def read_realignment(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the emulator's tensors that this version of a bundle has in place of the first version's."""
    realigned = any(file.name == realignment_file for file in manifest.files)
    return read_tensors(directory / realignment_file) if realigned else {}


def build_emulated_model(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Build the emulated model around role-named tensors, without copying them."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    check_config(manifest.config)
    fields = {name: value for name, value in manifest.config.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(manifest.model_type, **fields)
        architecture = find_architecture(config)
        auto_class = choose_auto_class(architecture, classifies=bool(manifest.classes))
        # Before a model is built: that takes time and memory for each block.
        depth = block_config(config, architecture).num_hidden_layers
        if depth != len(manifest.stack):
            raise BundleError(f"The bundle's config has {depth!r:.100} blocks, its stack {len(manifest.stack)}.")
        # Parameters stay on the meta device until the bundle's tensors take their place; buffers (rotary
        # frequencies, for one) are computed for real because no file carries them, and in the type that
        # from_pretrained gives them beside weights of this type.
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(config, trust_remote_code=False, dtype=weight_type(manifest))
            blocks = get_blocks(model, architecture)
            if len(blocks) != len(manifest.stack):
                raise BundleError(f"The bundle's config has {len(blocks)} blocks, its stack {len(manifest.stack)}.")
            for position, entry in enumerate(manifest.stack):
                if entry.role == "bridge":
                    blocks[position] = Bridge(
                        block_config(config, architecture).hidden_size,
                        position=position,
                        returns_tuple=architecture.block_returns_tuple,
                        rank=entry.rank,
                        width=entry.width,
                    )
                elif entry.width or entry.rank:
                    reshape_block(blocks[position], width=entry.width, rank=entry.rank, architecture=architecture)
    except OtFederatedError:
        raise
    except Exception as error:  # whatever transformers makes of a config that a stranger wrote
        raise BundleError(
            f"No model can be built from the bundle's config ({type(error).__name__}: {error}). It was altered, or "
            "made by another release of transformers."
        ) from error
    shared = shared_names(model, manifest)
    _assign(model, _rename(tensors, model_names(manifest, architecture)), shared)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _rename(tensors: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        role, _, rest = name.partition(".")
        if f"{role}." == head_prefix and head_prefix in prefixes:
            renamed[prefixes[head_prefix] + rest] = tensor
            continue
        index, _, inner = rest.partition(".")
        prefix = prefixes.get(f"{role}.{index}.")
        renamed[prefix + inner if prefix else name] = tensor
    return renamed


def shared_names(model: nn.Module, manifest: Manifest) -> dict[str, str]:
    """Return the parameters of blocks that run with a kept block's weights, alias -> source."""
    architecture = find_architecture(model.config)
    prefixes = model_names(manifest, architecture)
    blocks = get_blocks(model, architecture)
    return {
        f"{architecture.blocks}.{position}.{name}": prefixes[f"emulator.{entry.index}."] + name
        for position, entry in enumerate(manifest.stack)
        if entry.role == "share"
        for name, _ in blocks[position].named_parameters()
    }


def _assign(model: Any, state: dict[str, torch.Tensor], shared: Mapping[str, str]) -> None:
    for target, source in [*tied_names(model).items(), *shared.items()]:
        if source in state:
            state.setdefault(target, state[source])
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise BundleError(f"The bundle's tensors do not fit its config: missing {missing[:3]}, unknown {extra[:3]}.")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise BundleError(
                f"{name} has shape {tuple(state[name].shape)} in the bundle; its config needs {tuple(shape)}."
            )
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    for target, source in shared.items():
        # One parameter in two places: it moves to a device once, and is trained, if at all, as one.
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))


def tied_names(model: Any) -> dict[str, str]:
    """Return the model's tied parameters, alias -> source (a tied head -> the input embeddings)."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    return tied


def adapter_parameters(model: nn.Module, manifest: Manifest, *, placement: str = "both") -> dict[str, nn.Parameter]:
    """Return the adapter's parameters in the emulated model, by role name; a classification head belongs to it."""
    architecture = find_architecture(model.config)
    prefixes = model_names(manifest, architecture)
    wanted = (*adapter_prefixes(manifest.stack, placement=placement), *([head_prefix] if manifest.classes else []))
    named = dict(model.named_parameters())
    return {
        role + name.removeprefix(prefixes[role]): parameter
        for role in wanted
        for name, parameter in named.items()
        if name.startswith(prefixes[role])
    }


@torch.no_grad()
def load_adapter(model: nn.Module, adapter: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Replace adapter parameters of the emulated model by ``adapter`` (role names), cast to the model's type.

    The parameters get memory of their own: what was there may be a memory-mapped file that others read.

    Raises:
        BundleError: If a name or a shape is not the model's.
    """
    parameters = adapter_parameters(model, manifest)
    for name, tensor in adapter.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            raise BundleError(f"The adapter's tensor {name} {tuple(tensor.shape)} has no counterpart in the bundle.")
        parameter.data = tensor.to(device=parameter.device, dtype=parameter.dtype, copy=True)
