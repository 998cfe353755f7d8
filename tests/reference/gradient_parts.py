"""Examples, a trained part of a model, and single examples' gradients: what per-example gradients are tested with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ot_federated.tasks.base import Example
from tests.examples import build_examples

examples = build_examples([(4, 1), (31, 3), (9, 8), (9, 2), (17, 3)])


def trained_part(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the first and the last block: what an adapter is."""
    return {name: p for name, p in model.named_parameters() if ".0." in name or ".7." in name}


def flatten(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten().double() for part in sums])


def single_gradient(model: Any, parameters: Mapping[str, nn.Parameter], example: Example) -> torch.Tensor:
    """Return one example's gradient by transformers' own loss."""
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.num_context] = -100
    gradients = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(parameters.values()))
    model.requires_grad_(False)
    return flatten(gradients)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
