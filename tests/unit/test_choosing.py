"""The alpha of the lowest loss, the best round on disk, and what the run config may say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ot_federated.alphas import parse_alphas
from ot_federated.config import parse_run_config
from ot_federated.errors import CheckpointError, ConfigError
from ot_federated.model_owner.choosing import BestRound, choose_alpha


def test_the_lowest_loss_is_chosen_and_each_alpha_is_tried_once() -> None:
    tried: list[float] = []

    def loss_of(alpha: float) -> float:
        tried.append(alpha)
        return (alpha - 0.7) ** 2

    alpha, losses = choose_alpha((0.0, 0.5, 1.0, 1.5), loss_of)
    assert alpha == 0.5
    assert tried == list(losses) == [0.0, 0.5, 1.0, 1.5]


def test_of_equal_losses_the_one_that_changes_least_is_chosen() -> None:
    assert choose_alpha((0.0, 0.5, 1.25, 1.5), lambda alpha: 1.0)[0] == 1.25


@pytest.mark.parametrize(("text", "alphas"), [("", ()), ("1, 0.5,0,1.5,1", (0.0, 0.5, 1.0, 1.5))])
def test_alphas_are_read(text: str, alphas: tuple[float, ...]) -> None:
    assert parse_alphas(text) == alphas
    assert parse_run_config({"evaluation.alphas": text}).evaluation.tried_alphas == alphas


@pytest.mark.parametrize("bad", ["1.6", "-0.1", "one", "nan", "inf"])
def test_other_alphas_are_refused_with_their_name(bad: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.alphas.*'{bad}'.*from 0 to 1\.5"):
        parse_run_config({"evaluation.alphas": f"1,{bad}"})


def test_settings_of_alpha_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"needs evaluation\.alphas"):
        parse_run_config({"evaluation.alpha-every-round": True})
    exact = {"tuning.method": "lora", "tuning.lora-aggregation": "exact", "evaluation.alphas": "0.5,1"}
    assert parse_run_config(exact)
    with pytest.raises(ConfigError, match="residual no client has"):
        parse_run_config(exact | {"evaluation.alpha-every-round": True})


def test_the_best_round_comes_back_or_is_refused(tmp_path: Path) -> None:
    assert BestRound.load(tmp_path / "best") is None
    best = BestRound(3, 1.25, {"w": torch.arange(6.0).view(2, 3).T})
    best.save(tmp_path / "best")
    loaded = BestRound.load(tmp_path / "best")
    assert loaded is not None
    assert (loaded.server_round, loaded.loss) == (3, 1.25)
    assert torch.equal(loaded.state["w"], best.state["w"])
    weights = tmp_path / "best" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="digest"):
        BestRound.load(tmp_path / "best")
