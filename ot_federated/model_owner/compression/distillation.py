"""Train the emulator on public text to do what the middle does.

Source: Xiao, Lin, Han, "Offsite-Tuning", 2023, https://arxiv.org/abs/2302.04870, section 3.3 and its public code: the
loss is cross-entropy plus 30 times the mean of ((t - s) / rms(t))^2, t and s the hidden states behind the middle and
behind the emulator. Deviations: the same term also stands at every kept block (as FedPFT aligns layers), against the
output of the last full block that it stands for; rms is a token's own, because the first token's states are a
thousand times larger than others in some models; optionally the divergence of the next-token distributions is added.
Models that read images or end in a classification head have the hidden states' term alone, as the paper's do.

The state that gives the best plug-in on held-out public data is the one that is released, the undistilled one
included: see :mod:`ot_federated.model_owner.compression.plug_in_validation`. With a classification head this takes
labelled public examples and a head that is not zero; else the error of the middle's output on held-out data decides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.bundle import Manifest, StackEntry, read_tensors
from ot_federated.cache import atomic_directory
from ot_federated.emulated_model import build_emulated_model, model_names
from ot_federated.model_owner.compression.calibration import record_blocks
from ot_federated.model_owner.compression.plug_in_validation import (
    cut_windows,
    measure_output_error,
    validate_by_plug_in,
)
from ot_federated.model_owner.compression.public_losses import uses_labels
from ot_federated.model_owner.splitting import draft_manifest, split_tensors
from ot_federated.packed_tensors import pack, unpack
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.language_model import hidden_states, target_log_probs
from ot_federated.tasks.losses import predicts_tokens, run_model
from ot_federated.training import MasterWeights, OptimizerSettings, draw_batches, scale_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

num_validations = 3
Record = dict[int, tuple[torch.Tensor, torch.Tensor]]
# Examples to tune on, and others to score on.
Labelled = tuple[Sequence[AnyExample], Sequence[AnyExample]]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How an emulator is distilled.

    Attributes:
        num_steps: Steps in all; 0 for none.
        batch_size: Windows a step.
        learning_rate: Peak learning rate of AdamW, on fp32 copies.
        trains: ``bridges`` alone, or ``all``: kept blocks too.
        hidden_weight: Weight of the hidden states' term.
        cross_entropy_weight: Weight of the cross-entropy.
        kl_weight: Weight of KL(full || emulated) of the next token.
        validation_steps: Steps of adapter tuning before the plug-in is scored, where there is a loss to tune by; 0 for
            no validation: the last state.
        checkpoint_steps: The state is kept every so many steps.
        seed: Of the order of the text.
    """

    num_steps: int
    batch_size: int = 4
    learning_rate: float = 2e-4
    trains: str = "all"
    hidden_weight: float = 30.0
    cross_entropy_weight: float = 1.0
    kl_weight: float = 0.0
    validation_steps: int = 16
    checkpoint_steps: int = 50
    seed: int = 0


