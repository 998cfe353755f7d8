"""What a client could rebuild of the full model from a bundle.

The attacks know what every client knows: the adapter, the emulator, and from the manifest the depth of the full model
and which of its blocks were kept. No attack on offsite-tuning emulators has been published that we know of; these are
the ones that suggest themselves.

- R1, ``repeat``: put the nearest kept block into every gap.
- R2, ``repeat`` and train what stands in the gaps on public text.
- R3, ``emulator``: train all of the emulator on the client's own data.
- R4, ``fresh``: put newly initialised blocks into the gaps and train them on public text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ot_federated.architectures import cut_config, find_architecture, get_blocks
from ot_federated.bundle import Manifest, StackEntry, read_manifest
from ot_federated.emulated_model import build_emulated_model, read_bundle_tensors
from ot_federated.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

starts = ("emulator", "repeat", "fresh")


def rebuild(directory: Path, *, start: str, seed: int = 0) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """Build the attacker's model from a bundle alone.

    Args:
        directory: The bundle.
        start: ``emulator``: as it is. ``repeat``, ``fresh``: at the full model's depth, with the nearest kept block or
            a new one in every gap.
        seed: Of new blocks.

    Returns:
        The model, and what the attacker trains in it by name: the emulator's middle, or what stands in the gaps.

    Raises:
        ConfigError: If the start is unknown.
    """
    if start not in starts:
        raise ConfigError(f"start={start!r} is none of {', '.join(starts)}.")
    manifest = read_manifest(directory)
    # Copied: an attacker trains them, and the file is mapped by others.
    tensors = {name: tensor.clone() for name, tensor in read_bundle_tensors(directory, manifest).items()}
    if start == "emulator":
        model = build_emulated_model(manifest, tensors)
        trained = [position for position, entry in enumerate(manifest.stack) if entry.role in ("emulator", "bridge")]
        return model, _parameters_of(model, trained)
    deep, tensors, gaps = deepen(manifest, tensors)
    model = build_emulated_model(deep, tensors)
    if start == "fresh":
        torch.manual_seed(seed)
        blocks = get_blocks(model, find_architecture(model.config))
        for position in gaps:
            reinitialise(blocks[position], scale=float(getattr(model.config, "initializer_range", 0.02)))
    return model, _parameters_of(model, gaps)


def deepen(
    manifest: Manifest, tensors: Mapping[str, torch.Tensor]
) -> tuple[Manifest, dict[str, torch.Tensor], list[int]]:
    """Return manifest and tensors of a model of full depth with the nearest kept block in every gap, and the gaps.

    Args:
        manifest: The bundle's.
        tensors: The bundle's tensors by role name; those of bridges are left out.
    """
    from transformers import AutoConfig

    positions = {
        entry.first_block: position
        for position, entry in enumerate(manifest.stack)
        if entry.role not in ("bridge", "share")
    }
    exact = {block: manifest.stack[position] for block, position in positions.items()}
    num_bottom = sum(entry.role == "bottom" for entry in manifest.stack)
    num_top = sum(entry.role == "top" for entry in manifest.stack)
    middle = range(num_bottom, manifest.num_blocks - num_top)
    # A kept middle block stands in best; where none was kept, the adapter's nearest.
    kept = [block for block in middle if block in exact] or sorted(exact)
    # The lower of two equally near ones, as CRaSh shares blocks upwards.
    source = {block: min(kept, key=lambda other: (abs(other - block), other)) for block in middle}
    stack = [entry for entry in manifest.stack if entry.role == "bottom"]
    renamed = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("emulator.", "bridge.", "spread."))
    }
    for index, block in enumerate(middle):
        origin = exact[source[block]]
        entry = StackEntry("emulator", index, block, block, width=origin.width, rank=origin.rank)
        stack.append(entry)
        prefix = origin.prefix
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                renamed[entry.prefix + name.removeprefix(prefix)] = tensor.clone()
    stack += [entry for entry in manifest.stack if entry.role == "top"]
    fields = {name: value for name, value in manifest.config.items() if name != "model_type"}
    config = AutoConfig.for_model(manifest.model_type, **fields)
    order = [positions[entry.first_block if entry.role != "emulator" else source[entry.first_block]] for entry in stack]
    deep = cut_config(config, find_architecture(config), positions=order)
    gaps = [position for position, entry in enumerate(stack) if entry.first_block not in exact]
    return replace(manifest, stack=tuple(stack), config=deep), renamed, gaps


@torch.no_grad()
def reinitialise(block: nn.Module, *, scale: float) -> None:
    """Give a block weights as before any training: matrices normal with this deviation, norms one, biases zero."""
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=scale)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


def recovered_fraction(*, attack: float, emulator: float, full: float) -> float | None:
    """Return the share of the way from the emulator to the full model that an attack went.

    All three are measures that are better when higher; give losses with a minus.

    Returns:
        0 at the emulator, 1 at the full model, below 0 where the attack made it worse; None where the full model is
        not better than the emulator, so that there is nothing to recover.
    """
    distance = full - emulator
    return (attack - emulator) / distance if distance > 1e-9 else None


def blocks_revealed(manifests: Sequence[Manifest]) -> list[int]:
    """Return the full model's blocks that a client who has all of these releases (R6) holds exactly."""
    return sorted(
        {e.first_block for manifest in manifests for e in manifest.stack if e.role not in ("bridge", "share")}
    )


def _parameters_of(model: PreTrainedModel, positions: Sequence[int]) -> dict[str, nn.Parameter]:
    blocks = get_blocks(model, find_architecture(model.config))
    return {
        f"{position}.{name}": parameter
        for position in positions
        for name, parameter in blocks[position].named_parameters()
    }
