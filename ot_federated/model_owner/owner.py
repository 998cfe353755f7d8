"""What the model owner has at hand during a run, and how it is made ready."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ot_federated.architectures import find_architecture
from ot_federated.bundle import Manifest, read_tensors
from ot_federated.cache import file_sha256
from ot_federated.config import RunConfig
from ot_federated.devices import choose_device, choose_dtype
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import ConfigError
from ot_federated.label_words import parse_label_words
from ot_federated.logs import logger
from ot_federated.model_owner.compression.distillation import Distillation
from ot_federated.model_owner.evaluation import choose_rows
from ot_federated.model_owner.full_model import load_full_model, model_fingerprint
from ot_federated.model_owner.harness import check_harness, parse_tasks
from ot_federated.model_owner.head_start import fit_head, has_untrained_head
from ot_federated.model_owner.plug_in import plugged_in
from ot_federated.model_owner.preparation import prepare_bundle, prepare_windows
from ot_federated.model_owner.public_data import find_labelled_public, read_all_labelled, read_public
from ot_federated.model_owner.realignment import Realignment, distil_bridges, refit_bridges
from ot_federated.processors import set_image_size
from ot_federated.reporting.run_directory import RunDirectory
from ot_federated.sources import is_local_source, list_files, load_table
from ot_federated.tasks.base import Row, Score, Task
from ot_federated.tasks.labels import list_classes
from ot_federated.tasks.registry import build_configured_task
from ot_federated.tasks.vocabulary import check_vocabulary
from ot_federated.tuning import (
    Tuning,
    build_tuning,
    check_family,
    full_places,
    is_mergeable,
    merge,
    prepare_tuning,
    tuned_unmerged,
    uses_conv1d,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ot_federated.processors import Processor

say = logger.info


@dataclass
class Owner:
    """What the model owner has at hand during a run."""

    config: RunConfig
    run: RunDirectory
    model: PreTrainedModel
    processor: Processor
    task: Task
    device: str
    dtype: torch.dtype
    bundle: Path
    manifest: Manifest
    validation: Sequence[Row]
    test: Sequence[Row]
    rows: dict[str, Score | None] = field(default_factory=dict)
    harness: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    realignment: Realignment | None = None

    @property
    def tuning(self) -> Tuning:
        """What trains."""
        return build_tuning(self.config)

    def whole_adapter(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the adapter's whole weights, in fp32, for a state that can be merged."""
        base = read_tensors(self.bundle / "adapter.safetensors")
        return merge(state, base, self.tuning, conv1d=uses_conv1d(self.model))

    @contextmanager
    def plugged_in(self, state: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
        """Plug a state into the full model, merged where it can be, for the length of a ``with`` block."""
        stack, tuning = self.manifest.stack, self.tuning
        if is_mergeable(tuning):
            with plugged_in(self.model, self.whole_adapter(state), stack, placement=tuning.placement) as model:
                yield model
        else:
            with tuned_unmerged(full_places(self.model, stack, tuning), state, tuning) as model:
                yield model

    def load_tuned_emulator(self, state: Mapping[str, torch.Tensor], *, server_round: int) -> PreTrainedModel:
        """Return the emulated model with a round's state in it, unmerged as that round's clients trained it."""
        bundle, manifest = self.bundle, self.manifest
        if self.realignment:
            bundle, manifest = self.realignment.trained_with(server_round)
        model = load_emulated_model(bundle, manifest, device=self.device)
        for name, parameter in prepare_tuning(model, self.manifest, self.tuning).items():
            parameter.data = state[name].to(parameter, copy=True)
        return model


def prepare(config: RunConfig, run: RunDirectory) -> Owner:
    """Load data and model, and make the bundle; what is cheap and may be wrong comes first."""
    columns = config.columns
    evaluation, is_text = config.evaluation, config.task.name == "causal-lm"
    validation = load_table(config.data.validation, split="validation", columns=list(columns.values()))
    test = load_table(config.data.test, split="test", columns=list(columns.values()))
    check_train_data(config)
    if config.evaluation.harness_tasks:
        check_harness(parse_tasks(config.evaluation.harness_tasks), task_files=config.evaluation.harness_task_files)
    parts = load_parts(config)
    validation, test = (
        choose_rows(rows, max_examples=limit, seed=config.seed, contiguous=is_text)
        for rows, limit in ((validation, evaluation.max_validation_examples), (test, evaluation.max_examples))
    )
    check_vocabulary(
        parts.task.encode(validation),
        parts.model,
        what="data.validation",
        unknown=getattr(parts.processor, "unk_token_id", None),
    )
    bundle, manifest = make_bundle(config, parts)
    return Owner(
        config=config,
        run=run,
        model=parts.model,
        processor=parts.processor,
        task=parts.task,
        device=parts.device,
        dtype=parts.dtype,
        bundle=bundle,
        manifest=manifest,
        validation=validation,
        test=test,
    )


def build_realignment(owner: Owner, *, last_round: int) -> Realignment:
    """Return the versions of the bundle of a run that goes on after ``last_round``."""
    config = owner.config

    def refit(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        parts = Parts(model, owner.processor, owner.task, owner.device, owner.dtype)
        num_tokens = config.offsite.calibration_tokens
        public, offsite = read_public(config, parts), config.offsite
        windows = prepare_windows(
            model, owner.processor, public, num_tokens=num_tokens, length=offsite.calibration_window
        )
        bridges = refit_bridges(
            model,
            owner.bundle,
            owner.manifest,
            windows,
            ridge=offsite.bridge_ridge,
            in_order=offsite.bridge_fit == "in-order",
        )
        if config.offsite.realign_steps:
            bridges = distil_bridges(
                model,
                owner.bundle,
                owner.manifest,
                bridges,
                windows,
                settings=describe_distillation(config, num_steps=config.offsite.realign_steps),
                checkpoints=directory / "distillation",
            )
        return bridges

    directory = owner.run.path / "realigned"
    # What is left of a distillation that was stopped may belong to another round.
    shutil.rmtree(directory / "distillation", ignore_errors=True)
    return Realignment(
        directory,
        base=(owner.bundle, owner.manifest),
        every_rounds=config.offsite.realign_every_rounds,
        refit=refit,
        plugged_in=owner.plugged_in,
        last_round=last_round,
    )


@dataclass(frozen=True)
class Parts:
    """The full model, its head fitted, and what goes with it."""

    model: PreTrainedModel
    processor: Processor
    task: Task
    device: str
    dtype: torch.dtype


def load_parts(config: RunConfig) -> Parts:
    """Load the full model and build its task."""
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device=device)
    say("loading %s in %s on %s", config.model.source, str(dtype).removeprefix("torch."), device)
    classes = choose_classes(config)
    model, processor = load_full_model(
        config.model.source,
        revision=config.model.revision,
        dtype=dtype,
        device=device,
        reads=config.reads,
        classes=classes,
    )
    check_positions(model.config, max_length=config.data.max_length)
    check_family(model, build_tuning(config))
    if config.reads == "image" and config.data.image_size:
        architecture = find_architecture(model.config)
        set_image_size(processor, config.data.image_size, architecture=architecture, config=model.config)
    task = build_configured_task(config, processor, classes=classes)
    if config.task.head_start == "probe" and has_untrained_head(model):
        say("fitting the head to the labels of %s", config.offsite.public_text)
        fit_head(model, read_all_labelled(config, task), classes=classes)
    return Parts(model, processor, task, device, dtype)


def choose_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the classes of the model's head: those of ``task.label-words``, else those of the validation data."""
    if not config.has_head:
        return ()
    if config.task.label_words:
        return tuple(parse_label_words(config.task.label_words))
    column = config.data.label_column
    table = load_table(config.data.validation, split="validation", columns=[column])
    return list_classes(table[column], column=column)


def make_bundle(config: RunConfig, parts: Parts) -> tuple[Path, Manifest]:
    """Return the directory and the manifest of the bundle that a run sends."""
    offsite = config.offsite
    return prepare_bundle(
        parts.model,
        parts.processor,
        bottom=offsite.bottom_blocks,
        emulator=offsite.emulator_blocks,
        top=offsite.top_blocks,
        spread=offsite.spread_blocks,
        keep=offsite.keep,
        gaps=offsite.gaps,
        read_public_text=lambda: read_public(config, parts),
        read_labelled=lambda: find_labelled_public(config, parts),
        calibration_tokens=offsite.calibration_tokens,
        calibration_window=offsite.calibration_window,
        ridge=offsite.bridge_ridge,
        bridge_fit=offsite.bridge_fit,
        bridge_rank=offsite.bridge_rank,
        bridge_width=offsite.bridge_width,
        shrink=offsite.shrink,
        shrink_keep=offsite.shrink_keep,
        transport=offsite.transport,
        distillation=describe_distillation(config, num_steps=offsite.distillation_steps)
        if offsite.distillation_steps
        else None,
        distillation_tokens=offsite.distillation_tokens,
        recipe=bundle_recipe(config, parts.dtype) | {"commit": getattr(parts.model.config, "_commit_hash", None)},
        say=say,
    )


def describe_distillation(config: RunConfig, *, num_steps: int) -> Distillation:
    """Return how the emulator is distilled in so many steps."""
    offsite = config.offsite
    return Distillation(
        num_steps=num_steps,
        batch_size=offsite.distillation_batch_size,
        learning_rate=offsite.distillation_learning_rate,
        trains=offsite.distillation_trains,
        hidden_weight=offsite.distillation_hidden_weight,
        cross_entropy_weight=offsite.distillation_cross_entropy_weight,
        kl_weight=offsite.distillation_kl_weight,
        validation_steps=offsite.distillation_validation_steps,
        seed=config.seed,
    )


def check_train_data(config: RunConfig) -> None:
    """Look at the training data before minutes of work, where this process can see it: in a simulation.

    Raises:
        SourceError: If it cannot be found.
        DataError: If it lacks columns.
    """
    if not os.environ.get("OT_FEDERATED_ENGINE"):
        return
    data = config.data
    columns = list(config.columns.values())
    if data.partitioner in ("dirichlet", "column") and data.partition_column:
        columns.append(data.partition_column)
    source = str(list_files(data.train)[0]) if data.partitioner == "files" else data.train
    load_table(source, split="train", columns=list(dict.fromkeys(columns)))


def check_positions(model_config: Any, *, max_length: int) -> None:
    """Check that examples fit into the model's positions.

    Raises:
        ConfigError: If ``data.max-length`` is beyond them: learned positions would be read out of range.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ConfigError(f"data.max-length={max_length} is beyond the model's {positions} positions: lower it.")


def bundle_recipe(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return all that determines the bundle."""
    source = config.offsite.public_text
    data = {"columns": config.columns, "max_length": config.data.max_length, "image_size": config.data.image_size}
    if config.has_head:
        data["classes"] = choose_classes(config)
    offsite = asdict(config.offsite)
    for later in ("realign_every_rounds", "realign_steps"):  # make later versions, not the bundle
        del offsite[later]
    return {
        "model": model_fingerprint(config.model.source, revision=config.model.revision),
        "dtype": str(dtype),
        "offsite": offsite,
        # The order of the text in distillation is drawn from it, and with a head the public examples are.
        "seed": config.seed if config.offsite.distillation_steps or config.has_head else None,
        "task": {**asdict(config.task), **data},
        "public_text": [file_sha256(path) for path in list_files(source)] if is_local_source(source) else source,
    }
