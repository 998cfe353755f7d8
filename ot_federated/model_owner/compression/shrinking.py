"""How kept blocks are made smaller: every way by its name.

svd: each attention layer becomes two factors, the best approximation of its rank. ffn: the FFN keeps the neurons of the
largest norm of incoming and outgoing weights, ``||[w_in; w_out]||``. Both are FedPFT's: Zhaopeng Peng et al., "FedPFT:
Federated Proxy Fine-Tuning of Foundation Models", IJCAI 2024, https://arxiv.org/abs/2404.11536, section 3.2; without
distillation they lose to dropping blocks, as there. magnitude: the weights of the smallest magnitude become zero, and
only the others are stored; the shape of the computation stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ot_federated.architectures import find_architecture, find_layers, get_blocks
from ot_federated.block_layers import BlockLayers
from ot_federated.bundle import StackEntry
from ot_federated.emulated_blocks import count_neurons, is_transposed, linear_shape, saves_by_rank
from ot_federated.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ways = ("none", "svd", "ffn", "svd+ffn", "magnitude")


def shrink_blocks(
    model: PreTrainedModel,
    stack: Sequence[StackEntry],
    tensors: Mapping[str, torch.Tensor],
    *,
    shrink: str,
    keep: float,
) -> tuple[tuple[StackEntry, ...], dict[str, torch.Tensor]]:
    """Return the stack with the kept blocks' new sizes, and the emulator's tensors with their new weights.

    Args:
        model: The full model.
        stack: The layout.
        tensors: The emulator's tensors by role name; those of bridges pass unchanged.
        shrink: The way.
        keep: Share that stays, in (0, 1): of the attention layers' weights, of the neurons, of the weights.

    Raises:
        ArchitectureError: If the family's table entry does not say where its attention or FFN is, or is not true of
            these blocks.
    """
    architecture = find_architecture(model.config)
    needs = {"svd": "attention", "ffn": "ffn_in", "svd+ffn": "attention", "magnitude": "attention"}
    if shrink != "none" and not getattr(architecture.layers, needs[shrink]):
        raise ArchitectureError(
            f"offsite.shrink={shrink!r} needs the paths of FFN and attention layers, which {architecture.family}'s "
            "architecture does not give: set its layers, or take offsite.shrink=none."
        )
    blocks = get_blocks(model, architecture)
    result, sized = dict(tensors), []
    for entry in stack:
        if entry.role != "emulator" or shrink == "none":
            sized.append(entry)
            continue
        block = blocks[entry.first_block]
        layers = find_layers(block, architecture)
        own = {n.removeprefix(entry.prefix): result.pop(n) for n in list(result) if n.startswith(entry.prefix)}
        width = rank = 0
        if shrink == "magnitude":
            own = _prune(own, layers, keep=keep)
        if "ffn" in shrink:
            own, width = _prune_neurons(block, own, layers, keep=keep)
        if "svd" in shrink:
            own, rank = _factorise(block, own, layers, keep=keep)
        result.update({entry.prefix + name: tensor for name, tensor in own.items()})
        sized.append(replace(entry, width=width, rank=rank))
    # A block that runs once more has the sizes of the one whose weights it runs with.
    kept = {entry.index: entry for entry in sized if entry.role == "emulator"}
    return tuple(
        replace(entry, width=kept[entry.index].width, rank=kept[entry.index].rank) if entry.role == "share" else entry
        for entry in sized
    ), result


def _matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight as ``(outputs, inputs)``."""
    return weight.T if is_transposed(layer) else weight


def _prune(own: Mapping[str, torch.Tensor], layers: BlockLayers, *, keep: float) -> dict[str, torch.Tensor]:
    paths = {f"{path}.weight" for path in (*layers.ffn_in, *layers.ffn_out, *layers.attention)}
    pruned = {}
    for name, tensor in own.items():
        if name not in paths:
            pruned[name] = tensor
            continue
        magnitude = tensor.float().abs()
        threshold = magnitude.flatten().kthvalue(max(1, round((1 - keep) * tensor.numel()))).values
        pruned[name] = torch.where(magnitude > threshold, tensor, torch.zeros_like(tensor))
    return pruned


def _prune_neurons(
    block: nn.Module, own: Mapping[str, torch.Tensor], layers: BlockLayers, *, keep: float
) -> tuple[dict[str, torch.Tensor], int]:
    num_neurons = count_neurons(block, layers)
    sums: list[torch.Tensor] = []
    for path in layers.ffn_in:
        rows = _matrix(block.get_submodule(path), own[f"{path}.weight"]).float().square().sum(1)
        sums.append(rows.view(-1, num_neurons).sum(0))
    for path in layers.ffn_out:
        sums.append(_matrix(block.get_submodule(path), own[f"{path}.weight"]).float().square().sum(0))
    norms = torch.stack(sums).sum(0)
    width = max(1, round(keep * num_neurons))
    # In their order: a client cannot tell from it which were taken, and equal runs give equal files.
    chosen = norms.topk(width).indices.sort().values
    shrunk = dict(own)
    for path in layers.ffn_in:
        layer = block.get_submodule(path)
        # A neuron's second part, where there is one, stands as far behind the first as there are neurons.
        parts = torch.arange(linear_shape(layer)[0] // num_neurons, device=chosen.device)[:, None] * num_neurons
        rows = (parts + chosen).flatten()
        shrunk[f"{path}.weight"] = own[f"{path}.weight"].index_select(1 if is_transposed(layer) else 0, rows)
        if f"{path}.bias" in own:
            shrunk[f"{path}.bias"] = own[f"{path}.bias"].index_select(0, rows)
    for path in layers.ffn_out:
        dimension = 0 if is_transposed(block.get_submodule(path)) else 1
        shrunk[f"{path}.weight"] = own[f"{path}.weight"].index_select(dimension, chosen)
    for path in layers.ffn_norms:
        for name in [f"{path}.{name}" for name, _ in block.get_submodule(path).named_parameters()]:
            shrunk[name] = own[name].index_select(0, chosen)
    return shrunk, width


def _factorise(
    block: nn.Module, own: Mapping[str, torch.Tensor], layers: BlockLayers, *, keep: float
) -> tuple[dict[str, torch.Tensor], int]:
    shapes = [linear_shape(block.get_submodule(path)) for path in layers.attention]
    # One rank for all: the share of the largest layer's weights. Smaller layers, as keys and values of grouped
    # queries, may be whole at that rank.
    outputs, inputs = max(shapes, key=lambda shape: shape[0] * shape[1])
    rank = max(1, int(keep * outputs * inputs / (outputs + inputs)))
    factored = dict(own)
    for path, (outputs, inputs) in zip(layers.attention, shapes, strict=True):
        if not saves_by_rank(outputs, inputs, rank=rank):
            continue
        weight = factored.pop(f"{path}.weight")
        left, values, right = torch.linalg.svd(_matrix(block.get_submodule(path), weight).float(), full_matrices=False)
        root = values[:rank].sqrt()
        factored[f"{path}.up"] = (left[:, :rank] * root).to(weight.dtype)
        factored[f"{path}.down"] = (root[:, None] * right[:rank]).to(weight.dtype)
    return factored, rank
