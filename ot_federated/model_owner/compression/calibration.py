"""Statistics of the full model's hidden states on public text or images.

Public inputs are token windows ``(num_windows, window)``, or images ``(num_images, channels, height, width)``.

The passes stream: memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.errors import DataError
from ot_federated.tasks.losses import run_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

window_length = 512
num_tokens_per_batch = 1024
num_images_per_batch = 2


def split_windows(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Divide public inputs into batches of about a thousand tokens, or of two images."""
    size = num_images_per_batch if windows.is_floating_point() else max(1, num_tokens_per_batch // windows.shape[1])
    batches: tuple[torch.Tensor, ...] = windows.split(size)
    return batches


def tokenise_public_text(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_tokens: int,
    max_positions: int,
    length: int = window_length,
) -> torch.Tensor:
    """Return token windows ``(num_windows, window)`` from the beginning of the texts, about ``num_tokens`` in all.

    Raises:
        DataError: If the texts hold less than one window.
    """
    window = min(length, max_positions, num_tokens)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text.strip() + "\n\n", verbose=False)["input_ids"]
        if len(ids) >= num_tokens:
            break
    num_windows = min(len(ids), num_tokens) // window
    if num_windows == 0:
        raise DataError(
            f"The public text has {len(ids)} tokens, less than one window of {window}. Give more text with "
            "offsite.public-text, or set offsite.gaps=empty and offsite.keep=uniform, which need none."
        )
    return torch.tensor(ids[: num_windows * window]).view(num_windows, window)


@contextmanager
def record_blocks(blocks: Sequence[nn.Module], record: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Note in ``record`` each block's input and output hidden states, by its index, whenever the model runs."""
    handles = []
    for index, block in enumerate(blocks):

        def note(_: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            record[index] = (before, output[0] if isinstance(output, tuple) else output)

        handles.append(block.register_forward_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def block_states(
    model: PreTrainedModel, windows: torch.Tensor
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield, batch by batch, each block's input and output hidden states ``(batch, tokens, hidden)``."""
    blocks = list(get_blocks(model, find_architecture(model.config)))
    record: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with record_blocks(blocks, record):
        for batch in split_windows(windows):
            run_model(model, batch)
            yield record
            record.clear()


def block_influence(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Return each block's influence: 1 - mean cosine of its input and output (ShortGPT, equation 1)."""
    sums: dict[int, float] = {}
    num_tokens = 0
    for states in block_states(model, windows):
        num_tokens += states[0][0].shape[:2].numel()
        for index, (before, after) in states.items():
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] = sums.get(index, 0.0) + float((1.0 - cosine).cpu().double().sum())
    return [sums[index] / num_tokens for index in sorted(sums)]
