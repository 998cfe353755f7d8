"""Keep the blocks without which the adapter's gradient would change most.

Source of the idea: Kai Yao et al., "GradOT: Training-free Gradient-preserving Offsite-tuning for Large Language
Models", ACL 2025, https://arxiv.org/abs/2507.04455: compress so that the adapter's gradient under the emulator stays
close to the one under the full model. How it is done here is our own.

A run of dropped blocks i..j changes two things. Going up, the top adapter sees other hidden states: the linear bridge
of the run errs by e = h_out(j) - bridge(h_in(i)). Going down, the bottom adapter gets another gradient: the bridge's
transpose carries g_out(j) to a vector that is not g_in(i). With the hidden states and gradients of one pass over
public text, both errors are known for every run, each with the ridge regression that would stand there. They are taken
as independent between runs, and the set of blocks with the smallest sum of errors is found exactly, by dynamic
programming.

The gradient is that of the task's loss, or of what :mod:`ot_federated.model_owner.compression.public_losses` takes in
its place: a model with a classification head needs no labels.

The pass costs one forward and backward pass over about four tokens a dimension (with a head over at least
``num_head_examples`` examples, each of which gives one gradient and not one a token); runs are at most ``longest_run``
blocks long (longer only where few blocks are kept), so that the cost grows linearly with depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ot_federated.architectures import block_config, find_architecture, get_blocks
from ot_federated.model_owner.compression.calibration import record_blocks
from ot_federated.model_owner.compression.public_losses import PublicLoss, public_losses
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import predicts_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

longest_run = 8
tokens_per_dimension = 4
num_head_examples = 32


def keep_gradient_preserving(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    first: int,
    last: int,
    num_kept: int,
    ridge: float,
    labelled: Sequence[AnyExample] = (),
) -> list[int]:
    """Return ``num_kept`` blocks of ``[first, last]`` that best preserve the adapter's gradient, ascending.

    Args:
        model: The full model.
        windows: Token windows of public text, ``(num_windows, window)``, or public images.
        first: First middle block.
        last: Last middle block.
        num_kept: How many to keep.
        ridge: Penalty of the bridges that are tried, relative to the mean diagonal of X'X.
        labelled: Labelled public examples, for a model with a classification head.
    """
    num_middle = last - first + 1
    if num_kept in (0, num_middle):
        return list(range(first, last + 1)) if num_kept else []
    longest = max(longest_run, 2 * math.ceil((num_middle - num_kept) / (num_kept + 1)))
    at_least = 1 if predicts_tokens(model, windows) else num_head_examples
    losses = public_losses(model, windows, labelled)
    states, gradients = states_and_gradients(model, losses, first=first, last=last, at_least=at_least)
    errors = run_errors(states, gradients, longest=longest, ridge=ridge)
    return [first + index for index in choose_by_run_errors(errors, num_middle=num_middle, num_kept=num_kept)]


def states_and_gradients(
    model: PreTrainedModel, losses: Iterable[PublicLoss], *, first: int, last: int, at_least: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return hidden states before block ``first`` and behind each of ``[first, last]``, and the gradients there.

    Both are lists of ``(num_tokens, hidden)`` in fp32 on the CPU, of the tokens that the gradient reaches.

    Args:
        model: The full model.
        losses: The losses of public examples; those behind the wanted number of tokens are not computed.
        first: First block.
        last: Last block.
        at_least: Examples to take however many tokens they have.
    """
    architecture = find_architecture(model.config)
    blocks = list(get_blocks(model, architecture))
    wanted = tokens_per_dimension * int(block_config(model.config, architecture).hidden_size)
    num_tokens = 0
    states: list[list[torch.Tensor]] = [[] for _ in range(first, last + 2)]
    gradients: list[list[torch.Tensor]] = [[] for _ in range(first, last + 2)]

    def begin(_: Any, args: Any, kwargs: Any) -> Any:
        # The graph begins here: nothing below the middle needs a gradient.
        if args:
            return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}

    handle = blocks[first].register_forward_pre_hook(begin, with_kwargs=True)
    record: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        with torch.enable_grad(), record_blocks(blocks[first : last + 1], record):
            for number, example in enumerate(losses):
                if number >= at_least and num_tokens >= wanted:
                    break
                loss = example.compute()
                tensors = [record[0][0], *(record[index][1] for index in range(last - first + 1))]
                found = torch.autograd.grad(loss, tensors)
                length = tensors[0].shape[1]
                reached = slice(length - example.num_idle)
                for index, (tensor, gradient) in enumerate(zip(tensors, found, strict=True)):
                    states[index].append(tensor[0, reached].detach().float().cpu())
                    gradients[index].append(gradient[0, reached].float().cpu())
                num_tokens += length
                record.clear()
    finally:
        handle.remove()
    return [torch.cat(parts) for parts in states], [torch.cat(parts) for parts in gradients]


