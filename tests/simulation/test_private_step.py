"""The benchmark of private steps, on a model that takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ot_federated.data_owner.per_example_gradients import PrivacyError
from simulations.benchmarks import private_step
from simulations.benchmarks.private_step import main
from tests.federations import build_questions, write_rows


@pytest.fixture
def words(tmp_path: Path, llama_directory: Path) -> list[str]:
    data = write_rows(tmp_path / "questions.jsonl", build_questions(24))
    settings = {
        "model.source": llama_directory,
        "data.train": data,
        "data.validation": data,
        "data.test": data,
        "offsite.bottom-blocks": 1,
        "offsite.emulator-blocks": 2,
        "offsite.top-blocks": 1,
        "offsite.keep": "uniform",
        "offsite.gaps": "empty",
    }
    counts = ["--batch-size=4", "--batches=2", "--repetitions=2", "--steps=1"]
    return [*(f"{key}={value}" for key, value in settings.items()), *counts, f"--output={tmp_path / 'step.json'}"]


def test_every_engine_is_timed_on_the_batches_of_plain_training(tmp_path: Path, words: list[str], capsys) -> None:
    assert main([*words, "--dtypes=float32"]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["command"].startswith("python -m simulations.benchmarks.private_step model.source=")
    assert [(row["tuning"], row["engine"]) for row in found["rows"]] == [
        (tuning, engine) for tuning in ("lora", "ffa-lora", "full") for engine in ("hooks", "ghost", "loop")
    ]
    for row in found["rows"]:
        assert row["num_steps_timed"] == 4
        assert row["batch_size"] == 4
        assert len(row["tokens_per_batch"]) == 2
        assert row["plain_seconds"] > 0
        assert row["private_seconds"] > 0
    assert found["rows"][3]["num_trained"] * 2 < found["rows"][0]["num_trained"] * 1.5
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_what_a_client_would_refuse_is_not_timed(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, engine: str, **__: object) -> None:
        raise PrivacyError(f"The client refuses to train: privacy.engine={engine}")

    monkeypatch.setattr(private_step, "check_per_example_gradients", refuse)
    assert main([*words, "--dtypes=bfloat16", "--engines=ghost", "--tunings=lora"]) == 0
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert "privacy.engine=ghost" in row["refused"]
    assert "ratio" not in row


def test_batched_engines_are_timed_in_the_clients_type(tmp_path: Path, words: list[str]) -> None:
    assert main([*words, "--dtypes=bfloat16", "--engines=hooks", "--tunings=lora"]) == 0
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert (row["dtype"], row["num_steps_timed"]) == ("bfloat16", 4)
