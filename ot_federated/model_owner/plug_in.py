"""Plug the tuned adapter into the full model: by name, with verification, or not at all.

Source of the method: Xiao, Lin, Han, "Offsite-Tuning", 2023, https://arxiv.org/abs/2302.04870, section 3.1.
Earlier systems zipped two state dicts by position or loaded with ``strict=False``, and so plugged in nothing
without a word; here every name must match and every written value is read back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ot_federated.architectures import find_architecture, find_head, get_blocks
from ot_federated.bundle import StackEntry, adapter_roles, head_prefix
from ot_federated.errors import PlugInError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def full_model_names(model: PreTrainedModel, stack: Sequence[StackEntry]) -> dict[str, str]:
    """Return the adapter's role names -> the full model's parameter names; a classification head is part of it."""
    architecture = find_architecture(model.config)
    blocks, head = get_blocks(model, architecture), find_head(model, architecture)
    of_head = {} if head is None else {head_prefix + n: f"{architecture.head}.{n}" for n, _ in head.named_parameters()}
    return of_head | {
        entry.prefix + name: f"{architecture.blocks}.{entry.first_block}.{name}"
        for entry in stack
        if entry.role in adapter_roles
        for name, _ in blocks[entry.first_block].named_parameters()
    }


@torch.no_grad()
def plug_in(
    model: PreTrainedModel,
    adapter: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    *,
    placement: str = "both",
) -> dict[str, torch.Tensor]:
    """Write ``adapter`` (role names) into the full model, in place, and return the weights that were there.

    Args:
        model: The full model.
        adapter: The tuned adapter; every tensor of the trained roles and no other.
        stack: The layout that the adapter was tuned in.
        placement: Which adapter blocks were tuned: ``both`` (all), ``bottom``, ``spread`` or ``top``.

    Raises:
        PlugInError: If names are missing or unknown, a shape is wrong, or a value is not finite. The model is
            then unchanged.
    """
    names = full_model_names(model, stack)
    # A classification head is tuned wherever the blocks are.
    wanted = {name for name in names if placement == "both" or name.startswith((f"{placement}.", head_prefix))}
    missing, unknown = sorted(wanted - adapter.keys()), sorted(adapter.keys() - wanted)
    if missing or unknown:
        raise PlugInError(
            f"The adapter does not fit the full model: missing {missing[:3] or 'nothing'}, unknown "
            f"{unknown[:3] or 'nothing'}. Plug in only an adapter that was tuned with this model's bundle."
        )
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.items():
        target = parameters[names[name]]
        if tensor.shape != target.shape:
            raise PlugInError(f"{name} has shape {tuple(tensor.shape)}; the full model needs {tuple(target.shape)}.")
        # In the model's own type: a number that fp32 holds may be infinite in float16.
        if not torch.isfinite(tensor.to(target.dtype)).all():
            raise PlugInError(
                f"{name} holds values that are not finite in {target.dtype}: the adapter is damaged or diverged."
            )
    before = {}
    for name, tensor in adapter.items():
        target = parameters[names[name]]
        before[name] = target.detach().clone()
        cast = tensor.to(device=target.device, dtype=target.dtype)
        target.copy_(cast)
        if not torch.equal(target, cast):
            raise PlugInError(f"{name} could not be written into the full model.")
    return before


@contextmanager
def plugged_in(
    model: PreTrainedModel,
    adapter: Mapping[str, torch.Tensor],
    stack: Sequence[StackEntry],
    *,
    placement: str = "both",
) -> Iterator[PreTrainedModel]:
    """Plug the adapter in for the length of a ``with`` block, then restore the full model bit for bit."""
    before = plug_in(model, adapter, stack, placement=placement)
    try:
        yield model
    finally:
        plug_in(model, before, stack, placement=placement)
