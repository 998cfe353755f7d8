"""A federation under client-level privacy: what is noised, paid, recorded, told and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError
from ot_federated.messages import arrays_key, metrics_key
from ot_federated.model_owner.owner import Owner
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import Score
from strategies import client_level_privacy
from strategies.offsite_tuning import AggregationError
from tests.client_private_runs import CountedRandom, PowerCutError, arguments, books_of, delta, gaussian, private, run
from tests.federations import Federation, crash, is_train_reply, prepare_federation, run_federation, start


class SilentRandom(SecureRandom):
    def draw_normals(self, num: int) -> np.ndarray:
        return np.zeros(num)


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_level_privacy, "SecureRandom", SilentRandom)


def distance(one: Federation, other: Federation) -> float:
    return math.sqrt(sum(float(((one.adapter[name] - other.adapter[name]) ** 2).sum()) for name in one.adapter))


def fail(*, partition: int, server_rounds: tuple[int, ...]) -> Any:
    def hook(reply: Message) -> list[Message]:
        if any(is_train_reply(reply, server_round=number, partition=partition) for number in server_rounds):
            return [crash(reply)]
        return [reply]

    return hook


# ---- What comes out -------------------------------------------------------------------------------------------


def test_the_guarantee_is_told_with_all_that_gives_it_a_meaning(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = run(tmp_path, llama_directory)
    shown = federation.summary["privacy"]
    assert shown["epsilon"] == pytest.approx(gaussian(3), abs=1e-6)
    assert (shown["delta"], shown["unit"], shown["num_releases"]) == (delta, "client", 3)
    assert (shown["target_epsilon"], shown["noise_multiplier"]) == (None, 1.0)
    card = (federation.output / "model" / "README.md").read_text()
    lines = capsys.readouterr().err.splitlines()
    for text in (card, next(line for line in lines if "  privacy: " in line)):
        for part in (f"epsilon {shown['epsilon']:.4g} at delta 1e-05", shown["adjacency"], "trusted: the server"):
            assert part in text
    assert any("4 clients a round" in line and "privacy.mode=example" in line for line in lines)
    assert any("FedAvg behind FixedClipping on adapters" in line for line in lines)
    told = [line["epsilon"] for number, line in federation.rounds.items() if number > 0]
    assert told == pytest.approx([gaussian(count) for count in (1, 2, 3)], abs=1e-6)
    assert [release.server_round for release in books_of(tmp_path).releases] == [1, 2, 3]


def test_nothing_is_recorded_that_was_not_noised(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = run(tmp_path, llama_directory)
    for number, line in federation.rounds.items():
        if number > 0:
            assert (line["train_loss"], line["num_tokens"], line["num_steps"], line["num_examples"]) == (None, 0, 0, 4)
    progress = [line for line in capsys.readouterr().err.splitlines() if "/4  client-" in line]
    assert len(progress) == 4 * 3
    assert all(line.endswith("  replied") for line in progress)


def test_the_full_model_takes_the_steps_of_equal_shares_where_nobody_tells_them(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def note(owner: Owner, *, num_steps: int) -> Score:
        taken.append(num_steps)
        return owner.rows["plug_in"]

    monkeypatch.setattr("ot_federated.model_owner.results.score_full_fine_tuning", note)
    settings = {"num-server-rounds": 1, "train.max-steps": 0, "train.local-epochs": 3}
    settings |= {"train.batch-size": 2, "evaluation.full-fine-tuning": True}
    run(tmp_path / "client", llama_directory, settings=settings)
    plain = run(tmp_path / "none", llama_directory, settings=settings | {"privacy.mode": "none"})
    # 16 examples at 4 clients in batches of 2, three times.
    assert taken == [plain.rounds[1]["num_steps"]] * 2 == [24] * 2


def test_two_runs_of_one_seed_differ_by_their_noise(llama_directory: Path, tmp_path: Path) -> None:
    one, other = (run(tmp_path / name, llama_directory, settings={"num-server-rounds": 1}) for name in ("a", "b"))
    size = sum(tensor.numel() for tensor in one.adapter.values())
    # Both sums have noise of 0.01; divided by 4; the length over so many numbers is sharp.
    assert distance(one, other) == pytest.approx(0.01 / 4 * math.sqrt(2 * size), rel=0.05)


@pytest.mark.usefixtures("silence")
def test_without_noise_and_clipping_it_is_the_plain_mean(llama_directory: Path, tmp_path: Path) -> None:
    # One round: what travels to the next is rounded to 16 bits, and a last bit decides to which side.
    settings = {"privacy.update-norm": 1e3, "train.max-steps": 0, "num-server-rounds": 1}
    noiseless = run(tmp_path / "client", llama_directory, settings=settings)
    plain = run(tmp_path / "none", llama_directory, settings=settings | {"privacy.mode": "none"})
    for name, values in plain.adapter.items():
        torch.testing.assert_close(noiseless.adapter[name], values, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("silence")
def test_a_missing_reply_and_untrue_counts_scale_nothing_up(llama_directory: Path, tmp_path: Path) -> None:
    """The sum is divided by the constant, whoever replies, and no client weighs more than another."""

    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply, partition=3):
            return [crash(reply)]
        if is_train_reply(reply, partition=0):
            reply.content.metric_records[metrics_key]["num-examples"] = 1000
        return [reply]

    settings = {"num-server-rounds": 1, "privacy.update-norm": 1e3}
    still = run(tmp_path / "still", llama_directory, settings=settings | {"train.learning-rate": 1e-12})
    honest, spoilt, halved = (
        run(tmp_path / str(number), llama_directory, settings=settings | changes, on_reply=on_reply)
        for number, (changes, on_reply) in enumerate(
            [({}, fail(partition=3, server_rounds=(1,))), ({}, spoil), ({"privacy.clients-per-round": 8}, spoil)]
        )
    )
    assert spoilt.digest == honest.digest
    assert spoilt.summary["federation"]["num_replies"] == 3
    assert distance(spoilt, still) > 0
    for name, base in still.adapter.items():
        torch.testing.assert_close(spoilt.adapter[name] - base, 2 * (halved.adapter[name] - base), atol=1e-6, rtol=1e-3)


def test_a_client_that_did_nothing_has_an_update_of_zero(llama_directory: Path, tmp_path: Path) -> None:
    """What travels is rounded to 16 bits: the rounding is not the client's doing, and must not use up its norm."""
    seen = []
    aggregate = client_level_privacy.NoisedMean.aggregate_train

    def spy(self: Any, server_round: int, replies: Any) -> Any:
        for reply in replies:
            for name, array in reply.content.array_records[arrays_key].items():
                seen.append(np.array_equal(array.numpy(), self.current_arrays[name].numpy()))
        return aggregate(self, server_round, replies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_level_privacy.NoisedMean, "aggregate_train", spy)
        run(tmp_path, llama_directory, settings={"train.learning-rate": 1e-12})
    assert len(seen) > 0
    assert all(seen)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
