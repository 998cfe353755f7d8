"""What stands in an emulated stack beside whole blocks: bridges, and blocks that were made smaller.

Bridge: Offsite-Tuning drops blocks and leaves nothing; a linear map fitted on public text is this project's. With a
bottleneck it becomes the harmonizer of Kai Yao et al., "ScaleOT: Privacy-utility-scalable Offsite-tuning with Dynamic
LayerReplace and Selective Rank Compression", AAAI 2025, https://arxiv.org/abs/2412.09812, which adds its output to
the hidden states. Ours starts as the closed-form bridge, because the bottleneck's last matrix starts at zero.

Smaller blocks: fewer FFN neurons and attention of low rank, as in Zhaopeng Peng et al., "FedPFT: Federated Proxy
Fine-Tuning of Foundation Models", IJCAI 2024, https://arxiv.org/abs/2404.11536.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from ot_federated.architectures import Architecture, find_layers
from ot_federated.block_layers import BlockLayers
from ot_federated.errors import BundleError


class Bridge(nn.Module):
    """A stand-in for a run of dropped blocks: ``h -> h + W h + b``, with a bottleneck ``V gelu(U h / rms(h))`` added.

    It takes a block's place in the stack, so it accepts what blocks are passed beside hidden states. Of that it uses
    the key-value cache alone: it stores empty keys at its position, because models read the number of cached tokens
    off the first layer, or the first of each attention type.

    Args:
        hidden_size: Width of the hidden states.
        position: Its position in the stack.
        returns_tuple: Whether the family's blocks return a tuple.
        rank: Rank of W, kept as ``up @ down``; 0 for a whole matrix.
        width: Neurons of the bottleneck; 0 for none.
    """

    def __init__(self, hidden_size: int, *, position: int, returns_tuple: bool, rank: int = 0, width: int = 0) -> None:
        super().__init__()
        if rank:
            self.down = nn.Parameter(torch.empty(rank, hidden_size))
            self.up = nn.Parameter(torch.empty(hidden_size, rank))
        else:
            self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        if width:
            self.enter = nn.Parameter(torch.empty(width, hidden_size))
            self.leave = nn.Parameter(torch.empty(hidden_size, width))
        self.rank = rank
        self.width = width
        self.position = position
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
        """Map hidden states ``(batch, seq, hidden)`` to the same shape."""
        # Families pass the cache under different names, GPT-2 by position.
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            empty = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(empty, empty, self.position)
        if self.rank:
            change = functional.linear(functional.linear(hidden_states, self.down), self.up, self.bias)
        else:
            change = functional.linear(hidden_states, self.weight, self.bias)
        if self.width:
            scaled = functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
            change = change + functional.linear(functional.gelu(functional.linear(scaled, self.enter)), self.leave)
        bridged = hidden_states + change
        return (bridged, None) if self.returns_tuple else bridged


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is ``up @ down``, with ``down`` ``(rank, inputs)`` and ``up`` ``(outputs, rank)``."""

    def __init__(self, num_inputs: int, num_outputs: int, *, rank: int, has_bias: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, num_inputs))
        self.up = nn.Parameter(torch.empty(num_outputs, rank))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if has_bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map ``(..., inputs)`` to ``(..., outputs)``."""
        return functional.linear(functional.linear(inputs, self.down), self.up, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, for blocks that use a layer's weight without calling the layer (EVA's ``attn.qkv``)."""
        return self.up @ self.down


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer; GPT-2's Conv1D keeps its matrix transposed."""
    first, second = layer.weight.shape  # type: ignore[misc]  # both kinds have a matrix
    return (second, first) if is_transposed(layer) else (first, second)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its matrix as ``(inputs, outputs)``."""
    return type(layer).__name__ == "Conv1D"


def saves_by_rank(num_outputs: int, num_inputs: int, *, rank: int) -> bool:
    """Whether two factors of this rank are smaller than the matrix; else the layer stays whole."""
    return rank * (num_outputs + num_inputs) < num_outputs * num_inputs


def reshape_block(block: nn.Module, *, width: int, rank: int, architecture: Architecture) -> None:
    """Give a block's FFN ``width`` neurons and its attention this ``rank``, in place, with new weights; 0 for as it is.

    Raises:
        BundleError: If the family's table entry does not say where FFN and attention are, or a number is beyond them.
    """
    layers = find_layers(block, architecture)
    if (width and not layers.ffn_in) or (rank and not layers.attention):
        raise BundleError(f"The table does not say where the FFN and attention layers of {architecture.family} are.")
    if width:
        _narrow_ffn(block, layers, width=width)
    for path in layers.attention:
        layer = block.get_submodule(path)
        outputs, inputs = linear_shape(layer)
        if rank and saves_by_rank(outputs, inputs, rank=rank):
            block.set_submodule(path, LowRankLinear(inputs, outputs, rank=rank, has_bias=layer.bias is not None))


def count_neurons(block: nn.Module, layers: BlockLayers) -> int:
    """Return the number of neurons of a block's FFN."""
    return linear_shape(block.get_submodule(layers.ffn_out[0]))[1]


def _narrow_ffn(block: nn.Module, layers: BlockLayers, *, width: int) -> None:
    num_neurons = count_neurons(block, layers)
    if width > num_neurons:
        raise BundleError(f"An FFN of {width} neurons is wider than the model's own.")
    for path in layers.ffn_in:
        layer = block.get_submodule(path)
        outputs, inputs = linear_shape(layer)
        block.set_submodule(path, _resize(layer, outputs=outputs // num_neurons * width, inputs=inputs))
    for path in layers.ffn_out:
        layer = block.get_submodule(path)
        block.set_submodule(path, _resize(layer, outputs=linear_shape(layer)[0], inputs=width))
    for path in layers.ffn_norms:
        norm: Any = block.get_submodule(path)
        if isinstance(norm, nn.Identity):
            continue
        # In place: a subclass may keep more than its sizes.
        norm.normalized_shape = (width,)
        for name, parameter in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(torch.empty_like(parameter[:width])))


def _resize(layer: nn.Module, *, outputs: int, inputs: int) -> nn.Module:
    if is_transposed(layer):
        return type(layer)(outputs, inputs)  # Conv1D takes its outputs first
    return nn.Linear(inputs, outputs, bias=layer.bias is not None)
