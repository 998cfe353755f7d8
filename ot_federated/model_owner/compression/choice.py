"""Which middle blocks the emulator keeps: every way by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ot_federated.errors import ConfigError, nearest_match
from ot_federated.model_owner.compression.calibration import block_influence
from ot_federated.model_owner.compression.cka_clusters import block_similarity, keep_cluster_centres
from ot_federated.model_owner.compression.gradient_keeping import keep_gradient_preserving
from ot_federated.model_owner.compression.keeping import keep_influential, keep_uniform
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import num_public_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

num_influence_tokens = 4096
text_free = ("uniform",)


def choose_blocks(
    model: PreTrainedModel,
    windows: torch.Tensor | None,
    *,
    keep: str,
    first: int,
    last: int,
    num_kept: int,
    spread: Sequence[int] = (),
    ridge: float,
    labelled: Sequence[AnyExample] = (),
    say: Callable[[str], None],
) -> list[int]:
    """Return the full-model indices of the middle blocks that stay, ascending.

    Args:
        model: The full model.
        windows: Token windows of public text, or public images; ``uniform`` needs none.
        keep: The way: ``uniform``, ``influence``, ``cka`` or ``gradient``.
        first: First middle block.
        last: Last middle block.
        num_kept: How many stay.
        spread: Middle blocks of the adapter, among which nothing is chosen; with ``uniform`` and ``influence`` alone.
        ridge: Penalty of the bridges that ``gradient`` tries.
        labelled: Labelled public examples, which ``gradient`` prefers for a model with a classification head.
        say: Told what is going on.

    Raises:
        ConfigError: If the way is unknown, or needs public text and has none.
    """
    if keep not in ("uniform", "influence", "cka", "gradient"):
        ways = ("uniform", "influence", "cka", "gradient")
        raise ConfigError(f"offsite.keep={keep!r} is not one of {', '.join(ways)}{nearest_match(keep, ways)}.")
    if num_kept == 0:
        return []
    others = [block for block in range(first, last + 1) if block not in spread]
    if keep == "uniform":
        return [others[place] for place in keep_uniform(first=0, last=len(others) - 1, num_kept=num_kept)]
    if windows is None:
        raise ConfigError(f"offsite.keep={keep!r} needs public text: set offsite.public-text, or take uniform.")
    say(f"Choosing middle blocks by {keep} on public text or images")
    if keep == "influence":
        num_windows = max(1, num_influence_tokens * len(windows) // num_public_tokens(model, windows))
        influence = block_influence(model, windows[:num_windows])
        places = keep_influential([influence[block] for block in others], first=0, num_kept=num_kept)
        return [others[place] for place in places]
    if keep == "cka":
        similarity = block_similarity(model, windows, first=first, last=last)
        return keep_cluster_centres(similarity, first=first, num_kept=num_kept)
    return keep_gradient_preserving(
        model, windows, first=first, last=last, num_kept=num_kept, ridge=ridge, labelled=labelled
    )
