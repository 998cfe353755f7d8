"""DP-SGD on the adapter: what a data owner runs so that no example can be told from the update it sends.

Abadi et al., "Deep learning with differential privacy", CCS 2016, https://arxiv.org/abs/1607.00133, algorithm 1,
with AdamW for the last line (a function of the noisy gradients alone, so it costs no privacy). One step:

1. Draw a batch: each example is in, on its own, with chance ``q`` (Poisson sampling, which the accounting assumes).
2. Clip each example's gradient to norm ``C`` and sum (``per_example_gradients``). The sum of an empty batch is 0.
3. Add noise with standard deviation ``sigma C`` to the sum, once, in float64.
4. Divide by ``q N``, the expected batch size: the realised one is private.
5. Add the proximal gradient, which reads no data, and let AdamW step.

A step with an empty batch is a step like any other: leaving it out would tell that the batch was empty, and the
accounting counts it. Steps 1 and 3 draw from ``SecureRandom``; no configured seed reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ot_federated.data_owner.per_example_gradients import PrivacyError, open_clipped_gradients
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import AnyExample
from ot_federated.training import MasterWeights, OptimizerSettings, StepReport, TrainingResult, scale_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_noise(
    sums: Sequence[torch.Tensor], *, noise_multiplier: float, max_grad_norm: float, random: SecureRandom
) -> list[torch.Tensor]:
    """Return ``sums`` with independent normal noise of standard deviation ``sigma C`` on every number, in fp32."""
    if noise_multiplier == 0:
        return list(sums)
    noisy = []
    for total in sums:
        normals = torch.from_numpy(random.draw_normals(total.numel())).view(total.shape)
        # In float64 and rounded once: see secure_random on floating point. On the CPU: not every device has float64.
        noisy.append((total.cpu().double() + (noise_multiplier * max_grad_norm) * normals).float().to(total.device))
    return noisy


def train_privately(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[AnyExample],
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    num_steps: int,
    sample_rate: float,
    noise_multiplier: float,
    max_grad_norm: float,
    clipping: str = "flat",
    engine: str = "hooks",
    micro_batch_size: int,
    optimizer: OptimizerSettings,
    first_step: int = 0,
    total_steps: int,
    random: SecureRandom,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainingResult:
    """Train ``parameters`` of the model by DP-SGD, in place, and return them in fp32.

    The result is private at (noise_multiplier, sample_rate, num_steps) under adding or removing one example; the
    caller accounts for it before it calls, and checks the engine with ``check_per_example_gradients``. Losses and
    token counts are of private data: both are withheld (``nan`` and 0), in the result and in the reports. Dropout
    is off.

    Args:
        model: The model, on its device.
        parameters: What trains, by name; all else stays frozen, buffers included.
        examples: All local examples; their number is taken to be public.
        start: fp32 start values by the same names; the parameters' own values where absent.
        num_steps: Steps to take.
        sample_rate: q, the chance of each example to be in a batch, in (0, 1].
        noise_multiplier: sigma, the noise's standard deviation in units of C. 0 gives no privacy.
        max_grad_norm: C, the most that one example can move the sum.
        clipping: ``flat`` or ``automatic``.
        engine: ``hooks``, ``ghost`` or ``loop``.
        micro_batch_size: Most examples in the model at once; bounds the memory, does not change the result.
        optimizer: How the weights move along the noisy gradients.
        first_step: Position of the first step in the learning-rate schedule.
        total_steps: Length of the schedule.
        random: Draws batches and noise.
        on_step: Called after every step.

    Raises:
        PrivacyError: If a setting cannot give privacy, or the engine cannot work with this model.
    """
    _check_settings(
        num_examples=len(examples),
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    divisor = sample_rate * len(examples)
    masters = MasterWeights(model, parameters, start=start, optimizer=optimizer, max_grad_norm=0.0)
    with open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=micro_batch_size) as gradients:
        for step in range(num_steps):
            batch = [examples[index] for index in random.sample_indices(len(examples), sample_rate=sample_rate)]
            sums = gradients.sum(batch, max_grad_norm=max_grad_norm, clipping=clipping)
            noisy = add_noise(sums, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, random=random)
            factor = scale_learning_rate(
                first_step + step,
                num_steps=total_steps,
                schedule=optimizer.lr_schedule,
                warmup_fraction=optimizer.warmup_fraction,
            )
            masters.step([total / divisor for total in noisy], rate_factor=factor)
            if on_step:
                on_step(StepReport(step + 1, num_steps, math.nan))
    return TrainingResult(weights=masters.weights(), loss=math.nan, num_steps=num_steps, num_tokens=0)


def _check_settings(*, num_examples: int, sample_rate: float, noise_multiplier: float, max_grad_norm: float) -> None:
    if num_examples < 1:
        raise PrivacyError("The client refuses to train: it has no examples.")
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"The client refuses to train: sample_rate={sample_rate!r} must be above 0 and at most 1.")
    if not 0 <= noise_multiplier < math.inf:
        raise PrivacyError(
            f"The client refuses to train: privacy.noise-multiplier={noise_multiplier!r} must be finite and at least 0."
        )
    if not max_grad_norm > 0 or (noise_multiplier > 0 and math.isinf(max_grad_norm)):
        raise PrivacyError(
            f"The client refuses to train: privacy.max-grad-norm={max_grad_norm!r} must be finite and above 0."
        )
