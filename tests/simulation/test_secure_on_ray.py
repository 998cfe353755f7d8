"""Secure aggregation with DP-SGD on Ray, where every step of the protocol may run in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ot_federated.data_owner.privacy_ledger import PrivacyLedger, list_ledgers
from tests.families import save_family_model
from tests.federations import build_questions, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
root = Path(__file__).parents[2]


def test_masked_private_rounds_on_ray(tmp_path: Path) -> None:
    model = save_family_model(tmp_path / "model")
    data = write_rows(tmp_path / "questions.jsonl", build_questions(48))
    settings = [
        *(f"data.{part}={data}" for part in ("train", "validation", "test")),
        f"model.source={model}",
        "model.dtype=float32",
        "num-clients=3",
        "num-server-rounds=2",
        "offsite.bottom-blocks=1",
        "offsite.emulator-blocks=2",
        "offsite.top-blocks=1",
        "offsite.keep=uniform",
        "offsite.gaps=empty",
        "train.batch-size=4",
        "train.max-steps=2",
        "privacy.mode=example",
        "privacy.engine=loop",
        "strategy.secure-aggregation=true",
        "strategy.min-nodes=3",
        "evaluation.max-examples=8",
        "evaluation.max-validation-examples=8",
    ]
    command = [sys.executable, str(root / "run_sim.py"), *settings, "--output", str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=500)
    rounds = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["num_replies"], line["failures"]) for line in rounds if line["round"]] == [(3, {})] * 2
    ledgers = tmp_path / "run" / "ledgers"
    entries = [PrivacyLedger(ledgers / name, dataset_id=name).entries for name in list_ledgers(ledgers)]
    assert [len(of_client) for of_client in entries] == [2, 2, 2]
