"""Flower app bundles made by hand, for tests."""

from __future__ import annotations

import io
import zipfile

from ot_federated.data_owner.app_bundle import installed_release

pyproject = """
[project]
name = "ot-federated"
version = "0.1.0"
[tool.flwr.app]
publisher = "ot-federated"
[tool.flwr.app.components]
serverapp = "ot_federated.model_owner.server_app:app"
clientapp = "ot_federated.data_owner.client_app:app"
"""


def pack(files: dict[str, bytes | str], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def release(**changes: bytes | str | None) -> dict[str, bytes | str]:
    """Return the files of a bundle of the installed release; names in ``changes`` have ``__`` for ``/``."""
    files: dict[str, bytes | str] = {"pyproject.toml": pyproject, **installed_release()[1], ".info/CONTENT": "list"}
    for name, content in changes.items():
        path = name.replace("__", "/") + ".py"
        files.pop(path, None)
        if content is not None:
            files[path] = content
    return files
