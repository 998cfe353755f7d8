"""``ot-federated audit data`` and ``audit model`` on a small model: they find what is there, and say it in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ot_federated.cli import main
from ot_federated.config import parse_run_config
from ot_federated.model_owner.owner import load_parts, make_bundle
from tests.families import save_family_model
from tests.federations import build_questions, write_rows

num_examples, num_candidates = 60, 40


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run would be started with; the questions differ enough to be learnt by heart."""
    directory = tmp_path_factory.mktemp("audit")
    rng = np.random.default_rng(0)
    rows = [
        {**row, "choices": ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(3)]}
        for row in build_questions(num_examples)
    ]
    data = str(write_rows(directory / "train.jsonl", rows))
    return {
        "model.source": str(save_family_model(directory / "model")),
        "model.dtype": "float32",
        "data.train": data,
        "data.validation": data,
        "offsite.public-text": data,
        "offsite.bottom-blocks": 1,
        "offsite.emulator-blocks": 2,
        "offsite.top-blocks": 1,
        "offsite.keep": "uniform",
        "offsite.gaps": "empty",
        "offsite.calibration-tokens": 2048,
        "train.learning-rate": 1e-2,
        "train.batch-size": 20,
        "train.max-steps": 50,
        "train.local-epochs": 40,
        "num-server-rounds": 1,
    }


@pytest.fixture
def bundle(settings: dict[str, Any]) -> Path:
    config = parse_run_config(settings)
    return make_bundle(config, load_parts(config))[0]


def words(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def audit(bundle: Path, settings: dict[str, Any], output: Path, **changes: Any) -> tuple[int, dict[str, Any]]:
    command = ["audit", "data", "--bundle", str(bundle), "--data", settings["data.train"], "--device", "cpu"]
    command += ["--candidates", str(num_candidates), "--output-dir", str(output)]
    code = main([*command, *words(settings | changes)])
    return code, json.loads((output / "audit.json").read_text())


def test_attacks_succeed_without_privacy(
    bundle: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = audit(bundle, settings, tmp_path)
    assert code == 0
    assert report["claimed_epsilon"] is None
    assert max(attack["auc"] for attack in report["membership"].values()) > 0.8
    assert report["one_run_audit"]["epsilon_lower_bound"] > 0.2
    assert report["exposure"]["mean_bits"] > report["exposure"]["chance_bits"] + 0.5
    assert not report["token_recovery"]["at_chance"]
    told = capsys.readouterr().out
    assert "ABOVE CHANCE" in told
    assert "there is no bound on what an update tells" in told
    assert (tmp_path / "roc.png").stat().st_size > 1000


def test_attacks_fail_with_privacy(
    bundle: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))
    private = {"privacy.mode": "example", "privacy.target-epsilon": 0.5, "privacy.target-delta": 1e-3}
    code, report = audit(bundle, settings, tmp_path, **private)
    assert code == 0
    assert report["claimed_epsilon"] == pytest.approx(0.5, abs=0.02)
    assert report["one_run_audit"]["epsilon_lower_bound"] <= report["claimed_epsilon"]
    # 40 candidates: four standard errors are 0.36.
    assert abs(report["membership"]["reference"]["auc"] - 0.5) < 0.36
    assert report["token_recovery"]["recovered"] < 0.5
    assert "does not refute the claim" in capsys.readouterr().out
    # A rehearsal is no release: nothing is booked.
    assert not (tmp_path / "ledgers").exists()


def test_a_claim_that_is_refuted_is_an_error(
    bundle: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if the noise were lost on the way: the audit is there to notice.
    monkeypatch.setattr("ot_federated.data_owner.differential_privacy.add_noise", lambda sums, **_: list(sums))
    # Private batches are drawn with the system's entropy, so each run differs: twice the steps and a small claim leave
    # room (the bound was 0.8 or 1.1 in ten runs; with 50 steps and a claim of 0.1, one in some twenty fell below it).
    private = {"privacy.mode": "example", "privacy.target-epsilon": 0.02, "privacy.target-delta": 1e-3}
    code, report = audit(bundle, settings, tmp_path, **private, **{"train.max-steps": 100})
    assert report["one_run_audit"]["epsilon_lower_bound"] > report["claimed_epsilon"]
    assert code == 1
    assert "REFUTED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, ["--candidates", "61"], "61 candidates of 60 examples"),
        ({}, ["--candidates", "9"], "at least 10 candidates"),
        ({"privacy.mode": "example", "privacy.target-delta": 0.05}, [], "not below 1/"),
        ({"train.batch-sise": 3}, [], "batch-size"),
    ],
)
def test_an_audit_that_cannot_be_is_refused(
    changes: dict[str, Any],
    options: list[str],
    reason: str,
    bundle: Path,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["audit", "data", "--bundle", str(bundle), "--data", settings["data.train"], "--candidates", "40"]
    assert main([*command, *options, *words(settings | changes)]) == 1
    assert reason in capsys.readouterr().err


def test_a_model_owner_sees_what_a_client_could_rebuild(
    bundle: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", "model", "--budgets", "0,600", "--output-dir", str(tmp_path), "--previous", str(bundle)]
    assert main([*command, *words(settings | {"offsite.emulator-blocks": 3})]) == 0
    report = json.loads((tmp_path / "model_leak.json").read_text())
    tried = {(result["attack"].split()[0], result["budget"]) for result in report["attacks"]}
    assert tried == {("R1", 0), ("R2", 0), ("R2", 600), ("R3", 0), ("R3", 600), ("R4", 0), ("R4", 600)}
    assert 0 < report["exact_weights"]["fraction"] < 1
    assert sum(share == 1.0 for share in report["exact_weights"]["by_block"]) == 5
    assert report["releases"]["fraction_of_blocks"] >= 5 / 8
    told = capsys.readouterr().out
    assert "67.0% of the model's weights are in it as they are" in told
    assert "Release one kept set per model" in told
    assert "with the releases before, a client holds" in told
    assert (tmp_path / "recovery.png").stat().st_size > 1000
    assert main(["audit", "model", "--budgets", "few", *words(settings)]) == 1
    assert "must be numbers of tokens" in capsys.readouterr().err
