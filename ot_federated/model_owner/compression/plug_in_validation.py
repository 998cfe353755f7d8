"""Whether an emulator does its work: tune the adapter with it for a few steps on public text, plug in, and look.

An emulator that scores better by itself need not give a better plug-in, so this and not its own loss decides between
two states of one. The data that the plug-in is scored on is none that it was tuned or the emulator distilled on.

Where there is no loss to tune by (a classification head without labels) the error of the middle's output decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.bundle import Manifest
from ot_federated.emulated_model import adapter_parameters, load_adapter
from ot_federated.model_owner.compression.calibration import record_blocks, split_windows
from ot_federated.model_owner.plug_in import plugged_in
from ot_federated.tasks.base import AnyExample, Example
from ot_federated.tasks.losses import example_losses, run_model
from ot_federated.training import OptimizerSettings, draw_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

piece_tokens = 64
num_pieces_per_batch = 8
learning_rate = 2e-4


@dataclass(frozen=True)
class PlugInLosses:
    """Losses on public data, in nats per target, of the tuned emulator and the plug-in; infinite where it diverged."""

    emulator: float
    plug_in: float


def cut_windows(windows: torch.Tensor) -> list[Example]:
    """Return token windows ``(num_windows, window)`` as examples of at most 64 tokens."""
    length = min(piece_tokens, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    return [Example(tuple(row), 1) for row in pieces.tolist()]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, examples: Sequence[AnyExample]) -> float:
    """Return the mean loss per target (a token, or a class), in nats."""
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
    tune_on: Sequence[AnyExample],
    score_on: Sequence[AnyExample],
    num_steps: int,
    seed: int,
) -> PlugInLosses:
    """Tune the adapter for ``num_steps`` steps, plug it in, and score both; both models are as before afterwards.

    Args:
        model: The full model.
        emulated: The emulated model.
        manifest: Its layout.
        tune_on: Public examples: of text, see :func:`cut_windows`, or labelled ones.
        score_on: Others.
        num_steps: Steps of 8 examples.
        seed: Of their order.
    """
    parameters = adapter_parameters(emulated, manifest)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    batches = draw_batches(
        [example.length for example in tune_on],
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
        tune_on,
        batches=batches,
        num_steps=num_steps,
        total_steps=num_steps,
        optimizer=optimizer,
        max_grad_norm=1.0,
    )
    emulator_loss = mean_loss(emulated, score_on)
    load_adapter(emulated, before, manifest)
    if not all(torch.isfinite(weight).all() for weight in result.weights.values()):
        return PlugInLosses(emulator=emulator_loss, plug_in=math.inf)
    with plugged_in(model, result.weights, manifest.stack) as plugged:
        return PlugInLosses(emulator=emulator_loss, plug_in=mean_loss(plugged, score_on))


@torch.inference_mode()
def measure_output_error(
    model: PreTrainedModel, emulated: PreTrainedModel, inputs: torch.Tensor, *, block: int, position: int
) -> float:
    """Return the squared error of a hidden state over its size, mean over tokens; 0 is exact, NaN has diverged.

    Args:
        model: The full model.
        emulated: The emulated model.
        inputs: Token windows of public text, or public images.
        block: The full model's block behind which it is looked at.
        position: The emulated model's that stands for it.
    """
    total, count = 0.0, 0
    for batch in split_windows(inputs):
        states = []
        for each, index in ((model, block), (emulated, position)):
            record: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            with record_blocks([get_blocks(each, find_architecture(each.config))[index]], record):
                run_model(each, batch)
            states.append(record[0][1].float())
        error = (states[0] - states[1]).square().mean(-1) / states[0].square().mean(-1).clamp(min=1e-12)
        total, count = total + float(error.sum()), count + error.numel()
    return total / count
