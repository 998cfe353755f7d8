"""Where blocks keep their linear layers, and the layouts that several families share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class BlockLayers:
    """Where a block keeps its linear layers: what is needed to make it smaller.

    Attributes:
        ffn_in: Paths, within a block, of the layers whose outputs are the FFN's neurons. One that is twice as wide as
            the FFN holds two parts of each neuron, gate and value, all of the one behind all of the other.
        ffn_norms: Paths of norms over the FFN's neurons, which may be identities.
        ffn_out: Paths of the layers whose inputs are the FFN's neurons.
        attention: Paths of the attention's linear layers.
    """

    ffn_in: tuple[str, ...] = ()
    ffn_norms: tuple[str, ...] = ()
    ffn_out: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()

    def fits(self, block: nn.Module) -> bool:
        """Whether a block has all these paths."""
        names = {name for name, _ in block.named_modules(remove_duplicate=False)}
        return names.issuperset(path for paths in vars(self).values() for path in paths)


absent = BlockLayers()
gated = BlockLayers(
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out=("mlp.down_proj",),
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
vision = BlockLayers(
    ffn_in=("mlp.fc1",),
    ffn_out=("mlp.fc2",),
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
)
clip = replace(vision, attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"))
dinov2_gated = replace(vision, ffn_in=("mlp.gate_proj", "mlp.up_proj"), ffn_out=("mlp.down_proj",))
_eva_attention = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")
# Queries, keys and values are one matrix or three; so are gate and value of the FFN one or two.
eva = tuple(
    BlockLayers(ffn_in=ffn_in, ffn_norms=("mlp.norm",), ffn_out=("mlp.fc2",), attention=attention)
    for attention in (("attn.qkv", "attn.proj"), _eva_attention)
    for ffn_in in (("mlp.fc1",), ("mlp.fc1_g", "mlp.fc1_x"))
)
