"""Where a new classification head starts: fitted on the owner's labelled public data, the model untouched.

Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
https://arxiv.org/abs/2202.10054: a probe first, then fine-tuning, keeps what the model knows. It also makes "full
model, zero-shot" mean something: an untrained head is at chance, whatever is below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ot_federated.architectures import find_architecture, find_head
from ot_federated.errors import DataError
from ot_federated.tasks.base import LabelledImage, LabelledText
from ot_federated.tasks.classification_model import class_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

num_examples_per_batch = 16
max_iterations = 200


def has_untrained_head(model: PreTrainedModel) -> bool:
    """Say whether the model has a classification head that knows nothing yet: all its weights are zero."""
    head = find_head(model, find_architecture(model.config))
    return head is not None and not any(bool(parameter.any()) for parameter in head.parameters())


def fit_head(
    model: PreTrainedModel,
    examples: Sequence[LabelledText] | Sequence[LabelledImage],
    *,
    classes: Sequence[str],
    penalty: float = 1.0,
) -> None:
    """Fit the head, in place, to labelled public examples, by logistic regression on what the model gives it.

    Features are divided by their deviations first, so that the penalty treats them alike; the result is the same from
    run to run.

    Args:
        model: The full model.
        examples: Labelled public examples.
        classes: Names of the classes.
        penalty: Weight of ``|W|^2 / 2`` against the examples' summed cross-entropy.

    Raises:
        DataError: If a class has no example.
    """
    labels = torch.tensor([example.label for example in examples], dtype=torch.long)
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise DataError(
            f"The public data (offsite.public-text) has no example of {', '.join(empty[:5])}, so the head cannot be "
            "fitted to it. Add some, or set task.head-start=zero."
        )
    head: Any = find_head(model, find_architecture(model.config))
    features = compute_features(model, examples)
    has_bias = head.bias is not None
    mean = features.mean(dim=0) if has_bias else torch.zeros_like(features[0])
    scale = features.std(dim=0, unbiased=False).clamp(min=1e-6 * float(features.abs().max()))
    inputs = (features - mean) / scale
    weight = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=has_bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias] if has_bias else [weight], max_iter=max_iterations, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight.T + bias, labels)
        loss = loss + 0.5 * penalty / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        fitted = weight / scale
        head.weight.copy_(fitted.to(head.weight.dtype))
        if has_bias:
            head.bias.copy_((bias - fitted @ mean).to(head.bias.dtype))


@torch.inference_mode()
def compute_features(
    model: PreTrainedModel, examples: Sequence[LabelledText] | Sequence[LabelledImage]
) -> torch.Tensor:
    """Return what the head is given for each example, ``(examples, width)``, in fp64 on the CPU."""
    head = find_head(model, find_architecture(model.config))
    assert head is not None, "the caller has looked"
    found: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].cpu().double()))
    try:
        for start in range(0, len(examples), num_examples_per_batch):
            class_logits(model, examples[start : start + num_examples_per_batch])
    finally:
        handle.remove()
    return torch.cat(found).clone()
