"""IA3: one learned factor for each output of keys and values, and for each input of the last feed-forward layer.

Haokun Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022, https://arxiv.org/abs/2205.05638; injected by PEFT, whose table says which layers of a family get factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.errors import ConfigError
from ot_federated.tuning.settings import (
    Method,
    Places,
    Tensors,
    Tuning,
    changes_all,
    is_linear,
    remove_peft,
    uses_conv1d,
)

if TYPE_CHECKING:
    from peft import PeftConfig

_factor = ".ia3_l.default"


def inject(places: Places, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Wrap the layers that PEFT's table names, and return their factors.

    Raises:
        ConfigError: If the family is not in the table.
    """
    from peft import IA3Config, inject_adapter_in_model

    del tuning
    targets, feed_forward = _find_layers(places)
    config = IA3Config(
        target_modules=targets, feedforward_modules=feed_forward, fan_in_fan_out=uses_conv1d(places.model)
    )
    inject_adapter_in_model(config, places.model)
    places.model.requires_grad_(False)
    factors = {name: p for name, p in places.parameters().items() if name.endswith(_factor)}
    for factor in factors.values():
        factor.data = torch.ones_like(factor)
    return factors


def _find_layers(places: Places) -> tuple[list[str], list[str]]:
    """Return the full names of all layers that get factors, and of those among them whose inputs get them."""
    from peft.utils import constants

    model_type = places.model.config.model_type
    suffixes = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type, [])
    inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
    names = [
        places.full_name(name)
        for name, module in places.modules()
        if is_linear(module) and any(name.endswith("." + suffix) for suffix in suffixes)
    ]
    if not names:
        raise ConfigError(
            f"tuning.method='ia3': PEFT does not say which layers of a {model_type} model get factors. Take full, lora "
            "or bottleneck."
        )
    return names, [name for name in names if any(name.endswith("." + suffix) for suffix in inner)]


def start(shapes: Mapping[str, torch.Size], base: Tensors, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return factors of 1."""
    del base, tuning
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def merge(state: Tensors, base: Tensors, tuning: Tuning, conv1d: bool) -> dict[str, torch.Tensor]:
    """Return the weights, and biases, times their factors."""
    del tuning
    merged = {}
    for name, factor in state.items():
        module = name.removesuffix(_factor)
        weight, bias = base[f"{module}.weight"].float(), base.get(f"{module}.bias")
        merged[f"{module}.weight"] = weight * (factor.float().T if conv1d else factor.float())
        # A column scales the outputs, which a bias is part of; a row scales the inputs.
        if bias is not None and factor.shape[1] == 1:
            merged[f"{module}.bias"] = bias.float() * factor.float().flatten()
    return merged


def build_peft(
    state: Tensors, base: Tensors, tuning: Tuning, conv1d: bool, rename: Callable[[str], str]
) -> tuple[PeftConfig, dict[str, Any]]:
    """Return PEFT's config and tensors."""
    from peft import IA3Config

    del base, tuning
    factors = {rename(name.removesuffix(_factor)): factor for name, factor in state.items()}
    config = IA3Config(
        target_modules=list(factors),
        feedforward_modules=[module for module, factor in factors.items() if factor.shape[0] == 1],
        fan_in_fan_out=conv1d,
    )
    return config, {f"{module}.ia3_l": factor for module, factor in factors.items()}


ia3 = Method(inject=inject, start=start, merge=merge, changes=changes_all, remove=remove_peft, peft=build_peft)
