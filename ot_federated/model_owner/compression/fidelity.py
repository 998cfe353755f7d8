"""Cheap predictors of how well an emulator stands in for the middle, on public text, before anybody tunes with it.

The cosine of the adapter's gradient under the emulator with the one under the full model, bottom and top apart; the
relative error of the middle's output; the emulator's loss beside the full model's. None needs training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.bundle import Manifest
from ot_federated.emulated_model import adapter_parameters
from ot_federated.model_owner.compression.calibration import record_blocks
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.tasks.base import AnyExample, Example
from ot_federated.tasks.losses import example_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

num_windows_per_batch = 2


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How close an emulator is to the middle it stands for.

    Attributes:
        bottom_cosine: Cosine of the bottom adapter's gradient with the full model's, in [-1, 1]; None without one.
        top_cosine: The same of the top adapter.
        output_error: Squared error of the middle's output over its size, mean over tokens; 0 is exact.
        loss: The emulated model's loss in nats per token.
        full_loss: The full model's.
    """

    bottom_cosine: float | None
    top_cosine: float | None
    output_error: float
    loss: float
    full_loss: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the measures as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Pass:
    """Gradients by role name, the states behind the middle by batch, and the loss of one model."""

    gradients: dict[str, torch.Tensor]
    states: list[torch.Tensor]
    loss: float


def measure_fidelity(
    model: PreTrainedModel,
    emulated: PreTrainedModel,
    manifest: Manifest,
    windows: torch.Tensor | Sequence[AnyExample],
) -> Fidelity:
    """Compare an emulated model with the full one on token windows ``(num_windows, window)`` of public text.

    Use text that the emulator was not fitted on. Examples of a task may stand for windows: then the loss is theirs, and
    the padding of shorter ones counts in ``output_error``. Both models stay as they are.
    """
    names = full_model_names(model, manifest.stack)
    own = dict(model.named_parameters())
    full_position = manifest.num_blocks - sum(entry.role == "top" for entry in manifest.stack) - 1
    position = max((i for i, entry in enumerate(manifest.stack) if entry.role != "top"), default=-1)
    full = _run(model, {role: own[name] for role, name in names.items()}, windows, position=full_position)
    reduced = _run(emulated, adapter_parameters(emulated, manifest), windows, position=position)
    error = 0.0
    for ours, theirs in zip(full.states, reduced.states, strict=True):
        squared = (theirs - ours).square().sum(-1) / ours.square().sum(-1).clamp(min=1e-12)
        error += float(squared.sum())
    num_tokens = sum(states.shape[0] * states.shape[1] for states in full.states)
    return Fidelity(
        bottom_cosine=_cosine(full.gradients, reduced.gradients, "bottom."),
        top_cosine=_cosine(full.gradients, reduced.gradients, "top."),
        output_error=error / max(1, num_tokens),
        loss=reduced.loss,
        full_loss=full.loss,
    )


def _run(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    windows: torch.Tensor | Sequence[AnyExample],
    *,
    position: int,
) -> _Pass:
    """Run a model over windows, with the gradient of ``parameters``; record what leaves the block at ``position``."""
    blocks = list(get_blocks(model, find_architecture(model.config)))
    examples: list[AnyExample] = (
        [Example(tuple(row), 1) for row in windows.tolist()] if isinstance(windows, torch.Tensor) else list(windows)
    )
    record: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    # Below the first block (no bottom adapter, nothing in the middle) the state is the first block's input.
    place, side = max(position, 0), 0 if position < 0 else 1
    tensors = list(parameters.values())
    sums = [torch.zeros(tensor.shape) for tensor in tensors]
    states, loss, count = [], 0.0, 0
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad(), record_blocks([blocks[place]], record):
            for start in range(0, len(examples), num_windows_per_batch):
                losses, counts = example_losses(model, examples[start : start + num_windows_per_batch])
                total = (losses * counts).sum()
                found = torch.autograd.grad(total, tensors)
                for summed, gradient in zip(sums, found, strict=True):
                    summed.add_(gradient.float().cpu())
                states.append(record[0][side].detach().float().cpu())
                loss, count = loss + float(total.detach()), count + int(counts.sum())
    finally:
        for tensor, flag in zip(tensors, before, strict=True):
            tensor.requires_grad_(flag)
    return _Pass(dict(zip(parameters, sums, strict=True)), states, loss / count)


def _cosine(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], prefix: str) -> float | None:
    names = [name for name in ours if name.startswith(prefix)]
    if not names:
        return None
    first, second = (torch.cat([side[name].flatten() for name in names]) for side in (ours, theirs))
    return float(functional.cosine_similarity(first.double(), second.double(), dim=0))