def run_errors(
    states: list[torch.Tensor], gradients: list[torch.Tensor], *, longest: int, ridge: float
) -> dict[tuple[int, int], float]:
    """Return what it costs to drop each run, by its first and last block counted from the first middle block.

    The cost is the mean of two parts in [0, 1] or a little above: the squared error of the hidden states behind the
    run relative to their size, per token, and one minus the cosine of the gradient before it.
    """
    errors = {}
    num_middle = len(states) - 1
    for start in range(num_middle):
        x = states[start]
        # As bridges are fitted; by the size of the input, so that runs from the same block share the factor.
        weight = 1.0 / x.square().mean(1).clamp(min=1e-12)
        weight = weight / weight.sum()
        centred = x - weight @ x
        xx = ((weight[:, None] * centred).T @ centred).double()
        penalty = max(ridge, 1e-6) * xx.diagonal().mean()
        factor = torch.linalg.cholesky(xx + penalty * torch.eye(len(xx), dtype=xx.dtype))
        for stop in range(start, min(num_middle, start + longest)):
            y = states[stop + 1] - x
            centred_y = y - weight @ y
            xy = ((weight[:, None] * centred).T @ centred_y).double()
            bridge = torch.cholesky_solve(xy, factor).float()  # (hidden, hidden): y ~ centred @ bridge + mean
            residual = centred_y - centred @ bridge
            up = (residual.square().sum(1) / states[stop + 1].square().sum(1).clamp(min=1e-12)).clamp(max=1.0).mean()
            carried = gradients[stop + 1] + gradients[stop + 1] @ bridge.T
            down = 1.0 - functional.cosine_similarity(carried.flatten(), gradients[start].flatten(), dim=0)
            errors[start, stop] = 0.5 * (float(up) + float(down))
    return errors


def choose_by_run_errors(errors: Mapping[tuple[int, int], float], *, num_middle: int, num_kept: int) -> list[int]:
    """Return the ``num_kept`` of ``num_middle`` blocks whose dropped runs cost least in sum.

    Args:
        errors: Cost of a run by its first and last block; runs that are not there are not allowed.
        num_middle: Number of blocks.
        num_kept: How many to keep.
    """
    # best[position][kept]: blocks below ``position`` are decided, and the one just below was kept (or there is none).
    best: list[dict[int, tuple[float, list[int]]]] = [{} for _ in range(num_middle + 1)]
    best[0][0] = (0.0, [])
    final: tuple[float, list[int]] = (math.inf, [])
    for position in range(num_middle + 1):
        for count, (cost, kept) in best[position].items():
            for stop in range(position - 1, num_middle):
                # Blocks position..stop are dropped (none where stop is position - 1), and the next one is kept.
                run = 0.0 if stop < position else errors.get((position, stop), math.inf)
                total = cost + run
                if stop == num_middle - 1:
                    if count == num_kept and total < final[0]:
                        final = (total, kept)
                elif count < num_kept and total < best[stop + 2].get(count + 1, (math.inf, []))[0]:
                    best[stop + 2][count + 1] = (total, [*kept, stop + 1])
    return final[1]
