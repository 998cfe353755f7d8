"""What stands in for the dropped blocks: every way by its name.

empty: nothing (Xiao, Lin, Han, "Offsite-Tuning", 2023). share: the nearest kept block runs once more, with the same
weights (Zhang et al., "CRaSh", EMNLP 2023, section 4.2): full depth, no further bytes, more work for the client.
bridge: a linear map in closed form, of full or low rank. trained-bridge: the same with a bottleneck that starts at
nothing and is trained by distillation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ot_federated.architectures import block_config, find_architecture, get_blocks
from ot_federated.bundle import StackEntry
from ot_federated.emulated_model import build_emulated_model
from ot_federated.errors import ConfigError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges, fit_low_rank_bridges
from ot_federated.model_owner.splitting import draft_manifest, split_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ways = ("empty", "share", "bridge", "trained-bridge")
bridged_ways = ("bridge", "trained-bridge")


def build_bridges(
    model: PreTrainedModel,
    windows: torch.Tensor,
    stack: Sequence[StackEntry],
    emulator: Mapping[str, torch.Tensor],
    *,
    ridge: float,
    in_order: bool,
    rank: int,
    width: int,
) -> tuple[tuple[StackEntry, ...], dict[str, torch.Tensor]]:
    """Return the stack with the bridges' sizes, and the bridges' tensors by role name.

    Args:
        model: The full model.
        windows: Token windows of public text, ``(num_windows, window)``.
        stack: The layout, with an entry for each bridge.
        emulator: The kept blocks' tensors by role name, as clients will have them: bridges mend what shrinking and
            quantising did.
        ridge: Penalty, relative to the mean diagonal of X'X.
        in_order: Whether a bridge is fitted to what the emulator has before it, or to the full model's own states.
        rank: Rank of the linear map; 0 for a whole matrix.
        width: Neurons of the bottleneck; 0 for none. It starts at zero, so that at first the bridge is the linear one.

    Raises:
        ConfigError: If two factors of this rank would be larger than the whole matrix.
    """
    hidden = int(block_config(model.config, find_architecture(model.config)).hidden_size)
    if 2 * rank >= hidden:
        raise ConfigError(
            f"offsite.bridge-rank={rank} saves nothing: the whole matrix is {hidden} x {hidden}. Take a rank below "
            f"{hidden // 2}, or 0 for the whole matrix."
        )
    bridges = [entry for entry in stack if entry.role == "bridge"]
    runs = [(entry.first_block, entry.last_block) for entry in bridges]
    tensors: dict[str, torch.Tensor] = {}
    kept = find_kept_blocks(model, stack, emulator)
    if rank:
        low_rank = fit_low_rank_bridges(model, windows, runs, ridge=ridge, rank=rank, in_order=in_order, kept=kept)
        for number, parts in low_rank.items():
            tensors.update({bridges[number].prefix + name: tensor for name, tensor in parts.items()})
    else:
        whole = fit_bridges(model, windows, runs, ridge=ridge, in_order=in_order, kept=kept)
        for number, (weight, bias) in whole.items():
            tensors.update({bridges[number].prefix + "weight": weight, bridges[number].prefix + "bias": bias})
    dtype = next(model.parameters()).dtype
    for entry in bridges if width else ():
        enter = _random_matrix(entry.prefix, width, hidden)
        tensors[entry.prefix + "enter"] = enter.to(device=model.device, dtype=dtype)
        tensors[entry.prefix + "leave"] = torch.zeros(hidden, width, device=model.device, dtype=dtype)
    sized = tuple(replace(entry, rank=rank, width=width) if entry.role == "bridge" else entry for entry in stack)
    return sized, tensors


def find_kept_blocks(
    model: PreTrainedModel, stack: Sequence[StackEntry], emulator: Mapping[str, torch.Tensor]
) -> dict[int, nn.Module]:
    """Return the emulator's kept blocks by their numbers in the full model, with the tensors that clients have."""
    without = [entry for entry in stack if entry.role != "bridge"]
    parts = split_tensors(model, without, bridges={})
    tensors = {**parts["adapter"], **parts["frozen"], **emulator}
    emulated = build_emulated_model(draft_manifest(model, without, compression=""), tensors)
    blocks = get_blocks(emulated.to(model.device), find_architecture(emulated.config))  # type: ignore[arg-type]  # transformers annotates .to loosely
    return {entry.first_block: blocks[place] for place, entry in enumerate(without) if entry.role == "emulator"}


def _random_matrix(name: str, rows: int, columns: int) -> torch.Tensor:
    """Return a matrix that maps vectors of unit variance to vectors of unit variance; the same for the same name."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
