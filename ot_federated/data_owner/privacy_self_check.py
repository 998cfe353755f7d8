"""The client's own proof, before it trains, that the engine bounds each example's influence on this very model.

Engines that look inside a model fail silently on some (weights used beside their layer, positions shared by a
batch, a loss whose mean runs over the batch): the clipped sum is then wrong, and epsilon with it. Two properties
that need no knowledge of the model find these mistakes; both are tried on made-up tokens or images, never on
private data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ot_federated.data_owner.per_example_gradients import (
    ClippedGradients,
    PrivacyError,
    clip_factors,
    float32_engines,
    open_clipped_gradients,
)
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import make_up_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Allowed relative error of a clipped sum, and excess of one example's influence over C, by the model's type.
# float32, for every engine: rounding is 1e-6 in a tame model; in SmolLM2-135M, whose activations are large, even a
# single example's gradient is 3e-4 off that in float64, the sum 1.9e-4 off the loop's, and C is exceeded by 6e-6.
# 5e-5 of C is 5e-5 of epsilon, which no reported figure shows.
# Narrower types, for loop alone: on a CPU it repeats a gradient bit for bit; on a GPU attention's backward pass adds
# up in any order, and differs from itself by a few percent. Which examples there are has no part in that.
error_tolerances = {torch.float32: 5e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
influence_tolerances = {torch.float32: 5e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}

# Short ones for speed; unequal for losses that share a mean; in micro-batches of three, sorted by length. Without the
# shortest every micro-batch has other members and other padding; without the longest the last one has no padding.
_lengths = ((4, 2), (5, 2), (5, 4), (6, 3), (7, 2), (8, 5), (8, 2), (12, 3))
_micro_batch_size = 3


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What the self-check measured.

    Attributes:
        max_error: Largest relative error of a clipped sum, of all examples or of all but one, against a loop of
            single examples.
        max_influence: Largest change of the clipped sum when one example is left out, in units of C. That changes
            what the others share a micro-batch with, so it is part of this.
    """

    max_error: float
    max_influence: float


def check_per_example_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    *,
    engine: str,
    max_grad_norm: float,
    clipping: str = "flat",
) -> SelfCheck:
    """Prove on the actual model that no example can move the clipped sum by more than C; refuse otherwise.

    Tried at three bounds: the configured one, one that clips every example, and one that clips none.

    Args:
        model: The model, on its device.
        parameters: What will train, by name.
        engine: ``hooks``, ``ghost`` or ``loop``.
        max_grad_norm: The configured C.
        clipping: ``flat`` or ``automatic``.

    Raises:
        PrivacyError: If a property does not hold, or the engine cannot work with this model.
    """
    examples = make_up_examples(model, shapes=_lengths, seed=0)
    with _without_zeros(parameters):
        singles = _single_gradients(model, parameters, examples)
        norms = [_norm(single) for single in singles]
        if not max(norms) > 0:
            raise PrivacyError(
                "The client refuses to train: on test inputs no trained weight has a gradient, so nothing can be "
                "checked. See that the trained parameters are part of the model."
            )
        bounds = (max_grad_norm, 0.1 * min(norm for norm in norms if norm > 0), max(norms))
        with (
            _refused(model, engine=engine),
            open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=_micro_batch_size) as gradients,
        ):
            found = [_measure(gradients, examples, singles, max_grad_norm=bound, clipping=clipping) for bound in bounds]
    measured = SelfCheck(max_error=max(f.max_error for f in found), max_influence=max(f.max_influence for f in found))
    judge(model, parameters, measured, engine=engine)
    return measured


def _measure(
    gradients: ClippedGradients,
    examples: Sequence[AnyExample],
    singles: Sequence[Sequence[torch.Tensor]],
    *,
    max_grad_norm: float,
    clipping: str,
) -> SelfCheck:
    total = gradients.sum(examples, max_grad_norm=max_grad_norm, clipping=clipping)
    norms = torch.tensor([_norm(single) for single in singles])
    factors = clip_factors(norms, max_grad_norm=max_grad_norm, clipping=clipping).tolist()
    reference = [torch.zeros_like(part) for part in total]
    for factor, single in zip(factors, singles, strict=True):
        for part, gradient in zip(reference, single, strict=True):
            part.add_(gradient, alpha=factor)
    errors, influences = [_distance(total, reference) / max(_norm(reference), 1e-30)], []
    for index in (0, len(examples) - 1):  # the shortest, the longest
        left = [*examples[:index], *examples[index + 1 :]]
        without = gradients.sum(left, max_grad_norm=max_grad_norm, clipping=clipping)
        influences.append(_distance(total, without) / max_grad_norm)
        others = [part - factors[index] * gone for part, gone in zip(reference, singles[index], strict=True)]
        errors.append(_distance(without, others) / max(_norm(others), 1e-30))
    return SelfCheck(max_error=max(errors), max_influence=max(influences))


@contextmanager
def _refused(model: PreTrainedModel, *, engine: str) -> Iterator[None]:
    """Turn what Opacus meets inside a model that it does not understand into a refusal."""
    try:
        yield
    # Its text is public: the inputs are made up.
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise PrivacyError(
            f"The client refuses to train: privacy.engine={engine} fails on this {model.config.model_type} model "
            f"({type(error).__name__}: {error}). Set privacy.engine=loop."
        ) from error


def judge(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], measured: SelfCheck, *, engine: str) -> None:
    """Tell rounding from mistakes.

    Raises:
        PrivacyError: If what was measured is beyond what the model's type explains.
    """
    # What batches examples is held to float32's margins, whatever it is given.
    dtype = torch.float32 if engine in float32_engines else next(iter(parameters.values())).dtype
    remedies = {"loop": "Set model.dtype=float32, or use another model."}
    remedy = remedies.get(engine, "Set privacy.engine=loop.")
    # Written so that nan fails too.
    if not measured.max_error <= error_tolerances[dtype]:
        raise PrivacyError(
            f"The client refuses to train: with privacy.engine={engine} the clipped gradients of this "
            f"{model.config.model_type} model differ by {measured.max_error:.2g} of their norm from those of single "
            f"examples (allowed: {error_tolerances[dtype]:g}). {remedy}"
        )
    if not measured.max_influence <= 1 + influence_tolerances[dtype]:
        raise PrivacyError(
            f"The client refuses to train: with privacy.engine={engine} one example moves the clipped sum of this "
            f"{model.config.model_type} model by {measured.max_influence:.6g} C (allowed: "
            f"{1 + influence_tolerances[dtype]:g} C). {remedy}"
        )


def _norm(sums: Sequence[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(float(total.square().sum()) for total in sums))


def _distance(sums: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return _norm([total - other for total, other in zip(sums, others, strict=True)])


def _single_gradients(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], examples: Sequence[AnyExample]
) -> list[list[torch.Tensor]]:
    with open_clipped_gradients(model, parameters, engine="loop", micro_batch_size=1) as loop:
        return [loop.sum([example], max_grad_norm=math.inf) for example in examples]


@contextmanager
def _without_zeros(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give parameters that are all zero small random values for a while.

    LoRA starts with one factor at zero, where the other's gradient vanishes and so does every mistake in it.
    """
    generator = torch.Generator().manual_seed(0)
    kept = {name: parameter.data for name, parameter in parameters.items() if not bool(parameter.detach().any())}
    for name, data in kept.items():
        parameters[name].data = (0.02 * torch.randn(data.shape, generator=generator)).to(data)
    try:
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data
