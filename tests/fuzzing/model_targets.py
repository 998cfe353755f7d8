"""What a data owner builds from a bundle's files: tensors, the model of its config, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np


def build_safetensors_parser() -> Callable[[bytes], object]:
    from ot_federated.bundle import read_tensors
    from tests.fuzzing.targets import scratch_file

    path = scratch_file("adapter.safetensors")

    def parse(data: bytes) -> None:
        # Beside the old file: its tensors may still be mapped.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        for tensor in read_tensors(path).values():
            assert tensor.numel() * tensor.element_size() <= len(data)

    return parse


def safetensors_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    seeds = [save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}), save({})]
    for dtype in ("F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U16", "I32", "F6_E2M3"):
        header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 16]}}).encode()
        seeds.append(len(header).to_bytes(8, "little") + header + bytes(16))
        header = json.dumps({"a": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
        seeds.append(len(header).to_bytes(8, "little") + header)
    return seeds


def build_model_parser() -> Callable[[bytes], object]:
    """A config that a stranger wrote, in an otherwise right manifest, and no tensors: a model that never fits."""
    from ot_federated.bundle import parse_manifest
    from ot_federated.emulated_model import build_emulated_model
    from tests.fuzzing.targets import manifest_seeds

    valid = json.loads(manifest_seeds()[0])

    def parse(data: bytes) -> None:
        try:
            config = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(config, dict):
            text = json.dumps({**valid, "config": config, "model_type": config.get("model_type", "llama")})
            build_emulated_model(parse_manifest(text.encode()), {})

    return parse


def model_seeds() -> list[bytes]:
    from tests.families import build_family_model

    seeds = []
    for family in ("llama", "gpt2"):  # one with rotary frequencies, one with learned positions
        # Only what differs from the defaults, and a depth that fits the manifest's stack.
        fields = build_family_model(family).config.to_diff_dict()
        depth = next(name for name in ("num_hidden_layers", "n_layer") if name in fields)
        seeds.append(json.dumps({**fields, depth: 4}).encode())
    return seeds


def build_tokenizer_parser() -> Callable[[bytes], object]:
    from ot_federated.processors import load_bundle_processor
    from tests.fuzzing.targets import scratch_file

    path = scratch_file("tokenizer.json")

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        tokenizer = load_bundle_processor(path.parent)
        assert np.asarray(tokenizer("Good morning.")["input_ids"]).ndim == 1

    return parse


def tokenizer_seeds() -> list[bytes]:
    small = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
    }  # fmt: skip
    return [json.dumps(small).encode()]
