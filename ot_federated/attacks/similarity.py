"""How alike the hidden states of two models are: linear centred kernel alignment.

Simon Kornblith, Mohammad Norouzi, Honglak Lee, Geoffrey Hinton, "Similarity of Neural Network Representations
Revisited", ICML 2019, https://arxiv.org/abs/1905.00414.
"""

from __future__ import annotations

import torch


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the linear CKA of two sets of states of the same tokens, in [0, 1].

    1 means equal up to rotation and scale; it does not mean that one model can stand in for the other.

    Args:
        first: ``(num_tokens, width)``.
        second: ``(num_tokens, other_width)``.

    Raises:
        ValueError: If they do not hold the same number of tokens.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} tokens: CKA compares states of the same tokens.")
    x, y = (states - states.mean(dim=0) for states in (first.cpu().double(), second.cpu().double()))
    cross = torch.linalg.matrix_norm(y.T @ x) ** 2
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(cross / own) if own > 0 else 0.0
