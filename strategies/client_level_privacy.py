"""Client-level differential privacy at the server: clip every update, add Gaussian noise to their sum.

H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang, "Learning Differentially Private Recurrent Language Models",
ICLR 2018, https://arxiv.org/abs/1710.06963: flat clipping, equal weights, the estimator with a fixed divisor. Galen
Andrew, Om Thakkar, H. Brendan McMahan, Swaroop Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
NeurIPS 2021, https://arxiv.org/abs/1905.03871: the norm follows a quantile of the updates' norms.

A round releases, from updates d_i clipped to norm C and n clients a round::

    (sum clip(d_i) + N(0, (s C)^2)) / n                        s = z with a fixed norm
    1/2 + (sum (1[|d_i| <= C] - 1/2) + N(0, (n/20)^2)) / n     adaptive alone; then 1/s^2 = 1/z^2 - 1/(n/10)^2

One client's presence moves the first sum by at most C and the second by exactly 1/2, so both together are one Gaussian
mechanism of noise multiplier z (Andrew et al., theorem 1), and n is no part of the mechanism. It must not be the number
of replies: a mean over k replies moves by more than C / k when the k-th is left out, because all others gain weight.

The noised mean is what one of Flower's aggregators then gets, as the one reply of the round: whatever it makes of it,
and remembers of it, is post-processing.

Flower has the two classes for this, and the ones below are theirs: constructors, the arithmetic of the noise shares,
``configure_train`` and the rest. ``aggregate_train`` is not, because in Flower 1.41 it

- skips the round when any reply is an error, and (with an accountant) when a reply is missing;
- divides by the norm, so that an update of zero raises ZeroDivisionError;
- weighs updates by ``num-examples``, and divides by the number of replies while the noise is divided by n;
- adds noise after the aggregator's step: what FedAdam has made of the exact mean, and keeps of it in its momenta, is
  beyond the reach of noise of C / n;
- draws noise, in the arrays' own precision, from numpy's global Mersenne Twister, which can be reconstructed;
- (adaptive) clips to one norm and noises for the next, and lowers the norm when many updates were clipped where the
  paper raises it: with all updates above the norm it goes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)
from numpy.typing import NDArray

from ot_federated.errors import ConfigError
from ot_federated.messages import arrays_key, metrics_key
from ot_federated.secure_random import SecureRandom
from strategies.aggregators import Aggregator

Floats = NDArray[np.float64]
# Fewer clients a round than this are told what they get.
few_clients = 100


class NoisedMean(Strategy):
    """What fixed and adaptive clipping share: the round's replies become one, their noised mean.

    Attributes:
        strategy: The aggregator that gets the noised mean.
        current_arrays: What the clients' updates are differences to.
        clipping_norm: The L2 norm to which this round's updates are clipped, over all arrays.
        noise_multiplier: Standard deviation of the sum's noise over ``clipping_norm``.
        num_sampled_clients: What the noised sum is divided by, however many replied.
        before_release: Told the round and its clipping norm before any noise is drawn: the place to account for it.
            Returns the epsilon so far.
        epsilon: What it returned last.
        random: Where the noise comes from.
    """

    strategy: Strategy
    current_arrays: ArrayRecord
    clipping_norm: float
    noise_multiplier: float
    num_sampled_clients: int
    before_release: Callable[[int, float], float]
    random: SecureRandom
    epsilon: float = 0.0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, add up, noise and divide the updates of at least one valid reply, and let the aggregator go on."""
        replies = list(replies)
        self.epsilon = self.before_release(server_round, self.clipping_norm)
        reference = {name: array.numpy().astype(np.float64) for name, array in self.current_arrays.items()}
        total = {name: np.zeros_like(values) for name, values in reference.items()}
        num_clipped = 0
        for reply in replies:
            num_clipped += add_clipped(
                total, reply.content.array_records[arrays_key], reference, clipping_norm=self.clipping_norm
            )
        mean = ArrayRecord()
        for name, values in total.items():
            noise = self.random.draw_normals(values.size).reshape(values.shape)
            noised = values + self.noise_multiplier * self.clipping_norm * noise
            # In float64 up to here, then rounded once: see ot_federated.secure_random.
            mean[name] = Array((reference[name] + noised / self.num_sampled_clients).astype(np.float32))
        # Only now: the noise belongs to the norm that the updates were clipped to.
        self.follow_quantile(num_clipped, len(replies))
        replies[0].content = RecordDict({arrays_key: mean, metrics_key: MetricRecord({"num-examples": 1})})
        return self.strategy.aggregate_train(server_round, replies[:1])

    def follow_quantile(self, num_clipped: int, num_replies: int) -> None:
        """Choose the next round's clipping norm; a fixed one stays."""


def add_clipped(
    total: Mapping[str, Floats], weights: ArrayRecord, reference: Mapping[str, Floats], *, clipping_norm: float
) -> bool:
    """Add ``weights - reference``, scaled down to at most ``clipping_norm``, to ``total``; return whether it was.

    Args:
        total: Sum of the updates so far, float64; changed in place.
        weights: One client's weights, with finite values.
        reference: What it began with, float64.
        clipping_norm: The L2 norm over all arrays, above 0.
    """
    update = {name: weights[name].numpy() - values for name, values in reference.items()}
    norm = math.sqrt(sum(float(np.vdot(values, values)) for values in update.values()))
    clipped = norm > clipping_norm
    for name, values in update.items():
        total[name][...] += values * (clipping_norm / norm) if clipped else values
    return clipped


