"""Prepare: full model -> kept blocks -> bridges -> bundle, cached by the digest of all that made it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

import ot_federated
from ot_federated.architectures import check_split, find_architecture, get_blocks
from ot_federated.bundle import Manifest, read_manifest, read_tensors, verify_files
from ot_federated.cache import cache_root, file_lock
from ot_federated.errors import BundleError, DataError
from ot_federated.model_owner.compression.calibration import tokenise_public_text, window_length
from ot_federated.model_owner.compression.choice import choose_blocks, text_free
from ot_federated.model_owner.compression.distillation import Distillation, as_received, distil
from ot_federated.model_owner.compression.gaps import bridged_ways, build_bridges
from ot_federated.model_owner.compression.keeping import spread_evenly
from ot_federated.model_owner.compression.shrinking import shrink_blocks
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.model_owner.splitting import (
    check_emulator_bytes,
    draft_manifest,
    plan_stack,
    split_tensors,
    write_bundle,
)
from ot_federated.packed_tensors import pack
from ot_federated.tasks.base import AnyExample
from ot_federated.tasks.losses import num_public_tokens
from ot_federated.tasks.vocabulary import check_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ot_federated.processors import Processor

Inputs = TypeVar("Inputs", torch.Tensor, Sequence[AnyExample], tuple[AnyExample, ...])


def prepare_bundle(
    model: PreTrainedModel,
    tokenizer: Processor,
    *,
    bottom: int,
    emulator: int,
    top: int,
    spread: int = 0,
    keep: str,
    gaps: str,
    read_public_text: Callable[[], Sequence[str] | torch.Tensor],
    read_labelled: Callable[[], Sequence[AnyExample]] = lambda: (),
    calibration_tokens: int,
    calibration_window: int = window_length,
    ridge: float,
    bridge_fit: str = "in-order",
    bridge_rank: int = 0,
    bridge_width: int = 64,
    shrink: str = "none",
    shrink_keep: float = 0.5,
    transport: str = "as-is",
    distillation: Distillation | None = None,
    distillation_tokens: int = 0,
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
        spread: Blocks of the adapter in the middle.
        keep: Which middle blocks stay, see :func:`choose_blocks`.
        gaps: What stands in for dropped blocks, see :mod:`ot_federated.model_owner.compression.gaps`.
        read_public_text: Gives the public texts, or images ``(num_images, channels, height, width)``; called only when
            they are needed.
        read_labelled: Gives labelled public examples, of images these very ones in their order; none where there are
            none. Called only when a classification head's loss is of use.
        calibration_tokens: Tokens of public text to use.
        calibration_window: Tokens that are read together.
        ridge: Penalty of the bridges, relative.
        bridge_fit: What a bridge is fitted to, ``in-order`` or ``apart``; see :func:`fit_bridges`.
        bridge_rank: Rank of the bridges; 0 for whole matrices.
        bridge_width: Neurons of a trained bridge's bottleneck.
        shrink: How kept blocks are made smaller, see :func:`shrink_blocks`.
        shrink_keep: Share of them that stays.
        transport: How the emulator's matrices are stored, see :mod:`ot_federated.packed_tensors`.
        distillation: How the emulator is distilled; None for not at all.
        distillation_tokens: At most so many tokens of public text to distil on.
        recipe: All that determines the bundle (sources, digests, settings), as JSON values.
        say: Told what is going on, for a person who waits.

    Raises:
        ConfigError: If the split does not fit the model's depth, or the emulator is larger than the middle.
        DataError: If the public text is too short, or not in the model's vocabulary.
    """
    blocks = get_blocks(model, find_architecture(model.config))
    check_split(num_blocks=len(blocks), bottom=bottom, emulator=emulator, top=top, spread=spread)
    directory = cache_root() / "bundles" / recipe_digest(recipe)
    # Two runs that start together would build it twice, on the same checkpoints.
    lock = cache_root() / "locks" / f"bundle-{directory.name}"
    with file_lock(lock, on_wait=lambda: say("Another run is making the same bundle: waiting for it")):
        if prepared := _read_prepared(directory, model, say=say):
            return directory, prepared
        windows, public, labelled = None, None, tuple[AnyExample, ...]()
        if keep not in text_free or gaps in bridged_ways or distillation:
            texts = read_public_text()
            windows = prepare_windows(model, tokenizer, texts, num_tokens=calibration_tokens, length=calibration_window)
            if distillation:
                public = prepare_windows(model, tokenizer, texts, num_tokens=distillation_tokens)
            if keep == "gradient" or distillation:
                labelled = tuple(read_labelled())
        last = len(blocks) - top - 1
        inside = spread_evenly(first=bottom, last=last, num_blocks=spread)
        kept = choose_blocks(
            model,
            windows,
            keep=keep,
            first=bottom,
            last=last,
            num_kept=emulator,
            spread=inside,
            ridge=ridge,
            labelled=labelled,
            say=say,
        )
        stack = plan_stack(
            num_blocks=len(blocks),
            bottom=bottom,
            top=top,
            kept=kept,
            bridged=gaps in bridged_ways,
            shared=gaps == "share",
            spread=inside,
        )
        tensors = split_tensors(model, stack, bridges={})["emulator"]
        stack, tensors = shrink_blocks(model, stack, tensors, shrink=shrink, keep=shrink_keep)
        if windows is not None and any(entry.role == "bridge" for entry in stack):
            say(f"Fitting bridges on {len(windows)} windows of public text, or images")
            width = bridge_width if gaps == "trained-bridge" else 0
            received = as_received(tensors, transport=transport, dtype=next(model.parameters()).dtype)
            stack, bridges = build_bridges(
                model,
                windows,
                stack,
                received,
                ridge=ridge,
                in_order=bridge_fit == "in-order",
                rank=bridge_rank,
                width=width,
            )
            tensors |= bridges
        if distillation and public is not None:
            # Before the long work; write_bundle checks all.
            middle_bytes = draft_manifest(model, stack, compression="").middle_bytes
            check_emulator_bytes(pack(tensors, transport=transport)[0], middle_bytes=middle_bytes)
            learnt, held_out = hold_out(public)
            tensors = distil(
                model,
                stack,
                tensors,
                learnt,
                held_out,
                settings=distillation,
                transport=transport,
                checkpoints=cache_root() / "distillation" / directory.name,
                say=say,
                labelled=hold_out_labelled(labelled, public),
            )
        words = [shrink, transport, f"distilled-{distillation.num_steps}" if distillation else "none"]
        manifest = write_bundle(
            directory,
            model=model,
            tokenizer=tokenizer,
            stack=stack,
            bridges={},
            compression="+".join([keep, gaps, *(word for word in words if word not in ("none", "as-is"))]),
            emulator=tensors,
            transport=transport,
        )
        say(f"Bundle {manifest.digest[:12]}: {manifest.num_bytes / 1e6:.0f} MB, middle blocks kept {kept}")
        return directory, manifest


