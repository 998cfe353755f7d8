"""From a GGUF file to a plain transformers directory.

GGUF is the one-file format of llama.cpp: weights, often quantised, and the tokenizer. transformers reads it,
but keeps the model marked as quantised, so the model can neither be saved nor trained as it stands. Here the
dequantised weights move into an unmarked model of the same configuration, and only that is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ot_federated.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What tokenizer.ggml.pre says of tokenizers that cut text at every digit before anything else (llama.cpp,
# src/llama-vocab.cpp). transformers reads the vocabulary and merges of a GGUF file but not this field.
digit_splitting = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def convert_gguf(gguf_file: Path, *, directory: Path, name: str) -> None:
    """Write a GGUF causal language model into ``directory`` as ``save_pretrained`` would.

    Weights become float32 safetensors, so nothing is lost beyond what the quantisation lost. ``name`` stands
    for the model in place of the file's path.

    Raises:
        SourceError: If the weights do not fit the configuration exactly, or are not all finite.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**location)
    marked = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    model = _without_quantisation_mark(marked, name=name)
    for key, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise SourceError(f"{gguf_file.name}: the weight {key} has values that are not finite.")
    model.save_pretrained(directory)
    if _read_text_field(gguf_file, "tokenizer.ggml.pre") in digit_splitting:
        _split_digits(tokenizer)
    tokenizer.name_or_path = name
    tokenizer.save_pretrained(directory)


def _without_quantisation_mark(marked: PreTrainedModel, *, name: str) -> PreTrainedModel:
    """Return an equal model that can be saved: same configuration without ``quantization_config``."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = marked.config.to_dict()
    for mark in ("quantization_config", "_model_name_or_path"):
        settings.pop(mark, None)
    config = type(marked.config).from_dict(settings)
    config.name_or_path = name
    with torch.random.fork_rng(devices=[]):  # building draws initial weights: the caller's random state must not notice
        auto_model: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32)
    try:
        model.load_state_dict(marked.state_dict(), strict=True)
    except RuntimeError as error:
        raise SourceError(f"{name}: the weights do not fit the configuration: {error}") from error
    model.tie_weights()
    special = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig.from_dict(special)
    return model


def _read_text_field(gguf_file: Path, key: str) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf_file).get_field(key)
    return str(field.contents()) if field else ""


def _split_digits(tokenizer: Any) -> None:
    """Cut at every digit before the byte-level rules, as in training."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
