"""Alpha and the best round in whole federations: chosen on validation data alone, the same after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ot_federated.settings import Scalar
from tests.federations import Federation, run_federation
from tests.invariants.test_resume import resume, stop_in_round, strip_times

# A step so long that the last round is worse than the first.
diverging: dict[str, Scalar] = {
    "num-server-rounds": 3,
    "train.learning-rate": 0.5,
    "train.lr-schedule": "constant",
    "train.warmup-fraction": 0.0,
}


@pytest.mark.parametrize(
    "extra",
    [
        {"evaluation.deliver": "best", "evaluation.alphas": "0.25,0.5,1"},
        {"evaluation.alphas": "0,0.5,1", "evaluation.alpha-every-round": True},
        {"tuning.method": "lora", "tuning.lora-aggregation": "exact", "evaluation.deliver": "best"},
        {
            "tuning.method": "lora",
            "tuning.lora-aggregation": "truncated",
            "evaluation.alphas": "0,0.5,1",
            "evaluation.alpha-every-round": True,
        },
    ],
    ids=["best", "every-round", "exact", "truncated-every-round"],
)
def test_resumed_is_uninterrupted(extra: dict[str, Scalar], llama_directory: Path, tmp_path: Path) -> None:
    settings = {**diverging, **extra}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(3, tmp_path / "cut", llama_directory, settings)
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.digest == whole.digest
    assert resumed.summary["delivered"] == whole.summary["delivered"]
    assert strip_times(resumed) == strip_times(whole)
    check_choice(whole, extra)


def check_choice(run: Federation, extra: dict[str, Scalar]) -> None:
    delivered = run.summary["delivered"]
    losses = {number: line["plug_in"]["loss"] for number, line in run.rounds.items() if number}
    if extra.get("evaluation.deliver") == "best":
        assert delivered["round"] == min(losses, key=lambda number: losses[number])
    if extra.get("evaluation.alpha-every-round"):
        # 0 is among the alphas, so no round can make it worse.
        assert losses[1] >= losses[2] - 1e-4 >= losses[3] - 2e-4
        assert {line["alpha"] for number, line in run.rounds.items() if number} <= {0.0, 0.5, 1.0}
    elif "evaluation.alphas" in extra:
        tried = delivered["validation_losses"]
        assert list(tried) == ["0.25", "0.5", "1"]
        assert tried[f"{delivered['alpha']:g}"] == min(tried.values())
        assert tried["1"] == pytest.approx(losses[delivered["round"]])


def test_an_alpha_of_zero_delivers_the_untouched_model(llama_directory: Path, tmp_path: Path) -> None:
    run = run_federation(tmp_path, llama_directory, settings={"evaluation.alphas": "0"})
    rows = run.summary["rows"]
    assert rows["plug_in"]["loss"] == rows["full_zero_shot"]["loss"]
    assert all(torch.isfinite(tensor).all() for tensor in run.adapter.values())
