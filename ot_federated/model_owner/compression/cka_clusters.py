"""Keep the centre of each cluster of blocks whose outputs are alike.

Source: Kaiyan Zhang et al., "CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without Full Large Language
Model", EMNLP 2023, https://arxiv.org/abs/2310.15477, section 4.1. Blocks are compared by the linear CKA of their
outputs (Simon Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
https://arxiv.org/abs/1905.00414, equation 5) on public text, never on the data owners' data. Only neighbours merge,
so a cluster is a run of blocks; two clusters are as alike as their blocks on average.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from ot_federated.model_owner.compression.calibration import block_states
from ot_federated.tasks.losses import num_public_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The similarities of n tokens are an n x n matrix for each block.
num_cka_tokens = 1024


def block_similarity(model: PreTrainedModel, windows: torch.Tensor, *, first: int, last: int) -> torch.Tensor:
    """Return the linear CKA of the outputs of blocks ``first`` to ``last``, ``(num_blocks, num_blocks)`` in [0, 1].

    Args:
        model: The full model.
        windows: Token windows of public text, ``(num_windows, window)``; of their tokens about a thousand are used,
            spread evenly.
        first: First block that is compared.
        last: Last block that is compared.
    """
    stride = math.ceil(num_public_tokens(model, windows) / num_cka_tokens)
    outputs: dict[int, list[torch.Tensor]] = {index: [] for index in range(first, last + 1)}
    for states in block_states(model, windows):
        for index, parts in outputs.items():
            parts.append(states[index][1].flatten(0, 1)[::stride].float())
    grams = []
    for parts in outputs.values():
        x = torch.cat(parts).cpu().double()
        x -= x.mean(0)
        gram = x @ x.T
        grams.append((gram / gram.norm().clamp(min=1e-30)).float().flatten())
    stacked = torch.stack(grams)
    return (stacked @ stacked.T).clamp(0.0, 1.0)


def keep_cluster_centres(similarity: torch.Tensor, *, first: int, num_kept: int) -> list[int]:
    """Return the centre of each of ``num_kept`` clusters of neighbouring blocks, ascending.

    Args:
        similarity: Similarity of the middle blocks, ``(num_middle, num_middle)``.
        first: Full-model index of the first middle block.
        num_kept: Clusters to be left; the centre is the block most like the others of its cluster, the lower of two.
    """
    clusters = [[index] for index in range(len(similarity))]
    while len(clusters) > num_kept > 0:
        alike = [float(similarity[a][:, b].mean()) for a, b in itertools.pairwise(clusters)]
        closest = max(range(len(alike)), key=alike.__getitem__)
        clusters[closest : closest + 2] = [clusters[closest] + clusters[closest + 1]]
    if num_kept == 0:
        return []
    return [
        first + max(cluster, key=lambda index: (float(similarity[index, cluster].sum()), -index))
        for cluster in clusters
    ]
