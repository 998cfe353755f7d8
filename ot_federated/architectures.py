"""Where each model family keeps its blocks: one table, open to registration.

Offsite-Tuning needs little of a family. Its blocks stand in one ``ModuleList`` and each maps hidden states
``(batch, seq, hidden)`` to hidden states of the same shape. Everything outside the list (embeddings, final norm,
head) is frozen and is found by exclusion, so tied and untied heads need no special case here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ot_federated.errors import ArchitectureError, ConfigError, nearest_match

if TYPE_CHECKING:
    from torch import nn

# Config fields by which transformers fetches and runs code: a bundle never holds them.
code_fields = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "quantization_config",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The layout of one model family.

    Attributes:
        family: The family's name in messages and cards.
        model_types: Values of ``config.model_type`` that have this layout.
        blocks: Path of the ``ModuleList`` of blocks in the causal language model.
        block_returns_tuple: Whether a block returns ``(hidden_states, ...)`` and not hidden states alone.
        per_block_fields: Config fields that hold one entry a block and must be cut with the blocks.
        unsupported: Config fields that make a block depend on its index, with the value that does no harm.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    block_returns_tuple: bool = False
    per_block_fields: tuple[str, ...] = ()
    unsupported: tuple[tuple[str, object], ...] = ()


_table: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Add a family to the table, or replace the entry of its model types."""
    for model_type in architecture.model_types:
        _table[model_type] = architecture


def list_architectures() -> dict[str, Architecture]:
    """Return the table, by model type."""
    return dict(_table)


for _architecture in (
    Architecture(family="LLaMA", model_types=("llama",), blocks="model.layers"),
    Architecture(
        family="Mistral",
        model_types=("mistral", "ministral"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
    ),
    Architecture(
        family="Qwen",
        model_types=("qwen2", "qwen3"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
    ),
    Architecture(
        family="Gemma",
        model_types=("gemma", "gemma2", "gemma3_text"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
    ),
    Architecture(family="OPT", model_types=("opt",), blocks="model.decoder.layers"),
    Architecture(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        # With this switch a block divides its attention by its own index, which changes when blocks are dropped.
        unsupported=(("scale_attn_by_inverse_layer_idx", False),),
    ),
    Architecture(family="BLOOM", model_types=("bloom",), blocks="transformer.h", block_returns_tuple=True),
    Architecture(family="GPT-NeoX", model_types=("gpt_neox",), blocks="gpt_neox.layers"),
):
    register_architecture(_architecture)


def find_architecture(config: Any) -> Architecture:
    """Return the table's entry for a transformers config.

    Raises:
        ArchitectureError: If the model type is not in the table (the message says how to register it), or the
            config switches on something that breaks when blocks are dropped.
    """
    model_type = str(getattr(config, "model_type", ""))
    architecture = _table.get(model_type)
    if architecture is None:
        known = ", ".join(sorted(_table))
        raise ArchitectureError(
            f"Model type {model_type!r} has no known architecture{nearest_match(model_type, _table)}. Known: {known}. "
            "To add it, call ot_federated.architectures.register_architecture(Architecture(family='...', "
            f"model_types=({model_type!r},), blocks='path.to.its.block.list')) before the run."
        )
    for name, harmless in architecture.unsupported:
        if getattr(config, name, harmless) != harmless:
            raise ArchitectureError(
                f"{architecture.family} with {name}={getattr(config, name)!r} cannot be split: its blocks depend on "
                f"their index. Use a model with {name}={harmless!r}."
            )
    return architecture


def get_blocks(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """Return the model's list of blocks.

    Raises:
        ArchitectureError: If the model has no module list at the table's path.
    """
    from torch import nn

    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError as error:
        raise ArchitectureError(
            f"{type(model).__name__} has no module {architecture.blocks!r}, where the table keeps the blocks of "
            f"{architecture.family}: load it as a causal language model, or register its own architecture."
        ) from error
    if not isinstance(blocks, nn.ModuleList):
        raise ArchitectureError(f"{architecture.blocks!r} is a {type(blocks).__name__}, not a ModuleList of blocks.")
    return blocks


def check_split(*, num_blocks: int, bottom: int, emulator: int, top: int) -> None:
    """Check that a ``bottom-emulator-top`` split fits a model of ``num_blocks`` blocks.

    Raises:
        ConfigError: If the adapter leaves no middle, or the emulator is larger than the middle.
    """
    middle = num_blocks - bottom - top
    split = f"offsite.bottom-blocks={bottom}, offsite.emulator-blocks={emulator}, offsite.top-blocks={top}"
    if middle < 1:
        raise ConfigError(
            f"The split {split} does not fit a model of {num_blocks} blocks: bottom and top leave no middle to "
            f"protect. Their sum must be below {num_blocks}."
        )
    if emulator > middle:
        raise ConfigError(
            f"The split {split} does not fit a model of {num_blocks} blocks: the middle has only {middle} blocks. "
            f"Set offsite.emulator-blocks to at most {middle}."
        )


def cut_config(config: Any, architecture: Architecture, *, positions: list[int]) -> dict[str, Any]:
    """Return the config, as JSON values, of a model whose i-th block is the full model's block ``positions[i]``.

    Names and paths that tell where the full model lives are left out.
    """
    cut: dict[str, Any] = config.to_dict()
    for name in architecture.per_block_fields:
        values = cut.get(name)
        if values is not None:
            cut[name] = [values[position] for position in positions]
    depth_field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut[depth_field] = len(positions)
    for private in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", *code_fields):
        cut.pop(private, None)
    # As it will be read back: JSON turns integer keys (label tables) into text.
    plain: dict[str, Any] = json.loads(json.dumps(cut))
    return plain
