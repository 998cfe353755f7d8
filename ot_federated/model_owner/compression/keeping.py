"""Which middle blocks the emulator keeps.

uniform: Xiao, Lin, Han, "Offsite-Tuning", 2023, https://arxiv.org/abs/2302.04870, section 3.2 (layer drop).
influence: Xin Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
https://arxiv.org/abs/2403.03853, equation 1 (block influence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def keep_uniform(*, first: int, last: int, num_kept: int) -> list[int]:
    """Return ``num_kept`` evenly spaced blocks of ``[first, last]``, both ends among them.

    A single kept block stands in the middle, where the paper's formula divides by zero.
    """
    num_middle = last - first + 1
    if num_kept == 1:
        return [first + (num_middle - 1) // 2]
    return [first + round(index * (num_middle - 1) / (num_kept - 1)) for index in range(num_kept)]


def spread_evenly(*, first: int, last: int, num_blocks: int) -> list[int]:
    """Return ``num_blocks`` blocks inside ``[first, last]``, evenly spaced with as much room at both ends."""
    num_middle = last - first + 1
    return [first + math.floor((index + 0.5) * num_middle / num_blocks) for index in range(num_blocks)]


def keep_influential(influence: Sequence[float], *, first: int, num_kept: int) -> list[int]:
    """Return the ``num_kept`` middle blocks of the largest influence, ascending.

    Args:
        influence: Block influence of the middle blocks, in order.
        first: Full-model index of the first middle block.
        num_kept: How many to keep; ties go to the lower block.
    """
    ranked = sorted(range(len(influence)), key=lambda index: (-influence[index], index))
    return sorted(first + index for index in ranked[:num_kept])
