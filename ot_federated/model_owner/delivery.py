"""Deliver: the plugged-in model as a transformers directory, and the adapter by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from ot_federated.architectures import find_architecture
from ot_federated.bundle import StackEntry, head_prefix
from ot_federated.cache import atomic_directory, file_sha256
from ot_federated.model_owner.plug_in import full_model_names, plug_in
from ot_federated.tuning import Tuning, lora_pairs, uses_conv1d

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ot_federated.processors import Processor

adapter_file = "adapter.safetensors"


def deliver_adapter(
    directory: Path,
    *,
    model: PreTrainedModel,
    adapter: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    description: Mapping[str, Any],
) -> str:
    """Write the tuned adapter in fp32 under the full model's own parameter names and return its SHA-256.

    ``adapter.json`` beside it says what it belongs to.
    """
    names = full_model_names(model, stack)
    with atomic_directory(directory, replace=True) as partial:
        tensors = {names[name]: tensor.float().contiguous() for name, tensor in adapter.items()}
        save_file(tensors, partial / adapter_file, metadata={"format": "pt"})
        digest = file_sha256(partial / adapter_file)
        (partial / "adapter.json").write_text(json.dumps({**description, "sha256": digest}, indent=2) + "\n")
    return digest


def deliver_lora(
    directory: Path,
    *,
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    tuning: Tuning,
    description: Mapping[str, Any],
) -> str:
    """Write the tuned LoRA as a PEFT directory for the full model and return the SHA-256 of its weights.

    ``PeftModel.from_pretrained(full_model, directory)`` loads it.
    """
    from peft import LoraConfig

    architecture = find_architecture(model.config)
    blocks = architecture.blocks
    places = {entry.prefix: f"{blocks}.{entry.first_block}." for entry in stack if entry.role in ("bottom", "top")}
    conv1d = uses_conv1d(model)
    parameters = dict(model.named_parameters())
    inputs = {
        role.removesuffix(".weight"): parameters[name].shape[0 if conv1d else 1]
        for role, name in full_model_names(model, stack).items()
        if role.endswith(".weight") and parameters[name].dim() == 2
    }
    tensors, modules = {}, []
    for name, (a, b) in lora_pairs(state, tuning, inputs=inputs).items():
        role = next(prefix for prefix in places if name.startswith(prefix))
        module = places[role] + name.removeprefix(role)
        modules.append(module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    of_head = {name.removeprefix(head_prefix): value for name, value in state.items() if name.startswith(head_prefix)}
    for name, value in of_head.items():
        tensors[f"base_model.model.{architecture.head}.{name}"] = value.float().contiguous()
    config = LoraConfig(
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]  # PEFT takes and scales by any number
        target_modules=modules,
        task_type=None if of_head else "CAUSAL_LM",
        modules_to_save=[architecture.head] if of_head else None,
        base_model_name_or_path=str(description["base_model"]),
        fan_in_fan_out=conv1d,
        inference_mode=True,
    )
    with atomic_directory(directory, replace=True) as partial:
        config.save_pretrained(str(partial))
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        digest = file_sha256(partial / "adapter_model.safetensors")
        (partial / "adapter.json").write_text(json.dumps({**description, "sha256": digest}, indent=2) + "\n")
    return digest


def deliver_model(
    directory: Path,
    *,
    model: PreTrainedModel,
    tokenizer: Processor,
    adapter: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    placement: str,
) -> None:
    """Plug the adapter into the full model for good and write it as a ``save_pretrained`` directory."""
    plug_in(model, adapter, stack, placement=placement)
    with atomic_directory(directory, replace=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(str(partial))
