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
from ot_federated.tuning import Tuning, build_peft, full_places, uses_conv1d

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


def deliver_state(
    directory: Path,
    *,
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    tuning: Tuning,
    description: Mapping[str, Any],
) -> str:
    """Write what the clients trained, unmerged, in fp32, and return the SHA-256 of its weights.

    Where PEFT has the method this is a PEFT directory: ``PeftModel.from_pretrained(full_model, directory)`` loads it.
    Bottleneck adapters stand under the full model's names: ``ot_federated.tuning.load_bottlenecks`` loads them.
    """
    places = full_places(model, stack, tuning)
    parameters = dict(model.named_parameters())
    base = {role: parameters[name] for role, name in full_model_names(model, stack).items()}
    of_head = {places.full_name(name): tensor for name, tensor in state.items() if name.startswith(head_prefix)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(head_prefix)}
    peft = build_peft(rest, base, tuning, conv1d=uses_conv1d(model), rename=places.full_name)
    with atomic_directory(directory, replace=True) as partial:
        if peft is None:
            weights = partial / adapter_file
            tensors = {places.full_name(name): tensor for name, tensor in rest.items()} | of_head
        else:
            config: Any = peft[0]  # not every method of PEFT has modules_to_save; those here do
            tensors = peft[1]
            config.task_type = None if of_head else "CAUSAL_LM"
            if of_head:
                config.modules_to_save = [find_architecture(model.config).head]
            config.base_model_name_or_path = str(description["base_model"])
            config.inference_mode = True
            config.save_pretrained(str(partial))
            weights = partial / "adapter_model.safetensors"
            tensors = {f"base_model.model.{name}": tensor for name, tensor in (tensors | of_head).items()}
        save_file({n: t.float().cpu().contiguous() for n, t in tensors.items()}, weights, metadata={"format": "pt"})
        digest = file_sha256(weights)
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
