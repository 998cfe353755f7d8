"""Federated Offsite-Tuning: the strategy that joins the data owners' adapters.

Guangxuan Xiao, Ji Lin, Song Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023,
https://arxiv.org/abs/2302.04870, with many data owners in place of one.

A round: wait (not for ever) for clients, choose some, bring the bundle to those who lack it, let them train, check
every reply, hand the good ones to one of Flower's aggregators, save the result. What an aggregator sees are whole
adapters in fp32; what travels are differences. Who takes part is in :mod:`strategies.participants`, what a client and
the server say to each other in :mod:`strategies.conversation`, how clients train in :mod:`strategies.plain_round` and,
where their updates leave under masks, in :mod:`strategies.secure_round`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from ot_federated.errors import ConfigError, OtFederatedError, ProtocolError
from ot_federated.logs import log_fields, logger
from ot_federated.messages import (
    arrays_key,
    build_content,
    decode_update,
    encode_update,
    metrics_key,
    num_array_bytes,
    train_type,
)
from strategies.aggregators import Aggregator, fit_selection
from strategies.client_level_privacy import NoisedMean
from strategies.conversation import BundleSource
from strategies.exchange import FixedNodes
from strategies.participants import Participants, count_nodes_needed
from strategies.plain_round import hold_plain_round
from strategies.rejections import Rejections
from strategies.replies import RoundRecord, record_tensors, tensors_record
from strategies.secure_aggregation import SecureAggregationError
from strategies.secure_round import hold_secure_round
from strategies.traffic import MeteredGrid
from strategies.training_only import TrainingOnly
from strategies.validation import Bounds, ValidReply, find_outliers, read_reply


class AggregationError(OtFederatedError):
    """A round brought too few valid replies to go on."""


class OffsiteTuning(TrainingOnly):
    """Distribute the bundle, tune adapters at the clients, validate and aggregate their updates.

    Args:
        aggregator: What joins the adapters.
        source: The bundle.
        reference: The bundle's adapter by role name: what travels to clients is the difference to it.
        update_dtype: Type in which differences travel.
        fraction_train: Share of the connected clients that train in a round, in (0, 1].
        min_nodes: Clients that must be connected, and at least train.
        min_replies: Valid replies without which a round fails.
        min_replies_fraction: The same as a share of the clients that were asked, in [0, 1]; the larger one counts.
        max_retries: How often a client is asked again in a round after its process or its connection broke.
        straggler_seconds: Once enough replies are there, longest wait for the others; 0 for no such limit.
        node_timeout_seconds: Longest wait for ``min_nodes``.
        secure_range: Aggregate securely, numbers of an update within plus and minus this; None for plain replies.
        bounds: What no honest client's update exceeds.
        rejections: Whose replies were rejected, and how many put a client aside; None to put none aside.
        seed: Seed of the choice of clients.
        run_id: Identifies the run, also after it was resumed; clients account for privacy under it.
        first_round: The round to begin with; above 1 when a run is continued.
        on_progress: Told a line of text whenever something happened that a waiting person wants to know.
        scale_update: Called with the adapter before a round and after it; returns the one to go on with and its factor
            on the update.
        choose_source: Called with a round that begins and its adapter; returns the version of the bundle to train
            with.
        on_round: Called with each finished round's adapter and record, before it is evaluated: the place to save it.
    """

    def __init__(
        self,
        *,
        aggregator: Aggregator,
        source: BundleSource,
        reference: Mapping[str, torch.Tensor],
        update_dtype: str = "float16",
        fraction_train: float = 1.0,
        min_nodes: int = 2,
        min_replies: int = 1,
        min_replies_fraction: float = 0.0,
        max_retries: int = 0,
        straggler_seconds: float = 0.0,
        node_timeout_seconds: float = 300.0,
        secure_range: float | None = None,
        bounds: Bounds | None = None,
        rejections: Rejections | None = None,
        seed: int = 0,
        run_id: str = "run",
        first_round: int = 1,
        on_progress: Callable[[str], None] = logger.info,
        on_round: Callable[[ArrayRecord, RoundRecord], None] | None = None,
        scale_update: Callable[[ArrayRecord, ArrayRecord], tuple[ArrayRecord, float]] | None = None,
        choose_source: Callable[[int, ArrayRecord], BundleSource] | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.reference = {name: tensor.float() for name, tensor in reference.items()}
        self.update_dtype = update_dtype
        self.min_replies = max(min_replies, aggregator.min_replies)
        self.min_replies_fraction = min_replies_fraction
        self.straggler_seconds = straggler_seconds
        self.secure_range = secure_range
        self.bounds = bounds or Bounds()
        self.run_id = run_id
        self.first_round = first_round
        self.on_progress = on_progress
        self.on_round = on_round
        self.scale_update = scale_update
        self.choose_source = choose_source
        least_nodes, why = count_nodes_needed(aggregator, min_nodes=min_nodes, secure=secure_range is not None)
        self.participants = Participants(
            source=source,
            min_nodes=least_nodes,
            why=why,
            fraction_train=fraction_train,
            max_retries=max_retries,
            straggler_seconds=straggler_seconds,
            node_timeout_seconds=node_timeout_seconds,
            rejections=rejections or Rejections(),
            seed=seed,
            on_progress=on_progress,
        )
        self.record = RoundRecord(0)
        self.round_timeout_seconds = 3600.0
        self._sent: dict[str, torch.Tensor] = {}

    def summary(self) -> None:
        """Log the strategy's settings."""
        strategy = self.aggregator.strategy
        wrapped = getattr(strategy, "strategy", None)
        logger.info(
            "%s on adapters, at least %d nodes and %d valid replies; bundle %s, %.1f MB; updates travel as %s",
            f"{type(wrapped).__name__} behind {type(strategy).__name__}" if wrapped else type(strategy).__name__,
            self.participants.min_nodes,
            self.min_replies,
            self.participants.source.digest[:12],
            self.participants.source.manifest.num_bytes / 1e6,
            self.update_dtype,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds ``first_round`` to ``num_rounds`` and return the last adapter, as whole fp32 arrays.

        Flower's own loop always begins with round 1, takes replies only all at once, and goes on with unchanged
        weights when every client failed; therefore this one.

        Raises:
            AggregationError: If a round has too few nodes or too few valid replies; the message has the reasons.
        """
        del evaluate_config  # clients report in their reply to train: one process start less for each of them
        self.summary()
        metered = MeteredGrid(grid)
        self.round_timeout_seconds = timeout
        result = Result()
        result.arrays = initial_arrays
        if evaluate_fn and (metrics := evaluate_fn(self.first_round - 1, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[self.first_round - 1] = metrics
        for server_round in range(self.first_round, num_rounds + 1):
            with log_fields(round=server_round):
                try:
                    self._run_round(server_round, result, metered, train_config, evaluate_fn)
                except (AggregationError, SecureAggregationError):
                    self.participants.rejections.keep(server_round)
                    raise
        return result

    def _run_round(
        self,
        server_round: int,
        result: Result,
        grid: MeteredGrid,
        train_config: ConfigRecord | None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        """Go on from the result's adapter by one round, and put what came of it into the result."""
        began = time.monotonic()
        arrays = result.arrays
        if self.choose_source:
            self.participants.use(self.choose_source(server_round, arrays))
        messages = self.configure_train(server_round, arrays, ConfigRecord(dict(train_config or {})), grid)
        if self.secure_range is None:
            replies = hold_plain_round(
                grid,
                messages,
                participants=self.participants,
                record=self.record,
                num_needed=self._num_needed(),
                straggler_seconds=self.straggler_seconds,
                timeout_seconds=self.round_timeout_seconds,
                quiet=bool(self.aggregator.delta),
            )
            aggregated, train_metrics = self.aggregate_train(server_round, replies)
        else:
            aggregated, train_metrics = self._train_securely(grid, server_round, list(messages))
        assert aggregated is not None  # aggregate_train raises rather than return nothing
        if self.scale_update:
            aggregated, self.record.alpha = self.scale_update(arrays, aggregated)
        result.arrays = aggregated
        self.record.seconds = time.monotonic() - began
        self.record.wire_bytes_to_clients, self.record.wire_bytes_to_server = grid.take()
        if train_metrics is not None:
            result.train_metrics_clientapp[server_round] = train_metrics
        if self.on_round:
            self.on_round(aggregated, self.record)
        if evaluate_fn and (metrics := evaluate_fn(server_round, aggregated)) is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's clients and return the first message to each.

        Raises:
            AggregationError: If too few clients connect in time.
        """
        self.record = RoundRecord(server_round)
        node_ids = self.participants.wait(grid)
        self.record.num_connected = len(list(grid.get_node_ids()))
        present = self.participants.greet(grid, node_ids, record=self.record)
        if len(present) < self.participants.min_nodes:
            raise AggregationError(
                f"Round {server_round}: {len(present)} of {len(node_ids)} clients can take part and "
                f"strategy.min-nodes needs {self.participants.min_nodes}. Their reasons: "
                f"{self.record.failures or 'none given'}. "
                f"Put aside for rejected replies: {', '.join(self.record.put_aside) or 'nobody'}."
            )
        if self.aggregator.delta * len(present) >= 1:
            raise ConfigError(
                f"privacy.target-delta={self.aggregator.delta:g} is not below 1 / {len(present)} connected clients: "
                "such a delta would allow to publish a whole client. Begin a new run with a smaller one."
            )
        chosen = self.participants.choose(server_round, present, max_clients=self.aggregator.max_clients)
        self.record.clients = [self.participants.name(node_id) for node_id in chosen]
        # Flower's aggregator notes the current weights here, and adds what its clients must know (FedProx: mu).
        list(self.aggregator.strategy.configure_train(server_round, arrays, config, FixedNodes(grid, chosen)))
        update = encode_update(record_tensors(arrays), self.reference, dtype=self.update_dtype)
        # What clients really get, rounded as it was: their updates are differences to this.
        self._sent = decode_update(update, self.reference, dtype=self.update_dtype)
        if isinstance(self.aggregator.strategy, NoisedMean):
            # Clipped is what a client has done: the difference to what it got, not to what was rounded for it.
            self.aggregator.strategy.current_arrays = tensors_record(self._sent)
        fields: dict[str, str | int | float | bytes | list[int]] = {
            name: value for name, value in config.items() if isinstance(value, (str, int, float))
        }
        fields |= {
            "bundle-digest": self.participants.source.digest,
            "server-round": server_round,
            "update-dtype": self.update_dtype,
            "run": self.run_id,
        }
        content = build_content(fields, arrays=update)
        self.record.bytes_to_clients = num_array_bytes(update) * len(chosen)
        return [Message(content, node_id, train_type, ttl=self.round_timeout_seconds) for node_id in chosen]

    def _num_needed(self) -> int:
        """Return the valid replies without which this round fails."""
        # A hair less before rounding up: 0.7 of 10 clients are 7, whatever floating point makes of it.
        share = math.ceil(self.min_replies_fraction * len(self.record.clients) - 1e-9)
        return max(self.min_replies, share)

    def _train_securely(
        self, grid: Grid, server_round: int, messages: list[Message]
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Let every chosen client train, and aggregate the mean of their updates, of which none is seen.

        Raises:
            AggregationError: If too few clients stayed.
            SecureAggregationError: If they were too few for the masks to come off.
        """
        assert self.secure_range is not None
        weights = hold_secure_round(
            grid,
            messages,
            participants=self.participants,
            record=self.record,
            sent=self._sent,
            clipping_range=self.secure_range,
            timeout_seconds=self.round_timeout_seconds,
        )
        self._check_enough("updates")
        content = RecordDict({arrays_key: tensors_record(weights), metrics_key: MetricRecord({"num-examples": 1})})
        # The mean stands for all of them: to the aggregator it is the round's one reply.
        return self._join(server_round, [Message(content, reply_to=messages[0])])

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, aggregate the valid ones in fp32, and return the new adapter and train metrics.

        Raises:
            AggregationError: If fewer replies are valid than ``min_replies``.
        """
        checked: list[ValidReply] = []
        for reply in replies:
            try:
                checked.append(self._read(server_round, reply))
            except ProtocolError as error:
                self._reject(reply, str(error))
        outliers = find_outliers(checked, bounds=self.bounds)
        for index, reason in outliers.items():
            self._reject(checked[index].message, reason)
        self.record.put_aside = self.participants.rejections.names_aside()
        valid = [self._count(reply) for index, reply in enumerate(checked) if index not in outliers]
        self.record.num_replies = len(valid)
        self._check_enough("valid replies")
        fit_selection(self.aggregator, num_replies=len(valid))
        return self._join(server_round, valid)

    def _join(self, server_round: int, valid: list[Message]) -> tuple[ArrayRecord, MetricRecord | None]:
        """Hand checked replies to the aggregator and return the new adapter in fp32, and train metrics."""
        strategy = self.aggregator.strategy
        arrays, metrics = strategy.aggregate_train(server_round, valid)
        if isinstance(strategy, NoisedMean):
            self.record.epsilon, self.record.delta = strategy.epsilon, self.aggregator.delta
            self.on_progress(
                f"round {server_round}  noised mean of {len(valid)} clients' updates; so far epsilon "
                f"{strategy.epsilon:.4g} at delta {self.aggregator.delta:g} for each client"
            )
        if arrays is None:
            raise AggregationError(
                f"Round {server_round}: {self.aggregator.strategy.__class__.__name__} gave no result."
            )
        # Flower's server optimizers compute in fp64 where a learning rate is a numpy number.
        result = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
        return ArrayRecord({name: Array(result[name]) for name in self.reference}), metrics

    def _reject(self, reply: Message, reason: str) -> None:
        """Note that a client's reply is none that an honest one gives."""
        node_id = reply.metadata.src_node_id
        self.participants.reject(node_id, self.participants.name(node_id), reason, record=self.record)

    def _check_enough(self, what: str) -> None:
        """Check that as many clients as this round needs have brought something.

        Raises:
            AggregationError: If they have not; it has the others' reasons.
        """
        if self.record.num_replies < self._num_needed():
            raise AggregationError(
                f"Round {self.record.number} brought {self.record.num_replies} {what} and needs {self._num_needed()}. "
                + "; ".join(f"{name}: {reason}" for name, reason in self.record.failures.items())
            )

    def _read(self, server_round: int, reply: Message) -> ValidReply:
        """Read a reply and check all that can be checked without the others."""
        return read_reply(
            reply,
            server_round=server_round,
            bundle_digest=self.participants.source.digest,
            sent=self._sent,
            reference=self.reference,
            update_dtype=self.update_dtype,
            bounds=self.bounds,
        )

    def _count(self, reply: ValidReply) -> Message:
        """Count a valid reply, and return it as Flower's aggregators want it: fp32 weights, and their weight."""
        record, num_examples, num_steps = self.record, reply.num_examples, reply.num_steps
        num_tokens, loss = reply.num_tokens, reply.loss
        record.bytes_to_server += reply.num_bytes
        if self.aggregator.delta:
            # Of the clients' data nothing is recorded but what leaves with noise; steps tell how much there is.
            num_examples, num_steps, num_tokens, loss = 1, 0, 0, None
        record.num_steps += num_steps
        record.num_tokens += num_tokens
        record.num_examples += num_examples
        if loss is not None:
            share = num_examples / record.num_examples
            record.train_loss = loss if record.train_loss is None else (1 - share) * record.train_loss + share * loss
        if reply.epsilon is not None and reply.epsilon > (record.epsilon or 0.0):
            record.epsilon, record.delta = reply.epsilon, reply.delta
        whole = RecordDict({arrays_key: tensors_record(reply.weights)})
        whole[metrics_key] = MetricRecord({"num-examples": num_examples})
        reply.message.content = whole
        return reply.message
