"""Prepare: full model -> kept blocks -> bridges -> bundle, cached by the digest of all that made it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import ot_federated
from ot_federated.architectures import check_split, find_architecture, get_blocks
from ot_federated.bundle import Manifest, read_manifest, read_tensors, verify_files
from ot_federated.cache import cache_root
from ot_federated.errors import BundleError
from ot_federated.model_owner.compression.calibration import fit_bridges, tokenise_public_text
from ot_federated.model_owner.compression.choice import choose_blocks, text_free
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.model_owner.splitting import plan_stack, write_bundle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ot_federated.processors import Processor


def prepare_bundle(
    model: PreTrainedModel,
    tokenizer: Processor,
    *,
    bottom: int,
    emulator: int,
    top: int,
    keep: str,
    gaps: str,
    read_public_text: Callable[[], Sequence[str] | torch.Tensor],
    calibration_tokens: int,
    ridge: float,
    recipe: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[Path, Manifest]:
    """Return the bundle's directory and manifest, from the cache where the same recipe was followed before.

    Args:
        model: The full model.
        tokenizer: Its tokenizer or image processor, which goes into the bundle.
        bottom: Blocks of the bottom adapter.
        emulator: Middle blocks that stay.
        top: Blocks of the top adapter.
        keep: Which middle blocks stay, see :func:`choose_blocks`.
        gaps: ``empty`` or ``bridge``.
        read_public_text: Gives the public texts, or images ``(num_images, channels, height, width)``; called only when
            they are needed.
        calibration_tokens: Tokens of public text to use.
        ridge: Penalty of the bridges, relative.
        recipe: All that determines the bundle (sources, digests, settings), as JSON values.
        say: Told what is going on, for a person who waits.

    Raises:
        ConfigError: If the split does not fit the model's depth.
    """
    blocks = get_blocks(model, find_architecture(model.config))
    check_split(num_blocks=len(blocks), bottom=bottom, emulator=emulator, top=top)
    directory = cache_root() / "bundles" / recipe_digest(recipe)
    if directory.is_dir():
        try:
            manifest = read_manifest(directory)
            verify_files(directory, manifest)
            check_model(directory, manifest, model)
        except BundleError as error:
            say(f"The cached bundle is made anew: {error}")
            shutil.rmtree(directory)
        else:
            say(f"Bundle {manifest.digest[:12]} from the cache")
            return directory, manifest
    windows = None
    if keep not in text_free or gaps == "bridge":
        windows = prepare_windows(model, tokenizer, read_public_text(), num_tokens=calibration_tokens)
    kept = choose_blocks(
        model,
        windows,
        keep=keep,
        first=bottom,
        last=len(blocks) - top - 1,
        num_kept=emulator,
        ridge=ridge,
        say=say,
    )
    stack = plan_stack(num_blocks=len(blocks), bottom=bottom, top=top, kept=kept, bridged=gaps == "bridge")
    runs = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    bridges: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if runs and windows is not None:
        say(f"Fitting {len(runs)} bridges on {len(windows)} windows of public text, or images")
        bridges = fit_bridges(model, windows, runs, ridge=ridge)
    manifest = write_bundle(
        directory,
        model=model,
        tokenizer=tokenizer,
        stack=stack,
        bridges=bridges,
        compression=f"{keep}+{gaps}",
    )
    say(f"Bundle {manifest.digest[:12]}: {manifest.num_bytes / 1e6:.0f} MB, middle blocks kept {kept}")
    return directory, manifest


def prepare_windows(
    model: PreTrainedModel, processor: Processor, public: Sequence[str] | torch.Tensor, *, num_tokens: int
) -> torch.Tensor:
    """Return public texts as token windows ``(num_windows, window)``; images are the model's inputs as they are."""
    if isinstance(public, torch.Tensor):
        return public
    tokenizer = cast("PreTrainedTokenizerBase", processor)
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 10**9)
    return tokenise_public_text(tokenizer, public, num_tokens=num_tokens, max_positions=positions)


def check_model(directory: Path, manifest: Manifest, model: PreTrainedModel) -> None:
    """Check that a bundle's adapter is this very model's: a hub id may mean other weights than last time.

    Raises:
        BundleError: If a tensor differs.
    """
    parameters = dict(model.named_parameters())
    names = full_model_names(model, manifest.stack)
    for role, tensor in read_tensors(directory / "adapter.safetensors").items():
        parameter = parameters[names[role]]
        if tensor.shape != parameter.shape or not torch.equal(tensor, parameter.detach().to("cpu", tensor.dtype)):
            raise BundleError(f"{role} is not the model's: the model has changed since the bundle was made.")


def recipe_digest(recipe: dict[str, Any]) -> str:
    """Return the SHA-256 of a recipe; this project's version is part of it, because code makes the bundle too."""
    text = json.dumps({**recipe, "version": ot_federated.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
