"""The bundle: what a data owner receives, on disk.

A directory of safetensors (tensors) and JSON (structure)::

    manifest.json         format, split, kept blocks, file digests, versions
    adapter.safetensors   bottom.I.*, spread.I.* and top.I.*: the blocks that train; head.*: a classification head,
                          which trains
    emulator.safetensors  emulator.I.* (kept middle blocks) and bridge.I.* (what stands in for the others), packed
                          where the manifest says so
    frozen.safetensors    embeddings, final norm, language-model head, under their own names
    tokenizer.json ...    the tokenizer's files, or preprocessor_config.json for images
    realignment.safetensors   in a later version of a bundle: the emulator's tensors that are others than before

The bundle's digest is the SHA-256 of ``manifest.json``, which holds the digests of all other files: one value
names the whole content.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ot_federated.architectures import code_fields, config_parts
from ot_federated.cache import file_sha256
from ot_federated.errors import BundleError

if TYPE_CHECKING:
    import torch

format_version = 2
manifest_name = "manifest.json"
max_manifest_bytes = 4 * 2**20
realignment_file = "realignment.safetensors"
# Limits of what a stranger's manifest may ask for; every known model stays far below them.
max_files, max_stack_entries, max_companion_bytes, max_header_bytes = 64, 1024, 2**28, 2**25
# Tensors, structure, and what tokenizers are saved as. Nothing that is unpickled or run: no .bin, .pt, .pkl, .py.
accepted_suffixes = (".safetensors", ".json", ".txt", ".model", ".jinja")
weight_files = ("adapter.safetensors", "emulator.safetensors", "frozen.safetensors")

# Tensor names of a classification head begin with it.
head_prefix = "head."

Role = Literal["bottom", "spread", "emulator", "bridge", "share", "top"]
adapter_roles = ("bottom", "spread", "top")
packed_forms = ("sparse", "int8", "int4", "bfloat16", "float16")


@dataclass(frozen=True)
class StackEntry:
    """One position in the emulated block stack.

    Attributes:
        role: What stands there. ``bottom``, ``spread`` (blocks of the adapter in the middle) and ``top`` are the
            adapter. ``emulator`` is a kept middle block, ``bridge``
            a small stand-in for dropped ones, ``share`` a kept block that runs once more in a dropped one's place.
        index: Its number within the role; with it the tensor names begin: ``top.0.mlp.up_proj.weight``. A ``share``
            has the number of the kept block whose weights it runs with, and no tensors of its own.
        first_block: First block of the full model that it stands for.
        last_block: Last block of the full model that it stands for (equal to ``first_block`` except for bridges).
        width: Neurons of a kept block's FFN, where they are fewer than the full model's, or of a bridge's bottleneck.
        rank: Rank of a kept block's attention layers, or of a bridge's matrix; 0 for whole ones.
    """

    role: Role
    index: int
    first_block: int
    last_block: int
    width: int = 0
    rank: int = 0

    @property
    def prefix(self) -> str:
        """The beginning of its tensor names."""
        return f"{self.role}.{self.index}."


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle: its size in bytes and its SHA-256."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored in another form, see :mod:`ot_federated.packed_tensors`.

    Attributes:
        name: Its name once it is unpacked.
        form: One of ``packed_forms``.
        shape: Its shape once it is unpacked.
    """

    name: str
    form: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The structure of a bundle.

    Attributes:
        model_type: The full model's ``config.model_type``.
        config: The transformers config of the emulated model (its depth is ``len(stack)``).
        dtype: Type of the weights, as torch spells it (``bfloat16``).
        num_blocks: Blocks of the full model.
        stack: What stands at each position, bottom to top.
        compression: How the emulator was made, for people (``influence+bridge``).
        exact_weight_fraction: Share of the full model's parameters that stand unaltered in the bundle, in [0, 1].
        middle_bytes: Bytes of the full model's middle blocks, which the emulator replaces.
        files: Every file but the manifest.
        versions: Versions of the packages that made the bundle.
        classes: Names of what the model tells apart, in the order of its classification head; empty without one.
        packed: The emulator's tensors that are stored in another form, in the order in which they were packed.
    """

    model_type: str
    config: dict[str, Any]
    dtype: str
    num_blocks: int
    stack: tuple[StackEntry, ...]
    compression: str
    exact_weight_fraction: float
    middle_bytes: int
    files: tuple[BundleFile, ...]
    versions: dict[str, str]
    classes: tuple[str, ...] = ()
    packed: tuple[PackedTensor, ...] = ()
    format: int = format_version

    def to_bytes(self) -> bytes:
        """Return the canonical JSON text, whose SHA-256 is the bundle's digest."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest: the bundle's name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest: what travels in shards."""
        return sum(file.num_bytes for file in self.files)

    def file_bytes(self, name: str) -> int:
        """Return the size of one file in bytes."""
        return next(file.num_bytes for file in self.files if file.name == name)

    @property
    def kept_blocks(self) -> list[int]:
        """The full model's indices of the middle blocks that the emulator keeps."""
        return [entry.first_block for entry in self.stack if entry.role == "emulator"]