def _read_prepared(directory: Path, model: PreTrainedModel, *, say: Callable[[str], None]) -> Manifest | None:
    """Return the manifest of a bundle that is there and whole, or None; one that is damaged is removed."""
    if not directory.is_dir():
        return None
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest)
        check_model(directory, manifest, model)
    except BundleError as error:
        say(f"The cached bundle is made anew: {error}")
        shutil.rmtree(directory)
        return None
    say(f"Bundle {manifest.digest[:12]} from the cache")
    return manifest


def prepare_windows(
    model: PreTrainedModel,
    processor: Processor,
    public: Sequence[str] | torch.Tensor,
    *,
    num_tokens: int,
    length: int = window_length,
) -> torch.Tensor:
    """Return public texts as token windows ``(num_windows, length)``, or of images the first of about ``num_tokens``.

    Raises:
        DataError: If there is too little text, or it has tokens that are not in the model's vocabulary.
    """
    if isinstance(public, torch.Tensor):
        return public[: max(1, num_tokens // num_public_tokens(model, public[:1]))]
    tokenizer = cast("PreTrainedTokenizerBase", processor)
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 10**9)
    windows = tokenise_public_text(tokenizer, public, num_tokens=num_tokens, max_positions=positions, length=length)
    check_token(int(windows.max()), model, what="the public text")
    return windows


def hold_out(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Divide public inputs: all but the last eighth to learn from, the last eighth to score on.

    Of that at most 16 windows of text, or 128 images or labelled examples.

    Raises:
        DataError: If there are fewer than two.
    """
    if len(inputs) < 2:
        raise DataError(
            "The public data is one window of text, one example or one image, too little to distil on and to keep some "
            "apart. Give more with offsite.public-text, or set offsite.distillation-steps=0."
        )
    is_text = isinstance(inputs, torch.Tensor) and not inputs.is_floating_point()
    num_held_out = max(1, min(len(inputs) // 8, 16 if is_text else 128))
    return inputs[:-num_held_out], inputs[-num_held_out:]


def hold_out_labelled(
    labelled: tuple[AnyExample, ...], public: torch.Tensor
) -> tuple[tuple[AnyExample, ...], tuple[AnyExample, ...]]:
    """Divide labelled examples as :func:`hold_out` divides the inputs that are distilled on.

    Args:
        labelled: Examples, of images those of ``public`` in their order.
        public: What is distilled on and what is held out, together.
    """
    if public.is_floating_point():
        labelled = labelled[: len(public)]
    return hold_out(labelled) if len(labelled) > 1 else ((), ())


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
