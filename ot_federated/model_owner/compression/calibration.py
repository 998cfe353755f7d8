"""Statistics of the full model's hidden states on public text or images.

Public inputs are token windows ``(num_windows, window)``, or images ``(num_images, channels, height, width)``.

Both passes stream: memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
num_windows_per_batch = 2


def tokenise_public_text(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, num_tokens: int, max_positions: int
) -> torch.Tensor:
    """Return token windows ``(num_windows, window)`` from the beginning of the texts, about ``num_tokens`` in all.

    Raises:
        DataError: If the texts hold less than one window.
    """
    window = min(window_length, max_positions, num_tokens)
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
        for batch in windows.split(num_windows_per_batch):
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


@dataclass
class _Moments:
    """Sums over tokens from which a ridge regression with intercept follows, in fp64 on the CPU."""

    num_tokens: int
    sum_x: torch.Tensor
    sum_y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor


def fit_bridges(
    model: PreTrainedModel, windows: torch.Tensor, gaps: Sequence[tuple[int, int]], *, ridge: float
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Fit a linear bridge over each run of dropped blocks, in closed form.

    Over blocks i..j the regression is ``h_out(j) - h_in(i) ~ W h_in(i) + b`` with the penalty
    ``ridge * mean(diag(X'X)) * |W|^2`` on centred inputs; the intercept is free.

    Args:
        model: The full model.
        windows: Token windows of public text, or public images.
        gaps: First and last block of each run.
        ridge: Penalty, relative to the mean diagonal of X'X.

    Returns:
        Weight ``(hidden, hidden)`` and bias ``(hidden,)`` by the gap's number, in the model's type.
    """
    dtype = next(model.parameters()).dtype
    solved = {}
    for number, moments in _sum_moments(model, windows, gaps).items():
        weight, bias, _ = _solve(moments, ridge=ridge)
        solved[number] = weight.to(dtype).to(model.device), bias.to(dtype).to(model.device)
    return solved


def fit_low_rank_bridges(
    model: PreTrainedModel, windows: torch.Tensor, gaps: Sequence[tuple[int, int]], *, ridge: float, rank: int
) -> dict[int, dict[str, torch.Tensor]]:
    """Fit bridges whose matrix has a given rank, in closed form (reduced-rank regression).

    Alan Izenman, "Reduced-rank regression for the multivariate linear model", Journal of Multivariate Analysis 1975:
    of all matrices of that rank the ridge solution, projected on the principal directions of what it predicts, has
    the least penalised error.

    Returns:
        ``up`` ``(hidden, rank)``, ``down`` ``(rank, hidden)`` and ``bias`` ``(hidden,)`` by the gap's number.
    """
    dtype = next(model.parameters()).dtype
    solved = {}
    for number, moments in _sum_moments(model, windows, gaps).items():
        weight, _, penalised = _solve(moments, ridge=ridge)
        up = torch.linalg.eigh(weight @ penalised @ weight.T).eigenvectors[:, -rank:]
        down = up.T @ weight
        bias = (moments.sum_y - up @ (down @ moments.sum_x)) / moments.num_tokens
        parts = {"up": up, "down": down, "bias": bias}
        solved[number] = {name: tensor.to(dtype).to(model.device) for name, tensor in parts.items()}
    return solved


def _sum_moments(model: PreTrainedModel, windows: torch.Tensor, gaps: Sequence[tuple[int, int]]) -> dict[int, _Moments]:
    moments: dict[int, _Moments] = {}
    for states in block_states(model, windows):
        for number, (first, last) in enumerate(gaps):
            x = states[first][0].flatten(0, 1).float()
            y = states[last][1].flatten(0, 1).float() - x
            new = _Moments(len(x), *(part.cpu().double() for part in (x.sum(0), y.sum(0), x.T @ x, x.T @ y)))
            old = moments.get(number)
            if old is None:
                moments[number] = new
                continue
            old.num_tokens += new.num_tokens
            for name in ("sum_x", "sum_y", "xx", "xy"):
                getattr(old, name).add_(getattr(new, name))
    return moments


def _solve(moments: _Moments, *, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weight, bias, and X'X with the penalty, in fp64 on the CPU."""
    mean_x, mean_y = moments.sum_x / moments.num_tokens, moments.sum_y / moments.num_tokens
    xx = moments.xx - moments.num_tokens * torch.outer(mean_x, mean_x)
    xy = moments.xy - moments.num_tokens * torch.outer(mean_x, mean_y)
    # A little is always added, so that fewer tokens than dimensions still have one solution.
    penalty = max(ridge, 1e-6) * xx.diagonal().mean()
    penalised = xx + penalty * torch.eye(len(xx), dtype=xx.dtype)
    weight = torch.linalg.solve(penalised, xy).T
    return weight, mean_y - weight @ mean_x, penalised
