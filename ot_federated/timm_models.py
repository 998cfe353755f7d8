"""EVA through timm, as transformers' ``timm_wrapper`` runs it: what its configs leave to timm is written into them.

Yuxin Fang et al., "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale", CVPR 2023,
https://arxiv.org/abs/2211.07636, and "EVA-02: A Visual Representation for Neon Genesis", 2023,
https://arxiv.org/abs/2303.11331.

A config of transformers' wrapper names a timm model and the arguments that it is built with. The names lead to more
than models (``hf-hub:`` and ``local-dir:`` make timm fetch and open things, the argument ``checkpoint_path`` reads
pickles), so EVA's own names and arguments alone are accepted, from model owners as from bundles. timm is optional
(``pip install 'ot-federated[timm]'``), and this is the only module that imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ot_federated.errors import ArchitectureError, SourceError, nearest_match

timm_model_type = "timm_wrapper"
# Arguments of EVA's layout. Rates of dropout and stochastic depth are not among them: these make a block depend on its
# number; neither are rotary embeddings of each block's own (``rope_type``).
accepted_arguments = (
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "global_pool",
    "class_token",
    "num_reg_tokens",
    "no_embed_class",
    "qkv_bias",
    "qkv_fused",
    "swiglu_mlp",
    "scale_mlp",
    "scale_attn_inner",
    "init_values",
    "use_abs_pos_emb",
    "use_rot_pos_emb",
    "rope_grid_offset",
    "rope_temperature",
    "ref_feat_shape",
    "use_post_norm",
    "use_pre_transformer_norm",
    "use_post_transformer_norm",
    "use_fc_norm",
    "head_init_scale",
    "dynamic_img_size",
    "dynamic_img_pad",
)


def import_timm() -> Any:
    """Return timm.

    Raises:
        SourceError: If it cannot be imported; the message says how to install it.
    """
    try:
        import timm
    # RuntimeError: a torchvision that was built for another torch.
    except (ImportError, OSError, RuntimeError) as error:
        # A client may put this into a reply: other errors quote paths.
        reason = error if isinstance(error, (ModuleNotFoundError, RuntimeError)) else type(error).__name__
        raise SourceError(
            f"EVA models come through timm, which cannot be imported here ({reason}): pip install "
            "'ot-federated[timm]'. It brings torchvision, which must be the release, and the build for CPU or CUDA, "
            "that belongs to the installed torch."
        ) from error
    return timm


@lru_cache(maxsize=1)
def list_eva_models() -> tuple[str, ...]:
    """Return the names under which timm has EVA's layout, with blocks in a ``ModuleList``."""
    return tuple(import_timm().list_models("eva*", module="eva"))


def check_timm_config(config: Any) -> None:
    """Check that a config is one of EVA's, and that timm would fetch, open or run nothing for it.

    Raises:
        SourceError: If timm cannot be imported.
        ArchitectureError: If the config names another model, or arguments that are not accepted.
    """
    known = list_eva_models()
    name, arguments = getattr(config, "architecture", None), getattr(config, "model_args", None) or {}
    if not isinstance(name, str) or name.partition(".")[0] not in known:
        raise ArchitectureError(
            f"Of timm's models EVA is supported, and {name!r:.100} is none{nearest_match(str(name), known)}. Known: "
            f"{', '.join(known)}."
        )
    if not isinstance(arguments, Mapping) or not all(map(_is_plain, arguments.values())):
        raise ArchitectureError("The config's model_args are not numbers, switches and names.")
    if unknown := sorted(str(argument)[:100] for argument in arguments if argument not in accepted_arguments):
        raise ArchitectureError(
            f"{name} with model_args {', '.join(unknown)} is not supported. Accepted: "
            f"{', '.join(sorted(accepted_arguments))}."
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(isinstance(size, int) for size in value)
    return value is None or isinstance(value, (bool, int, float, str))


def complete_timm_config(config: Any) -> None:
    """Write into ``config.model_args``, in place, what timm knows by the model's name: depth, width and sizes.

    The model then also reads images of other sizes. What timm keeps beside the model, the image processor's settings
    among them, is dropped: it names places on the hub, and the processor has a file of its own. So are the classes'
    names as they were read: they would be saved in the place of others that the model is given.
    """
    import torch

    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(config.architecture, **{**(config.model_args or {}), "num_classes": 0})
    config.model_args = {
        **(config.model_args or {}),
        "depth": len(model.blocks),
        "embed_dim": model.embed_dim,
        "in_chans": model.patch_embed.proj.in_channels,
        "img_size": _shorten(model.patch_embed.img_size),
        "patch_size": _shorten(model.patch_embed.patch_size),
        "dynamic_img_size": True,
    }
    for field in ("pretrained_cfg", "label_names"):
        vars(config).pop(field, None)


def _shorten(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def describe_timm_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json`` for what timm does to images in evaluation.

    transformers' own wrapper of timm's transforms cannot be saved into a file of its own. Where the margin to cut off
    is odd, timm's image may begin one pixel later.

    Args:
        settings: ``pretrained_cfg`` of timm's config file.

    Raises:
        SourceError: If transformers has no such image processor.
    """
    from PIL.Image import Resampling

    resolved = import_timm().data.resolve_data_config(dict(settings))
    _, height, width = resolved["input_size"]
    mode, resample = resolved["crop_mode"], resolved["interpolation"].upper()
    if height != width or mode not in ("center", "squash") or resample not in Resampling.__members__:
        raise SourceError(
            f"The model reads images of {height} x {width} pixels, crop_mode={mode!r}, interpolation="
            f"{resolved['interpolation']!r}; squares, center or squash, and Pillow's interpolations are supported. "
            "Save an image processor as preprocessor_config.json beside the model and take pretrained_cfg out of its "
            "config.json."
        )
    scaled = math.floor(height / resolved["crop_pct"])
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        "crop_size": {"height": height, "width": width},
        "resample": Resampling[resample].value,
        "image_mean": list(resolved["mean"]),
        "image_std": list(resolved["std"]),
    }
