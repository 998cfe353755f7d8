"""Clipping, noise and the adaptive norm, on replies made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from ot_federated.config import mean_aggregators
from ot_federated.errors import ConfigError
from ot_federated.secure_random import SecureRandom
from simulations.in_process import InProcessGrid
from strategies.aggregators import aggregator_state, build_aggregator, restore_aggregator
from strategies.client_level_privacy import (
    AdaptiveClipping,
    FixedClipping,
    NoisedMean,
    add_clipped,
    describe_noise,
    protect_clients,
)
from strategies.exchange import FixedNodes

shapes = {"bottom.weight": (3, 4), "top.bias": (5,)}
num_numbers = 17
Update = dict[str, np.ndarray]


class Silence(SecureRandom):
    """No noise: what is left is what clipping and dividing made."""

    def draw_normals(self, num: int) -> np.ndarray:
        return np.zeros(num)


@pytest.fixture(autouse=True)
def server() -> None:
    """Messages can be made in a process that is a server, or a client, alone."""
    InProcessGrid(ClientApp(), run_config={}, num_clients=1)


@pytest.fixture
def paid() -> list[tuple[int, float]]:
    return []


@pytest.fixture
def pay(paid: list[tuple[int, float]]) -> Callable[[int, float], float]:
    def note(server_round: int, clipping_norm: float) -> float:
        paid.append((server_round, clipping_norm))
        return float(len(paid))

    return note


def draw_update(seed: int, *, norm: float = 1.0, shapes: dict[str, tuple[int, ...]] = shapes) -> Update:
    """Return a random update of the given norm over all arrays."""
    dice = np.random.default_rng(seed)
    update = {name: dice.normal(size=shape) for name, shape in shapes.items()}
    scale = norm / math.sqrt(sum(float((values**2).sum()) for values in update.values()))
    return {name: (values * scale).astype(np.float32) for name, values in update.items()}


def record(arrays: Update) -> ArrayRecord:
    return ArrayRecord({name: Array(values.astype(np.float32)) for name, values in arrays.items()})


def reply(update: Update, base: Update, *, num_examples: int = 1) -> Message:
    content = RecordDict(
        {
            "arrays": record({name: base[name] + values for name, values in update.items()}),
            "metrics": MetricRecord({"num-examples": num_examples}),
        }
    )
    return Message(content, 7, "train")


def zeros(shapes: dict[str, tuple[int, ...]] = shapes) -> Update:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def aggregate(strategy: NoisedMean, replies: Sequence[Message], base: Update, *, server_round: int = 1) -> Update:
    strategy.current_arrays = record(base)
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def fixed(pay, *, num_clients: int = 4, z: float = 1.0, norm: float = 0.5, random=None, inner=None) -> FixedClipping:
    return FixedClipping(
        inner or FedAvg(),
        noise_multiplier=z,
        clipping_norm=norm,
        num_sampled_clients=num_clients,
        before_release=pay,
        random=random,
    )


def adaptive(pay, *, num_clients: int = 100, z: float = 1.0, norm: float = 1.0, random=None, **settings):
    values = {"target_quantile": 0.5, "quantile_learning_rate": 0.2} | settings
    return AdaptiveClipping(
        FedAvg(),
        noise_multiplier=z,
        initial_clipping_norm=norm,
        num_sampled_clients=num_clients,
        before_release=pay,
        random=random,
        **values,
    )


def stack(arrays: Update) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


# ---- Clipping, weights, divisor -------------------------------------------------------------------------------


def test_updates_are_clipped_over_all_arrays_and_divided_by_the_constant(pay) -> None:
    base = draw_update(0, norm=30.0)
    updates = [draw_update(1, norm=4.0), draw_update(2, norm=0.25), draw_update(3, norm=0.5)]
    mean = aggregate(fixed(pay, random=Silence()), [reply(update, base) for update in updates], base)
    by_hand = stack(base) + (stack(updates[0]) * 0.5 / 4.0 + stack(updates[1]) + stack(updates[2])) / 4
    np.testing.assert_allclose(stack(mean), by_hand, atol=1e-5)


def test_weights_are_equal_whatever_num_examples_says(pay) -> None:
    base = zeros()
    updates = [draw_update(1, norm=0.4), draw_update(2, norm=0.4)]
    means = [
        aggregate(
            fixed(pay, random=Silence()),
            [reply(update, base, num_examples=count) for update, count in zip(updates, counts, strict=True)],
            base,
        )
        for counts in [(1, 1), (1, 10**6), (999, 3)]
    ]
    np.testing.assert_array_equal(stack(means[0]), stack(means[1]))
    np.testing.assert_array_equal(stack(means[0]), stack(means[2]))


@pytest.mark.parametrize("norm", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("left_out", [0, 5, 9])
def test_one_client_moves_the_released_sum_by_at_most_the_norm(pay, norm: float, left_out: int) -> None:
    """Nine clients pull one way, one the other: were the sum divided by the replies, it would move by twice that."""
    base, pull = zeros(), draw_update(1, norm=1e4)
    updates = [{name: -values if number == 5 else values for name, values in pull.items()} for number in range(10)]
    strategy = fixed(pay, num_clients=10, norm=norm, random=Silence())
    with_all = aggregate(strategy, [reply(update, base, num_examples=50) for update in updates], base)
    rest = [update for number, update in enumerate(updates) if number != left_out]
    without = aggregate(strategy, [reply(update, base, num_examples=50) for update in rest], base)
    distance = 10 * np.linalg.norm(stack(with_all).astype(np.float64) - stack(without))
    assert distance == pytest.approx(norm, rel=1e-5)  # at most the norm, and as all are clipped no less


def test_an_update_of_zero_is_an_update(pay) -> None:
    base = draw_update(0, norm=3.0)
    mean = aggregate(fixed(pay, random=Silence()), [reply(zeros(), base) for _ in range(3)], base)
    np.testing.assert_array_equal(stack(mean), stack(base))


def test_adding_up_is_in_float64() -> None:
    total = {"w": np.zeros(1)}
    for value in (1.0, 1e-12):
        add_clipped(total, ArrayRecord({"w": Array(np.array([value]))}), {"w": np.zeros(1)}, clipping_norm=2.0)
    assert total["w"][0] == 1.0 + 1e-12


# ---- Noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("z", "norm", "num_clients", "num_replies"), [(1.0, 0.5, 4, 4), (3.0, 0.1, 50, 1)])
def test_noise_on_updates_of_zero_has_its_standard_deviation(
    pay, z: float, norm: float, num_clients: int, num_replies: int
) -> None:
    """200000 numbers: the estimate has a standard deviation of 0.16 %, so 2 % is never missed by chance."""
    large = {"a": (400, 250), "b": (100_000,)}
    replies = [reply(zeros(large), zeros(large)) for _ in range(num_replies)]
    mean = aggregate(fixed(pay, z=z, norm=norm, num_clients=num_clients), replies, zeros(large))
    for values in mean.values():
        assert values.std() == pytest.approx(z * norm / num_clients, rel=0.02)
        assert abs(values.mean()) < 5 * z * norm / num_clients / math.sqrt(values.size)
    assert abs(np.corrcoef(mean["a"].ravel(), mean["b"])[0, 1]) < 0.02


def test_noise_of_adaptive_clipping_belongs_to_the_norm_that_was_clipped_to(pay) -> None:
    large = {"a": (200_000,)}
    strategy = adaptive(pay, z=2.0, norm=0.5, num_clients=100, quantile_learning_rate=5.0)
    mean = aggregate(strategy, [reply(zeros(large), zeros(large))] * 100, zeros(large))
    share = 1 / math.sqrt(1 / 2.0**2 - 1 / 10.0**2)  # Andrew et al., theorem 1 with sigma_b = 100 / 20
    assert mean["a"].std() == pytest.approx(share * 0.5 / 100, rel=0.02)
    assert strategy.clipping_norm < 0.25


def test_noise_is_new_each_time_whatever_numpy_was_seeded_with(pay) -> None:
    means = []
    for _ in range(2):
        np.random.seed(0)  # Flower's noise comes from there
        means.append(stack(aggregate(fixed(pay), [reply(zeros(), zeros())], zeros())))
    assert not np.isclose(means[0], means[1]).any()


def test_the_release_is_paid_before_any_noise_is_drawn(pay, paid) -> None:
    class Watched(SecureRandom):
        def draw_normals(self, num: int) -> np.ndarray:
            assert paid == [(3, 0.5)]
            return super().draw_normals(num)

    strategy = fixed(pay, random=Watched())
    aggregate(strategy, [reply(zeros(), zeros())], zeros(), server_round=3)
    assert strategy.epsilon == 1.0

    def refuse(server_round: int, clipping_norm: float) -> float:
        raise ConfigError("spent")

    with pytest.raises(ConfigError, match="spent"):
        aggregate(fixed(refuse, random=Watched()), [reply(zeros(), zeros())], zeros())


# ---- The aggregators behind it --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mean_aggregators)
def test_the_aggregator_gets_nothing_but_the_noised_mean(name: str, pay) -> None:
    """Over two rounds: the same as the bare aggregator, given the noised mean as its only reply."""
    base = draw_update(0, norm=3.0)
    behind = protect_clients(
        build_aggregator(name, server_learning_rate=0.0),
        noise_multiplier=1.0,
        delta=1e-5,
        update_norm=0.5,
        adaptive_clipping=False,
        target_quantile=0.5,
        quantile_learning_rate=0.2,
        clients_per_round=3,
        before_release=pay,
    )
    bare = build_aggregator(name).strategy
    assert isinstance(behind.strategy, FixedClipping)
    weights = {"private": base, "bare": base}
    for server_round in (1, 2):
        noised: list[ArrayRecord] = []
        inner = behind.strategy.strategy
        original = inner.aggregate_train

        def spy(number: int, replies: Sequence[Message], original=original, noised=noised):
            noised += [message.content.array_records["arrays"] for message in replies]
            return original(number, replies)

        inner.aggregate_train = spy
        grid = FixedNodes(None, [1])  # type: ignore[arg-type]  # nothing is sent
        list(behind.strategy.configure_train(server_round, record(weights["private"]), ConfigRecord(), grid))
        list(bare.configure_train(server_round, record(weights["bare"]), ConfigRecord(), grid))
        replies = [reply(draw_update(seed), weights["private"]) for seed in (1, 2, 3)]
        weights["private"] = aggregate(behind.strategy, replies, weights["private"], server_round=server_round)
        inner.aggregate_train = original
        (mean,) = noised
        only = Message(RecordDict({"arrays": mean, "metrics": MetricRecord({"num-examples": 1})}), 7, "train")
        arrays, _ = bare.aggregate_train(server_round, [only])
        weights["bare"] = {key: array.numpy() for key, array in arrays.items()}
        np.testing.assert_allclose(stack(weights["private"]), stack(weights["bare"]), rtol=1e-6)
        # Not the exact mean: the noise is there, of a third of the norm for each of the numbers.
        exact = stack(base) if server_round == 1 else None
        if exact is not None:
            assert np.abs(stack({k: a.numpy() for k, a in mean.items()}) - exact).max() > 0.05
    state = aggregator_state(behind.strategy)
    assert state.pop("clipping_norm") == 0.5
    np.testing.assert_equal(state, aggregator_state(bare))


def test_state_comes_back_through_the_wrapper(pay) -> None:
    settings = {"delta": 1e-5, "target_quantile": 0.5, "quantile_learning_rate": 1.0, "before_release": pay}

    def build():
        return protect_clients(
            build_aggregator("fedadam"),
            noise_multiplier=1.0,
            update_norm=2.0,
            adaptive_clipping=True,
            clients_per_round=100,
            **settings,
        ).strategy

    first, second = build(), build()
    list(first.configure_train(1, record(zeros()), ConfigRecord(), FixedNodes(None, [1])))
    aggregate(first, [reply(draw_update(1), zeros())] * 100, zeros())
    state = aggregator_state(first)
    assert state["clipping_norm"] != 2.0
    restore_aggregator(second, state)
    np.testing.assert_equal(aggregator_state(second), state)
    assert isinstance(second.clipping_norm, float)


# ---- The adaptive norm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.05, 6.0])
def test_the_norm_converges_to_the_quantile(pay, quantile: float, start: float) -> None:
    """From far below (everything is clipped: Flower's own goes to 0) and far above."""
    num_clients = 200
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, num_clients)
    strategy = adaptive(pay, num_clients=num_clients, z=1.0, norm=start, target_quantile=quantile)
    replies = [reply({"w": np.array([norm], np.float32)}, zeros({"w": (1,)})) for norm in norms]
    seen = []
    for server_round in range(120):
        aggregate(
            strategy,
            [Message(one.content, 7, "train") for one in replies],
            zeros({"w": (1,)}),
            server_round=server_round,
        )
        seen.append(strategy.clipping_norm)
    share_below = float(np.mean(norms <= np.exp(np.mean(np.log(seen[-40:])))))
    assert share_below == pytest.approx(quantile, abs=0.06)


