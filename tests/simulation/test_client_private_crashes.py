"""A run under client-level privacy that is cut off and goes on: what is noised again is paid again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ot_federated.errors import ConfigError
from ot_federated.model_owner import server_app
from ot_federated.model_owner.client_privacy import ClientPrivacyBooks, ClientPrivacyError
from ot_federated.privacy_accounting import epsilon_of
from strategies import client_level_privacy
from tests.client_private_runs import CountedRandom, PowerCutError, books_of, delta, run


def die(*_: Any, **__: Any) -> None:
    raise PowerCutError


def cut_at(place: str, directory: Path, model: Path) -> int:
    """Run until a power cut at ``place`` in round 2; return how many noised sums were begun."""
    CountedRandom.num_draws = 0
    sums = []
    pay, aggregate, save = (
        ClientPrivacyBooks.pay,
        client_level_privacy.NoisedMean.aggregate_train,
        server_app.save_checkpoint,
    )

    def paid(self: Any, release: Any) -> float:
        if place == "before paying" and release.server_round == 2:
            die()
        epsilon = pay(self, release)
        if place == "after paying" and release.server_round == 2:
            die()
        return epsilon

    def aggregated(self: Any, server_round: int, replies: Any) -> Any:
        before = CountedRandom.num_draws
        try:
            return aggregate(self, server_round, replies)
        finally:
            sums.append(CountedRandom.num_draws > before)

    def saved(path: Path, *, server_round: int, **rest: Any) -> Path:
        if place == "before the checkpoint" and server_round == 2:
            die()
        written = save(path, server_round=server_round, **rest)
        if place == "after the checkpoint" and server_round == 2:
            die()
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_level_privacy, "SecureRandom", CountedRandom)
        patch.setattr(ClientPrivacyBooks, "pay", paid)
        patch.setattr(client_level_privacy.NoisedMean, "aggregate_train", aggregated)
        patch.setattr(server_app, "save_checkpoint", saved)
        with pytest.raises(PowerCutError):
            run(directory, model, settings={"privacy.noise-multiplier": 0.0})
    return sum(sums)


@pytest.mark.parametrize(
    ("place", "num_begun", "paid"),
    [
        ("before paying", 1, [1, 2, 3]),
        ("after paying", 1, [1, 2, 2, 3]),
        ("before the checkpoint", 2, [1, 2, 2, 3]),
        ("after the checkpoint", 2, [1, 2, 3]),
    ],
)
def test_a_crash_never_makes_it_count_too_little_and_the_target_holds(
    place: str, num_begun: int, paid: list[int], llama_directory: Path, tmp_path: Path
) -> None:
    assert cut_at(place, tmp_path, llama_directory) == num_begun
    assert len(books_of(tmp_path).releases) >= num_begun
    first = books_of(tmp_path).releases[0].noise_multiplier
    federation = run(tmp_path, llama_directory, settings={"privacy.noise-multiplier": 0.0, "resume": True})
    releases = books_of(tmp_path).releases
    assert [release.server_round for release in releases] == paid
    total = epsilon_of([release.mechanism for release in releases], delta=delta)
    assert federation.summary["privacy"]["epsilon"] == total
    assert 8.0 * 0.995 <= total <= 8.0  # privacy.target-epsilon, the repeated round included
    if len(paid) == 3:
        assert {release.noise_multiplier for release in releases} == {first}


def test_a_finished_run_is_delivered_again_at_no_cost(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"privacy.noise-multiplier": 0.0}
    first = run(tmp_path, llama_directory, settings=settings)
    digest, shown = first.digest, first.summary["privacy"]
    again = run(tmp_path, llama_directory, settings=settings | {"resume": True})
    assert (again.digest, again.summary["privacy"]) == (digest, shown)
    assert again.grid.num_messages["train"] == 0


def test_a_larger_target_lets_a_run_go_on_whose_last_round_was_lost(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"privacy.noise-multiplier": 0.0, "num-server-rounds": 2}
    run(tmp_path, llama_directory, settings=settings)
    last = tmp_path / "run" / "checkpoints" / "round-0002"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    with pytest.raises(ConfigError, match="larger privacy.target-epsilon, or begin a new run"):
        run(tmp_path, llama_directory, settings=settings | {"resume": True})
    more = settings | {"resume": True, "privacy.target-epsilon": 12.0}
    federation = run(tmp_path, llama_directory, settings=more)
    assert 8.0 < federation.summary["privacy"]["epsilon"] <= 12.0
    assert federation.summary["privacy"]["num_releases"] == 3


def test_lost_books_end_the_run(llama_directory: Path, tmp_path: Path) -> None:
    cut_at("after the checkpoint", tmp_path, llama_directory)
    books_of(tmp_path).path.unlink()
    with pytest.raises(ClientPrivacyError, match="does not have round 1"):
        run(tmp_path, llama_directory, settings={"privacy.noise-multiplier": 0.0, "resume": True})
