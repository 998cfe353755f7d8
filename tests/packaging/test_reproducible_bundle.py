"""Both parties get the same digest: an app bundle depends on the content of a checkout's files and on nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import ot_federated
from ot_federated.data_owner.app_bundle import compare_to_installed, read_app_bundle
from ot_federated.data_owner.approved_supernode import build_app_bundle

root = Path(ot_federated.__file__).parents[1]

pytestmark = pytest.mark.skipif(not (root / "pyproject.toml").is_file(), reason="only in a checkout")


def list_files() -> list[Path]:
    sources = [path for name in ("ot_federated", "strategies") for path in (root / name).rglob("*.py")]
    return sorted(sources) + [root / name for name in ("pyproject.toml", "README.md", "LICENSE")]


def check_out(target: Path, files: list[Path], *, mtime: int, mode: int) -> Path:
    """Write the checkout's files in this order, with these times and permissions."""
    for path in files:
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(mode)
        os.utime(copy, (mtime, mtime))
    return target


def test_two_checkouts_make_one_digest(tmp_path: Path) -> None:
    files = list_files()
    first = check_out(tmp_path / "mine" / "ot-federated", files, mtime=10**9, mode=0o644)
    second = check_out(tmp_path / "theirs" / "release", files[::-1], mtime=1_700_000_001, mode=0o600)
    # What lies about in a checkout in use.
    (second / "ot_federated" / "__pycache__").mkdir()
    (second / "ot_federated" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"\x00")
    (second / "runs").mkdir()
    (second / "runs" / "summary.json").write_text("{}")
    # By Flower's command, which the model owner uses, and by ours, which the data owner uses.
    done = subprocess.run(
        [shutil.which("flwr", path=sysconfig.get_path("scripts")) or "flwr", "build"],
        cwd=first,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = first.glob("*.fab")
    assert hashlib.sha256(bundle.read_bytes()).digest() == hashlib.sha256(build_app_bundle(second)).digest()
    assert build_app_bundle(first) == bundle.read_bytes()


def test_every_byte_of_code_changes_the_digest(tmp_path: Path) -> None:
    checkout = check_out(tmp_path / "ot-federated", list_files(), mtime=10**9, mode=0o644)
    before = build_app_bundle(checkout)
    policy = checkout / "ot_federated" / "data_owner" / "policy.py"
    policy.write_bytes(policy.read_bytes() + b"#")
    os.utime(policy, (10**9, 10**9))
    assert build_app_bundle(checkout) != before


def test_a_checkout_of_the_installed_release_would_run_the_installed_code(tmp_path: Path) -> None:
    checkout = check_out(tmp_path / "ot-federated", list_files(), mtime=10**9, mode=0o644)
    assert not compare_to_installed(read_app_bundle(build_app_bundle(checkout))).any


def test_building_runs_none_of_the_checkouts_code(tmp_path: Path) -> None:
    checkout = check_out(tmp_path / "ot-federated", list_files(), mtime=10**9, mode=0o644)
    (checkout / "ot_federated" / "__init__.py").write_text("raise SystemExit('imported')\n")
    build_app_bundle(checkout)
