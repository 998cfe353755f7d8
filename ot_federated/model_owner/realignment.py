"""Realign: every few rounds the emulator is fitted to the full model with the current adapter in it.

The bottom adapter's tuning changes what the middle gets, and a bridge that was fitted to the untouched model no longer
stands for the blocks it replaced. The linear map has a closed form, so the owner fits it anew on public text, with the
adapter plugged in, and clients are sent the new bridges alone. The idea is that of FedBiOT (Feijie Wu et al., "FedBiOT:
LLM Local Fine-tuning in Federated Learning without Full Model", KDD 2024, https://arxiv.org/abs/2406.17706) and FedPFT
(Zhaopeng Peng et al., IJCAI 2024, https://arxiv.org/abs/2404.11536), which distil instead; that can follow the fit.

A realigned emulator is a new version of the bundle, named by its own digest: the base's files, and one more with the
tensors that changed. Versions are kept in the run directory::

    realigned/round-0004/   what the rounds after round 4 train with
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ot_federated.bundle import Manifest, describe_files, manifest_name, read_manifest, realignment_file, verify_files
from ot_federated.cache import atomic_directory, link_or_copy
from ot_federated.emulated_model import read_bundle_tensors
from ot_federated.errors import BundleError, CheckpointError
from ot_federated.logs import logger
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.compression.distillation import Distillation, distil
from ot_federated.model_owner.compression.gaps import find_kept_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = Mapping[str, torch.Tensor]
# Public text and the full model with a state in it -> the emulator's tensors that are others than the base's.
Refit = Callable[["PreTrainedModel"], dict[str, torch.Tensor]]


def refit_bridges(
    model: PreTrainedModel,
    bundle: Path,
    manifest: Manifest,
    windows: torch.Tensor,
    *,
    ridge: float,
    in_order: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the bridges of a bundle, by role name, fitted to a full model with a tuned adapter in it.

    Args:
        model: The full model, tuned.
        bundle: The bundle's directory, with the blocks between the bridges.
        manifest: Its manifest.
        windows: Token windows of public text ``(num_windows, window)``.
        ridge: Penalty of the bridges, relative.
        in_order: Whether a bridge is fitted to what the emulator has before it; see :func:`fit_bridges`.
    """
    entries = [entry for entry in manifest.stack if entry.role == "bridge"]
    kept = find_kept_blocks(model, manifest.stack, _read_kept_tensors(bundle, manifest))
    runs = [(entry.first_block, entry.last_block) for entry in entries]
    fitted = fit_bridges(model, windows, runs, ridge=ridge, in_order=in_order, kept=kept)
    return {
        entry.prefix + name: tensor.contiguous().cpu()
        for number, entry in enumerate(entries)
        for name, tensor in zip(("weight", "bias"), fitted[number], strict=True)
    }


def distil_bridges(
    model: PreTrainedModel,
    bundle: Path,
    manifest: Manifest,
    bridges: Mapping[str, torch.Tensor],
    windows: torch.Tensor,
    *,
    settings: Distillation,
    checkpoints: Path,
) -> dict[str, torch.Tensor]:
    """Return bridges, by role name, after distillation against a full model with a tuned adapter in it.

    Args:
        model: The full model, tuned.
        bundle: The bundle's directory: what its emulator has beside the bridges stays.
        manifest: Its manifest.
        bridges: Where they start.
        windows: Token windows of public text ``(num_windows, window)``.
        settings: How; only bridges train.
        checkpoints: A directory of this very distillation's own.
    """
    kept = _read_kept_tensors(bundle, manifest)
    tensors = {name: tensor.to(model.device) for name, tensor in (kept | dict(bridges)).items()}
    distilled = distil(
        model,
        manifest.stack,
        tensors,
        windows,
        windows[:0],
        settings=replace(settings, trains="bridges", validation_steps=0),
        checkpoints=checkpoints,
        say=logger.info,
    )
    return {name: distilled[name].contiguous().cpu() for name in bridges}


def _read_kept_tensors(bundle: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    tensors = read_bundle_tensors(bundle, manifest)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("emulator.")}


class Realignment:
    """The versions of a run's bundle.

    Args:
        directory: Where versions are kept.
        base: Directory and manifest of the bundle.
        every_rounds: A new version after every so many rounds; 0 for none.
        refit: What is fitted to the tuned model.
        plugged_in: Plugs a state into the full model for the length of a ``with`` block.
        last_round: The round after which the run goes on; versions of later rounds are dropped.
    """

    def __init__(
        self,
        directory: Path,
        *,
        base: tuple[Path, Manifest],
        every_rounds: int,
        refit: Refit,
        plugged_in: Callable[[State], AbstractContextManager[PreTrainedModel]],
        last_round: int = 0,
    ) -> None:
        self._directory = directory
        self._every = every_rounds
        self._refit = refit
        self._plugged_in = plugged_in
        self.versions = {0: base}
        for path in sorted(directory.glob("round-*")) if every_rounds else []:
            server_round = int(path.name.removeprefix("round-"))
            if server_round > last_round:
                shutil.rmtree(path)
            else:
                self.versions[server_round] = (path, self._read(path))

    @staticmethod
    def _read(path: Path) -> Manifest:
        try:
            manifest = read_manifest(path)
            verify_files(path, manifest)
        except BundleError as error:
            raise CheckpointError(f"A realigned bundle of the run is damaged: {error} Start a new run.") from error
        return manifest

    @cached_property
    def _base(self) -> tuple[Path, Manifest]:
        return self.versions[0]

    def version_for(self, server_round: int, state: State) -> tuple[Path, Manifest]:
        """Return directory and manifest of the bundle that a round trains with; make it where it is due.

        Args:
            server_round: The round that begins, from 1.
            state: What the clients have trained so far.

        Raises:
            CheckpointError: If a version is missing that earlier rounds were trained with.
        """
        done = server_round - 1
        due = done // self._every * self._every if self._every else 0
        if due not in self.versions:
            if due != done:
                raise CheckpointError(
                    f"{self._directory / f'round-{due:04d}'}, which the rounds after round {due} trained with, is "
                    "missing: the run cannot go on as it was. Start a new run."
                )
            self.versions[due] = self._make(due, state)
        return self.versions[due]

    def earlier(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """Return the manifests of the versions before one, oldest first."""
        found = []
        for _, (_, version) in sorted(self.versions.items()):
            if version.digest == manifest.digest:
                break
            found.append(version)
        return tuple(found)

    def trained_with(self, server_round: int) -> tuple[Path, Manifest]:
        """Return directory and manifest of the version that a past round was trained with."""
        return self.versions[max(number for number in self.versions if number < server_round)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all changes together: what a client that is always there receives beside the bundle."""
        return sum(manifest.file_bytes(realignment_file) for number, (_, manifest) in self.versions.items() if number)

    def _make(self, server_round: int, state: State) -> tuple[Path, Manifest]:
        with self._plugged_in(state) as model:
            changed = self._refit(model)
        directory, base = self._base
        target = self._directory / f"round-{server_round:04d}"
        with atomic_directory(target) as partial:
            for file in base.files:
                link_or_copy(directory / file.name, partial / file.name)
            save_file(changed, partial / realignment_file)
            # The base's digests are known; only what is new is read.
            added = [file for file in describe_files(partial) if file not in base.files]
            manifest = replace(base, files=(*base.files, *added))
            (partial / manifest_name).write_bytes(manifest.to_bytes())
        num_bytes = manifest.file_bytes(realignment_file)
        logger.info("the emulator is realigned after round %d: %.2f MB for each client", server_round, num_bytes / 1e6)
        return target, manifest
