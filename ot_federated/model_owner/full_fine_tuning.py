"""Fine-tune the full model on the training data: the upper bound that recovery is measured against.

Only a simulation can do this, because it has the data owners' data and the owner's model in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ot_federated.tasks.base import AnyExample
from ot_federated.training import OptimizerSettings, StepReport, draw_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fine_tune_full_model(
    model: PreTrainedModel,
    examples: Sequence[AnyExample],
    *,
    num_steps: int,
    batch_size: int,
    optimizer: OptimizerSettings,
    max_grad_norm: float,
    seed: int,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Train every parameter of the model, in place, for as many steps as all clients took together."""
    torch.manual_seed(seed)  # dropout, where the family has it
    train(
        model,
        dict(model.named_parameters()),
        examples,
        batches=draw_batches(
            [example.length for example in examples],
            batch_size=batch_size,
            first_step=0,
            num_steps=num_steps,
            seed=[seed],
        ),
        num_steps=num_steps,
        total_steps=num_steps,
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        on_step=on_step,
    )
