"""Bundles from a place of the data owner's choosing: checked by digest, resumed, and never trusted."""

from __future__ import annotations

import http.server
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ot_federated.bundle import Manifest, verify_files
from ot_federated.data_owner import bundle_import
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.data_owner.bundle_import import import_bundle, import_if_missing
from ot_federated.errors import BundleError
from ot_federated.logs import logger
from tests.bundles import write_random_bundle


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def manifest(source: Path) -> Manifest:
    return write_random_bundle(source, sizes=(100_000, 250_000, 0))


@pytest.fixture
def cache(tmp_path: Path) -> BundleCache:
    return BundleCache(tmp_path / "cache")


def bring(cache: BundleCache, place: Path | str, manifest: Manifest) -> Path:
    return import_bundle(cache, str(place), manifest.digest, manifest.to_bytes())


@pytest.mark.parametrize("as_url", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_from_a_directory(
    source: Path, manifest: Manifest, cache: BundleCache, tmp_path: Path, *, as_url: bool, below: bool
) -> None:
    place = source
    if below:  # one of several bundles, by its digest
        place = tmp_path / "several"
        shutil.copytree(source, place / manifest.digest)
    found = bring(cache, place.as_uri() if as_url else place, manifest)
    assert cache.find(manifest.digest) == found
    verify_files(found, manifest)
    assert cache.announce(manifest.digest, manifest.to_bytes(), shard_bytes=1024) == []


def test_a_changed_file_is_refused_and_leaves_nothing(source: Path, manifest: Manifest, cache: BundleCache) -> None:
    path = source / "emulator.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"emulator\.safetensors does not have the digest"):
        bring(cache, source, manifest)
    assert cache.find(manifest.digest) is None
    assert not [path for path in cache.root.iterdir() if path.is_dir()]


@pytest.mark.parametrize("damage", ["shorter", "missing", "other bundle", "nothing there", "no such scheme"])
def test_what_cannot_be_had_is_said_and_the_server_is_asked(
    damage: str, source: Path, manifest: Manifest, cache: BundleCache, caplog: pytest.LogCaptureFixture
) -> None:
    place, said = str(source), ""
    if damage == "shorter":
        path = source / "adapter.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        said = "ends after 1000 of 100000 bytes"
    elif damage == "missing":
        (source / "adapter.safetensors").unlink()
        said = "adapter.safetensors"
    elif damage == "other bundle":
        shutil.rmtree(source)
        said = f"holds the bundle {write_random_bundle(source).digest[:12]}"
    elif damage == "nothing there":
        place, said = str(source / "elsewhere"), "There is no bundle"
    else:
        place, said = "http://example.org/bundle", "neither a directory nor a file:// or https:// URL"
    with caplog.at_level(logging.WARNING, logger=logger.name):
        assert not import_if_missing(cache, place, manifest.digest, manifest.to_bytes())
    assert said in caplog.text
    assert "The model owner sends the bundle instead" in caplog.text
    assert cache.announce(manifest.digest, manifest.to_bytes(), shard_bytes=2**18) == [0, 1]


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Ends every answer after 60,000 bytes, and may not know about ranges."""

    knows_ranges = True
    asked: list[str]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        wanted = self.headers.get("Range", "")
        if self.knows_ranges and wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.asked.append(f"{path.name} {start}")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 60_000 if self.knows_ranges else 60_000 * len(self.asked)])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def breaking_server(request: pytest.FixtureRequest, source: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Breaking,), {"knows_ranges": request.param, "asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *args: handler(*args, directory=str(source)),  # type: ignore[arg-type]
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_broken_download_goes_on_where_it_broke(
    manifest: Manifest, cache: BundleCache, breaking_server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = breaking_server
    # A certificate is not what this is about; that http is refused is tested above.
    monkeypatch.setattr(bundle_import, "allowed_schemes", ("http",))
    monkeypatch.setattr(bundle_import.time, "sleep", lambda _: None)
    verify_files(bring(cache, url, manifest), manifest)
    assert sum(line.startswith("emulator") for line in asked) > 2
    if "adapter.safetensors 60000" in asked:
        assert "emulator.safetensors 240000" in asked  # no byte was sent twice