def parse_manifest(text: bytes, *, digest: str | None = None) -> Manifest:
    """Read a manifest that may come from a stranger.

    Raises:
        BundleError: If it is too large, not JSON, of another format, structurally wrong, or not the one that
            ``digest`` names.
    """
    if len(text) > max_manifest_bytes:
        raise BundleError(f"The manifest has {len(text)} bytes; at most {max_manifest_bytes} are accepted.")
    found = hashlib.sha256(text).hexdigest()
    if digest is not None and found != digest:
        raise BundleError(f"The manifest's digest is {found}, not {digest}: it was altered. Fetch the bundle again.")
    try:
        raw = json.loads(text)
        if raw["format"] != format_version:
            raise BundleError(
                f"The bundle has format {raw['format']!r}; this version reads {format_version}. Install the version "
                "of ot-federated that the model owner runs."
            )
        raw["stack"] = tuple(StackEntry(**entry) for entry in raw["stack"])
        raw["files"] = tuple(BundleFile(**file) for file in raw["files"])
        raw["classes"] = tuple(raw.get("classes", ()))
        raw["packed"] = tuple(PackedTensor(p["name"], p["form"], tuple(p["shape"])) for p in raw["packed"])
        manifest = Manifest(**raw)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"The manifest cannot be read ({type(error).__name__}: {error}).") from error
    try:
        _check_manifest(manifest)
        manifest.to_bytes()  # text that is no UTF-8 would fail later
    except (RecursionError, TypeError, ValueError) as error:
        raise BundleError(
            "The manifest is nested too deeply, has a list where it needs a name, or text that is none "
            f"({type(error).__name__})."
        ) from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    _check_types(manifest)
    names = [file.name for file in manifest.files]
    if len(names) > max_files or len(manifest.stack) > max_stack_entries:
        raise BundleError(
            f"The manifest has {len(names)} files and {len(manifest.stack)} blocks; at most {max_files} and "
            f"{max_stack_entries} are accepted."
        )
    for file in manifest.files:
        # A name from the wire becomes a path on the client's disk: one plain component, nothing hidden.
        if not (isinstance(file.name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}", file.name)):
            raise BundleError(f"The manifest names a file {file.name!r:.200}; only plain file names are accepted.")
        if not file.name.endswith(accepted_suffixes):
            raise BundleError(
                f"The manifest names a file {file.name!r}, which could hold code or a pickle; a bundle has only files "
                f"that end in {', '.join(accepted_suffixes)}."
            )
        if type(file.num_bytes) is not int or not 0 <= file.num_bytes < 2**44:
            raise BundleError(f"The manifest gives {file.name} the size {file.num_bytes!r:.200}.")
        if not file.name.endswith(".safetensors") and file.num_bytes > max_companion_bytes:
            # Read into memory as a whole, unlike tensors.
            raise BundleError(
                f"The manifest gives {file.name} {file.num_bytes:,} bytes; {max_companion_bytes:,} are accepted of a "
                "tokenizer's file."
            )
        if not re.fullmatch(r"[0-9a-f]{64}", str(file.sha256)):
            raise BundleError(f"The manifest gives {file.name} the digest {file.sha256!r}, which is no SHA-256.")
    if len(set(names)) != len(names) or manifest_name in names:
        raise BundleError("The manifest names a file twice, or itself.")
    missing = [name for name in weight_files if name not in names]
    if missing:
        raise BundleError(f"The manifest lacks {', '.join(missing)}.")
    _check_stack(manifest.stack)
    for packed in manifest.packed:
        sizes = packed.shape
        if not isinstance(packed.name, str) or packed.form not in packed_forms:
            raise BundleError(f"The manifest packs {packed.name!r} as {packed.form!r}, which nobody can unpack.")
        if any(type(size) is not int or size < 1 for size in sizes) or not 0 < math.prod(sizes) < 2**34:
            raise BundleError(f"The manifest gives the packed tensor {packed.name} the shape {sizes!r}.")


def _check_stack(stack: tuple[StackEntry, ...]) -> None:
    roles = [entry.role for entry in stack]
    if not roles or any(role not in get_args(Role) for role in roles):
        raise BundleError(f"The manifest's stack {roles!r} is empty or has an unknown role.")
    kept = {entry.index for entry in stack if entry.role == "emulator"}
    for entry in stack:
        numbers = (entry.index, entry.first_block, entry.last_block, entry.width, entry.rank)
        if any(type(number) is not int or not 0 <= number < 2**20 for number in numbers):
            raise BundleError(f"The manifest's stack has the entry {entry!r}, whose numbers are no block indices.")
        if entry.role == "share" and entry.index not in kept:
            raise BundleError(f"The manifest's stack has the entry {entry!r}, which shares a block that was not kept.")


def _check_types(manifest: Manifest) -> None:
    wanted: dict[str, type | tuple[type, ...]] = {
        "model_type": str,
        "config": dict,
        "dtype": str,
        "num_blocks": int,
        "compression": str,
        "exact_weight_fraction": (float, int),
        "middle_bytes": int,
        "versions": dict,
    }
    for name, kind in wanted.items():
        value = getattr(manifest, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"The manifest gives {name} as {type(value).__name__}, which it cannot be.")
    if len(set(manifest.classes)) != len(manifest.classes) or not all(isinstance(c, str) for c in manifest.classes):
        raise BundleError("The manifest's classes are not different texts.")
    check_config(manifest.config)


def check_config(config: Mapping[str, Any]) -> None:
    """Check a model config that may come from a stranger, before a model is built from it.

    Raises:
        BundleError: If it names code to fetch, or holds a number that no model has.
    """
    named = [field for part in config_parts(dict(config)) for field in code_fields if field in part]
    if named:
        raise BundleError(f"The manifest's config sets {named[0]!r}, which could make this side run a stranger's code.")
    # The weights are compared with these numbers only after a model was built from them.
    for part in config_parts(dict(config)):
        for field, value in part.items():
            if isinstance(value, int) and abs(value) > _config_limits.get(field, 2**24):
                raise BundleError(f"The manifest's config sets {field!r:.100} to {value!r:.100}, which no model has.")


# Of these transformers makes lists as soon as it reads them.
_config_limits = {"num_labels": 2**15, "num_hidden_layers": 4096, "n_layer": 4096}


def read_manifest(directory: Path, *, digest: str | None = None) -> Manifest:
    """Read ``manifest.json`` of a bundle directory.

    Raises:
        BundleError: If there is none, or as :func:`parse_manifest`.
    """
    path = directory / manifest_name
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {manifest_name}.")
    if (num_bytes := path.stat().st_size) > max_manifest_bytes:
        raise BundleError(f"{path} has {num_bytes:,} bytes; at most {max_manifest_bytes:,} are accepted.")
    return parse_manifest(path.read_bytes(), digest=digest)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check the size and SHA-256 of every file.

    Raises:
        BundleError: Naming the first file that is missing or altered.
    """
    for file in manifest.files:
        path = directory / file.name
        if not path.is_file():
            raise BundleError(f"The bundle {directory} lacks {file.name}. Delete the directory to fetch it again.")
        if path.stat().st_size != file.num_bytes or file_sha256(path) != file.sha256:
            raise BundleError(
                f"{path} does not have the digest that its manifest gives. Delete the directory to fetch it again."
            )


def describe_files(directory: Path) -> tuple[BundleFile, ...]:
    """Return size and digest of every file in ``directory`` but the manifest, by name."""
    return tuple(
        BundleFile(path.name, path.stat().st_size, file_sha256(path))
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != manifest_name
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, memory-mapped: pages load when touched, processes share them.

    Raises:
        BundleError: If the file is no valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > max_header_bytes:
            raise BundleError(
                f"{path} is not a readable safetensors file: a header of {header_bytes:,} bytes; {max_header_bytes:,} "
                "are accepted."
            )
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a readable safetensors file: {error}.") from error


def adapter_prefixes(stack: Iterable[StackEntry], *, placement: str = "both") -> tuple[str, ...]:
    """Return the tensor-name prefixes of the adapter blocks that train."""
    roles = adapter_roles if placement == "both" else (placement,)
    return tuple(entry.prefix for entry in stack if entry.role in roles)
