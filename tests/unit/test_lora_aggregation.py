"""LoRA's products are aggregated exactly: against the dense mean of B A, over rounds, and after a restart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError
from simulations.in_process import InProcessGrid
from strategies.aggregators import aggregator_state, build_aggregator, restore_aggregator
from strategies.lora_aggregation import StackedLora, interpolate_products, stack_products, truncate

outputs, inputs, rank = 7, 9, 2
module = "top.0.mlp.up_proj"
name_a, name_b = f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"
State = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def server() -> None:
    """Messages can be made in a process that is a server, or a client, alone."""
    InProcessGrid(ClientApp(), run_config={}, num_clients=1)


def random_state(seed: int, *, like: State | None = None) -> State:
    """Return a client's state: a random one, or a random step away from ``like``."""
    random = np.random.default_rng(seed)
    shapes = {name_a: (rank, inputs), name_b: (outputs, rank), "head.bias": (3,)}
    return {
        name: (random.normal(size=shape) + (0 if like is None else like[name])).astype(np.float32)
        for name, shape in shapes.items()
    }


def reply(state: State, *, num_examples: int = 1) -> Message:
    arrays = ArrayRecord({name: Array(array) for name, array in state.items()})
    metrics = MetricRecord({"num-examples": num_examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 7, "train")


def product(state: State) -> NDArray[Any]:
    return np.asarray(state[name_b].astype(float) @ state[name_a].astype(float))


def aggregate(strategy: Any, states: list[State], counts: list[int]) -> State:
    replies = [reply(state, num_examples=count) for state, count in zip(states, counts, strict=True)]
    arrays, _ = strategy.aggregate_train(1, replies)
    return {name: array.numpy() for name, array in arrays.items()}


def build(aggregation: str, name: str = "fedavg") -> Any:
    return stack_products(build_aggregator(name), aggregation=aggregation).strategy


def residual_product(strategy: StackedLora) -> NDArray[Any]:
    a, b = strategy.residual[module]
    return np.asarray(b @ a)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_exact_is_the_weighted_mean_of_products_and_the_mean_of_factors_is_not(name: str) -> None:
    states, counts = [random_state(seed) for seed in (1, 2, 3)], [1, 5, 2]
    dense = sum(count / 8 * product(state) for count, state in zip(counts, states, strict=True))
    exact = build("exact", name)
    result = aggregate(exact, states, counts)
    np.testing.assert_allclose(product(result) + residual_product(exact), dense, atol=1e-6)
    assert result[name_a].shape == (rank, inputs)
    naive = aggregate(build("mean", name), states, counts)
    assert np.abs(product(naive) - dense).max() > 0.3
    # What is no part of a pair is the plain mean.
    np.testing.assert_array_equal(result["head.bias"], naive["head.bias"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5])
def test_interpolated_products_are_the_best_of_their_rank(alpha: float) -> None:
    before, after = ({name: torch.from_numpy(array) for name, array in random_state(seed).items()} for seed in (1, 2))
    found = {name: tensor.numpy() for name, tensor in interpolate_products(before, after, alpha).items()}
    ends = [product({name: tensor.numpy() for name, tensor in state.items()}) for state in (before, after)]
    u, values, vt = np.linalg.svd((1 - alpha) * ends[0] + alpha * ends[1])
    np.testing.assert_allclose(product(found), (u[:, :rank] * values[:rank]) @ vt[:rank], atol=1e-5)
    expected = (1 - alpha) * before["head.bias"] + alpha * after["head.bias"]
    np.testing.assert_allclose(found["head.bias"], expected.numpy(), atol=1e-6)


def test_truncated_is_the_best_of_its_rank() -> None:
    states = [random_state(seed) for seed in (1, 2, 3)]
    dense = sum(product(state) for state in states) / 3
    truncated = build("truncated")
    error = np.linalg.norm(dense - product(aggregate(truncated, states, [1, 1, 1])))
    best = np.sqrt(np.sum(np.linalg.svd(dense)[1][rank:] ** 2))
    assert error == pytest.approx(best, rel=1e-5)
    assert truncated.lost_fraction == pytest.approx(best / np.linalg.norm(dense), rel=1e-5)
    assert not truncated.residual
    naive = product(aggregate(build("mean"), states, [1, 1, 1]))
    assert np.linalg.norm(dense - naive) > 1.2 * error


def test_exact_over_rounds_is_the_sum_of_mean_changes() -> None:
    exact = build("exact")
    state, total = random_state(0), product(random_state(0))
    for server_round in range(1, 5):
        states = [random_state(10 * server_round + client, like=state) for client in range(3)]
        total = total + sum(product(client) - product(state) for client in states) / 3
        state = aggregate(exact, states, [1, 1, 1])
        np.testing.assert_allclose(product(state) + residual_product(exact), total, atol=1e-4)
        # The residual never has a higher rank than the layer, however many rounds there are.
        assert len(exact.residual[module][0]) <= min(outputs, inputs) - rank


def test_clients_that_agree_lose_nothing() -> None:
    state = random_state(1)
    truncated = build("truncated")
    np.testing.assert_allclose(product(aggregate(truncated, [state, state], [1, 1])), product(state), atol=1e-6)
    assert truncated.lost_fraction == 0


def test_directions_that_nobody_uses_stay_trainable() -> None:
    """An A of zeros beside a B of zeros would never move again."""
    state = random_state(1)
    state[name_b][:] = 0
    result = aggregate(build("exact"), [state, state], [1, 1])
    assert not result[name_b].any()
    np.testing.assert_array_equal(result[name_a], state[name_a])
    state[name_b][:, 0] = 1
    result = aggregate(build("exact"), [state, state], [1, 1])
    np.testing.assert_allclose(product(result), product(state), atol=1e-6)
    assert (np.linalg.norm(result[name_a], axis=1) > 0.1).all()


def test_the_size_of_a_stays() -> None:
    like = np.random.default_rng(0).normal(size=(rank, inputs))
    pairs = [(1e-3 * like, 1e-3 * np.ones((outputs, rank))), (like[::-1], np.eye(outputs, rank))]
    (a, _), _ = truncate(pairs, like=like)
    assert np.mean(np.sum(a**2, axis=1)) == pytest.approx(np.mean(np.sum(like**2, axis=1)))


def test_a_restarted_owner_has_its_residual() -> None:
    exact, restarted = build("exact"), build("exact")
    first = aggregate(exact, [random_state(seed) for seed in (1, 2)], [1, 1])
    restore_aggregator(restarted, aggregator_state(exact))
    np.testing.assert_allclose(residual_product(restarted), residual_product(exact), rtol=0)
    states = [random_state(seed, like=first) for seed in (3, 4)]
    aggregate(exact, states, [1, 1])
    aggregate(restarted, states, [1, 1])
    np.testing.assert_allclose(residual_product(restarted), residual_product(exact), rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuning.method": "full"}, "everywhere else the plain mean is exact"),
        ({"tuning.freeze-lora-a": True}, "everywhere else the plain mean is exact"),
        ({"strategy.name": "fedadam"}, "works on A and B apart"),
        ({"strategy.secure-aggregation": True}, r"Take tuning\.freeze-lora-a=true"),
        ({"privacy.mode": "client", "privacy.clients-per-round": 2}, r"Take tuning\.freeze-lora-a=true"),
    ],
)
def test_settings_that_do_not_go_with_it(settings: dict[str, Any], message: str) -> None:
    lora = {"tuning.method": "lora", "tuning.lora-aggregation": "exact"}
    assert parse_run_config(lora).tuning.lora_aggregation == "exact"
    with pytest.raises(ConfigError, match=message):
        parse_run_config(lora | settings)
