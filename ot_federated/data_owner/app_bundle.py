"""What is inside a Flower app bundle (FAB), and how it differs from the release that the data owner installed.

A FAB is a zip file that the model owner made. It is read into memory within limits, nothing of it is ever extracted,
imported or put on a path here, and its names and texts are checked before a person sees them in a terminal.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import re
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ot_federated.errors import OtFederatedError

max_bundle_bytes = 10 * 2**20  # Flower's own limit
max_content_bytes = 64 * 2**20
max_files = 5000
client_app = "ot_federated.data_owner.client_app:app"
packages = ("ot_federated", "strategies")
# What every FAB has beside code. Flower writes the first two when it builds; nothing imports any of them.
companions = ("pyproject.toml", ".info/CONTENT", "README.md", "LICENSE")

_name = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")
_shown = re.compile(r"[A-Za-z0-9_.:\-+/]{1,200}")


class AppBundleError(OtFederatedError):
    """A Flower app bundle is damaged, or made so that one cannot tell what it would run."""

    may_leave = False


@dataclass(frozen=True, kw_only=True)
class AppBundle:
    """A FAB that was read.

    Attributes:
        sha256: Of the whole file: what Flower calls its hash, and what a data owner approves.
        name: ``publisher/name``.
        version: The version that it claims.
        client_app: The object that Flower would run at the data owner, ``module:attribute``.
        files: Content by path.
    """

    sha256: str
    name: str
    version: str
    client_app: str
    files: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How a FAB's code differs from the installed release.

    Attributes:
        installed: Name, version and place of the installed release.
        same: Files with the same content.
        changed: Files with another content.
        added: Files that the release does not have: code that would run and that nobody installed.
        missing: Files of the release that the FAB does not have.
        client_app: What Flower would run, if it is not this project's ClientApp; else empty.
    """

    installed: str
    same: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]
    missing: tuple[str, ...]
    client_app: str

    @property
    def any(self) -> bool:
        """Whether other code would run than the installed release's."""
        return bool(self.changed or self.added or self.missing or self.client_app)


def read_app_bundle(data: bytes) -> AppBundle:
    """Read a FAB from the bytes of its file.

    Raises:
        AppBundleError: If it is no FAB, too large, or has names that hide what would run.
    """
    if len(data) > max_bundle_bytes:
        raise AppBundleError(f"The app bundle has {len(data):,} bytes; Flower allows {max_bundle_bytes:,}.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = dict(_read_members(archive))
        project = files["pyproject.toml"]
    # What zipfile raises for damaged files; LookupError where there is no such file in it.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise AppBundleError(f"This is not a Flower app bundle ({type(error).__name__}: {error}).") from error
    name, version, component = parse_project(project)
    return AppBundle(
        sha256=hashlib.sha256(data).hexdigest(), name=name, version=version, client_app=component, files=files
    )


def parse_project(data: bytes) -> tuple[str, str, str]:
    """Return ``publisher/name``, the version and the ClientApp that a FAB's ``pyproject.toml`` names.

    Raises:
        AppBundleError: If it is not that of a Flower app, or they are no plain names.
    """
    try:
        config = tomllib.loads(data.decode())
        app, project = config["tool"]["flwr"]["app"], config["project"]
        name, version = f"{app['publisher']}/{project['name']}", project["version"]
        component = app["components"]["clientapp"]
    except (ValueError, LookupError) as error:
        raise AppBundleError(f"This is not a Flower app bundle ({type(error).__name__}: {error}).") from error
    except (TypeError, RecursionError) as error:
        raise AppBundleError("Its pyproject.toml is not that of a Flower app.") from error
    for text in (name, version, component):
        if not isinstance(text, str) or not _shown.fullmatch(text):
            raise AppBundleError(f"Its pyproject.toml has {text!r} for a name, version or ClientApp.")
    return name, version, component


def _read_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    members = archive.infolist()
    if len(members) > max_files:
        raise AppBundleError(f"The app bundle has {len(members)} files; more than {max_files} nobody reviews.")
    seen: set[str] = set()
    left = max_content_bytes
    for member in members:
        name = member.orig_filename
        # One spelling each, also on disks that ignore case: what is shown is what would be extracted.
        if not _name.fullmatch(name) or {".", ".."} & set(name.split("/")) or name.lower() in seen:
            raise AppBundleError(f"The app bundle has a file {name!r} whose name is unsafe, or there twice.")
        seen.add(name.lower())
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise AppBundleError(f"{name} is compressed in a way that Flower does not use.")
        with archive.open(member) as stream:
            content = stream.read(left + 1)
        left -= len(content)
        if left < 0:
            raise AppBundleError(f"The app bundle unpacks to more than {max_content_bytes:,} bytes.")
        yield name, content


def installed_release() -> tuple[str, dict[str, bytes]]:
    """Return the installed release, as text for people, and its Python files by path; nothing is imported for it."""
    files: dict[str, bytes] = {}
    places = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None  # this very module belongs to it
        assert spec.origin is not None
        root = Path(spec.origin).parent
        places.append(str(root))
        for path in sorted(root.rglob("*.py")):
            files[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    version = importlib.metadata.version("ot-federated")
    return f"ot-federated {version} as installed in {' and '.join(places)}", files


def compare_to_installed(bundle: AppBundle) -> Differences:
    """Compare a FAB's code, byte by byte, with the release that is installed here."""
    installed, release = installed_release()
    code = {name: content for name, content in bundle.files.items() if name not in companions}
    shared = sorted(code.keys() & release.keys())
    return Differences(
        installed=installed,
        same=tuple(name for name in shared if code[name] == release[name]),
        changed=tuple(name for name in shared if code[name] != release[name]),
        added=tuple(sorted(code.keys() - release.keys())),
        missing=tuple(sorted(release.keys() - code.keys())),
        client_app="" if bundle.client_app == client_app else bundle.client_app,
    )
