"""What is shipped: the run-config surface, the wheel, Flower's app bundle, and who imports whom."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ot_federated
from ot_federated.config import list_keys

root = Path(ot_federated.__file__).parents[1]
pyproject_file = root / "pyproject.toml"

pytestmark = pytest.mark.skipif(not pyproject_file.is_file(), reason="only in a checkout: there is no pyproject.toml")


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads(pyproject_file.read_text(encoding="utf-8"))


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def list_sources(*packages: str) -> set[str]:
    """Return the Python files of packages, relative to the checkout."""
    return {
        path.relative_to(root).as_posix()
        for package in packages
        for path in (root / package).rglob("*.py")
        if "__pycache__" not in path.parts
    }


def copy_checkout(target: Path) -> Path:
    """Copy what belongs to the project: building must leave nothing behind in the checkout."""
    names = ["ot_federated", "strategies", "simulations", "tests", "run_sim.py", "pyproject.toml"]
    names += [path.name for path in root.iterdir() if path.suffix == ".md" or path.name == "LICENSE"]
    target.mkdir()
    for name in names:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(root / name, target / name)
    return target


def find_script(name: str) -> str:
    command = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if command is None:
        pytest.skip(f"{name} is missing: pip install -e '.[test]'")
    return command


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- The run config -------------------------------------------------------------------------------------------


def test_run_config_surface_is_that_of_the_config_classes() -> None:
    surface = dict(flatten(read_pyproject()["tool"]["flwr"]["app"]["config"]))
    keys = list_keys()
    assert surface.keys() == keys.keys()
    for name, key in keys.items():
        assert surface[name] == key.default, name
        # Flower takes an override's type from here: 1 is not 1.0, and neither is true.
        assert type(surface[name]) is key.type, name


def test_every_key_is_explained_where_users_look() -> None:
    text = " ".join(line.removeprefix("#").strip() for line in pyproject_file.read_text(encoding="utf-8").splitlines())
    for name, key in list_keys().items():
        assert key.doc in text, name


def test_components_exist_and_are_found_without_annotations() -> None:
    components = read_pyproject()["tool"]["flwr"]["app"]["components"]
    for component in components.values():
        module, _, name = component.partition(":")
        text = (root / Path(*module.split("."))).with_suffix(".py").read_text()
        # `flwr build` reads the source and does not find an annotated assignment.
        assert f"\n{name} = " in text, component


def test_version_is_said_once_and_equal() -> None:
    assert read_pyproject()["project"]["version"] == ot_federated.__version__


# ---- Who imports whom -----------------------------------------------------------------------------------------


def test_import_contracts_hold() -> None:
    shown = run(find_script("lint-imports"), "--no-cache", cwd=root)
    assert " 0 broken" in shown
    assert read_pyproject()["tool"]["importlinter"]["contracts"]


def test_the_contracts_can_be_broken(tmp_path: Path) -> None:
    """The contract that is the privacy story: neither party's code imports the other's."""
    copy = copy_checkout(tmp_path / "checkout")
    module = copy / "ot_federated" / "data_owner" / "local_data.py"
    module.write_text("import ot_federated.model_owner.plug_in\n" + module.read_text())
    done = subprocess.run(
        [find_script("lint-imports"), "--no-cache"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ot_federated.model_owner.plug_in" in done.stdout + done.stderr


# ---- Wheel and app bundle -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is missing: pip install -e '.[test]'"
)
def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "checkout")
    (copy / "notes.txt").write_text("private")
    (copy / "simulations" / "runs").mkdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist"), cwd=copy)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name for name in inside if name.endswith(".py")} == list_sources("ot_federated", "strategies")
    assert inside - list_sources("ot_federated", "strategies") <= {"ot_federated/py.typed", "strategies/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Classifier: Private :: Do Not Upload" in described
    assert wheel.stat().st_size < 1_000_000


def test_app_bundle_holds_what_both_apps_need_and_nothing_else(tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "checkout")
    (copy / "data.jsonl").write_text('{"question": "private"}\n')
    (copy / "ot_federated" / "weights.json").write_text("{}")
    home = {"FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    run(find_script("flwr"), "build", cwd=copy, **home)
    (bundle,) = copy.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
    expected = list_sources("ot_federated", "strategies") | {"pyproject.toml", ".info/CONTENT"}
    # Flower may add these by itself; another release does or does not.
    assert names - {"README.md", "LICENSE"} == expected
    assert bundle.stat().st_size < 10_000_000


def test_sources_the_bundle_would_drop_do_not_exist() -> None:
    """Flower leaves files of these names out of every bundle, whatever the patterns say."""
    for name in list_sources("ot_federated", "strategies"):
        assert not Path(name).name.startswith("test_"), name
        assert not {"lib", "build", "env", "dist", "venv"} & set(Path(name).parts), name


def test_ci_draws_the_same_examples_for_the_same_code() -> None:
    """``tests/conftest.py`` goes by ``CI``."""
    lines = (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "CI=true" in next(line for line in lines if line.startswith("export ")).split()
