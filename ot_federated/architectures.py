"""Where each model family keeps its blocks: one table, open to registration.

Offsite-Tuning needs little of a family. Its blocks stand in one ``ModuleList`` and each maps hidden states
``(batch, seq, hidden)``, of an image's patches as of a text's tokens, to hidden states of the same shape. Everything
outside the list (embeddings, final norm, language-model head) is frozen and is found by exclusion, so tied and untied
heads need no special case here. A classification head, where the task has one, is new and trains with the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from ot_federated import block_layers
from ot_federated.block_layers import BlockLayers
from ot_federated.errors import ArchitectureError, ConfigError, nearest_match
from ot_federated.timm_models import check_timm_config, complete_timm_config, timm_model_type

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
        blocks: Path of the ``ModuleList`` of blocks in the model.
        kind: What it reads: ``text`` or ``image``.
        head: Path of the classification head in a model that has one.
        size_argument: Argument that lets the model read images of another size than its config's, if it needs one.
        section: Field of the config that holds the blocks' own config, where one config describes several models.
        section_fields: transformers' usual name and the section's own, of each field that is read there, where the
            section is a plain dictionary.
        block_returns_tuple: Whether a block returns ``(hidden_states, ...)`` and not hidden states alone.
        per_block_fields: Config fields that hold one entry a block and must be cut with the blocks.
        dropped_fields: Config fields that name blocks by number and are of no use here.
        unsupported: Config fields that make a block depend on its index, with the value that does no harm.
        sublayer_outputs: Names, inside a block, of the projections that end attention and the feed-forward part:
            bottleneck adapters stand behind them.
        uncalled: Names, inside a block, of linear layers whose weights are used without calling the layer: what LoRA
            puts around them would change nothing.
        check: Raises an error where a config is none of the family, though its model type is the family's.
        complete: Writes into the full model's config, before it is loaded, the fields that are read here and that it
            leaves to defaults.
        layers: Where a block keeps its linear layers; empty where blocks are only kept or dropped.
        other_layers: Where blocks keep them that the config builds otherwise; see :func:`find_layers`.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    kind: Literal["text", "image"] = "text"
    head: str = "score"
    size_argument: str = ""
    section: str = ""
    section_fields: tuple[tuple[str, str], ...] = ()
    block_returns_tuple: bool = False
    per_block_fields: tuple[str, ...] = ()
    dropped_fields: tuple[str, ...] = ()
    unsupported: tuple[tuple[str, object], ...] = ()
    sublayer_outputs: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None
    complete: Callable[[Any], None] | None = None
    layers: BlockLayers = block_layers.absent
    other_layers: tuple[BlockLayers, ...] = ()


_table: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Add a family to the table, or replace the entry of its model types."""
    for model_type in architecture.model_types:
        _table[model_type] = architecture


def list_architectures() -> dict[str, Architecture]:
    """Return the table, by model type."""
    return dict(_table)