def test_every_mean_aggregator_runs_behind_it_and_resumes(name: str, llama_directory: Path, tmp_path: Path) -> None:
    settings = private | {"strategy.name": name, "num-server-rounds": 2}

    def cut(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=2):
            raise PowerCutError
        return [reply]

    with pytest.raises(PowerCutError):
        start(prepare_federation(tmp_path, llama_directory, settings=settings, on_reply=cut, **arguments))
    # Cut while the clients trained: nothing of round 2 was released, and nothing paid.
    assert books_of(tmp_path).epsilon() == pytest.approx(gaussian(1), abs=1e-6)
    federation = run(tmp_path, llama_directory, settings=settings | {"resume": True})
    assert federation.summary["privacy"]["epsilon"] == pytest.approx(gaussian(2), abs=1e-6)
    assert all(torch.isfinite(tensor).all() for tensor in federation.adapter.values())


def test_the_adaptive_norm_moves_and_survives_a_restart(llama_directory: Path, tmp_path: Path) -> None:
    settings = {
        "privacy.adaptive-clipping": True,
        "privacy.noise-multiplier": 0.1,
        "privacy.quantile-learning-rate": 1.0,
    }
    first = run(tmp_path, llama_directory, settings=settings)
    norms = [release.clipping_norm for release in books_of(tmp_path).releases]
    # Updates are far longer than 0.01, all are clipped; the clipped share has a noise of 1/20.
    assert norms[0] == 0.01
    assert 0.01 * math.exp(0.25) < norms[1] < norms[2]
    state = first.output / "checkpoints" / "round-0003"
    for path in state.iterdir():
        path.unlink()
    state.rmdir()
    run(tmp_path, llama_directory, settings=settings | {"resume": True})
    releases = books_of(tmp_path).releases
    assert [release.server_round for release in releases] == [1, 2, 3, 3]
    assert releases[3].clipping_norm == releases[2].clipping_norm


# ---- Failures -------------------------------------------------------------------------------------------------


