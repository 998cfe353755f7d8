"""LoRA: low-rank changes of the adapter's linear layers.

Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685;
injected by PEFT. FFA-LoRA (``freeze_a``): Youbang Sun et al., "Improving LoRA in Privacy-preserving Federated
Learning", ICLR 2024, https://arxiv.org/abs/2403.12313: A stays at its random start, so that the mean of the clients'
B is the mean of their updates, and half as many numbers carry noise.

A state at the model owner may hold more than what travels: where products are aggregated exactly, the part of their
mean that rank r cannot hold stands beside each layer as a second pair (``strategies.lora_aggregation``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.architectures import find_architecture
from ot_federated.tuning.settings import (
    Method,
    Places,
    Tensors,
    Tuning,
    initial_uniform,
    is_linear,
    remove_peft,
    uses_conv1d,
)

if TYPE_CHECKING:
    from peft import PeftConfig

lora_a, lora_b = ".lora_A.default.weight", ".lora_B.default.weight"
residual_a, residual_b = ".lora_residual_A", ".lora_residual_B"
initial_a = initial_uniform


def inject(places: Places, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Wrap the blocks' linear layers and return A and B, or B alone where A is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    uncalled = tuple(f".{name}" for name in find_architecture(places.model.config).uncalled)
    targets = [
        places.full_name(name) for name, module in places.modules() if is_linear(module) and not name.endswith(uncalled)
    ]
    alpha: Any = tuning.lora_alpha  # PEFT annotates int, and scales by any number
    config = LoraConfig(
        r=tuning.lora_r, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=uses_conv1d(places.model)
    )
    inject_adapter_in_model(config, places.model)
    places.model.requires_grad_(False)
    parameters = {name: p for name, p in places.parameters().items() if name.endswith((lora_a, lora_b))}
    for name, value in start({name: p.shape for name, p in parameters.items()}, {}, tuning).items():
        parameters[name].data = value.to(parameters[name])
    return {name: p for name, p in parameters.items() if name.endswith(lora_b) or not tuning.freeze_a}


def start(shapes: Mapping[str, torch.Size], base: Tensors, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return random A, and B of zeros."""
    del base
    return {
        name: initial_a(name, shape, seed=tuning.seed) if name.endswith(lora_a) else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def merge(state: Tensors, base: Tensors, tuning: Tuning, conv1d: bool) -> dict[str, torch.Tensor]:
    """Return the weights of the changed layers."""
    merged = {}
    for module, (a, b) in lora_pairs(state, tuning, inputs=layer_inputs(base, conv1d=conv1d)).items():
        change = tuning.lora_alpha / tuning.lora_r * (b @ a)
        merged[f"{module}.weight"] = base[f"{module}.weight"].float() + (change.T if conv1d else change)
    return merged


def layer_inputs(base: Tensors, *, conv1d: bool) -> dict[str, int]:
    """Return the width of each layer's input, by role name without ``.weight``."""
    matrices = {name.removesuffix(".weight"): tensor for name, tensor in base.items() if tensor.dim() == 2}
    return {module: tensor.shape[0 if conv1d else 1] for module, tensor in matrices.items()}


def lora_pairs(
    state: Tensors, tuning: Tuning, *, inputs: Mapping[str, int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A ``(rank, inputs)`` and B ``(outputs, rank)``, in fp32, of each layer that LoRA changes.

    Where the state has a residual it is part of the pair, whose rank is then larger; the scale stays
    ``lora_alpha / lora_r``.

    Args:
        state: Trained tensors by role name; without A where it was frozen.
        tuning: How the state was made.
        inputs: Width of each layer's input, by role name without ``.weight``.
    """
    pairs = {}
    for module in [name.removesuffix(lora_b) for name in state if name.endswith(lora_b)]:
        if tuning.freeze_a:
            a = initial_a(module + lora_a, torch.Size((tuning.lora_r, inputs[module])), seed=tuning.seed)
        else:
            a = state[module + lora_a]
        b = state[module + lora_b]
        rest_a, rest_b = state.get(module + residual_a), state.get(module + residual_b)
        if rest_a is not None and rest_b is not None:
            a, b = torch.cat([a.float(), rest_a.float()]), torch.cat([b.float(), rest_b.float()], dim=1)
        pairs[module] = (a.float(), b.float())
    return pairs


def build_peft(
    state: Tensors, base: Tensors, tuning: Tuning, conv1d: bool, rename: Callable[[str], str]
) -> tuple[PeftConfig, dict[str, Any]]:
    """Return PEFT's config and tensors; layers with a residual have a rank of their own."""
    from peft import LoraConfig

    pairs = lora_pairs(state, tuning, inputs=layer_inputs(base, conv1d=conv1d))
    renamed = {rename(module): pair for module, pair in pairs.items()}
    ranks = {module: len(a) for module, (a, _) in renamed.items() if len(a) != tuning.lora_r}
    scale = tuning.lora_alpha / tuning.lora_r
    config = LoraConfig(
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes and scales by any number
        target_modules=list(renamed),
        rank_pattern=dict(ranks),
        alpha_pattern={module: scale * rank for module, rank in ranks.items()},
        fan_in_fan_out=conv1d,
    )
    tensors = {f"{module}.lora_A.weight": a for module, (a, _) in renamed.items()}
    return config, tensors | {f"{module}.lora_B.weight": b for module, (_, b) in renamed.items()}


lora = Method(
    inject=inject,
    start=start,
    merge=merge,
    changes=lambda name: name.endswith((lora_b, residual_b)),
    remove=remove_peft,
    peft=build_peft,
)