def test_the_clipped_share_is_centred_noised_and_divided_by_the_constant(pay) -> None:
    """One client more or less moves it by 1/2 client; 4000 draws: 2 % is 1.8 standard deviations of 1.1 %."""
    strategy = adaptive(pay, num_clients=100, quantile_learning_rate=1.0)
    steps = []
    for _ in range(4000):
        strategy.clipping_norm = 1.0
        strategy.follow_quantile(30, 80)
        steps.append(math.log(strategy.clipping_norm))
    # 30 of 80 were clipped: 10 fewer than half of them, of 100; the target is that half are clipped.
    assert np.mean(steps) == pytest.approx(-0.10, abs=0.004)
    assert np.std(steps) == pytest.approx(5 / 100, rel=0.05)
    silent = adaptive(pay, num_clients=100, quantile_learning_rate=1.0, random=Silence())
    moved = []
    for counts in [(30, 80), (31, 81), (30, 81)]:
        silent.clipping_norm = 1.0
        silent.follow_quantile(*counts)
        moved.append(math.log(silent.clipping_norm))
    assert [(value - moved[0]) * 100 for value in moved[1:]] == pytest.approx([0.5, -0.5])


def test_adaptive_clipping_with_too_few_clients_is_refused_with_the_remedy(pay) -> None:
    with pytest.raises(ConfigError, match=r"below privacy.clients-per-round / 10 = 1, and it is 1\.5.*fixed norm"):
        adaptive(pay, num_clients=10, z=1.5)