def test_a_round_with_an_errored_reply_is_noised_and_paid(llama_directory: Path, tmp_path: Path) -> None:
    CountedRandom.num_draws = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_level_privacy, "SecureRandom", CountedRandom)
        federation = run(tmp_path, llama_directory, on_reply=fail(partition=1, server_rounds=(1, 2, 3)))
    assert federation.summary["privacy"]["epsilon"] == pytest.approx(gaussian(3), abs=1e-6)
    assert federation.summary["federation"]["num_replies"] == 9
    assert CountedRandom.num_draws == 3 * len(federation.adapter)


def test_a_run_that_loses_a_client_says_so_at_its_end(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With privacy or without: a client that is missing in every round is not in the result."""
    settings = {"num-server-rounds": 3, "train.max-steps": 1}
    federation = run_federation(
        tmp_path,
        llama_directory,
        settings=settings,
        num_clients=3,
        on_reply=fail(partition=1, server_rounds=(1, 2, 3)),
    )
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "  WARNING: " in line]
    assert warning.endswith(
        "WARNING: 3 updates are missing from the result, which 6 replies in 3 rounds made: client-0001 in 3 rounds "
        "(last: Flower reports error 2: <class 'MemoryError'>)"
    )
    assert federation.summary["federation"]["failed_clients"] == {
        "client-0001": {"num_rounds": 3, "last_reason": "Flower reports error 2: <class 'MemoryError'>"}
    }


def test_a_run_that_loses_nobody_warns_of_nothing(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = run_federation(tmp_path, llama_directory, settings={"train.max-steps": 1})
    assert federation.summary["federation"]["failed_clients"] == {}
    assert "  WARNING: " not in capsys.readouterr().err


# ---- Who trains, and what is refused --------------------------------------------------------------------------


def test_no_more_clients_train_than_the_sum_is_divided_by(llama_directory: Path, tmp_path: Path) -> None:
    federation = run(tmp_path, llama_directory, settings={"privacy.clients-per-round": 2, "num-server-rounds": 2})
    assert [len(line["clients"]) for number, line in federation.rounds.items() if number > 0] == [2, 2]


def test_delta_is_compared_with_all_connected_clients(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"privacy.target-delta": 0.05, "privacy.clients-per-round": 2, "privacy.noise-multiplier": 5.0}
    with pytest.raises(ConfigError, match=r"privacy.target-delta=0.05 is not below 1 / 20 connected clients"):
        run(tmp_path, llama_directory, settings=settings, num_clients=20, num_rows=40)
    assert books_of(tmp_path).releases == []


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"])
def test_aggregators_that_compare_single_updates_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy.name='{name}', which compares single updates.*fedavg, "):
        parse_run_config(private | {"strategy.name": name})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"privacy.clients-per-round": 0}, "clients-per-round=0: it must be set, to at least strategy.min-nodes=2"),
        ({"strategy.min-nodes": 5}, "clients-per-round=4.*strategy.min-nodes=5"),
        ({"privacy.clients-per-round": 200, "privacy.target-delta": 0.005}, "0.005 is not below 1 / 200 clients"),
        ({"privacy.update-norm": 0.0}, "privacy.update-norm=0.0 is out of range"),
        ({"privacy.target-quantile": 1.5}, "privacy.target-quantile=1.5 is out of range"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_run_config(private | settings)


def test_another_target_is_refused_where_clients_have_planned_with_it(llama_directory: Path, tmp_path: Path) -> None:
    """Only the server's own noise may be planned anew."""
    settings = {"num-server-rounds": 1, "train.max-steps": 1}
    federation = run_federation(tmp_path, llama_directory, settings=settings)
    saved = federation.output / "run_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"privacy.mode": "example"}))
    changed = settings | {"resume": True, "privacy.mode": "example", "privacy.target-epsilon": 9.0}
    with pytest.raises(Exception, match=r"resume=true with privacy.target-epsilon=9.0"):
        run_federation(tmp_path, llama_directory, settings=changed)


def test_an_owner_who_trusts_no_server_refuses(llama_directory: Path, tmp_path: Path) -> None:
    """The noise comes after the server has seen the update: a policy that requires privacy means the owner's own."""
    policy = tmp_path / "policy.toml"
    policy.write_text("max-epsilon = 8.0\n")
    with pytest.raises(AggregationError, match=r"without example-level privacy \(require-privacy = true\)"):
        run(tmp_path, llama_directory, node_config={"policy": str(policy)})
    assert books_of(tmp_path).releases == []
