"""Split a full model into adapter and middle, and write the bundle.

Source of the method: Guangxuan Xiao, Ji Lin, Song Han, "Offsite-Tuning: Transfer Learning without Full Model",
2023, https://arxiv.org/abs/2302.04870, section 3.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import ot_federated
from ot_federated.architectures import check_split, cut_config, find_architecture, find_head, get_blocks
from ot_federated.bundle import Manifest, StackEntry, adapter_roles, describe_files, head_prefix, manifest_name
from ot_federated.cache import atomic_directory
from ot_federated.emulated_model import tied_names
from ot_federated.errors import ConfigError
from ot_federated.packed_tensors import pack, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ot_federated.processors import Processor

version_packages = ("torch", "transformers", "flwr", "safetensors")


def plan_stack(
    *,
    num_blocks: int,
    bottom: int,
    top: int,
    kept: Sequence[int],
    bridged: bool,
    shared: bool = False,
    spread: Sequence[int] = (),
) -> tuple[StackEntry, ...]:
    """Lay out the emulated stack: bottom blocks, kept middle blocks with bridges in the gaps, top blocks.

    Args:
        num_blocks: Blocks of the full model.
        bottom: Blocks of the bottom adapter.
        top: Blocks of the top adapter.
        kept: Full-model indices of the middle blocks that stay, ascending.
        bridged: Whether each run of dropped blocks gets a bridge; else the run leaves nothing.
        spread: Full-model indices of the adapter's blocks in the middle, ascending.
        shared: Whether the nearest kept block, the lower of two, runs in the place of each dropped one.

    Raises:
        ConfigError: If the split does not fit the depth, or there is no kept block to share.
    """
    if shared and not kept:
        raise ConfigError("offsite.gaps='share' with offsite.emulator-blocks=0: there is no kept block to share.")
    check_split(num_blocks=num_blocks, bottom=bottom, emulator=len(kept), top=top, spread=len(spread))
    stack = [StackEntry("bottom", index, index, index) for index in range(bottom)]
    num_bridges = 0
    start = bottom
    for block in [*sorted([*kept, *spread]), num_blocks - top]:
        if bridged and block > start:
            stack.append(StackEntry("bridge", num_bridges, start, block - 1))
            num_bridges += 1
        for dropped in range(start, block) if shared else ():
            nearest = min(range(len(kept)), key=lambda number: (abs(kept[number] - dropped), number))
            stack.append(StackEntry("share", nearest, dropped, dropped))
        if block in kept:
            stack.append(StackEntry("emulator", list(kept).index(block), block, block))
        elif block in spread:
            stack.append(StackEntry("spread", list(spread).index(block), block, block))
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
        bridges: Weight ``(hidden, hidden)`` and bias ``(hidden,)`` of bridges, by their index.
    """
    architecture = find_architecture(model.config)
    blocks = get_blocks(model, architecture)
    parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "emulator": {}, "frozen": {}}
    for entry in stack:
        if entry.role == "share":
            continue
        if entry.role == "bridge":
            if entry.index not in bridges:
                continue
            weight, bias = bridges[entry.index]
            tensors = {"weight": weight, "bias": bias}
        else:
            tensors = blocks[entry.first_block].state_dict()
        part = "adapter" if entry.role in adapter_roles else "emulator"
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
    emulator: Mapping[str, torch.Tensor] | None = None,
    transport: str = "as-is",
) -> Manifest:
    """Write the bundle of ``stack`` into ``directory``, all of it or nothing, and return its manifest.

    Args:
        directory: Where to; it must not be there yet.
        model: The full model.
        tokenizer: Its tokenizer.
        stack: The layout of the emulated stack.
        bridges: As :func:`split_tensors` takes them; unused with ``emulator``.
        compression: How the emulator was made, for people.
        emulator: The emulator's tensors by role name, where they are not the kept blocks as they are.
        transport: How the emulator's matrices are stored, see :mod:`ot_federated.packed_tensors`.

    Raises:
        ConfigError: If the emulator is larger than the middle.
        OtFederatedError: If the disk is full; nothing is left behind.
    """
    parts = split_tensors(model, stack, bridges=bridges)
    if emulator is not None:
        parts["emulator"] = dict(emulator)
    draft = draft_manifest(model, stack, compression=compression)
    arrays, packed = pack(parts["emulator"], transport=transport)
    check_emulator_bytes(arrays, middle_bytes=draft.middle_bytes)
    if packed:
        parts["emulator"] = unpack(arrays, packed, dtype=next(model.parameters()).dtype)
    exact = exact_weight_fraction(model, stack, parts)
    with atomic_directory(directory) as partial:
        for part, tensors in {**parts, "emulator": arrays}.items():
            # contiguous(): safetensors refuses views; GPT-2's Conv1D weights and the like are already contiguous.
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                partial / f"{part}.safetensors",
            )
        # How it was loaded here, with a hub or without, would give equal bundles digests of their own.
        getattr(tokenizer, "init_kwargs", {}).pop("local_files_only", None)
        tokenizer.save_pretrained(str(partial))
        manifest = replace(draft, exact_weight_fraction=exact, files=describe_files(partial), packed=packed)
        (partial / manifest_name).write_bytes(manifest.to_bytes())
    return manifest