def distil(
    model: PreTrainedModel,
    stack: Sequence[StackEntry],
    tensors: Mapping[str, torch.Tensor],
    windows: torch.Tensor,
    held_out: torch.Tensor,
    *,
    settings: Distillation,
    transport: str = "as-is",
    checkpoints: Path,
    say: Callable[[str], None],
    labelled: Labelled = ((), ()),
) -> dict[str, torch.Tensor]:
    """Return the emulator's tensors after distillation, in the model's type.

    Clients get these packed: what does not train stands here as they get it, and what trains is scored so. A run that
    was stopped goes on where its last checkpoint is, with the same result on a CPU.

    Args:
        model: The full model, which teaches.
        stack: The layout.
        tensors: The emulator's tensors by role name, as they start.
        windows: Token windows of public text to train on, ``(num_windows, window)``, or images.
        held_out: Others, to score on.
        settings: How.
        transport: How the emulator will be packed, see :mod:`ot_federated.packed_tensors`.
        checkpoints: A directory of this very distillation's own; it is gone at the end.
        say: Told what is going on.
        labelled: Labelled public examples to tune the adapter on, and others to score the plug-in on, for a model with
            a classification head.
    """
    manifest = draft_manifest(model, stack, compression="")
    parts = split_tensors(model, stack, bridges={})
    received = partial(as_received, transport=transport, dtype=next(model.parameters()).dtype)
    emulated = build_emulated_model(manifest, {**parts["adapter"], **parts["frozen"], **received(tensors)})
    emulated = emulated.to(model.device)  # type: ignore[arg-type]  # transformers annotates .to loosely
    parameters = emulator_parameters(emulated, manifest, trains=settings.trains)
    if not parameters:
        say("Nothing to distil: the emulator has no such parts")
        return dict(tensors)
    masters = MasterWeights(
        emulated,
        parameters,
        start={name: tensors[name] for name in parameters},
        optimizer=OptimizerSettings(
            learning_rate=settings.learning_rate, lr_schedule="cosine", warmup_fraction=0.1, weight_decay=0.0
        ),
        max_grad_norm=1.0,
    )
    first, best = _read_checkpoint(checkpoints, masters)
    if first:
        say(f"Distillation goes on at step {first} of {settings.num_steps}")
    marks = {round(part * settings.num_steps / num_validations) for part in range(num_validations + 1)}
    targets = target_blocks(stack, num_blocks=manifest.num_blocks)
    examples = _choose_examples(model, windows, held_out, labelled)
    judge = _Judge(model, emulated, manifest, held_out, examples, targets, settings)
    batches = draw_batches(
        [1] * len(windows),
        batch_size=min(settings.batch_size, len(windows)),
        first_step=first,
        num_steps=settings.num_steps - first,
        seed=[settings.seed],
    )
    with tqdm(total=settings.num_steps, initial=first, desc="distillation", unit=" steps", disable=None) as bar:
        for step in range(first, settings.num_steps + 1):
            if settings.validation_steps and step in marks and (step > first or step == 0):
                with _shown(parameters, received(masters.weights())):
                    best = _keep_better(best, masters, judge, step=step, say=say)
            if step == settings.num_steps:
                break
            if step > first and step % settings.checkpoint_steps == 0:
                _write_checkpoint(checkpoints, masters, step=step, best=best)
            loss = distillation_loss(model, emulated, windows[next(batches)], targets=targets, settings=settings)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            factor = scale_learning_rate(step, num_steps=settings.num_steps, schedule="cosine", warmup_fraction=0.1)
            masters.step(gradients, rate_factor=factor)
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
            bar.update()
    result = dict(tensors)
    weights = best.weights if best.weights else masters.weights()
    result.update({name: weights[name].to(tensors[name].dtype) for name in parameters})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def as_received(tensors: Mapping[str, torch.Tensor], *, transport: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an emulator's tensors as clients get them: packed and unpacked."""
    in_type = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return unpack(*pack(in_type, transport=transport), dtype=dtype)


@contextmanager
def _shown(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let parameters have other values for a while."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter.data)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def emulator_parameters(emulated: nn.Module, manifest: Manifest, *, trains: str) -> dict[str, nn.Parameter]:
    """Return what trains, by role name, set to have gradients."""
    roles = ("bridge",) if trains == "bridges" else ("emulator", "bridge")
    prefixes = model_names(manifest, find_architecture(emulated.config))
    named = dict(emulated.named_parameters())
    found = {
        role + name.removeprefix(prefix): parameter
        for role, prefix in prefixes.items()
        if role.partition(".")[0] in roles
        for name, parameter in named.items()
        if name.startswith(prefix)
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def target_blocks(stack: Sequence[StackEntry], *, num_blocks: int) -> dict[int, int]:
    """Return, for each position of the emulator, the full model's block whose output it should give.

    It stands for all blocks up to the next position's first one, whether something stands in for them or nothing.
    """
    top = num_blocks - sum(entry.role == "top" for entry in stack)
    starts = [entry.first_block for entry in stack] + [top]
    return {
        position: (min(starts[position + 1], top)) - 1
        for position, entry in enumerate(stack)
        if entry.role not in ("bottom", "top")
    }


def distillation_loss(
    model: PreTrainedModel,
    emulated: PreTrainedModel,
    windows: torch.Tensor,
    *,
    targets: Mapping[int, int],
    settings: Distillation,
) -> torch.Tensor:
    """Return the loss of the emulated model against the full one on windows ``(batch, window)``, or images."""
    ours: Record = {}
    theirs: Record = {}
    speaks = predicts_tokens(model, windows)
    with torch.no_grad(), record_blocks(_blocks(model), ours):
        teacher = _read_states(model, windows, speaks=speaks)
    with torch.enable_grad(), record_blocks(_blocks(emulated), theirs):
        student = _read_states(emulated, windows, speaks=speaks)
        loss = torch.zeros((), device=model.device)
        for position, block in targets.items():
            t, s = ours[block][1].float(), theirs[position][1].float()
            error = (t - s).square().mean(-1) / t.square().mean(-1).clamp(min=1e-12)
            loss = loss + settings.hidden_weight * error.mean() / len(targets)
        if speaks and settings.cross_entropy_weight:
            ids = windows.to(model.device)
            log_probs = target_log_probs(emulated, student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss - settings.cross_entropy_weight * log_probs.mean()
        if speaks and settings.kl_weight:
            loss = loss + settings.kl_weight * _divergence(model, teacher, student)
    return loss


def _read_states(model: PreTrainedModel, windows: torch.Tensor, *, speaks: bool) -> torch.Tensor:
    """Run a model and return what its head reads, ``(batch, window, hidden)``; nothing where no token is predicted."""
    if not speaks:
        run_model(model, windows)
        return torch.empty(0)
    ids = windows.to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    output = hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    states: torch.Tensor = output.last_hidden_state
    return states


def _divergence(model: PreTrainedModel, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of the next token's distribution; both models have the same head."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    logs = []
    for states in (teacher, student):
        logits = model.get_output_embeddings()(states).float().flatten(0, 1)
        logs.append(functional.log_softmax(torch.tanh(logits / cap) * cap if cap else logits, dim=-1))
    return functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(get_blocks(model, find_architecture(model.config)))


@dataclass(frozen=True)
class _Best:
    """The state that was judged best so far: its loss or error, its step, its fp32 weights (none before the first)."""

    loss: float
    step: int
    weights: dict[str, torch.Tensor]


def _choose_examples(
    model: PreTrainedModel, windows: torch.Tensor, held_out: torch.Tensor, labelled: Labelled
) -> Labelled | None:
    """Return the examples to validate the plug-in on; None where no loss says anything."""
    if predicts_tokens(model, windows):
        return cut_windows(windows), cut_windows(held_out)
    return labelled if labelled[1] and uses_labels(model, labelled[0]) else None


@dataclass(frozen=True)
class _Judge:
    """What decides between states of the emulator."""

    model: PreTrainedModel
    emulated: PreTrainedModel
    manifest: Manifest
    held_out: torch.Tensor
    examples: Labelled | None
    targets: Mapping[int, int]
    settings: Distillation

    def __call__(self) -> tuple[float, str]:
        """Return how bad the present state is, and what to say of it; its parameters have gradients afterwards."""
        if self.examples is None:
            position, block = max(self.targets.items())
            error = measure_output_error(self.model, self.emulated, self.held_out, block=block, position=position)
            return error, f"on public data kept apart the middle's output has a relative error of {error:.4f}"
        trained = [parameter for parameter in self.emulated.parameters() if parameter.requires_grad]
        losses = validate_by_plug_in(
            self.model,
            self.emulated,
            self.manifest,
            tune_on=self.examples[0],
            score_on=self.examples[1],
            num_steps=self.settings.validation_steps,
            seed=self.settings.seed,
        )
        for parameter in trained:
            parameter.requires_grad_(True)
        return losses.plug_in, (
            f"on public data the plug-in has a loss of {losses.plug_in:.4f}, the tuned emulator {losses.emulator:.4f}"
        )


def _keep_better(best: _Best, masters: MasterWeights, judge: _Judge, *, step: int, say: Callable[[str], None]) -> _Best:
    loss, words = judge()
    say(f"Distilled {step} of {judge.settings.num_steps} steps: {words}")
    # The undistilled state stands even where it is bad beyond numbers: what follows must beat it.
    if loss < best.loss or not best.weights:
        return _Best(loss, step, {name: weight.clone() for name, weight in masters.weights().items()})
    return best


def _write_checkpoint(directory: Path, masters: MasterWeights, *, step: int, best: _Best) -> None:
    with atomic_directory(directory, replace=True) as partial:
        save_file({name: t.contiguous().cpu() for name, t in masters.state().items()}, partial / "state.safetensors")
        save_file(best.weights, partial / "best.safetensors")
        document = {"step": step, "best_loss": best.loss if best.weights else None, "best_step": best.step}
        (partial / "state.json").write_text(json.dumps(document), encoding="utf-8")


def _read_checkpoint(directory: Path, masters: MasterWeights) -> tuple[int, _Best]:
    """Return the step to go on with, and the best state so far; 0 and none without a checkpoint."""
    if not (directory / "state.json").is_file():
        return 0, _Best(float("inf"), 0, {})
    document = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    masters.restore(read_tensors(directory / "state.safetensors"), num_steps=document["step"])
    best = {name: tensor.clone() for name, tensor in read_tensors(directory / "best.safetensors").items()}
    loss = float("inf") if document["best_loss"] is None else float(document["best_loss"])
    return int(document["step"]), _Best(loss, int(document["best_step"]), best)
