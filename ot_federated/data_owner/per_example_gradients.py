"""Sums of clipped per-example gradients: the one place where a private example meets the model.

Abadi et al., "Deep learning with differential privacy", CCS 2016, https://arxiv.org/abs/1607.00133, algorithm 1:
each example's gradient is scaled to norm C at most, then they are summed. Three engines compute the sum.

``loop``: one backward pass an example. Right for every model; the reference for the others. An example's gradient
    depends on nothing but that example, down to the last bit.
``hooks``: Opacus writes one gradient an example while the batch is propagated back (Yousefpour et al., "Opacus",
    2021, https://arxiv.org/abs/2109.12298). The hooks sit on the model itself, which keeps its names.
``ghost``: Opacus takes only the norms (Li et al., "Large language models can be strong differentially private
    learners", ICLR 2022, https://arxiv.org/abs/2110.05679) and a second pass goes back through the scaled losses.

In ``hooks`` and ``ghost`` the padding and the batch's size, which the other examples decide, choose the order in
which an example's numbers are added up. An example that leaves changes the composition of all micro-batches after it,
and with them every gradient there: in float32 by about 1e-6 of itself, in bfloat16 by a percent or more, so that the
sum would move by more than C. ``hooks`` and ``ghost`` therefore compute in float32, whatever the bundle's type
(``fine_tuning.load_private_model``), and refuse a model in another. ``loop`` has no such limit: it keeps the bundle's
type, and half the memory where that is bfloat16.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from ot_federated.errors import ConfigError, OtFederatedError, nearest_match
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import example_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

engine_names = ("hooks", "ghost", "loop")
# Those in which an example's gradient depends on the rest of its batch, by rounding.
float32_engines = ("hooks", "ghost")
clipping_names = ("flat", "automatic")
# Bu et al., "Automatic clipping", NeurIPS 2023, https://arxiv.org/abs/2206.07136: their gamma.
automatic_stability = 0.01


class PrivacyError(OtFederatedError):
    """The client refuses to train, because it could not keep its privacy guarantee."""


@final
class ClippedGradients:
    """Sums clipped per-example gradients of a model. Made by ``open_clipped_gradients``.

    Args:
        targets: What trains.
        add_clipped: The engine: adds the clipped gradients of a micro-batch to fp32 sums.
        micro_batch_size: Most examples that pass through the model at once.
    """

    def __init__(self, targets: Sequence[nn.Parameter], add_clipped: AddClipped, *, micro_batch_size: int) -> None:
        self._targets = targets
        self._add_clipped = add_clipped
        self._micro_batch_size = micro_batch_size

    def sum(
        self, examples: Sequence[AnyExample], *, max_grad_norm: float, clipping: str = "flat"
    ) -> list[torch.Tensor]:
        """Return the sum over examples of their clipped gradients, in fp32, in the order of the parameters.

        Args:
            examples: Any number; of none the sum is zero.
            max_grad_norm: C; ``inf`` for no clipping.
            clipping: ``flat`` or ``automatic``, see ``clip_factors``.
        """
        sums = [torch.zeros_like(target, dtype=torch.float32) for target in self._targets]
        # A sum has no order: examples of similar length share a micro-batch, so little is padded.
        ordered = sorted(examples, key=lambda example: example.length)

        def clip(norms: torch.Tensor) -> torch.Tensor:
            return clip_factors(norms, max_grad_norm=max_grad_norm, clipping=clipping)

        for start in range(0, len(ordered), self._micro_batch_size):
            self._add_clipped(ordered[start : start + self._micro_batch_size], sums, clip)
        return sums


Clip = Callable[[torch.Tensor], torch.Tensor]
AddClipped = Callable[[Sequence[AnyExample], list[torch.Tensor], Clip], None]


def clip_factors(norms: torch.Tensor, *, max_grad_norm: float, clipping: str) -> torch.Tensor:
    """Return what to multiply gradients of these norms with, so that none is longer than C = ``max_grad_norm``.

    ``flat`` is ``min(1, C / norm)``. ``automatic`` is ``C / (norm + 0.01)`` (AUTO-S): every gradient gets nearly
    the length C, so under AdamW, which divides by the gradient's size, C no longer matters. An example whose
    gradient is not finite counts nothing: it would show in every weight.

    Raises:
        ConfigError: If ``clipping`` is neither.
    """
    if clipping == "flat":
        factors = (max_grad_norm / norms).clamp(max=1.0)
    elif clipping == "automatic":
        factors = max_grad_norm / (norms + automatic_stability)
    else:
        raise ConfigError(
            f"Clipping {clipping!r} is not known{nearest_match(clipping, clipping_names)}. Known: "
            f"{', '.join(clipping_names)}."
        )
    return torch.where(norms.isfinite(), factors, 0.0)


@contextmanager
def open_clipped_gradients(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], *, engine: str, micro_batch_size: int
) -> Iterator[ClippedGradients]:
    """Make the model give per-example gradients of ``parameters``; undo every change to it in the end.

    Dropout is off inside: engines that batch examples differently would otherwise draw different masks, and the
    self-check could not compare them. All is frozen afterwards, as before training.

    Raises:
        ConfigError: If the engine is not known.
        PrivacyError: If the engine cannot work with this model.
    """
    if engine not in engine_names:
        raise ConfigError(
            f"privacy.engine={engine!r} is not known{nearest_match(engine, engine_names)}. Known: "
            f"{', '.join(engine_names)}."
        )
    model.requires_grad_(False).eval()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        if engine in float32_engines:
            _check_float32(model, parameters, engine=engine)
        with _engines[engine](model, parameters) as add_clipped:
            yield ClippedGradients(list(parameters.values()), add_clipped, micro_batch_size=micro_batch_size)
    finally:
        for parameter in parameters.values():
            parameter.grad = None
        model.requires_grad_(False).eval()


def _squared_norms(gradients: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each row, ``(rows,)``, in fp32.

    Not ``torch.linalg.vector_norm``: on the CPU it adds in sequence and comes out 5e-4 too small over 12 million
    numbers, so that clipped gradients would be that much too long. ``sum`` adds pairwise and is right to 3e-8.
    """
    return gradients.flatten(1).float().square().sum(dim=1)