for _architecture in (
    Architecture(
        family="LLaMA",
        model_types=("llama",),
        blocks="model.layers",
        layers=block_layers.gated,
        sublayer_outputs=("o_proj", "down_proj"),
    ),
    Architecture(
        family="Mistral",
        model_types=("mistral", "ministral"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
        sublayer_outputs=("o_proj", "down_proj"),
        layers=block_layers.gated,
    ),
    Architecture(
        family="Qwen",
        model_types=("qwen2", "qwen3"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
        sublayer_outputs=("o_proj", "down_proj"),
        layers=block_layers.gated,
    ),
    Architecture(
        family="Gemma",
        model_types=("gemma", "gemma2", "gemma3_text"),
        blocks="model.layers",
        per_block_fields=("layer_types",),
        sublayer_outputs=("o_proj", "down_proj"),
        layers=block_layers.gated,
    ),
    Architecture(
        family="OPT",
        model_types=("opt",),
        blocks="model.decoder.layers",
        layers=BlockLayers(
            ffn_in=("fc1",),
            ffn_out=("fc2",),
            attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        ),
        sublayer_outputs=("out_proj", "fc2"),
    ),
    Architecture(
        family="GPT-2",
        model_types=("gpt2",),
        blocks="transformer.h",
        # With this switch a block divides its attention by its own index, which changes when blocks are dropped.
        unsupported=(("scale_attn_by_inverse_layer_idx", False),),
        sublayer_outputs=("attn.c_proj", "mlp.c_proj"),
        layers=BlockLayers(ffn_in=("mlp.c_fc",), ffn_out=("mlp.c_proj",), attention=("attn.c_attn", "attn.c_proj")),
    ),
    Architecture(
        family="BLOOM",
        model_types=("bloom",),
        blocks="transformer.h",
        block_returns_tuple=True,
        sublayer_outputs=("dense", "dense_4h_to_h"),
        layers=BlockLayers(
            ffn_in=("mlp.dense_h_to_4h",),
            ffn_out=("mlp.dense_4h_to_h",),
            attention=("self_attention.query_key_value", "self_attention.dense"),
        ),
    ),
    Architecture(
        family="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        sublayer_outputs=("dense", "dense_4h_to_h"),
        layers=BlockLayers(
            ffn_in=("mlp.dense_h_to_4h",),
            ffn_out=("mlp.dense_4h_to_h",),
            attention=("attention.query_key_value", "attention.dense"),
        ),
    ),
    *(
        Architecture(
            family=family,
            model_types=(model_type,),
            blocks=f"{model_type}.layers",
            kind="image",
            head="classifier",
            size_argument="interpolate_pos_encoding",
            sublayer_outputs=("o_proj", "fc2"),
            layers=block_layers.vision,
        )
        for family, model_type in (("ViT", "vit"), ("DeiT", "deit"))
    ),
    Architecture(
        family="CLIP vision",
        model_types=("clip",),
        blocks="vision_model.encoder.layers",
        kind="image",
        head="classifier",
        size_argument="interpolate_pos_encoding",
        section="vision_config",
        sublayer_outputs=("out_proj", "fc2"),
        layers=block_layers.clip,
    ),
    *(
        Architecture(
            family=family,
            model_types=(model_type,),
            blocks=f"{model_type}.encoder.layer",
            kind="image",
            head="classifier",
            dropped_fields=("stage_names", "out_features", "out_indices"),
            sublayer_outputs=("o_proj", "fc2"),
            layers=block_layers.vision,
            other_layers=(block_layers.dinov2_gated,),
        )
        for family, model_type in (("DINOv2", "dinov2"), ("DINOv2 with registers", "dinov2_with_registers"))
    ),
    Architecture(
        family="EVA",
        model_types=(timm_model_type,),
        blocks="timm_model.blocks",
        kind="image",
        head="timm_model.head",
        section="model_args",
        section_fields=(
            ("num_hidden_layers", "depth"),
            ("hidden_size", "embed_dim"),
            ("image_size", "img_size"),
            ("patch_size", "patch_size"),
            ("num_channels", "in_chans"),
        ),
        # The classes once more, under timm's names; where timm's hub has the weights.
        dropped_fields=("num_classes", "label_names", "pretrained_cfg"),
        sublayer_outputs=("attn.proj", "mlp.fc2"),
        # Where queries, keys and values are one matrix, its biases are two parameters and a buffer beside it.
        uncalled=("attn.qkv",),
        layers=block_layers.eva[0],
        other_layers=block_layers.eva[1:],
        check=check_timm_config,
        complete=complete_timm_config,
    ),
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
    if architecture.check:
        architecture.check(config)
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
            f"{architecture.family}: load it as transformers names it for the task, or register its own architecture."
        ) from error
    if not isinstance(blocks, nn.ModuleList):
        raise ArchitectureError(f"{architecture.blocks!r} is a {type(blocks).__name__}, not a ModuleList of blocks.")
    return blocks


def find_layers(block: nn.Module, architecture: Architecture) -> BlockLayers:
    """Return where a block keeps its linear layers: the first of its family's layouts whose paths are all there.

    The result is empty where the table does not say it.

    Raises:
        ArchitectureError: If the block has none of the layouts.
    """
    layouts = (architecture.layers, *architecture.other_layers)
    for layout in layouts:
        if layout.fits(block):
            return layout
    raise ArchitectureError(
        f"{type(block).__name__} has its layers elsewhere than the table says of {architecture.family}: neither "
        f"{' nor '.join(', '.join((*layout.ffn_in, *layout.ffn_out, *layout.attention)) for layout in layouts)}. "
        "Register its own architecture, or take offsite.shrink=none."
    )


def find_head(model: nn.Module, architecture: Architecture) -> nn.Module | None:
    """Return the model's classification head, or None where it has none."""
    try:
        return model.get_submodule(architecture.head)
    except AttributeError:
        return None


def block_config(config: Any, architecture: Architecture) -> Any:
    """Return the part of a config that describes the blocks, its fields under transformers' usual names."""
    part = getattr(config, architecture.section) if architecture.section else config
    if architecture.section_fields:
        fields = {usual: (part or {}).get(own) for usual, own in architecture.section_fields}
        return SimpleNamespace(**fields, attribute_map=dict(architecture.section_fields))
    return part


def choose_auto_class(architecture: Architecture, *, classifies: bool) -> Any:
    """Return transformers' class that builds and loads a family's models.

    Args:
        architecture: The family.
        classifies: Whether the model ends in a classification head.

    Raises:
        ConfigError: If an image model is to do without a head: there is no task for it.
    """
    import transformers

    if architecture.kind == "image":
        if not classifies:
            raise ConfigError(f"{architecture.family} reads images: set task.name=image-classification for it.")
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM


def check_split(*, num_blocks: int, bottom: int, emulator: int, top: int, spread: int = 0) -> None:
    """Check that a ``bottom-emulator-top`` split fits a model of ``num_blocks`` blocks.

    Raises:
        ConfigError: If the adapter leaves no middle, or the emulator is larger than the middle.
    """
    middle = num_blocks - bottom - top - spread
    split = f"offsite.bottom-blocks={bottom}, offsite.emulator-blocks={emulator}, offsite.top-blocks={top}"
    if spread:
        split += f", offsite.spread-blocks={spread}"
    if middle < 1:
        raise ConfigError(
            f"The split {split} does not fit a model of {num_blocks} blocks: the adapter leaves no middle to "
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
    # Some families write the classes under names that their config does not read.
    cut.setdefault("id2label", config.id2label)
    cut.setdefault("label2id", config.label2id)
    blocks_part = cut[architecture.section] if architecture.section else cut
    for name in architecture.per_block_fields:
        values = blocks_part.get(name)
        if values is not None:
            blocks_part[name] = [values[position] for position in positions]
    depth_field = block_config(config, architecture).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    blocks_part[depth_field] = len(positions)
    for part in config_parts(cut):
        for private in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", *code_fields):
            part.pop(private, None)
        for name in architecture.dropped_fields:
            part.pop(name, None)
    # As it will be read back: JSON turns integer keys (label tables) into text.
    plain: dict[str, Any] = json.loads(json.dumps(cut))
    return plain


def config_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config of JSON values and the configs inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from config_parts(value)