# ---- What a run is told ---------------------------------------------------------------------------------------


def describe(pay, *, num_clients: int, num_parameters: int) -> str:
    aggregator = protect_clients(
        build_aggregator("fedavg"),
        noise_multiplier=1.0,
        delta=1e-5,
        update_norm=0.5,
        adaptive_clipping=False,
        target_quantile=0.5,
        quantile_learning_rate=0.2,
        clients_per_round=num_clients,
        before_release=pay,
    )
    return describe_noise(aggregator, num_parameters=num_parameters)


def test_the_noise_is_told_and_few_clients_are_warned(pay) -> None:
    assert "2.5 times as long" in describe(pay, num_clients=4, num_parameters=100)
    assert "privacy.mode=example" in describe(pay, num_clients=4, num_parameters=100)
    assert "privacy.mode=example" in describe(pay, num_clients=400, num_parameters=10**6)
    assert "privacy.mode=example" not in describe(pay, num_clients=400, num_parameters=10**4)


def test_the_noise_that_is_told_is_the_noise_that_comes(pay) -> None:
    large = {"a": (10_000,)}
    strategy = fixed(pay, num_clients=20, norm=0.5)
    mean = aggregate(strategy, [reply(zeros(large), zeros(large))], zeros(large))
    assert np.linalg.norm(mean["a"]) / 0.5 == pytest.approx(5.0, rel=0.05)
    assert "5 times as long" in describe(pay, num_clients=20, num_parameters=10_000)
