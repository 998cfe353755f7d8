"""Bottleneck adapters: behind each sublayer's last projection, y -> y + up(gelu(down(y))).

Neil Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, https://arxiv.org/abs/1902.00751,
section 2.1: two in a block, after attention and after the feed-forward part, before the residual is added. ``up``
starts at zero, so that an untouched adapter changes nothing. The architecture table says which projections these are.

Being no linear change of weights, they cannot be merged: the tuned model is the full model with these modules in it,
as :func:`load_bottlenecks` makes it from what a run delivers. A ``save_pretrained`` directory of it is not written:
transformers would load it without the modules and say so in a warning only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ot_federated.architectures import find_architecture
from ot_federated.bundle import read_tensors
from ot_federated.errors import ConfigError, PlugInError
from ot_federated.tuning.settings import Method, Places, Tensors, Tuning, initial_uniform, is_linear, remove_peft

_parts = tuple(f".{module}.{kind}" for module in ("down", "up") for kind in ("weight", "bias"))


class Bottleneck(nn.Module):
    """A linear layer with an adapter behind it."""

    def __init__(self, base_layer: nn.Module, *, hidden_size: int, size: int) -> None:
        super().__init__()
        weight: Any = base_layer.weight
        self.base_layer = base_layer
        self.down = nn.Linear(hidden_size, size, device=weight.device, dtype=weight.dtype)
        self.up = nn.Linear(size, hidden_size, device=weight.device, dtype=weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map ``(..., inputs)`` to ``(..., hidden)``."""
        outputs: torch.Tensor = self.base_layer(inputs)
        changed: torch.Tensor = self.up(functional.gelu(self.down(outputs)))
        return outputs + changed


def inject(places: Places, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Put an adapter behind each sublayer's last projection, and return the adapters' parameters.

    Raises:
        ConfigError: If the architecture table does not name these projections.
    """
    suffixes = find_architecture(places.model.config).sublayer_outputs
    found = {
        name: module
        for name, module in places.modules()
        if is_linear(module) and any(name.endswith("." + suffix) for suffix in suffixes)
    }
    if not found:
        raise ConfigError(
            f"tuning.method='bottleneck': the architecture table does not say which projections of a "
            f"{places.model.config.model_type} model end a sublayer (sublayer_outputs). Take full or lora."
        )
    for name in found:
        _wrap(places.model, places.full_name(name), size=tuning.bottleneck_size)
    places.model.requires_grad_(False)
    parameters = {name: p for name, p in places.parameters().items() if name.endswith(_parts) and _outer(name) in found}
    for name, value in start({name: p.shape for name, p in parameters.items()}, {}, tuning).items():
        parameters[name].data = value.to(parameters[name])
    return parameters


def _outer(name: str) -> str:
    return name.rsplit(".", 2)[0]


def _wrap(model: nn.Module, name: str, *, size: int) -> Bottleneck:
    layer: Any = model.get_submodule(name)
    width = layer.weight.shape[1 if type(layer).__name__ == "Conv1D" else 0]
    parent, _, child = name.rpartition(".")
    wrapped = Bottleneck(layer, hidden_size=width, size=size)
    setattr(model.get_submodule(parent), child, wrapped)
    return wrapped


def start(shapes: Mapping[str, torch.Size], base: Tensors, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return random ``down`` weights, and zeros."""
    del base
    return {
        name: initial_uniform(name, shape, seed=tuning.seed) if name.endswith(".down.weight") else torch.zeros(shape)
        for name, shape in shapes.items()
    }


bottleneck = Method(
    inject=inject,
    start=start,
    merge=None,
    changes=lambda name: name.endswith((".up.weight", ".up.bias")),
    remove=remove_peft,
    peft=None,
)


def load_bottlenecks(model: nn.Module, directory: Path | str) -> nn.Module:
    """Put the adapters that a run delivered into the full model, for good, and return it.

    Args:
        model: The full model, as its owner loads it.
        directory: The run's ``adapter`` directory.

    Raises:
        PlugInError: If the directory holds something else, or was made for another model.
    """
    described = json.loads((Path(directory) / "adapter.json").read_text())
    if described.get("tuning_method") != "bottleneck":
        raise PlugInError(
            f"{directory} holds an adapter of {described.get('tuning_method')!r}, not bottleneck adapters."
        )
    tensors = read_tensors(Path(directory) / "adapter.safetensors")
    known = dict(model.named_modules())
    of_head = {name: tensor for name, tensor in tensors.items() if not name.endswith(_parts)}
    for name, tensor in of_head.items():
        parameter = dict(model.named_parameters()).get(name)
        if parameter is None or parameter.shape != tensor.shape:
            raise PlugInError(
                f"{name} {tuple(tensor.shape)} is no part of this model's head: give it the same classes."
            )
        parameter.data = tensor.to(parameter, copy=True)
    for name in sorted({_outer(name) for name in tensors if name not in of_head}):
        weights = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        expected = {part.removeprefix(".") for part in _parts}
        if name not in known or not is_linear(known[name]) or weights.keys() != expected:
            raise PlugInError(f"{name} is no layer of this model that an adapter could stand behind.")
        wrapped = _wrap(model, name, size=len(weights["down.weight"]))
        if wrapped.up.weight.shape != weights["up.weight"].shape:
            raise PlugInError(f"{name} has another width in this model than the adapter was made for.")
        for part, tensor in weights.items():
            parameter = wrapped.get_parameter(part)
            parameter.data = tensor.to(parameter, copy=True)
    return model.eval()
