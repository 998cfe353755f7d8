"""Federated Offsite-Tuning: the strategy that joins the data owners' adapters.

Guangxuan Xiao, Ji Lin, Song Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023,
https://arxiv.org/abs/2302.04870, with many data owners in place of one.

A round: wait (not for ever) for clients, choose some, bring the bundle to those who lack it, let them train, check
every reply, hand the good ones to one of Flower's aggregators, save the result. What an aggregator sees are whole
adapters in fp32; what travels are differences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ot_federated.errors import ConfigError, OtFederatedError, ProtocolError, RefusalError
from ot_federated.logs import log_fields, logger
from ot_federated.messages import (
    Hello,
    arrays_key,
    build_content,
    decode_update,
    encode_update,
    hello_type,
    metrics_key,
    num_array_bytes,
    train_type,
)
from strategies.aggregators import Aggregator, fit_selection
from strategies.client_level_privacy import NoisedMean
from strategies.conversation import BundleSource, Conversation, hold_conversations, is_broken, raise_flower_error
from strategies.exchange import Again, FixedNodes, Patience, exchange, wait_for_nodes
from strategies.rejections import Rejections
from strategies.replies import RoundRecord, describe_reply, record_tensors, tensors_record
from strategies.secure_aggregation import aggregate_securely, min_clients, quantisation_error
from strategies.traffic import MeteredGrid
from strategies.validation import Bounds, ValidReply, find_outliers, read_reply


class AggregationError(OtFederatedError):
    """A round brought too few valid replies to go on."""


class OffsiteTuning(Strategy):
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
        self.source = source
        self.reference = {name: tensor.float() for name, tensor in reference.items()}
        self.update_dtype = update_dtype
        self.fraction_train = fraction_train
        self.min_nodes = max(min_nodes, aggregator.min_replies)
        self._need = ""
        if aggregator.min_replies > min_nodes:
            self._need = (
                f" {type(aggregator.strategy).__name__} needs {aggregator.min_replies} replies to withstand the "
                "strategy.num-malicious-nodes that are set: set fewer of those, or another strategy.name."
            )
        self.min_replies = max(min_replies, aggregator.min_replies)
        self.min_replies_fraction = min_replies_fraction
        self.max_retries = max_retries
        self.straggler_seconds = straggler_seconds
        self.secure_range = secure_range
        if secure_range is not None and self.min_nodes < min_clients:
            self.min_nodes = min_clients
            self._need = f" Secure aggregation needs {min_clients} clients: with fewer it would hide nothing."
        self.bounds = bounds or Bounds()
        self.rejections = rejections or Rejections()
        self.node_timeout_seconds = node_timeout_seconds
        self.seed = seed
        self.run_id = run_id
        self.first_round = first_round
        self.on_progress = on_progress
        self.on_round = on_round
        self.scale_update = scale_update
        self.choose_source = choose_source
        self.hellos: dict[int, Hello] = {}
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
            self.min_nodes,
            self.min_replies,
            self.source.digest[:12],
            self.source.manifest.num_bytes / 1e6,
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
                self._run_round(server_round, result, metered, train_config, evaluate_fn)
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
            self._use(self.choose_source(server_round, arrays))
        messages = self.configure_train(server_round, arrays, ConfigRecord(dict(train_config or {})), grid)
        if self.secure_range is None:
            replies = self._hold_round(grid, messages, timeout_seconds=self.round_timeout_seconds)
            aggregated, train_metrics = self.aggregate_train(server_round, replies)
        else:
            aggregated, train_metrics = self._hold_secure_round(grid, server_round, list(messages))
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

    def _use(self, source: BundleSource) -> None:
        """Train with this version of the bundle; what clients said of another one counts no more."""
        if source.digest != self.source.digest:
            self.source = source
            self.hellos.clear()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's clients and return the first message to each.

        Raises:
            AggregationError: If too few clients connect in time.
        """
        self.record = RoundRecord(server_round)
        node_ids = wait_for_nodes(
            grid,
            min_nodes=self.min_nodes,
            timeout_seconds=self.node_timeout_seconds,
            on_progress=self.on_progress,
            without=self.rejections.is_aside,
            why=self._need,
        )
        self._greet(grid, [node_id for node_id in node_ids if node_id not in self.hellos])
        greeted = {node_id: self.hellos[node_id].name for node_id in node_ids if node_id in self.hellos}
        self.rejections.recognise(dict.fromkeys(grid.get_node_ids(), "") | greeted)
        present = [node_id for node_id in greeted if not self.rejections.is_aside(node_id)]
        self.record.put_aside = self.rejections.names_aside()
        if len(present) < self.min_nodes:
            raise AggregationError(
                f"Round {server_round}: {len(present)} of {len(node_ids)} clients can take part and "
                f"strategy.min-nodes needs {self.min_nodes}. Their reasons: {self.record.failures or 'none given'}. "
                f"Put aside for rejected replies: {', '.join(self.record.put_aside) or 'nobody'}."
            )
        if self.aggregator.delta * len(present) >= 1:
            raise ConfigError(
                f"privacy.target-delta={self.aggregator.delta:g} is not below 1 / {len(present)} connected clients: "
                "such a delta would allow to publish a whole client. Begin a new run with a smaller one."
            )
        chosen = self._choose(server_round, present)
        self.record.clients = [self._name(node_id) for node_id in chosen]
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
            "bundle-digest": self.source.digest,
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

    def _choose(self, server_round: int, present: Sequence[int]) -> list[int]:
        """Return the round's nodes in the order of their names, the same in a run that was stopped and resumed."""
        ordered = sorted(present, key=lambda node_id: (self.hellos[node_id].name, node_id))
        size = min(len(ordered), max(self.min_nodes, round(len(ordered) * self.fraction_train)))
        size = min(size, self.aggregator.max_clients or size)
        picked = np.random.default_rng([self.seed, server_round]).choice(len(ordered), size=size, replace=False)
        return [ordered[index] for index in sorted(picked)]

    def _name(self, node_id: int) -> str:
        """Return a client's name, with its node where another client gave the same name."""
        name = self.hellos[node_id].name
        namesakes = sum(hello.name == name for hello in self.hellos.values())
        return name if namesakes == 1 else f"{name} (node {node_id})"

    def _greet(self, grid: Grid, node_ids: Sequence[int]) -> None:
        """Ask new nodes who they are and which shards they lack."""
        if not node_ids:
            return
        content = self.source.hello_content()
        ttl = self.node_timeout_seconds
        registered = {node.node_id: node.name for node in grid.get_nodes()}
        messages = {node_id: Message(content, node_id, hello_type, ttl=ttl) for node_id in node_ids}
        retries = dict.fromkeys(node_ids, self.max_retries)

        def note(node_id: int, reply: Message) -> list[Again]:
            try:
                if is_broken(reply) and retries[node_id]:
                    retries[node_id] -= 1
                    return [Again(messages[node_id])]
                raise_flower_error(reply)
                hello = self.source.read_hello(reply)
                # The name under which the model owner registered the node's key, before the one it gives itself.
                self.hellos[node_id] = replace(hello, name=registered.get(node_id) or hello.name)
            except RefusalError as error:
                lose(node_id, str(error))
            except ProtocolError as error:
                self._reject(node_id, f"node {node_id}", str(error))
            return []

        def lose(node_id: int, reason: str) -> list[Again]:
            self.record.failures[f"node {node_id}"] = reason
            with log_fields(node=f"node-{node_id}"):
                self.on_progress(f"node {node_id} cannot take part: {reason}")
            return []

        exchange(
            grid,
            messages.values(),
            timeout_seconds=ttl,
            on_reply=note,
            on_lost=lose,
            on_late=lose,
            patience=Patience(lambda: len(self.hellos) >= self.min_nodes, self.straggler_seconds),
        )

    def _hold_round(self, grid: Grid, messages: Iterable[Message], *, timeout_seconds: float) -> list[Message]:
        """Let every chosen client train and return the replies in the order of the clients' names."""
        conversations = [
            Conversation(node_id, self.hellos[node_id], self.source, message, max_retries=self.max_retries)
            for message in messages
            for node_id in [message.metadata.dst_node_id]
        ]
        names = {conversation.node_id: self._name(conversation.node_id) for conversation in conversations}
        num_done = 0

        def report(conversation: Conversation) -> None:
            nonlocal num_done
            num_done += 1
            head = f"round {self.record.number}  {num_done}/{len(conversations)}  {names[conversation.node_id]}"
            with log_fields(node=names[conversation.node_id]):
                self.on_progress(f"{head}  {describe_reply(conversation)}")

        hold_conversations(
            grid,
            conversations,
            timeout_seconds=timeout_seconds,
            on_change=report,
            num_enough=self._num_needed(),
            straggler_seconds=self.straggler_seconds,
        )
        for conversation in conversations:
            self.record.bundle_bytes += conversation.num_bundle_bytes
            if conversation.rejected:
                self._reject(conversation.node_id, names[conversation.node_id], conversation.failure)
                del self.hellos[conversation.node_id]
            elif conversation.failure:
                self.record.failures[names[conversation.node_id]] = conversation.failure
                # Ask again who it is before the next round: it may have lost its bundle, or be gone.
                del self.hellos[conversation.node_id]
            else:
                self.hellos[conversation.node_id] = replace(conversation.hello, missing_shards=())
        return [conversation.reply for conversation in conversations if conversation.reply is not None]

    def _hold_secure_round(
        self, grid: Grid, server_round: int, messages: list[Message]
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Let every chosen client train, and learn the mean of their updates alone.

        Raises:
            SecureAggregationError: If too few clients take part or stay.
        """
        assert self.secure_range is not None
        chosen = {message.metadata.dst_node_id: message for message in messages}
        names = {node_id: self._name(node_id) for node_id in chosen}
        self._deliver(grid, messages)
        ready = {node_id: message for node_id, message in chosen.items() if node_id in self.hellos}
        self.on_progress(f"round {server_round}  {len(ready)} clients train; their updates leave masked")
        mean = aggregate_securely(
            grid,
            {node_id: message.content for node_id, message in ready.items()},
            server_round=server_round,
            shapes=[tuple(self.reference[name].shape) for name in sorted(self.reference)],
            clipping_range=self.secure_range,
            timeout_seconds=self.round_timeout_seconds,
        )
        for node_id, reason in mean.failures.items():
            self.record.failures[names[node_id]] = reason
            self.on_progress(f"round {server_round}  {names[node_id]}  dropped out: {reason}")
            self.hellos.pop(node_id, None)
        self.record.num_replies, self.record.num_steps = len(mean.nodes), mean.num_steps
        self.record.bytes_to_server = mean.num_bytes
        largest = max((float(np.abs(array).max()) for array in mean.arrays if array.size), default=0.0)
        self.on_progress(
            f"round {server_round}  secure mean of {len(mean.nodes)} updates; largest change {largest:.2g} in a range "
            f"of {self.secure_range:.2g}, exact to {quantisation_error(self.secure_range):.1g}"
        )
        if largest > 0.5 * self.secure_range:
            logger.warning(
                "The mean update comes near the range of secure aggregation: single updates may have been cut off. "
                "Raise strategy.secure-aggregation-range above %g.",
                self.secure_range,
            )
        if self.record.num_replies < self._num_needed():
            raise AggregationError(
                f"Round {server_round} brought {self.record.num_replies} updates and needs {self._num_needed()}. "
                + "; ".join(f"{name}: {reason}" for name, reason in self.record.failures.items())
            )
        change = dict(zip(sorted(self.reference), map(torch.from_numpy, mean.arrays), strict=True))
        weights = {name: self._sent[name] + change[name] for name in self.reference}
        content = RecordDict({arrays_key: tensors_record(weights), metrics_key: MetricRecord({"num-examples": 1})})
        # The mean stands for all of them: to the aggregator it is the round's one reply.
        return self._join(server_round, [Message(content, reply_to=messages[0])])

    def _deliver(self, grid: Grid, messages: list[Message]) -> None:
        """Bring the bundle to the chosen clients that lack it; who does not get it is forgotten."""
        conversations = [
            Conversation(
                node_id, self.hellos[node_id], self.source, message, only_deliver=True, max_retries=self.max_retries
            )
            for message in messages
            for node_id in [message.metadata.dst_node_id]
            if self.hellos[node_id].missing_shards
        ]
        hold_conversations(
            grid, conversations, timeout_seconds=self.round_timeout_seconds, on_change=lambda _conversation: None
        )
        for conversation in conversations:
            self.record.bundle_bytes += conversation.num_bundle_bytes
            hello = self.hellos.pop(conversation.node_id)
            if conversation.failure:
                self.record.failures[hello.name] = conversation.failure
                self.on_progress(f"{hello.name} did not get the bundle: {conversation.failure}")
            else:
                self.hellos[conversation.node_id] = replace(hello, missing_shards=())

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
                self._reject(reply.metadata.src_node_id, self._name(reply.metadata.src_node_id), str(error))
        outliers = find_outliers(checked, bounds=self.bounds)
        for index, reason in outliers.items():
            node_id = checked[index].message.metadata.src_node_id
            self._reject(node_id, self._name(node_id), reason)
        self.record.put_aside = self.rejections.names_aside()
        valid = [self._count(reply) for index, reply in enumerate(checked) if index not in outliers]
        self.record.num_replies = len(valid)
        if len(valid) < self._num_needed():
            raise AggregationError(
                f"Round {server_round} brought {len(valid)} valid replies and needs {self._num_needed()}. "
                + "; ".join(f"{name}: {reason}" for name, reason in self.record.failures.items())
            )
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

    def _reject(self, node_id: int, name: str, reason: str) -> None:
        """Note that a client sent what no honest one sends; over the limit it is not asked again."""
        aside = self.rejections.add(node_id, name=name, reason=reason)
        self.record.failures[name] = f"rejected: {reason}"
        with log_fields(node=name):
            self.on_progress(f"round {self.record.number}  {name}  reply rejected: {reason}")
            if aside:
                self.on_progress(
                    f"{name} is put aside for the rest of the run, after "
                    f"{self.rejections.offenders[node_id].num_rejections} rejected replies (strategy.max-rejections)"
                )

    def _read(self, server_round: int, reply: Message) -> ValidReply:
        """Read a reply and check all that can be checked without the others."""
        return read_reply(
            reply,
            server_round=server_round,
            bundle_digest=self.source.digest,
            sent=self._sent,
            reference=self.reference,
            update_dtype=self.update_dtype,
            bounds=self.bounds,
        )

    def _count(self, reply: ValidReply) -> Message:
        """Count a valid reply, and return it as Flower's aggregators want it: fp32 weights, and their weight."""
        record, num_examples, num_tokens, loss = self.record, reply.num_examples, reply.num_tokens, reply.loss
        record.bytes_to_server += reply.num_bytes
        record.num_steps += reply.num_steps
        if self.aggregator.delta:
            # Of the clients' data nothing is recorded but what leaves with noise.
            num_examples, num_tokens, loss = 1, 0, None
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

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send nothing: the owner evaluates the plug-in, clients report their loss with their update."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: see :meth:`configure_evaluate`."""
        return None
