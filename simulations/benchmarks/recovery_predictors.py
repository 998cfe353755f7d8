"""What could tell a good emulator from a bad one without training: cheap predictors of recovery.

All are measured on the owner's validation examples, before anything is tuned. Which of them agrees with recovery is
what the benchmark is to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.emulated_model import adapter_parameters, load_emulated_model
from ot_federated.model_owner.owner import Owner
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from ot_federated.tuning import prepare_tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

batch_size = 8
higher_is_better = {
    "gradient_cosine": True,
    "gradient_cosine_bottom": True,
    "gradient_cosine_top": True,
    "middle_error": False,
    "emulator_loss": False,
}


def measure_predictors(owner: Owner, *, num_examples: int = 64) -> dict[str, float]:
    """Return the predictors of a bundle.

    Args:
        owner: The owner, with the bundle.
        num_examples: Validation examples to use.

    Returns:
        Cosine of the adapter's gradient under the emulator with the one under the full model, whole and by side;
        ``middle_error``, the squared distance of the emulator's output from the middle's, relative to the middle's
        size (both run on their own inputs, which are equal before tuning); ``emulator_loss``.
    """
    rows = list(owner.validation)[:num_examples]
    examples = owner.task.encode(rows)[:num_examples]
    emulated = load_emulated_model(owner.bundle, owner.manifest, device=owner.device)
    stack = owner.manifest.stack
    top = next((i for i, entry in enumerate(stack) if entry.role == "top"), len(stack))
    num_top = len(stack) - top
    names = full_model_names(owner.model, stack)
    full_parameters = dict(owner.model.named_parameters())
    sides = [
        (
            owner.model,
            {role: full_parameters[name] for role, name in names.items()},
            owner.manifest.num_blocks - num_top,
        ),
        (emulated, adapter_parameters(emulated, owner.manifest), top),
    ]
    (full_gradients, full_states, _), (gradients, states, loss) = (
        gradients_and_states(model, parameters, examples, position=position) for model, parameters, position in sides
    )
    owner.model.eval().requires_grad_(False)
    error = sum(float((s - t).square().sum()) for s, t in zip(states, full_states, strict=True))
    size = sum(float(t.square().sum()) for t in full_states)
    return {
        "gradient_cosine": cosine(gradients, full_gradients, ""),
        "gradient_cosine_bottom": cosine(gradients, full_gradients, "bottom."),
        "gradient_cosine_top": cosine(gradients, full_gradients, "top."),
        "middle_error": error / size,
        "emulator_loss": loss,
    }


def gradients_and_states(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], examples: Sequence[Example], *, position: int
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], float]:
    """Return the mean gradient of ``parameters`` in fp32, the states before block ``position``, and the mean loss.

    The states are those of all tokens, padding among them, batch by batch: equal batches give equal padding.
    """
    blocks = get_blocks(model, find_architecture(model.config))
    states: list[torch.Tensor] = []
    block, is_output = (blocks[position], False) if position < len(blocks) else (blocks[position - 1], True)

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = output if is_output else args or kwargs["hidden_states"]
        states.append((found[0] if isinstance(found, tuple) else found).detach().float().cpu())

    model.requires_grad_(False).eval()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    total = 0.0
    handle = block.register_forward_hook(note, with_kwargs=True)
    try:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            losses, _ = example_losses(model, batch)
            losses.sum().backward()
            total += float(losses.detach().sum())
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float()
                parameter.grad = None
    finally:
        handle.remove()
        model.requires_grad_(False)
    return {name: gradient.cpu() / len(examples) for name, gradient in sums.items()}, states, total / len(examples)


def cosine(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], prefix: str) -> float:
    """Return the cosine of two gradients over the tensors whose names begin with ``prefix``; 0 where there is none."""
    names = [name for name in left if name.startswith(prefix)]
    if not names:
        return 0.0
    a, b = (torch.cat([side[name].flatten() for name in names]) for side in (left, right))
    return float(functional.cosine_similarity(a, b, dim=0))


def training_flops_fraction(owner: Owner) -> float:
    """Return a client's work for a token, as a share of that of full fine-tuning, embeddings and head not counted.

    Two operations a weight going up; two more going down where a gradient must pass, and two more where the weight
    itself is trained. A block that stands at two positions counts twice. Attention's own products are left out: at
    these lengths they are a few percent.
    """
    emulated = load_emulated_model(owner.bundle, owner.manifest)
    trained = prepare_tuning(emulated, owner.manifest, owner.tuning)
    blocks = get_blocks(emulated, find_architecture(emulated.config))
    placement = owner.config.tuning.placement
    lowest = next(i for i, entry in enumerate(owner.manifest.stack) if placement in ("both", entry.role))
    num_weights = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    work = 2 * sum(num_weights) + 2 * sum(num_weights[lowest:])
    work += 2 * sum(parameter.numel() for parameter in trained.values() if parameter.dim() == 2)
    full_blocks = get_blocks(owner.model, find_architecture(owner.model.config))
    full = 6 * sum(p.numel() for block in full_blocks for p in block.parameters() if p.dim() == 2)
    return work / full


def rank_agreement(predictor: Sequence[float], measure: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None with fewer than three points, or where one side does not vary."""
    from scipy.stats import spearmanr

    if len(predictor) < 3 or len(set(predictor)) < 2 or len(set(measure)) < 2:
        return None
    value = float(spearmanr(predictor, measure).statistic)
    return None if math.isnan(value) else value
