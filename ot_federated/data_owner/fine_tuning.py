"""Tune the adapter on local data: one round at one data owner."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ot_federated.bundle import read_manifest, read_tensors
from ot_federated.config import RunConfig
from ot_federated.data_owner.per_example_gradients import float32_engines
from ot_federated.emulated_model import load_emulated_model
from ot_federated.processors import load_bundle_processor
from ot_federated.tasks.base import AnyExample, Task
from ot_federated.tasks.registry import build_configured_task
from ot_federated.training import OptimizerSettings, StepReport, TrainingResult, draw_batches, plan_round, train
from ot_federated.tuning import Tuning, prepare_tuning, start_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ot_federated.processors import Processor

full_tuning = Tuning()


@dataclass(frozen=True)
class TunableModel:
    """The emulated model, and what trains in it.

    Attributes:
        model: The emulated model.
        parameters: What trains, by role name.
        reference: Start values by the same names, in the bundle's type: what the first update is a difference to.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    reference: dict[str, torch.Tensor]


@lru_cache(maxsize=1)
def load_model_once(
    directory: str, device: str, tuning: Tuning = full_tuning, dtype: torch.dtype | None = None
) -> TunableModel:
    """Load the emulated model once a process: in a simulation the next client of the process finds it ready.

    Only the values of what trains differ between clients, and each round begins by writing all of them.

    Args:
        directory: The bundle.
        device: Where it computes.
        tuning: What trains.
        dtype: The type it computes in, where that is not the bundle's. The reference stays in the bundle's.
    """
    manifest = read_manifest(Path(directory))
    model = load_emulated_model(Path(directory), manifest, device=device)
    parameters = prepare_tuning(model, manifest, tuning)
    if dtype is not None:
        model.to(dtype)  # type: ignore[arg-type]  # transformers annotates .to loosely
    base = read_tensors(Path(directory) / "adapter.safetensors")
    if tuning.method == "full":
        # As they are in the file, which is memory-mapped: fp32 copies would take as much as the trained weights do.
        return TunableModel(model, parameters, {name: base[name] for name in parameters})
    return TunableModel(model, parameters, start_state(parameters, base, tuning))


def load_private_model(directory: str, device: str, tuning: Tuning, *, engine: str) -> TunableModel:
    """Load the emulated model for private training, once a process: in fp32 for the engines that need it.

    ``hooks`` and ``ghost`` bound an example's influence in fp32 alone (:mod:`~.per_example_gradients`). Where the
    bundle is in bfloat16 or float16 the fp32 model takes twice its bytes, and they are this process's own: they are
    no longer the file's, which processes share. ``loop`` keeps the bundle's type.
    """
    # As positions and no more than is needed: the cache tells calls apart by their form.
    if engine in float32_engines and not is_float32(directory):
        return load_model_once(directory, device, tuning, torch.float32)
    return load_model_once(directory, device, tuning)


def is_float32(directory: str) -> bool:
    """Say whether a bundle's model computes in fp32 as it is."""
    return read_manifest(Path(directory)).dtype == "float32"


@lru_cache(maxsize=1)
def load_processor_once(directory: str) -> Processor:
    """Load the bundle's tokenizer or image processor once a process."""
    return load_bundle_processor(Path(directory))


def build_bundle_task(config: RunConfig, directory: Path) -> Task:
    """Build the run's task with the bundle's processor and classes."""
    classes = read_manifest(directory).classes
    return build_configured_task(config, load_processor_once(str(directory)), classes=classes)


def fine_tune(
    directory: Path,
    adapter: Mapping[str, torch.Tensor],
    examples: Sequence[AnyExample],
    *,
    device: str,
    tuning: Tuning,
    client: str,
    server_round: int,
    num_rounds: int,
    batch_size: int,
    local_epochs: int,
    max_steps: int,
    optimizer: OptimizerSettings,
    max_grad_norm: float,
    seed: int,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainingResult:
    """Tune the adapter for one round, starting from ``adapter``, and return its new weights in fp32.

    The order of the data and the learning rate depend on the seed, the client's name and the round alone, so a
    round that is repeated gives the same weights.

    Args:
        directory: The bundle.
        adapter: fp32 weights that the server sent, by role name.
        examples: The local examples.
        device: Where to train.
        tuning: What trains.
        client: This client's name.
        server_round: The round, from 1.
        num_rounds: Rounds of the run: the learning-rate schedule spans them all.
        batch_size: Examples a step.
        local_epochs: Passes over the examples.
        max_steps: Most steps in this round; 0 for no limit.
        optimizer: How the weights move.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
        seed: The run's seed.
        on_step: Called after every step.
    """
    tunable = load_model_once(str(directory), device, tuning)
    client_seed = zlib.crc32(client.encode())
    # Dropout draws from torch's own generator; a repeated round must draw the same.
    torch.manual_seed(int(np.random.SeedSequence([seed, client_seed, server_round]).generate_state(1)[0]))
    num_steps = plan_round(
        num_examples=len(examples), batch_size=batch_size, local_epochs=local_epochs, max_steps=max_steps
    )
    first_step = (server_round - 1) * num_steps
    return train(
        tunable.model,
        tunable.parameters,
        examples,
        start=adapter,
        batches=draw_batches(
            [example.length for example in examples],
            batch_size=batch_size,
            first_step=first_step,
            num_steps=num_steps,
            seed=[seed, client_seed],
        ),
        first_step=first_step,
        num_steps=num_steps,
        total_steps=num_rounds * num_steps,
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        on_step=on_step,
    )
