"""Flower's aggregators by their name in the run config, and their state between rounds.

Papers: FedAvg https://arxiv.org/abs/1602.05629, FedProx https://arxiv.org/abs/1812.06127, FedAvgM
https://arxiv.org/abs/1909.06335, FedAdam, FedYogi and FedAdagrad https://arxiv.org/abs/2003.00295, FedMedian and
FedTrimmedAvg https://arxiv.org/abs/1803.01498, Krum and MultiKrum https://arxiv.org/abs/1703.02757, Bulyan
https://arxiv.org/abs/1802.07927. The mathematics is Flower's; what is ours is the table, the number of replies
each needs, a word where there are too few to trim, and saving what it remembers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from ot_federated.errors import ConfigError, nearest_match
from ot_federated.logs import logger

default_server_learning_rates = {"fedavgm": 1.0, "fedadam": 1e-3, "fedyogi": 1e-3, "fedadagrad": 1e-3}
aggregator_names = (
    *("fedavg", "fedprox", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"),
    *default_server_learning_rates,
)
_array_states = ("m_t", "v_t")


@dataclass(frozen=True)
class Aggregator:
    """A Flower aggregator, and what it needs to know of a round's replies.

    Attributes:
        strategy: Flower's strategy, or a wrapper around one.
        min_replies: Number of replies below which its guarantee is void.
        selects_rest: Whether it averages all replies but the malicious (MultiKrum without a number of its own).
        max_clients: Largest number of clients that may train in a round; 0: no limit.
        delta: Delta of client-level privacy, which must be below 1 over the number of clients; 0: without privacy.
    """

    strategy: Strategy
    min_replies: int = 1
    selects_rest: bool = False
    max_clients: int = 0
    delta: float = 0.0


def build_aggregator(
    name: str,
    *,
    proximal_mu: float = 0.0,
    server_learning_rate: float = 0.0,
    server_momentum: float = 0.9,
    num_malicious_nodes: int = 1,
    num_nodes_to_select: int = 0,
    trim_fraction: float = 0.2,
) -> Aggregator:
    """Build an aggregator that takes every node it is given; sampling and waiting are our strategy's work.

    Args:
        name: One of :data:`aggregator_names`.
        proximal_mu: Weight of the proximal term that FedProx tells its clients.
        server_learning_rate: Step of the server's optimizer; 0 for the default.
        server_momentum: Momentum of FedAvgM, in [0, 1].
        num_malicious_nodes: Faulty clients that Krum, MultiKrum and Bulyan withstand.
        num_nodes_to_select: Updates that MultiKrum averages; 0 for all but the malicious.
        trim_fraction: Share that FedTrimmedAvg cuts off each end, in [0, 0.5).

    Raises:
        ConfigError: If the name is unknown.
    """
    everyone: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 0,
        "min_available_nodes": 1,
    }
    if server_learning_rate and name not in default_server_learning_rates:
        logger.warning("strategy.server-learning-rate=%s is ignored by %s.", server_learning_rate, name)
    step = server_learning_rate or default_server_learning_rates.get(name, 1.0)
    f = num_malicious_nodes
    match name:
        case "fedavg":
            return Aggregator(flower.FedAvg(**everyone))
        case "fedprox":
            return Aggregator(flower.FedProx(**everyone, proximal_mu=proximal_mu))
        case "fedavgm":
            aggregator = flower.FedAvgM(**everyone, server_learning_rate=step, server_momentum=server_momentum)
            return Aggregator(aggregator)
        case "fedadam":
            return Aggregator(flower.FedAdam(**everyone, eta=step))
        case "fedyogi":
            return Aggregator(flower.FedYogi(**everyone, eta=step))
        case "fedadagrad":
            return Aggregator(flower.FedAdagrad(**everyone, eta=step))
        case "fedmedian":
            return Aggregator(flower.FedMedian(**everyone))
        case "fedtrimmedavg":
            return Aggregator(FedTrimmedAvg(**everyone, beta=trim_fraction))
        case "krum":
            return Aggregator(flower.Krum(**everyone, num_malicious_nodes=f), 2 * f + 3)
        case "multikrum":
            multi = flower.MultiKrum(**everyone, num_malicious_nodes=f, num_nodes_to_select=max(1, num_nodes_to_select))
            return Aggregator(multi, 2 * f + 3, selects_rest=num_nodes_to_select == 0)
        case "bulyan":
            return Aggregator(flower.Bulyan(**everyone, num_malicious_nodes=f), 4 * f + 3)
        case _:
            raise ConfigError(
                f"strategy.name={name!r} is unknown{nearest_match(name, aggregator_names)}. Known: "
                f"{', '.join(sorted(aggregator_names))}."
            )


class FedTrimmedAvg(flower.FedTrimmedAvg):
    """Flower's trimmed mean, which warns once where it trims nothing."""

    _has_warned = False

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of what is left when the ends are cut off."""
        replies = list(replies)
        if not self._has_warned and int(self.beta * len(replies)) == 0:
            self._has_warned = True
            logger.warning(
                "strategy.trim-fraction=%g cuts nothing off %d replies, whose mean withstands no faulty client. %s",
                self.beta,
                len(replies),
                describe_trimming(self.beta, num_replies=len(replies)),
            )
        return super().aggregate_train(server_round, replies)


def describe_trimming(fraction: float, *, num_replies: int) -> str:
    """Return the least number of replies that ``fraction`` cuts, and the least fraction that cuts ``num_replies``."""
    parts = []
    if fraction >= 1e-9:  # a smaller one cuts no number of replies that there can be
        num_cut = math.ceil(1 / fraction)
        # The float next to 1/49, for one, times 49 is a little less than 1.
        num_cut += int(fraction * num_cut) == 0
        parts.append(f"It cuts from {num_cut} replies on.")
    # Four decimals, rounded up; at half nothing would be left of two.
    if num_replies > 2:
        parts.append(f"Of {num_replies} replies strategy.trim-fraction={math.ceil(1e4 / num_replies) / 1e4:g} cuts.")
    else:
        parts.append("Of fewer than 3 replies none can be cut.")
    return " ".join(parts)


def fit_selection(aggregator: Aggregator, *, num_replies: int) -> None:
    """Tell MultiKrum how many updates "all but the malicious" are, now that the replies are counted."""
    if aggregator.selects_rest and isinstance(aggregator.strategy, flower.MultiKrum):
        rest = num_replies - aggregator.strategy.num_malicious_nodes
        aggregator.strategy.num_nodes_to_select = max(1, rest)


def aggregator_state(aggregator: Strategy) -> dict[str, np.ndarray]:
    """Return what the aggregator, and a wrapper around it, remembers between rounds, as arrays by name."""
    state: dict[str, np.ndarray] = {}
    inner = getattr(aggregator, "strategy", aggregator)
    for attribute in _array_states:
        for name, array in (getattr(inner, attribute, None) or {}).items():
            state[f"{attribute}/{name}"] = np.asarray(array)
    for index, array in enumerate(getattr(inner, "momentum_vector", None) or []):
        state[f"momentum_vector/{index:06d}"] = np.asarray(array)
    if hasattr(aggregator, "residual_arrays"):
        state |= {f"residual/{name}": array for name, array in aggregator.residual_arrays().items()}
    if hasattr(aggregator, "clipping_norm"):
        state["clipping_norm"] = np.array([aggregator.clipping_norm])  # safetensors gives a scalar back as a vector
    return state


def restore_aggregator(aggregator: Strategy, state: dict[str, np.ndarray]) -> None:
    """Give the aggregator, and a wrapper around it, back what :func:`aggregator_state` returned."""
    inner: Any = getattr(aggregator, "strategy", aggregator)
    for attribute in _array_states:
        saved = {key.partition("/")[2]: array for key, array in state.items() if key.startswith(attribute + "/")}
        if saved:
            setattr(inner, attribute, saved)
    momentum = [state[key] for key in sorted(state) if key.startswith("momentum_vector/")]
    if momentum:
        inner.momentum_vector = momentum  # only FedAvgM saved one
    residual = {key.partition("/")[2]: array for key, array in state.items() if key.startswith("residual/")}
    if residual:
        aggregator.restore_residual(residual)  # type: ignore[attr-defined]  # only StackedLora saved one
    if "clipping_norm" in state:
        aggregator.clipping_norm = state["clipping_norm"].item()  # type: ignore[attr-defined]  # client-level privacy
