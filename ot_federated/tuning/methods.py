"""The table of tuning methods, and what the rest of the project asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ot_federated.architectures import find_architecture, find_head
from ot_federated.bundle import Manifest, StackEntry, adapter_prefixes, adapter_roles, head_prefix
from ot_federated.emulated_model import model_names
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.tuning.bitfit import bitfit
from ot_federated.tuning.bottleneck import bottleneck
from ot_federated.tuning.full import full
from ot_federated.tuning.ia3 import ia3
from ot_federated.tuning.lora import lora
from ot_federated.tuning.settings import Method, Places, Tensors, Tuning

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

methods = {"full": full, "lora": lora, "ia3": ia3, "bitfit": bitfit, "bottleneck": bottleneck}


def find_method(name: str) -> Method:
    """Return a method by its name in the run config.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in methods:
        raise ConfigError(
            f"tuning.method={name!r} is unknown{nearest_match(name, methods)}. Known: {', '.join(methods)}."
        )
    return methods[name]


def is_mergeable(tuning: Tuning) -> bool:
    """Say whether a state of this method can become weights of the model."""
    return find_method(tuning.method).merge is not None


def emulated_places(model: PreTrainedModel, manifest: Manifest, tuning: Tuning) -> Places:
    """Return the blocks that train in the emulated model."""
    names = model_names(manifest, find_architecture(model.config))
    wanted = adapter_prefixes(manifest.stack, placement=tuning.placement)
    return Places(model=model, prefixes={role: names[role] for role in wanted}, head=names.get(head_prefix, ""))


def full_places(model: PreTrainedModel, stack: Sequence[StackEntry], tuning: Tuning) -> Places:
    """Return the blocks that train in the full model."""
    architecture = find_architecture(model.config)
    wanted = adapter_prefixes(stack, placement=tuning.placement)
    blocks = architecture.blocks
    prefixes = {entry.prefix: f"{blocks}.{entry.first_block}." for entry in stack if entry.prefix in wanted}
    head = "" if find_head(model, architecture) is None else f"{architecture.head}."
    return Places(model=model, prefixes=prefixes, head=head)


def check_family(model: PreTrainedModel, tuning: Tuning) -> None:
    """Check, on the full model, that the method has something to train in this family; the model stays as it is.

    Raises:
        ConfigError: If it has not; the message names the choices.
    """
    method = find_method(tuning.method)
    # Blocks are alike: the first one tells.
    places = Places(model=model, prefixes={"bottom.0.": f"{find_architecture(model.config).blocks}.0."})
    try:
        method.inject(places, tuning)
    finally:
        method.remove(places)


def prepare_tuning(model: PreTrainedModel, manifest: Manifest, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Make the emulated model ready and return what trains, by role name, at its start values.

    A classification head trains whole, whatever the method: it is new.

    Most methods put modules into the model, in place; do it once for a model.

    Raises:
        ConfigError: If the method has nothing to train in this family; the message names the choices.
    """
    places = emulated_places(model, manifest, tuning)
    return find_method(tuning.method).inject(places, tuning) | places.head_parameters()


def start_state(parameters: Mapping[str, nn.Parameter], base: Tensors, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return the start values, in fp32, of what trains: what all parties know without sending it.

    Args:
        parameters: What :func:`prepare_tuning` returned.
        base: The bundle's adapter by role name.
        tuning: What trains.
    """
    shapes = {name: parameter.shape for name, parameter in parameters.items() if not name.startswith(head_prefix)}
    of_head = {name: base[name].float() for name in parameters if name.startswith(head_prefix)}
    return find_method(tuning.method).start(shapes, base, tuning) | of_head


def merge(state: Tensors, base: Tensors, tuning: Tuning, *, conv1d: bool) -> dict[str, torch.Tensor]:
    """Return the whole weights, in fp32, of the adapter blocks that train.

    Args:
        state: Trained tensors by role name.
        base: The bundle's adapter by role name.
        tuning: How the state was made.
        conv1d: Whether the family keeps its weights transposed, as GPT-2's Conv1D does.

    Raises:
        ConfigError: If the method cannot be merged.
    """
    method = find_method(tuning.method)
    if method.merge is None:
        raise ConfigError(
            f"tuning.method={tuning.method!r} cannot be merged into a model's weights: it is plugged in unmerged."
        )
    roles = adapter_roles if tuning.placement == "both" else (tuning.placement,)
    prefixes = tuple(f"{role}." for role in roles)
    whole = {name: tensor.float() for name, tensor in base.items() if name.startswith(prefixes)}
    of_head = {name: tensor.float() for name, tensor in state.items() if name.startswith(head_prefix)}
    rest = {name: tensor for name, tensor in state.items() if name not in of_head}
    return whole | method.merge(rest, base, tuning, conv1d) | of_head


def scale_change(state: Tensors, start: Tensors, tuning: Tuning, *, alpha: float) -> dict[str, torch.Tensor]:
    """Return the state whose change of the model is ``alpha`` times that of ``state``, in fp32.

    Args:
        state: Trained tensors by role name.
        start: Their start values; tensors that are not among them start at zero.
        tuning: How the state was made.
        alpha: 0 undoes all tuning, 1 leaves it as it is.
    """
    changes = find_method(tuning.method).changes
    zero = torch.zeros(())
    return {
        name: torch.lerp(start.get(name, zero).float().expand(tensor.shape), tensor.float(), alpha)
        if changes(name) or name.startswith(head_prefix)
        else tensor.float()
        for name, tensor in state.items()
    }


@contextmanager
@torch.no_grad()
def tuned_unmerged(places: Places, state: Tensors, tuning: Tuning) -> Iterator[PreTrainedModel]:
    """Put a state into a model, unmerged, for the length of a ``with`` block, then restore the model bit for bit.

    Raises:
        ConfigError: If names or shapes are not those that the method trains in these places.
    """
    method = find_method(tuning.method)
    parameters = method.inject(places, tuning) | places.head_parameters()
    try:
        before = {name: parameter.data for name, parameter in parameters.items()}
        wrong = sorted(parameters.keys() ^ state.keys()) or [
            name for name, parameter in parameters.items() if parameter.shape != state[name].shape
        ]
        if wrong:
            raise ConfigError(f"The state does not fit tuning.method={tuning.method!r} here: {wrong[:3]}.")
        for name, parameter in parameters.items():
            parameter.data = state[name].to(parameter, copy=True)
        try:
            yield places.model
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]
    finally:
        method.remove(places)


def build_peft(
    state: Tensors, base: Tensors, tuning: Tuning, *, conv1d: bool, rename: Callable[[str], str]
) -> tuple[PeftConfig, dict[str, Any]] | None:
    """Return a state as PEFT's config and tensors, or None where PEFT has no such method.

    Args:
        state: Trained tensors by role name.
        base: The adapter's weights by role name; only their shapes are used.
        tuning: How the state was made.
        conv1d: Whether the family keeps its weights transposed.
        rename: Gives a role name the full model's name.
    """
    method = find_method(tuning.method)
    return method.peft(state, base, tuning, conv1d, rename) if method.peft else None
