"""Split a full model into adapter and middle, and write the bundle.

Source of the method: Guangxuan Xiao, Ji Lin, Song Han, "Offsite-Tuning: Transfer Learning without Full Model",
2023, https://arxiv.org/abs/2302.04870, section 3.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import ot_federated
from ot_federated.architectures import check_split, cut_config, find_architecture, find_head, get_blocks
from ot_federated.bundle import Manifest, StackEntry, describe_files, head_prefix, manifest_name
from ot_federated.cache import atomic_directory
from ot_federated.emulated_model import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ot_federated.processors import Processor

version_packages = ("torch", "transformers", "flwr", "safetensors")


def plan_stack(*, num_blocks: int, bottom: int, top: int, kept: Sequence[int], bridged: bool) -> tuple[StackEntry, ...]:
    """Lay out the emulated stack: bottom blocks, kept middle blocks with bridges in the gaps, top blocks.

    Args:
        num_blocks: Blocks of the full model.
        bottom: Blocks of the bottom adapter.
        top: Blocks of the top adapter.
        kept: Full-model indices of the middle blocks that stay, ascending.
        bridged: Whether each run of dropped blocks gets a bridge; else the run leaves nothing.

    Raises:
        ConfigError: If the split does not fit the depth.
    """
    check_split(num_blocks=num_blocks, bottom=bottom, emulator=len(kept), top=top)
    stack = [StackEntry("bottom", index, index, index) for index in range(bottom)]
    num_bridges = 0
    start = bottom
    for index, block in enumerate([*kept, num_blocks - top]):
        if bridged and block > start:
            stack.append(StackEntry("bridge", num_bridges, start, block - 1))
            num_bridges += 1
        if index < len(kept):
            stack.append(StackEntry("emulator", index, block, block))
        start = block + 1
    stack += [StackEntry("top", index, num_blocks - top + index, num_blocks - top + index) for index in range(top)]
    return tuple(stack)


def split_tensors(
    model: PreTrainedModel,
    stack: Sequence[StackEntry],
    *,
    bridges: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the bundle's tensors by file and role name; nothing is copied.

    Args:
        model: The full model.
        stack: The layout of the emulated stack.
        bridges: Weight ``(hidden, hidden)`` and bias ``(hidden,)`` of each bridge, by its index.
    """
    architecture = find_architecture(model.config)
    blocks = get_blocks(model, architecture)
    parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "emulator": {}, "frozen": {}}
    for entry in stack:
        if entry.role == "bridge":
            weight, bias = bridges[entry.index]
            tensors = {"weight": weight, "bias": bias}
        else:
            tensors = blocks[entry.first_block].state_dict()
        part = "adapter" if entry.role in ("bottom", "top") else "emulator"
        parts[part].update({entry.prefix + name: tensor.detach() for name, tensor in tensors.items()})
    head = find_head(model, architecture)
    if head is not None:
        parts["adapter"].update({head_prefix + name: tensor.detach() for name, tensor in head.state_dict().items()})
    inside = (architecture.blocks + ".", architecture.head + ".")
    aliases = tied_names(model)
    parts["frozen"] = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) and name not in aliases
    }
    return parts


def write_bundle(
    directory: Path,
    *,
    model: PreTrainedModel,
    tokenizer: Processor,
    stack: Sequence[StackEntry],
    bridges: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    compression: str,
) -> Manifest:
    """Write the bundle of ``stack`` into ``directory``, all of it or nothing, and return its manifest.

    Raises:
        OtFederatedError: If the disk is full; nothing is left behind.
    """
    architecture = find_architecture(model.config)
    blocks = get_blocks(model, architecture)
    parts = split_tensors(model, stack, bridges=bridges)
    with atomic_directory(directory) as partial:
        for part, tensors in parts.items():
            # contiguous(): safetensors refuses views; GPT-2's Conv1D weights and the like are already contiguous.
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                partial / f"{part}.safetensors",
            )
        tokenizer.save_pretrained(str(partial))
        num_adapter = {role: sum(entry.role == role for entry in stack) for role in ("bottom", "top")}
        middle = blocks[num_adapter["bottom"] : len(blocks) - num_adapter["top"]]
        manifest = Manifest(
            model_type=model.config.model_type,
            config=cut_config(model.config, architecture, positions=[entry.first_block for entry in stack]),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            num_blocks=len(blocks),
            stack=tuple(stack),
            compression=compression,
            exact_weight_fraction=exact_weight_fraction(model, parts),
            middle_bytes=sum(p.numel() * p.element_size() for block in middle for p in block.parameters()),
            files=describe_files(partial),
            versions=package_versions(),
            classes=read_classes(model),
        )
        (partial / manifest_name).write_bytes(manifest.to_bytes())
    return manifest


def read_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the classes of the model's classification head, in its order; none without one."""
    if find_head(model, find_architecture(model.config)) is None:
        return ()
    return tuple(name for _, name in sorted((model.config.id2label or {}).items(), key=lambda item: int(item[0])))


def exact_weight_fraction(model: PreTrainedModel, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
    """Return the share of the full model's parameters that stand unaltered in the bundle, in [0, 1]."""
    exact = sum(
        tensor.numel() for part in parts.values() for name, tensor in part.items() if not name.startswith("bridge.")
    )
    return exact / sum(parameter.numel() for parameter in model.parameters())


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that shape a bundle or a result."""
    versions = {"ot-federated": ot_federated.__version__}
    for package in version_packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def describe_split(manifest: Manifest) -> dict[str, Any]:
    """Return what ``summary.json`` says of the split."""
    roles = [entry.role for entry in manifest.stack]
    return {
        "bottom": roles.count("bottom"),
        "emulator": roles.count("emulator"),
        "top": roles.count("top"),
        "kept_blocks": manifest.kept_blocks,
        "compression": manifest.compression,
        "emulator_bytes": manifest.file_bytes("emulator.safetensors"),
        "middle_bytes": manifest.middle_bytes,
        "exact_weight_fraction": manifest.exact_weight_fraction,
    }
