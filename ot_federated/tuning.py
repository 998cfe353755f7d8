"""What trains inside the adapter: its blocks as a whole, or LoRA on their linear layers.

LoRA: Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
https://arxiv.org/abs/2106.09685; injected by PEFT. FFA-LoRA (``freeze_a``): Youbang Sun et al., "Improving LoRA in
Privacy-preserving Federated Learning", ICLR 2024, https://arxiv.org/abs/2403.12313: A stays at its random start, so
that the mean of the clients' B is the mean of their updates, and half as many numbers carry noise.

Whatever the method, a *state* is a set of tensors by role name, and :func:`merge` turns it into the adapter's whole
weights, which are plugged in. Nothing behind the merge knows of methods.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.bundle import Manifest, adapter_prefixes, head_prefix
from ot_federated.config import RunConfig
from ot_federated.emulated_model import adapter_parameters, model_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_a, _b = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What trains.

    Attributes:
        method: ``full`` or ``lora``.
        placement: Which adapter blocks train: ``both``, ``bottom`` or ``top``.
        lora_r: Rank of LoRA.
        lora_alpha: LoRA's scale is ``lora_alpha / lora_r``.
        freeze_a: Whether A stays at its start (FFA-LoRA).
        seed: What A starts from; equal at all parties.
    """

    method: str = "full"
    placement: str = "both"
    lora_r: int = 8
    lora_alpha: float = 16.0
    freeze_a: bool = False
    seed: int = 0


def build_tuning(config: RunConfig) -> Tuning:
    """Return what the run config says of tuning."""
    settings = config.tuning
    return Tuning(
        method=settings.method,
        placement=settings.placement,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        freeze_a=settings.freeze_lora_a,
        seed=config.seed,
    )


def prepare_tuning(model: PreTrainedModel, manifest: Manifest, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Make the emulated model ready and return what trains, by role name, at its start values.

    A classification head trains whole, whatever the method: it is new.

    For LoRA the model's linear layers are wrapped, in place; do it once for a model.
    """
    if tuning.method == "full":
        return adapter_parameters(model, manifest, placement=tuning.placement)
    from peft import LoraConfig, inject_adapter_in_model

    modules = _linear_modules(model, manifest, tuning)
    alpha: Any = tuning.lora_alpha  # PEFT annotates int, and scales by any number
    config = LoraConfig(r=tuning.lora_r, lora_alpha=alpha, target_modules=modules, fan_in_fan_out=uses_conv1d(model))
    inject_adapter_in_model(config, model)
    model.requires_grad_(False)
    parameters = adapter_parameters(model, manifest, placement=tuning.placement)
    for name, parameter in parameters.items():
        if name.endswith(_a):
            parameter.data = initial_a(name, parameter.shape, seed=tuning.seed).to(parameter)
        elif name.endswith(_b):
            parameter.data = torch.zeros_like(parameter)
    trained = (_b,) if tuning.freeze_a else (_a, _b)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name.endswith(trained) or name.startswith(head_prefix)
    }


def start_state(
    parameters: Mapping[str, nn.Parameter], base: Mapping[str, torch.Tensor], tuning: Tuning
) -> dict[str, torch.Tensor]:
    """Return the start values, in fp32, of what trains: what all parties know without sending it.

    Args:
        parameters: What :func:`prepare_tuning` returned.
        base: The bundle's adapter by role name.
        tuning: What trains.
    """
    if tuning.method == "full":
        return {name: base[name].float() for name in parameters}
    of_head = {name: base[name].float() for name in parameters if name.startswith(head_prefix)}
    return {
        name: initial_a(name, parameter.shape, seed=tuning.seed) if name.endswith(_a) else torch.zeros(parameter.shape)
        for name, parameter in parameters.items()
    } | of_head


def initial_a(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Return the start value of a LoRA A ``(rank, inputs)``: uniform as PEFT's, but the same at every party."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    # Kaiming-uniform with a = sqrt(5), which PEFT uses: bound 1 / sqrt(inputs).
    uniform = torch.rand(shape, generator=generator)
    return (2 * uniform - 1) / math.sqrt(shape[1])


def merge(
    state: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], tuning: Tuning, *, conv1d: bool
) -> dict[str, torch.Tensor]:
    """Return the whole weights, in fp32, of the adapter blocks that a state changes.

    Args:
        state: Trained tensors by role name.
        base: The bundle's adapter by role name.
        tuning: How the state was made.
        conv1d: Whether the family keeps its weights transposed, as GPT-2's Conv1D does.
    """
    if tuning.method == "full":
        return {name: tensor.float() for name, tensor in state.items()}
    prefixes = ("bottom.", "top.") if tuning.placement == "both" else (f"{tuning.placement}.",)
    merged = {name: tensor.float() for name, tensor in base.items() if name.startswith(prefixes)}
    merged |= {name: tensor.float() for name, tensor in state.items() if name.startswith(head_prefix)}
    matrices = {name.removesuffix(".weight"): tensor for name, tensor in merged.items() if tensor.dim() == 2}
    inputs = {module: tensor.shape[0 if conv1d else 1] for module, tensor in matrices.items()}
    for module, (a, b) in lora_pairs(state, tuning, inputs=inputs).items():
        change = tuning.lora_alpha / tuning.lora_r * (b @ a)
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + (change.T if conv1d else change)
    return merged


def lora_pairs(
    state: Mapping[str, torch.Tensor], tuning: Tuning, *, inputs: Mapping[str, int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A ``(rank, inputs)`` and B ``(outputs, rank)``, in fp32, of each layer that LoRA changes.

    Args:
        state: Trained tensors by role name; without A where it was frozen.
        tuning: How the state was made.
        inputs: Width of each layer's input, by role name without ``.weight``.
    """
    pairs = {}
    for name, b in state.items():
        if not name.endswith(_b):
            continue
        module = name.removesuffix(_b)
        if tuning.freeze_a:
            a = initial_a(module + _a, torch.Size((tuning.lora_r, inputs[module])), seed=tuning.seed)
        else:
            a = state[module + _a]
        pairs[module] = (a.float(), b.float())
    return pairs


def uses_conv1d(model: nn.Module) -> bool:
    """Say whether the model's blocks keep weights transposed (transformers' Conv1D)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _linear_modules(model: PreTrainedModel, manifest: Manifest, tuning: Tuning) -> list[str]:
    """Return the full names of the linear layers in the blocks that train."""
    architecture = find_architecture(model.config)
    blocks = get_blocks(model, architecture)
    prefixes = model_names(manifest, architecture)
    positions = {prefix: position for position, prefix in enumerate(prefixes)}
    return [
        prefixes[role] + name
        for role in adapter_prefixes(manifest.stack, placement=tuning.placement)
        for name, module in blocks[positions[role]].named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