class FixedClipping(NoisedMean, DifferentialPrivacyServerSideFixedClipping):
    """Flower's wrapper with a clipping norm that stays; see the module for what differs."""

    def __init__(
        self,
        strategy: Strategy,
        *,
        noise_multiplier: float,
        clipping_norm: float,
        num_sampled_clients: int,
        before_release: Callable[[int, float], float],
        random: SecureRandom | None = None,
    ) -> None:
        super().__init__(strategy, noise_multiplier, clipping_norm, num_sampled_clients)
        self.before_release = before_release
        self.random = random or SecureRandom()


class AdaptiveClipping(NoisedMean, DifferentialPrivacyServerSideAdaptiveClipping):
    """Flower's wrapper whose clipping norm follows a quantile; see the module for what differs.

    Args:
        strategy: The aggregator.
        noise_multiplier: That of sum and clipped share together: what is accounted for.
        initial_clipping_norm: The norm of the first round.
        target_quantile: Share of the updates that the norm should leave whole (gamma in the paper).
        quantile_learning_rate: Step of the norm's logarithm (eta_C in the paper).
        num_sampled_clients: What the noised sums are divided by.
        before_release: See :class:`NoisedMean`.
        random: Where the noise comes from.

    Raises:
        ConfigError: If the noise of the clipped share alone would be too little for ``noise_multiplier``.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        noise_multiplier: float,
        initial_clipping_norm: float,
        target_quantile: float,
        quantile_learning_rate: float,
        num_sampled_clients: int,
        before_release: Callable[[int, float], float],
        random: SecureRandom | None = None,
    ) -> None:
        if noise_multiplier >= num_sampled_clients / 10:
            raise ConfigError(
                f"privacy.adaptive-clipping needs a noise multiplier below privacy.clients-per-round / 10 = "
                f"{num_sampled_clients / 10:g}, and it is {noise_multiplier:.3g}: the clipped share is released with a "
                "noise of a twentieth of the clients. Take more clients, a larger epsilon, or a fixed norm."
            )
        super().__init__(
            strategy,
            noise_multiplier,
            num_sampled_clients,
            initial_clipping_norm=initial_clipping_norm,
            # Flower counts the clipped, the paper the others.
            target_clipped_quantile=1 - target_quantile,
            clip_norm_lr=quantile_learning_rate,
        )
        self.before_release = before_release
        self.random = random or SecureRandom()

    def follow_quantile(self, num_clipped: int, num_replies: int) -> None:
        """Move the norm towards the quantile by the noised share of clipped updates (algorithm 1 of the paper)."""
        # Centred, so that one client more or less moves the count by 1/2: the noise's share is computed for that.
        centred = num_clipped - num_replies / 2 + self.clipped_count_stddev * float(self.random.draw_normals(1)[0])
        clipped_fraction = 0.5 + centred / self.num_sampled_clients
        self.clipping_norm *= math.exp(self.clip_norm_lr * (clipped_fraction - self.target_clipped_quantile))


def protect_clients(
    aggregator: Aggregator,
    *,
    noise_multiplier: float,
    delta: float,
    update_norm: float,
    adaptive_clipping: bool,
    target_quantile: float,
    quantile_learning_rate: float,
    clients_per_round: int,
    before_release: Callable[[int, float], float],
) -> Aggregator:
    """Return ``aggregator`` behind client-level privacy; the arguments are the run config's, and those of the classes.

    Raises:
        ConfigError: If clipping cannot adapt with so few clients.
    """
    wrapped: NoisedMean
    if adaptive_clipping:
        wrapped = AdaptiveClipping(
            aggregator.strategy,
            noise_multiplier=noise_multiplier,
            initial_clipping_norm=update_norm,
            target_quantile=target_quantile,
            quantile_learning_rate=quantile_learning_rate,
            num_sampled_clients=clients_per_round,
            before_release=before_release,
        )
    else:
        wrapped = FixedClipping(
            aggregator.strategy,
            noise_multiplier=noise_multiplier,
            clipping_norm=update_norm,
            num_sampled_clients=clients_per_round,
            before_release=before_release,
        )
    return replace(aggregator, strategy=wrapped, max_clients=clients_per_round, delta=delta)


def describe_noise(aggregator: Aggregator, *, num_parameters: int) -> str:
    """Return how a run's noise compares with what it hides, and what helps where the noise is too much."""
    strategy, clients_per_round = aggregator.strategy, aggregator.max_clients
    assert isinstance(strategy, NoisedMean)
    ratio = strategy.noise_multiplier * math.sqrt(num_parameters) / clients_per_round
    text = (
        f"client-level privacy: noise multiplier {strategy.noise_multiplier:.3g}, {clients_per_round} clients a round, "
        f"{num_parameters} numbers: the noise on a round's mean update is {ratio:.3g} times as long as the longest "
        "mean that clipping allows"
    )
    if ratio <= 1 and clients_per_round >= few_clients:
        return text
    return (
        f"{text}. Client-level privacy is for hundreds of clients that train few numbers: with few clients take "
        "privacy.mode=example, else more privacy.clients-per-round, and tuning.method=lora tuning.freeze-lora-a=true "
        "with a small tuning.lora-r."
    )
