"""Reading app bundles that a stranger made, and telling how their code differs from the installed release."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ot_federated
from ot_federated.data_owner import app_bundle
from ot_federated.data_owner.app_bundle import AppBundleError, compare_to_installed, installed_release, read_app_bundle
from tests.app_bundles import pack, pyproject, release


def test_a_bundle_of_the_installed_release_has_no_differences() -> None:
    bundle = read_app_bundle(pack(release()))
    assert (bundle.name, bundle.version) == ("ot-federated/ot-federated", "0.1.0")
    differences = compare_to_installed(bundle)
    assert not differences.any
    assert len(differences.same) == len(installed_release()[1]) > 50
    assert str(Path(ot_federated.__file__).parent) in differences.installed


def test_changed_added_and_missing_files_are_told_apart() -> None:
    files = release(ot_federated__errors=b"pass\n", strategies__replies=None, torch=b"steal()\n")
    differences = compare_to_installed(read_app_bundle(pack(files)))
    assert differences.changed == ("ot_federated/errors.py",)
    assert differences.added == ("torch.py",)
    assert differences.missing == ("strategies/replies.py",)
    assert differences.any


def test_files_python_would_prefer_to_a_source_are_added_code() -> None:
    files = release()
    files["ot_federated/__pycache__/errors.cpython-311.pyc"] = b"\x00"
    files["ot_federated/errors.so"] = b"\x00"
    assert len(compare_to_installed(read_app_bundle(pack(files))).added) == 2


def test_another_client_app_is_a_difference() -> None:
    files = release() | {"pyproject.toml": pyproject.replace("data_owner.client_app:app", "errors:nearest_match")}
    differences = compare_to_installed(read_app_bundle(pack(files)))
    assert differences.client_app == "ot_federated.errors:nearest_match"
    assert differences.any


@pytest.mark.parametrize(
    "name",
    ["../x.py", "/etc/x.py", "a/../../x.py", "a//b.py", "./x.py", "a\\b.py", "C:x.py", "x\u202e.py", "x .py", "d/"],
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(AppBundleError, match="name is unsafe"):
        read_app_bundle(pack({"pyproject.toml": pyproject, name: b""}))


def test_a_name_cut_by_a_zero_byte_is_refused() -> None:
    data = pack({"pyproject.toml": pyproject, "safe.py#hidden.py": b""}).replace(b"safe.py#", b"safe.py\x00")
    with pytest.raises(AppBundleError):
        read_app_bundle(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a.py", "a.py"), ("a.py", "A.py")])
def test_two_files_of_one_name_are_refused(names: tuple[str, str]) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("pyproject.toml", *names):
            archive.writestr(name, pyproject if name == "pyproject.toml" else name)
    with pytest.raises(AppBundleError, match="there twice"):
        read_app_bundle(stream.getvalue())


def test_bombs_are_refused_within_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pack({"pyproject.toml": pyproject, "zeros.py": bytes(70 * 2**20)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    with pytest.raises(AppBundleError, match="unpacks to more than"):
        read_app_bundle(bomb)
    with pytest.raises(AppBundleError, match="Flower allows"):
        read_app_bundle(bytes(app_bundle.max_bundle_bytes + 1))
    monkeypatch.setattr(app_bundle, "max_files", 3)
    with pytest.raises(AppBundleError, match="4 files"):
        read_app_bundle(pack({f"{i}.py": b"" for i in range(4)}))


def test_compressions_flower_does_not_use_are_refused() -> None:
    with pytest.raises(AppBundleError, match="compressed in a way"):
        read_app_bundle(pack({"pyproject.toml": pyproject}, compression=zipfile.ZIP_LZMA))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "project = 7",
        pyproject.replace('version = "0.1.0"', "version = 1"),
        pyproject.replace('"0.1.0"', '"\\u001b[2J"'),
        pyproject.replace("clientapp", "agentapp"),
        "x = " + "[" * 5000,
        b"\xff\xfe",
    ],
)
def test_another_pyproject_is_refused(text: str | bytes) -> None:
    with pytest.raises(AppBundleError):
        read_app_bundle(pack({"pyproject.toml": text}))


_valid = pack({"pyproject.toml": pyproject, "a.py": b"pass\n" * 20}, compression=zipfile.ZIP_DEFLATED)


@given(st.lists(st.tuples(st.integers(0, len(_valid) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_bundles_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(_valid)
    for place, value in changes:
        data[place] = value
    with contextlib.suppress(AppBundleError):
        read_app_bundle(bytes(data))


def test_what_is_installed_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file on the disk counts, not the module in memory."""
    copy = tmp_path / "ot_federated"
    shutil.copytree(Path(ot_federated.__file__).parent, copy)
    (copy / "errors.py").write_text("altered = True\n")
    bundle = read_app_bundle(pack(release()))
    spec = type("Spec", (), {"origin": str(copy / "__init__.py")})()
    real = app_bundle.importlib.util.find_spec
    monkeypatch.setattr(
        app_bundle.importlib.util, "find_spec", lambda name: spec if name == "ot_federated" else real(name)
    )
    assert compare_to_installed(bundle).changed == ("ot_federated/errors.py",)