@contextmanager
def _loop(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[AddClipped]:
    targets = list(parameters.values())

    def add_clipped(batch: Sequence[AnyExample], sums: list[torch.Tensor], clip: Clip) -> None:
        for example in batch:
            loss = example_losses(model, [example])[0].sum()
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, targets, allow_unused=True)
            found = [(total, g) for total, g in zip(sums, gradients, strict=True) if g is not None]
            norm = torch.stack([_squared_norms(g[None]) for _, g in found]).sum().sqrt()
            factor = float(clip(norm))
            if factor:
                for total, gradient in found:
                    total.add_(gradient, alpha=factor)

    yield add_clipped


@contextmanager
def _hooks(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[AddClipped]:
    from opacus.grad_sample import GradSampleHooks

    def add_clipped(batch: Sequence[AnyExample], sums: list[torch.Tensor], clip: Clip) -> None:
        example_losses(model, batch)[0].sum().backward()
        found = []
        for total, (name, parameter) in zip(sums, parameters.items(), strict=True):
            gradients: Any = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus adds it
            _check_rows(model, name, parameter, gradients, num_examples=len(batch), engine="hooks")
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
            if gradients is not None:
                found.append((total, gradients.flatten(1)))
        factors = clip(torch.stack([_squared_norms(g) for _, g in found]).sum(dim=0).sqrt())
        for total, gradients in found:
            # A row that is not finite must not reach the product: 0 * inf is not 0.
            gradients[factors == 0] = 0
            total.view(-1).add_(torch.mv(gradients.T, factors))

    with _attached(model, GradSampleHooks, engine="hooks"):
        yield add_clipped


@contextmanager
def _ghost(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[AddClipped]:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping

    def add_clipped(batch: Sequence[AnyExample], sums: list[torch.Tensor], clip: Clip) -> None:
        losses = example_losses(model, batch)[0]
        losses.sum().backward(retain_graph=True)
        norms = []
        for name, parameter in parameters.items():
            found = vars(parameter).pop("_norm_sample", None)
            _check_rows(model, name, parameter, found, num_examples=len(batch), engine="ghost")
            parameter.grad = None
            if found is not None:
                norms.append(found)
        factors = clip(torch.stack(norms).norm(dim=0))
        if bool((factors == 0).any()):
            # A loss times 0 still sends back what is not finite: only leaving the example out stops it.
            kept = [example for example, factor in zip(batch, factors.tolist(), strict=True) if factor]
            if kept:
                add_clipped(kept, sums, clip)
            return
        hooks.disable_hooks()
        try:
            (losses * factors).sum().backward()
        finally:
            hooks.enable_hooks()
        for total, parameter in zip(sums, parameters.values(), strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
            parameter.grad = None

    with _attached(model, GradSampleHooksFastGradientClipping, engine="ghost") as hooks:
        yield add_clipped


_engines = {"hooks": _hooks, "ghost": _ghost, "loop": _loop}


def _check_float32(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], *, engine: str) -> None:
    # The frozen ones too: they round what the trained ones' gradients are made of.
    for parameter in (*parameters.values(), *model.parameters()):
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise PrivacyError(
                f"The client refuses to train: privacy.engine={engine} computes each example's gradient together with "
                f"others, and in {str(parameter.dtype).removeprefix('torch.')} these change it by more than the bound "
                "on one example allows. Load the model in float32, or set privacy.engine=loop."
            )


def _check_rows(
    model: PreTrainedModel,
    name: str,
    parameter: nn.Parameter,
    rows: Any,
    *,
    num_examples: int,
    engine: str,
) -> None:
    # The counts stay out of the message: a batch's size is private.
    if rows is None and parameter.grad is None:
        return
    if rows is None or isinstance(rows, list) or len(rows) != num_examples:
        raise PrivacyError(
            f"The client refuses to train: privacy.engine={engine} finds no gradient for each example of {name} in "
            f"this {model.config.model_type} model, because the model does not pass it through a layer of its own "
            "with the examples in the first dimension. Set privacy.engine=loop."
        )


@contextmanager
def _attached(model: PreTrainedModel, hooks_class: Callable[..., Any], *, engine: str) -> Iterator[Any]:
    """Attach Opacus' hooks to the layers that train, and leave no trace afterwards."""
    layers = [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    for layer in layers:
        # Opacus skips layers that are not training; only these are switched, so no dropout comes back.
        layer.training = True
    # True of the first block, whose input is frozen, and harmless: its weights' gradients come from its outputs.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    hooks = None
    with _opt_without_reshape(model):
        try:
            try:
                hooks = hooks_class(model, loss_reduction="sum")
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise PrivacyError(
                    f"The client refuses to train: privacy.engine={engine} does not support this "
                    f"{model.config.model_type} model ({error}). Set privacy.engine=loop."
                ) from error
            yield hooks
        finally:
            if hooks is not None:
                hooks.cleanup()
            for layer in layers:
                layer.training = False
                for attribute in ("activations", "max_batch_len"):
                    vars(layer).pop(attribute, None)


@contextmanager
def _opt_without_reshape(model: nn.Module) -> Iterator[None]:
    """Let OPT's decoder layers keep ``(batch, seq, hidden)``, for as long as the context lasts.

    transformers folds batch and sequence into one dimension before the feed-forward part, where Opacus would take
    every token for an example. The layers work on the last dimension alone, so without it the result is the same.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "OPTDecoderLayer"]
    for layer in layers:
        layer.forward = types.MethodType(_opt_decoder_layer, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _opt_decoder_layer(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **arguments: Any
) -> torch.Tensor:
    residual = hidden_states
    if self.do_layer_norm_before:
        hidden_states = self.self_attn_layer_norm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **arguments)
    hidden_states = residual + nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
    if not self.do_layer_norm_before:
        hidden_states = self.self_attn_layer_norm(hidden_states)
    residual = hidden_states
    if self.do_layer_norm_before:
        hidden_states = self.final_layer_norm(hidden_states)
    hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))
    hidden_states = residual + nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
    return hidden_states if self.do_layer_norm_before else self.final_layer_norm(hidden_states)
