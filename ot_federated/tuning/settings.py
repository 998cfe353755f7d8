"""The settings of tuning, and what a method of tuning consists of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.bundle import head_prefix
from ot_federated.config import RunConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What trains.

    Attributes:
        method: ``full``, ``lora``, ``ia3``, ``bitfit`` or ``bottleneck``.
        placement: Which adapter blocks train: ``both`` (all), ``bottom``, ``spread`` or ``top``.
        lora_r: Rank of LoRA.
        lora_alpha: LoRA's scale is ``lora_alpha / lora_r``.
        freeze_a: Whether LoRA's A stays at its start (FFA-LoRA).
        bottleneck_size: Width of bottleneck adapters.
        seed: What random start values derive from; equal at all parties.
    """

    method: str = "full"
    placement: str = "both"
    lora_r: int = 8
    lora_alpha: float = 16.0
    freeze_a: bool = False
    bottleneck_size: int = 64
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
        bottleneck_size=settings.bottleneck_size,
        seed=config.seed,
    )


@dataclass(frozen=True, kw_only=True)
class Places:
    """The blocks that train, in an emulated model or in the full one.

    Attributes:
        model: The model.
        prefixes: Role prefix (``top.0.``) -> prefix in the model (``model.layers.7.``).
        head: The model's prefix of a classification head, which trains whole whatever the method, being new; empty
            without one.
    """

    model: PreTrainedModel
    prefixes: Mapping[str, str]
    head: str = ""

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module inside the blocks, by role name."""
        for role, prefix in self.prefixes.items():
            for name, module in self.model.get_submodule(prefix.removesuffix(".")).named_modules():
                if name:
                    yield role + name, module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the blocks' parameters by role name."""
        named = list(self.model.named_parameters())
        return {
            role + name.removeprefix(prefix): parameter
            for role, prefix in self.prefixes.items()
            for name, parameter in named
            if name.startswith(prefix)
        }

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the head's parameters by role name."""
        if not self.head:
            return {}
        head = self.model.get_submodule(self.head.removesuffix("."))
        return {head_prefix + name: parameter for name, parameter in head.named_parameters()}

    def full_name(self, name: str) -> str:
        """Return the model's own name for a role name."""
        if name.startswith(head_prefix):
            return self.head + name.removeprefix(head_prefix)
        role = next(role for role in self.prefixes if name.startswith(role))
        return self.prefixes[role] + name.removeprefix(role)


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, transformers' transposed one included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def uses_conv1d(model: nn.Module) -> bool:
    """Say whether the model's blocks keep weights transposed (transformers' Conv1D)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def initial_uniform(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Return the start value of a matrix ``(outputs, inputs)``: Kaiming-uniform, and the same at every party."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    # Kaiming-uniform with a = sqrt(5), which PEFT uses: bound 1 / sqrt(inputs).
    uniform = torch.rand(shape, generator=generator)
    return (2 * uniform - 1) / math.sqrt(shape[1])


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to tune, as a few functions.

    Attributes:
        inject: Gives the blocks what trains, in place, with its start values; returns it by role name. Raises a
            ConfigError where the family has no place for it.
        start: Shapes of what trains, the bundle's adapter and the settings -> start values in fp32.
        merge: State, the bundle's adapter, the settings and whether weights are transposed -> the tensors, in fp32,
            that differ from the bundle's adapter. None where a state is no change of weights.
        changes: Whether the model's change is linear in this tensor, the others held fixed; scaling a change scales
            these tensors alone.
        remove: Takes back what ``inject`` did to a model.
        peft: State, the adapter's shapes, settings, transposed, and what gives a role name the full model's name ->
            PEFT's config (as keywords) and tensors. None where PEFT has no such method.
    """

    inject: Callable[[Places, Tuning], dict[str, nn.Parameter]]
    start: Callable[[Mapping[str, torch.Size], Tensors, Tuning], dict[str, torch.Tensor]]
    merge: Callable[[Tensors, Tensors, Tuning, bool], dict[str, torch.Tensor]] | None
    changes: Callable[[str], bool]
    remove: Callable[[Places], None]
    peft: Callable[[Tensors, Tensors, Tuning, bool, Callable[[str], str]], tuple[PeftConfig, dict[str, Any]]] | None


def changes_all(name: str) -> bool:
    """Say that the model's change is linear in every tensor of the state."""
    del name
    return True


def remove_nothing(places: Places) -> None:
    """Leave the model as it is: the method puts no modules into it."""
    del places


def remove_peft(places: Places) -> None:
    """Put the layers that PEFT wrapped back into their places."""
    for module in list(places.model.modules()):
        for name, child in list(module.named_children()):
            base = getattr(child, "base_layer", None)
            if isinstance(base, nn.Module):
                setattr(module, name, base)
    # PEFT notes its config on the model, and would take the next injection for a second adapter.
    if hasattr(places.model, "peft_config"):
        del places.model.peft_config
