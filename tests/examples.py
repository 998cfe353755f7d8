"""Tokenised examples of different lengths, always the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ot_federated.tasks.base import Example


def build_examples(shapes: Iterable[tuple[int, int]]) -> list[Example]:
    """Return an example for each pair of a number of tokens and how many of them are context."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(4, 260, (length,), generator=generator).tolist()), num) for length, num in shapes
    ]
