"""Train the adapter's blocks as a whole.

Guangxuan Xiao, Ji Lin, Song Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023,
https://arxiv.org/abs/2302.04870, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ot_federated.tuning.settings import Method, Places, Tensors, Tuning, changes_all, remove_nothing


def inject(places: Places, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Return the blocks' parameters."""
    del tuning
    return places.parameters()


def start(shapes: Mapping[str, torch.Size], base: Tensors, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return the bundle's own weights."""
    del tuning
    return {name: base[name].float() for name in shapes}


def merge(state: Tensors, base: Tensors, tuning: Tuning, conv1d: bool) -> dict[str, torch.Tensor]:
    """Return the state: it is whole weights already."""
    del base, tuning, conv1d
    return {name: tensor.float() for name, tensor in state.items()}


full = Method(inject=inject, start=start, merge=merge, changes=changes_all, remove=remove_nothing, peft=None)