def read_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the classes of the model's classification head, in its order; none without one."""
    if find_head(model, find_architecture(model.config)) is None:
        return ()
    return tuple(name for _, name in sorted((model.config.id2label or {}).items(), key=lambda item: int(item[0])))


def draft_manifest(model: PreTrainedModel, stack: Sequence[StackEntry], *, compression: str) -> Manifest:
    """Return a manifest of ``stack`` without files: enough to build the emulated model in memory."""
    architecture = find_architecture(model.config)
    blocks = get_blocks(model, architecture)
    adapter = {entry.first_block for entry in stack if entry.role in adapter_roles}
    middle = [block for index, block in enumerate(blocks) if index not in adapter]
    # A block that runs in another's place keeps its own kind of attention.
    kept = {entry.index: entry.first_block for entry in stack if entry.role == "emulator"}
    positions = [kept[entry.index] if entry.role == "share" else entry.first_block for entry in stack]
    return Manifest(
        model_type=model.config.model_type,
        config=cut_config(model.config, architecture, positions=positions),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        num_blocks=len(blocks),
        stack=tuple(stack),
        compression=compression,
        exact_weight_fraction=0.0,
        middle_bytes=sum(p.numel() * p.element_size() for block in middle for p in block.parameters()),
        files=(),
        versions=package_versions(),
        classes=read_classes(model),
    )


def check_emulator_bytes(arrays: Mapping[str, torch.Tensor], *, middle_bytes: int) -> None:
    """Check that an emulator is a compression.

    Raises:
        ConfigError: If it is larger than the middle that it stands for.
    """
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in arrays.values())
    if num_bytes > middle_bytes:
        raise ConfigError(
            f"The emulator has {num_bytes} bytes and the middle that it stands for {middle_bytes}. Keep fewer blocks "
            "(offsite.emulator-blocks), take smaller bridges (offsite.bridge-rank, offsite.bridge-width) or pack the "
            "emulator (offsite.transport=int8)."
        )


def exact_weight_fraction(
    model: PreTrainedModel, stack: Sequence[StackEntry], parts: Mapping[str, Mapping[str, torch.Tensor]]
) -> float:
    """Return the share of the full model's parameters that stand unaltered in the bundle, in [0, 1].

    Numbers are compared one by one: a pruned weight does not count, and one that rounding leaves as it was does.

    Args:
        model: The full model.
        stack: The layout.
        parts: The bundle's tensors as a client loads them, by file and role name.
    """
    blocks = get_blocks(model, find_architecture(model.config))
    exact = sum(tensor.numel() for part in ("adapter", "frozen") for tensor in parts[part].values())
    for entry in stack:
        if entry.role == "emulator":
            ours = blocks[entry.first_block].state_dict()
            own = {n.removeprefix(entry.prefix): t for n, t in parts["emulator"].items() if n.startswith(entry.prefix)}
            exact += sum(count_exact(tensor, ours[name]) for name, tensor in own.items() if name in ours)
    return exact / sum(parameter.numel() for parameter in model.parameters())


def count_exact(theirs: torch.Tensor, ours: torch.Tensor) -> int:
    """Return how many numbers of ``theirs`` are those of ``ours``.

    Of tensors of one shape, at the same place; a matrix with fewer rows or columns counts those that are whole ones of
    ours.
    """
    ours = ours.detach().to(device="cpu", dtype=theirs.dtype)
    theirs = theirs.detach().cpu()
    if theirs.shape == ours.shape:
        return theirs.numel() if torch.equal(theirs, ours) else int((theirs == ours).sum())
    if theirs.dim() == 1:
        return int(torch.isin(theirs, ours).sum())
    if theirs.shape[0] == ours.shape[0]:
        theirs, ours = theirs.T, ours.T
    elif theirs.shape[1] != ours.shape[1]:
        return 0
    rows = {row.tobytes() for row in ours.contiguous().view(torch.uint8).numpy()}
    return theirs.shape[1] * sum(row.tobytes() in rows for row in theirs.contiguous().view(torch.uint8).numpy())


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
        "spread": roles.count("spread"),
        "emulator": roles.count("emulator"),
        "top": roles.count("top"),
        "kept_blocks": manifest.kept_blocks,
        "compression": manifest.compression,
        "emulator_bytes": manifest.file_bytes("emulator.safetensors"),
        "middle_bytes": manifest.middle_bytes,
        "exact_weight_fraction": manifest.exact_weight_fraction,
    }
