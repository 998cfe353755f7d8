"""Linear bridges over runs of dropped blocks, fitted in closed form on public text or images.

A bridge over blocks i..j is a ridge regression of ``h_out(j) - h`` on ``h``. Two things make the error of the middle's
output smaller than that of the plain regression on the full model's own states, which grows with every bridge; whether
the plug-in gains by it differs from one choice of blocks to another:

- **In order.** ``h`` is what the emulator itself has there, with the earlier bridges and kept blocks in it, and the
  target is the full model's state. So each bridge also mends what went wrong below it, as Elias Frantar et al., "GPTQ",
  2022, https://arxiv.org/abs/2210.17323 quantise a block on what the quantised blocks below it give.
- **Weighted.** A token counts by 1 / mean(h_out^2): relative errors are what later blocks see, since they normalise
  their input. Some models' first token has states a thousand times larger than others (Mingjie Sun et al., "Massive
  Activations in Large Language Models", 2024, https://arxiv.org/abs/2402.17762); unweighted it is all that is fitted,
  and the penalty is then far too large for every other token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.model_owner.compression.calibration import split_windows
from ot_federated.tasks.losses import run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Solution = dict[str, torch.Tensor]


@dataclass
class _Moments:
    """Weighted sums over tokens from which a ridge regression with intercept follows, in fp64 on the CPU."""

    weight: torch.Tensor
    sum_x: torch.Tensor
    sum_y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor

    def add(self, other: _Moments) -> None:
        for name in ("weight", "sum_x", "sum_y", "xx", "xy"):
            getattr(self, name).add_(getattr(other, name))


def fit_bridges(
    model: PreTrainedModel,
    windows: torch.Tensor,
    gaps: Sequence[tuple[int, int]],
    *,
    ridge: float,
    in_order: bool = True,
    kept: Mapping[int, nn.Module] | None = None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Fit a linear bridge over each run of dropped blocks, in closed form.

    The penalty is ``ridge * mean(diag(X'X)) * |W|^2`` on centred inputs; the intercept is free. In memory are the
    hidden states of all windows twice: the full model's and the emulator's.

    Args:
        model: The full model.
        windows: Token windows of public text, or public images.
        gaps: First and last block of each run, ascending.
        ridge: Penalty, relative to the mean diagonal of X'X.
        in_order: Whether a bridge is fitted to the states that the emulator has before it, or to the full model's own.
        kept: What runs in the place of kept blocks, where the emulator has not the full model's own; by their numbers
            in the full model.

    Returns:
        Weight ``(hidden, hidden)`` and bias ``(hidden,)`` by the gap's number, in the model's type.
    """

    def solve(moments: _Moments) -> Solution:
        weight, bias, _ = _solve(moments, ridge=ridge)
        return {"weight": weight, "bias": bias}

    fitted = _fit_in_order(model, windows, gaps, solve=solve, in_order=in_order, kept=kept or {})
    return {number: (solution["weight"], solution["bias"]) for number, solution in fitted.items()}


def fit_low_rank_bridges(
    model: PreTrainedModel,
    windows: torch.Tensor,
    gaps: Sequence[tuple[int, int]],
    *,
    ridge: float,
    rank: int,
    in_order: bool = True,
    kept: Mapping[int, nn.Module] | None = None,
) -> dict[int, Solution]:
    """Fit bridges whose matrix has a given rank, in closed form (reduced-rank regression).

    Alan Izenman, "Reduced-rank regression for the multivariate linear model", Journal of Multivariate Analysis 1975:
    of all matrices of that rank the ridge solution, projected on the principal directions of what it predicts, has
    the least penalised error.

    Returns:
        ``up`` ``(hidden, rank)``, ``down`` ``(rank, hidden)`` and ``bias`` ``(hidden,)`` by the gap's number.
    """

    def solve(moments: _Moments) -> Solution:
        weight, _, penalised = _solve(moments, ridge=ridge)
        up = torch.linalg.eigh(weight @ penalised @ weight.T).eigenvectors[:, -rank:]
        down = up.T @ weight
        bias = (moments.sum_y - up @ (down @ moments.sum_x)) / moments.weight
        return {"up": up, "down": down, "bias": bias}

    return _fit_in_order(model, windows, gaps, solve=solve, in_order=in_order, kept=kept or {})


