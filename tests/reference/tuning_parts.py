"""What the tests of tuning methods share: a small model with its bundle, a state, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from ot_federated.bundle import Manifest
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.families import build_family_model, byte_tokenizer, num_blocks

pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
ids = torch.tensor([[5, 9, 200, 33, 7, 41], [8, 100, 3, 77, 12, 4]])


def build(
    tmp_path: Path, family: str, *, kept: list[int], spread: Sequence[int] = ()
) -> tuple[PreTrainedModel, Path, Manifest]:
    """Return a model, and the directory and manifest of its bundle with two bottom blocks and one top block."""
    model = build_family_model(family)
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=1, kept=kept, bridged=False, spread=spread)
    directory = tmp_path / "bundle"
    manifest = write_bundle(
        directory, model=model, tokenizer=byte_tokenizer(), stack=stack, bridges={}, compression="uniform+empty"
    )
    return model, directory, manifest


def build_image_model(family: str) -> PreTrainedModel:
    """Return a random image classifier of three blocks and four classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    ffn = {"mlp_ratio": 2} if family == "dinov2" else {"intermediate_size": 48}
    fields: dict[str, Any] = {**sizes, **ffn}
    if family == "timm_wrapper":
        arguments = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 28, "patch_size": 14, "in_chans": 3}
        fields = {"architecture": "eva02_tiny_patch14_224", "model_args": arguments}
    config = AutoConfig.for_model(family, num_labels=4, **fields)
    model: PreTrainedModel = AutoModelForImageClassification.from_config(config).eval().requires_grad_(False)
    return model


def random_state(parameters: Mapping[str, nn.Parameter], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors in the shapes of what trains."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return the model's logits ``(2, 6, vocabulary)`` on a fixed input."""
    output: torch.Tensor = model(ids).logits
    return output
