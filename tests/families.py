"""Small random models of every family in the architecture table, and a tokenizer that needs no download."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from ot_federated.architectures import find_architecture, find_head
from ot_federated.errors import SourceError
from ot_federated.timm_models import import_timm

num_blocks = 8
_llama_like = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": num_blocks,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_families: dict[str, dict[str, Any]] = {
    "llama": _llama_like,
    "mistral": {**_llama_like, "sliding_window": None},
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma": _llama_like,
    "gemma2": {**_llama_like, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_llama_like, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "gpt2": {"n_embd": 32, "n_layer": num_blocks, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0},
    "bloom": {"hidden_size": 32, "n_layer": num_blocks, "n_head": 4},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
}
family_names = tuple(_families)
_vit_like = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": num_blocks,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
_clip_text = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 10,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_image_families: dict[str, dict[str, Any]] = {
    "vit": _vit_like,
    "deit": {**_vit_like, "architectures": ["DeiTForImageClassification"]},
    "clip": {"vision_config": _vit_like, "text_config": _clip_text},
    "dinov2": _vit_like,
    "dinov2_with_registers": _vit_like,
    "timm_wrapper": {
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {
            "depth": num_blocks,
            "embed_dim": 32,
            "num_heads": 4,
            "img_size": 28,
            "patch_size": 7,
            "in_chans": 3,
            "dynamic_img_size": True,
        },
    },
}
image_family_names = tuple(_image_families)


def why_no_timm() -> str:
    """Return why timm cannot be imported; empty where it can."""
    try:
        import_timm()
    except SourceError as error:
        return str(error)
    return ""


needs_timm = pytest.mark.skipif(bool(why_no_timm()), reason=why_no_timm())


def family_param(family: str) -> Any:
    """Return a family as a test's parameter: a skipped one where what it needs cannot be imported."""
    return pytest.param(family, marks=needs_timm if family == "timm_wrapper" else ())


image_families = [family_param(family) for family in image_family_names]


def _draw_weights(model: torch.nn.Module) -> None:
    """Draw weights anew: blocks then differ enough that a wrong order would show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "bias" in name:
                parameter.normal_(std=0.05)


def build_family_model(
    family: str, *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a random model of one family."""
    torch.manual_seed(seed)
    vocabulary = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **vocabulary, **_families[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    _draw_weights(model)
    for parameter in model.parameters():
        # Not model.to(dtype), which would also round the rotary frequencies: from_pretrained leaves them in fp32.
        parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    return model


@lru_cache(maxsize=1)
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes, which reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_family_model(directory: Path, family: str = "llama", *, tied: bool = True, seed: int = 0) -> Path:
    """Write a small random model and its tokenizer as a save_pretrained directory."""
    build_family_model(family, tied=tied, seed=seed).save_pretrained(directory)
    byte_tokenizer().save_pretrained(str(directory))
    return directory


def get_head(model: PreTrainedModel) -> Any:
    """Return a model's classification head."""
    head = find_head(model, find_architecture(model.config))
    assert head is not None
    return head


def build_image_model(
    family: str = "vit", *, seed: int = 0, classes: int = 2, dtype: torch.dtype = torch.float32, **fields: Any
) -> PreTrainedModel:
    """Build a random image model of one family, its head included."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_image_families[family], **fields})
    config.num_labels = classes
    # EVA's buffers have its weights' type, so that it is built in it.
    model = AutoModelForImageClassification.from_config(config, dtype=dtype).eval()
    _draw_weights(model)
    return model


def image_processor() -> ViTImageProcessorPil:
    """Build the image processor of small models, which read 28 x 28 pixels."""
    return ViTImageProcessorPil(size={"height": 28, "width": 28})


def save_image_model(directory: Path, family: str = "vit", *, seed: int = 0, classes: int = 2, **fields: Any) -> Path:
    """Write a small random image model and its image processor as a save_pretrained directory."""
    build_image_model(family, seed=seed, classes=classes, **fields).save_pretrained(directory)
    image_processor().save_pretrained(directory)
    return directory
