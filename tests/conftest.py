"""What all tests share: quiet surroundings, caches of their own, hypothesis settings."""

from __future__ import annotations

import os

# Before torch and transformers are imported: no network, and one thread, as the suite may share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the first example of a property may import torch, and the machine may be busy.
settings.register_profile(
    "suite", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# CI judges a commit, so it draws the same examples for the same code; everywhere else each run explores further.
settings.register_profile("ci", settings.get_profile("suite"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "suite")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's caches. A test that wants another place sets it itself."""
    root = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(root / "cache"))
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(root / "ledgers"))
    monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
    monkeypatch.setenv("OT_FEDERATED_BUNDLE_CACHE", str(root / "received-bundles"))


@pytest.fixture(autouse=True)
def no_log_handlers() -> Iterator[None]:
    """Undo ``show_lines``: its handler would keep the output stream of the test that called it first."""
    from ot_federated.logs import logger

    yield
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LLaMA of 8 blocks with its tokenizer, as ``save_pretrained`` writes them."""
    from tests.families import save_family_model

    return save_family_model(tmp_path_factory.mktemp("models") / "llama")
