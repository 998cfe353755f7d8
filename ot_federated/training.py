"""The training loop: AdamW on fp32 master copies of what trains; everything else is frozen.

Both sides use it: a data owner to tune the adapter, the model owner for the full fine-tuning it is compared with.
The model computes in its own type (bfloat16 where that is fast). The optimizer works on fp32 copies, because in
bfloat16 an update below 1/256 of a weight would be rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import nn

from ot_federated.config import TrainConfig
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import example_losses, num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Enough for little padding, few enough that a batch is still a random draw of the epoch.
num_batches_sorted_together = 16


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW, the schedule of its learning rate, and the pull towards the start.

    Attributes:
        learning_rate: Peak learning rate.
        lr_schedule: ``linear``, ``cosine`` or ``constant``.
        warmup_fraction: Share of all steps of all rounds that warms up.
        weight_decay: Decoupled weight decay.
        proximal_mu: Adds ``mu/2 ||w - w_start||^2`` (Li et al., "Federated Optimization in Heterogeneous
            Networks", 2020, https://arxiv.org/abs/1812.06127, equation 2), by its gradient.
    """

    learning_rate: float
    lr_schedule: str
    warmup_fraction: float
    weight_decay: float
    proximal_mu: float = 0.0


def build_optimizer_settings(config: TrainConfig) -> OptimizerSettings:
    """Return what the run config says of the optimizer."""
    return OptimizerSettings(
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        proximal_mu=config.proximal_mu,
    )


@dataclass(frozen=True)
class StepReport:
    """What one step did: its number in this call (from 1), how many there will be, its loss in nats per token."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What training gave.

    Attributes:
        weights: The trained tensors in fp32 on the CPU, by the names that were given.
        loss: Mean training loss over the steps, in nats per token.
        num_steps: Steps taken.
        num_tokens: Tokens processed, padding not counted.
    """

    weights: dict[str, torch.Tensor]
    loss: float
    num_steps: int
    num_tokens: int


def plan_round(*, num_examples: int, batch_size: int, local_epochs: int, max_steps: int) -> int:
    """Return the steps of one round: ``local_epochs`` passes, at most ``max_steps`` where that is not 0."""
    num_steps = local_epochs * math.ceil(num_examples / batch_size)
    return min(num_steps, max_steps) if max_steps else num_steps


def draw_batches(
    lengths: Sequence[int], *, batch_size: int, first_step: int, num_steps: int, seed: Sequence[int]
) -> Iterator[list[int]]:
    """Yield the example indices of steps ``first_step``, ``first_step + 1``, ... of an endless shuffled walk.

    The walk passes over all examples in a new order each time. Examples of similar length share a batch, so little
    is padded: on ARC-Easy in batches of 16 this halves the work. It depends on lengths, seed and step alone, so a
    round starts where the last one stopped without anything being kept between them.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples a step; the last batch of a pass may be smaller.
        first_step: Position in the walk.
        num_steps: Steps to draw.
        seed: What the order is derived from.
    """
    per_epoch = math.ceil(len(lengths) / batch_size)
    batches: list[list[int]] = []
    drawn = -1
    for step in range(first_step, first_step + num_steps):
        epoch, position = divmod(step, per_epoch)
        if epoch != drawn:
            batches = _shuffle_by_length(lengths, batch_size, np.random.default_rng([*seed, epoch]))
            drawn = epoch
        yield batches[position]


