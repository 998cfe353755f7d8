"""Whether an emulator does its work: tune the adapter with it for a few steps on public text, plug in, and look.

An emulator that scores better by itself need not give a better plug-in, so this and not its own loss decides between
two states of one. The text that the plug-in is scored on is none that it was tuned or the emulator fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ot_federated.bundle import Manifest
from ot_federated.emulated_model import adapter_parameters, load_adapter
from ot_federated.model_owner.plug_in import plugged_in
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from ot_federated.training import OptimizerSettings, draw_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

piece_tokens = 64
num_pieces_per_batch = 8
learning_rate = 2e-4


@dataclass(frozen=True)
class PlugInLosses:
    """Losses on public text, in nats per token, of the tuned emulator and the plug-in; infinite where it diverged."""

    emulator: float
    plug_in: float


def cut_windows(windows: torch.Tensor) -> list[Example]:
    """Return token windows ``(num_windows, window)`` as examples of at most 64 tokens."""
    length = min(piece_tokens, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    return [Example(tuple(row), 1) for row in pieces.tolist()]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Return the mean loss per token, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(examples), num_pieces_per_batch):
        losses, counts = example_losses(model, examples[start : start + num_pieces_per_batch])
        total, count = total + float((losses * counts).sum()), count + int(counts.sum())
    return total / count


def validate_by_plug_in(
    model: PreTrainedModel,
    emulated: PreTrainedModel,
    manifest: Manifest,
    *,
    tune_on: torch.Tensor,
    score_on: torch.Tensor,
    num_steps: int,
    seed: int,
) -> PlugInLosses:
    """Tune the adapter for ``num_steps`` steps, plug it in, and score both; both models are as before afterwards.

    Args:
        model: The full model.
        emulated: The emulated model.
        manifest: Its layout.
        tune_on: Token windows of public text, ``(num_windows, window)``.
        score_on: Others.
        num_steps: Steps of 8 examples of 64 tokens.
        seed: Of their order.
    """
    examples = cut_windows(tune_on)
    parameters = adapter_parameters(emulated, manifest)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    batches = draw_batches(
        [len(example.input_ids) for example in examples],
        batch_size=num_pieces_per_batch,
        first_step=0,
        num_steps=num_steps,
        seed=[seed],
    )
    optimizer = OptimizerSettings(
        learning_rate=learning_rate, lr_schedule="linear", warmup_fraction=0.1, weight_decay=0.0
    )
    result = train(
        emulated,
        parameters,
        examples,
        batches=batches,
        num_steps=num_steps,
        total_steps=num_steps,
        optimizer=optimizer,
        max_grad_norm=1.0,
    )
    held_out = cut_windows(score_on)
    emulator_loss = mean_loss(emulated, held_out)
    load_adapter(emulated, before, manifest)
    if not all(torch.isfinite(weight).all() for weight in result.weights.values()):
        return PlugInLosses(emulator=emulator_loss, plug_in=math.inf)
    with plugged_in(model, result.weights, manifest.stack) as plugged:
        return PlugInLosses(emulator=emulator_loss, plug_in=mean_loss(plugged, held_out))