@torch.no_grad()
def _fit_in_order(
    model: PreTrainedModel,
    windows: torch.Tensor,
    gaps: Sequence[tuple[int, int]],
    *,
    solve: Callable[[_Moments], Solution],
    in_order: bool,
    kept: Mapping[int, nn.Module],
) -> dict[int, Solution]:
    """Walk up the stack with two streams of hidden states, the full model's and the emulator's, gap by gap."""
    if not gaps:
        return {}
    dtype, blocks = next(model.parameters()).dtype, list(get_blocks(model, find_architecture(model.config)))
    full, calls = _states_before(model, windows, gaps[0][0])
    emulated, position, fitted = list(full), gaps[0][0], dict[int, Solution]()
    for number, (first, last) in enumerate(gaps):
        for index in range(position, first):
            if in_order:
                emulated = [calls[index].run(kept.get(index, blocks[index]), states) for states in emulated]
            full = [calls[index].run(blocks[index], states) for states in full]
        befores = emulated if in_order else full
        for index in range(first, last + 1):
            full = [calls[index].run(blocks[index], states) for states in full]
        moments: _Moments | None = None
        for before, after in zip(befores, full, strict=True):
            batch = _sum_moments(before, after)
            if moments is None:
                moments = batch
            else:
                moments.add(batch)
        assert moments is not None
        found = {name: tensor.to(dtype).to(model.device) for name, tensor in solve(moments).items()}
        if in_order:
            emulated = [_apply(found, states) for states in emulated]
        fitted[number], position = found, last + 1
    return fitted


@dataclass
class _Call:
    """How the model calls a block beside the hidden states: masks, positions and the like, by the batch's size."""

    by_size: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        arguments, keywords = self.by_size[len(states)]
        output = block(states, *arguments, **keywords)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _ReachedError(Exception):
    """The model has come to the block whose input is wanted."""


def _states_before(
    model: PreTrainedModel, windows: torch.Tensor, first: int
) -> tuple[list[torch.Tensor], dict[int, _Call]]:
    """Return the input of block ``first``, batch by batch, and how every block is called.

    The model is run to its end once for each size of a batch, and to that block for the others.
    """
    blocks = list(get_blocks(model, find_architecture(model.config)))
    states: list[torch.Tensor] = []
    calls = {index: _Call({}) for index in range(len(blocks))}
    with _watch(blocks, first, states, calls):
        for batch in split_windows(windows):
            try:
                run_model(model, batch)
            except _ReachedError:
                continue
    return states, calls


@contextmanager
def _watch(
    blocks: Sequence[nn.Module], first: int, states: list[torch.Tensor], calls: Mapping[int, _Call]
) -> Iterator[None]:
    handles = []
    for index, block in enumerate(blocks):

        def note(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == first:
                states.append(hidden)
                if len(hidden) in calls[len(blocks) - 1].by_size:
                    raise _ReachedError
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls[index].by_size[len(hidden)] = (tuple(args[1:]), others)

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_moments(before: torch.Tensor, after: torch.Tensor) -> _Moments:
    x, target = before.flatten(0, 1).float(), after.flatten(0, 1).float()
    y, weight = target - x, 1.0 / target.square().mean(1).clamp(min=1e-12)
    weighted = weight[:, None] * x
    sums = (weight.sum(), weighted.sum(0), (weight[:, None] * y).sum(0), weighted.T @ x, weighted.T @ y)
    return _Moments(*(part.cpu().double() for part in sums))


def _solve(moments: _Moments, *, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weight, bias, and X'X with the penalty, in fp64 on the CPU."""
    mean_x, mean_y = moments.sum_x / moments.weight, moments.sum_y / moments.weight
    xx = moments.xx - moments.weight * torch.outer(mean_x, mean_x)
    xy = moments.xy - moments.weight * torch.outer(mean_x, mean_y)
    # A little is always added, so that fewer tokens than dimensions still have one solution.
    penalty = max(ridge, 1e-6) * xx.diagonal().mean()
    penalised = xx + penalty * torch.eye(len(xx), dtype=xx.dtype)
    weight = torch.linalg.solve(penalised, xy).T
    return weight, mean_y - weight @ mean_x, penalised


def _apply(found: Solution, states: torch.Tensor) -> torch.Tensor:
    """Return what a bridge makes of hidden states."""
    if "weight" in found:
        return states + functional.linear(states, found["weight"], found["bias"])
    return states + functional.linear(functional.linear(states, found["down"]), found["up"], found["bias"])