def _shuffle_by_length(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    order = rng.permutation(len(lengths))
    window = batch_size * num_batches_sorted_together
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window].tolist(), key=lambda index: lengths[index])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def scale_learning_rate(step: int, *, num_steps: int, schedule: str, warmup_fraction: float) -> float:
    """Return the factor on the peak learning rate at ``step`` (from 0) of ``num_steps``, in (0, 1]."""
    warmup = math.ceil(warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@final
class MasterWeights:
    """fp32 copies of what trains, and the AdamW that moves them and writes them back into the model.

    Args:
        model: The model, on its device.
        parameters: What trains, by name. They get memory of their own.
        start: fp32 start values by the same names; the parameters' own values where absent.
        optimizer: How they move. The proximal gradient is added after clipping.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        *,
        start: Mapping[str, torch.Tensor] | None,
        optimizer: OptimizerSettings,
        max_grad_norm: float,
    ) -> None:
        self._targets = dict(parameters)
        values = [parameters[name].detach() if start is None else start[name] for name in parameters]
        self._masters = [value.to(device=model.device, dtype=torch.float32, copy=True) for value in values]
        self._anchors = [master.clone() for master in self._masters] if optimizer.proximal_mu else []
        for target, master in zip(self._targets.values(), self._masters, strict=True):
            # Memory of its own: a parameter from a bundle is a view of a file that other processes read too.
            target.data = master.to(target.dtype, copy=True)
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),
        )
        self._settings = optimizer
        self._max_grad_norm = max_grad_norm

    def step(self, gradients: Sequence[torch.Tensor | None], *, rate_factor: float) -> None:
        """Take one step along ``gradients`` (None for zero) at ``rate_factor`` times the peak learning rate."""
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
        if self._max_grad_norm:
            nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        for master, anchor in zip(self._masters, self._anchors, strict=False):
            master.grad.add_(master.detach() - anchor, alpha=self._settings.proximal_mu)  # type: ignore[union-attr]  # set above
        self._optimizer.param_groups[0]["lr"] = self._settings.learning_rate * rate_factor
        self._optimizer.step()
        with torch.no_grad():
            for target, master in zip(self._targets.values(), self._masters, strict=True):
                target.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that the next step depends on but its number: weights and AdamW's moments, in fp32, by name."""
        tensors = {}
        for name, master in zip(self._targets, self._masters, strict=True):
            moments = self._optimizer.state[master]
            tensors[f"weight.{name}"] = master.detach()
            tensors[f"first.{name}"] = moments["exp_avg"]
            tensors[f"second.{name}"] = moments["exp_avg_sq"]
        return tensors

    def restore(self, state: Mapping[str, torch.Tensor], *, num_steps: int) -> None:
        """Go back to a :meth:`state` that was taken after ``num_steps`` steps, the model's weights too."""
        with torch.no_grad():
            for (name, target), master in zip(self._targets.items(), self._masters, strict=True):
                master.copy_(state[f"weight.{name}"])
                target.copy_(master)
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(num_steps), device=master.device if master.is_cuda else "cpu"),
                    "exp_avg": state[f"first.{name}"].to(master, copy=True),
                    "exp_avg_sq": state[f"second.{name}"].to(master, copy=True),
                }

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the fp32 weights by name, on the CPU."""
        return {name: master.detach().cpu() for name, master in zip(self._targets, self._masters, strict=True)}


def train(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[AnyExample],
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    batches: Iterator[list[int]],
    first_step: int = 0,
    num_steps: int,
    total_steps: int,
    optimizer: OptimizerSettings,
    max_grad_norm: float,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainingResult:
    """Train ``parameters`` of the model, in place, and return them in fp32.

    Args:
        model: The model, on its device.
        parameters: What trains, by name; all else is left frozen.
        examples: Training examples, which ``batches`` indexes.
        start: fp32 start values by the same names; the parameters' own values where absent.
        batches: Example indices, step by step.
        first_step: Position of the first step in the learning-rate schedule.
        num_steps: Steps to take.
        total_steps: Length of the schedule.
        optimizer: How the weights move.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
        on_step: Called after every step.
    """
    masters = MasterWeights(model, parameters, start=start, optimizer=optimizer, max_grad_norm=max_grad_norm)
    targets = list(parameters.values())
    model.requires_grad_(False).train()
    for target in targets:
        target.requires_grad_(True)
    losses, tokens = [], 0
    for step in range(num_steps):
        batch = [examples[index] for index in next(batches)]
        loss = example_losses(model, batch)[0].mean()
        loss.backward()
        factor = scale_learning_rate(
            first_step + step,
            num_steps=total_steps,
            schedule=optimizer.lr_schedule,
            warmup_fraction=optimizer.warmup_fraction,
        )
        masters.step([target.grad for target in targets], rate_factor=factor)
        for target in targets:
            target.grad = None
        losses.append(loss.item())
        tokens += num_positions(batch)
        if on_step:
            on_step(StepReport(step + 1, num_steps, losses[-1]))
    model.eval().requires_grad_(False)
    return TrainingResult(
        weights=masters.weights(),
        loss=float(np.mean(losses)) if losses else math.nan,
        num_steps=len(losses),
        num_tokens=tokens,
    )
