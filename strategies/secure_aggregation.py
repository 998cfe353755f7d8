"""Secure aggregation: the server learns the mean of the updates and no single one.

James Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
https://eprint.iacr.org/2020/704 (SecAgg+), by Flower's workflow. Ours around it: the range of quantisation follows from
what AdamW can move in a round; replies are checked before the workflow, which expects none to be malformed, sees them;
masks are drawn at full strength (:mod:`ot_federated.secure_masks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import FitIns, Parameters, bytes_to_ndarray, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow as flower_workflow
from flwr.serverapp import Grid

from ot_federated.errors import OtFederatedError, ProtocolError, RefusalError
from ot_federated.messages import config_key
from ot_federated.secure_masks import strengthen
from strategies.conversation import raise_flower_error

min_clients = 3
# What each step of the protocol is answered with.
step_fields: dict[str, dict[str, type]] = {
    Stage.SETUP: {Key.PUBLIC_KEY_1: bytes, Key.PUBLIC_KEY_2: bytes},
    Stage.SHARE_KEYS: {Key.DESTINATION_LIST: list, Key.CIPHERTEXT_LIST: list},
    Stage.COLLECT_MASKED_VECTORS: {Key.MASKED_PARAMETERS: list},
    Stage.UNMASK: {Key.NODE_ID_LIST: list, Key.SHARE_LIST: list},
}
num_levels = 2**22
most_neighbours = 17
Arrays = list[np.ndarray]
strengthen(flower_workflow)


class SecureAggregationError(OtFederatedError):
    """Too few clients stayed for the masks to come off, or what came off is no update."""


@dataclass
class SecureMean:
    """What a secure round gave.

    Attributes:
        arrays: Mean of the clients' arrays, fp32, in their order.
        nodes: The clients behind it.
        failures: Node -> reason, for those that left a step unanswered: some of them may be in the mean all the same.
        rejected: Those that answered a step as no honest client does; their reasons are in ``failures``.
        num_bytes: Bytes of masked arrays received.
    """

    arrays: Arrays
    nodes: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    rejected: set[int] = field(default_factory=set)
    num_bytes: int = 0


def choose_range(*, learning_rate: float, max_steps: int) -> float:
    """Return the largest change of a number that a round is expected to make: what quantisation must cover.

    AdamW moves a number by about its learning rate a step, whatever the gradient's scale; twice that leaves room for
    its first steps. Without a limit on the steps it is 1.
    """
    return min(1.0, 2.0 * learning_rate * max_steps) if max_steps else 1.0


def quantisation_error(clipping_range: float) -> float:
    """Return the most by which quantisation can move a number of the mean: one level, whatever the clients' number."""
    return 2.0 * clipping_range / num_levels


def plan_shares(num_clients: int) -> tuple[int, int]:
    """Return into how many shares a client's secrets are split, and how many of them recover one.

    Raises:
        SecureAggregationError: If there are too few clients.
    """
    if num_clients < min_clients:
        raise SecureAggregationError(
            f"Secure aggregation of {num_clients} clients would hide nothing: it needs at least {min_clients}. Wait "
            "for more clients (strategy.min-nodes), or set strategy.secure-aggregation=false."
        )
    shares = min(num_clients, most_neighbours)
    return shares, shares // 2 + 1


def aggregate_securely(
    grid: Grid,
    contents: Mapping[int, RecordDict],
    *,
    server_round: int,
    shapes: Sequence[tuple[int, ...]],
    clipping_range: float,
    timeout_seconds: float,
    on_rejected: Callable[[int, str], None] = lambda _node_id, _reason: None,
) -> SecureMean:
    """Let clients train and return the mean of their updates.

    Args:
        grid: Flower's grid.
        contents: What each node is asked to train on.
        server_round: The round.
        shapes: Shapes of an update's arrays, in order.
        clipping_range: Numbers beyond it are cut off.
        timeout_seconds: Longest wait in each of the protocol's four steps.
        on_rejected: Told the node, and the reason, whenever an answer is none that an honest client gives.

    Raises:
        SecureAggregationError: If too few clients took part or stayed.
    """
    shares, threshold = plan_shares(len(contents))
    workflow = _Workflow(
        num_shares=shares,
        reconstruction_threshold=threshold,
        max_weight=1.0,
        clipping_range=clipping_range,
        quantization_range=num_levels,
        timeout=timeout_seconds,
    )
    workflow.contents = contents
    results: list[Arrays] = []
    screened = _ScreenedGrid(grid, nodes=contents, shapes=shapes, on_rejected=on_rejected)

    def choose(*_: object) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=node), FitIns(Parameters([], ""), {})) for node in contents]

    def take(_round: int, fits: Sequence[tuple[Any, Any]], _failures: object) -> tuple[None, dict[str, Any]]:
        results.append(parameters_to_ndarrays(fits[0][1].parameters))
        return None, {}

    # The workflow asks and tells a strategy of Flower's old kind.
    strategy = SimpleNamespace(configure_fit=choose, aggregate_fit=take)
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: server_round}),
            MAIN_PARAMS_RECORD: ArrayRecord(),
        }
    )
    manager = SimpleNamespace(num_available=lambda: len(contents))
    legacy = LegacyContext(
        Context(run_id=0, node_id=0, node_config={}, state=state, run_config={}),
        strategy=cast(Any, strategy),
        client_manager=cast(Any, manager),
    )
    workflow(cast(Any, screened), legacy)
    if not results:
        reasons = (
            "; ".join(f"node {node}: {reason}" for node, reason in screened.failures.items()) or "no reply in time"
        )
        raise SecureAggregationError(
            f"Round {server_round}: of {len(contents)} clients too few stayed for secure aggregation, which needs "
            f"{threshold} of every client's {shares} neighbours: {reasons}."
        )
    mean = [array.astype(np.float32).reshape(shape) for array, shape in zip(results[0], shapes, strict=True)]
    largest = max((float(np.abs(array).max()) for array in mean if array.size), default=0.0)
    if not largest <= clipping_range * (1 + 1e-3):
        raise SecureAggregationError(
            f"Round {server_round}: the sum under the masks is no sum of updates (a number of {largest:g} in a range "
            f"of {clipping_range:g}): a client gave a wrong share. Start the round again with resume=true."
        )
    return SecureMean(
        mean,
        nodes=sorted(screened.masked),
        failures=screened.failures,
        rejected=screened.rejected,
        num_bytes=screened.num_bytes,
    )


class _Workflow(flower_workflow.SecAggPlusWorkflow):
    """Flower's workflow, with our train message in place of its own."""

    contents: Mapping[int, RecordDict]

    def setup_stage(self, grid: Grid, context: LegacyContext, state: flower_workflow.WorkflowState) -> bool:
        done = super().setup_stage(grid, context, state)
        state.nid_to_fitins = {
            node: RecordDict({key: content[key] for key in content}) for node, content in self.contents.items()
        }
        return done

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: flower_workflow.WorkflowState) -> bool:
        done = super().share_keys_stage(grid, context, state)
        # Who left before sharing keys is in nobody's mask. Flower would ask the others for its shares all the same,
        # which they do not have, and lose the round.
        state.sampled_node_ids = set(state.active_node_ids)
        state.nid_to_neighbours = {
            node: state.nid_to_neighbours[node] & state.sampled_node_ids for node in state.sampled_node_ids
        }
        return done


class _ScreenedGrid:
    """A grid that keeps from the workflow whatever is no answer to its question."""

    def __init__(
        self,
        grid: Grid,
        *,
        nodes: Iterable[int],
        shapes: Sequence[tuple[int, ...]],
        on_rejected: Callable[[int, str], None],
    ) -> None:
        self.grid = grid
        self.nodes = set(nodes)
        self.shapes = list(shapes)
        self.on_rejected = on_rejected
        self.failures: dict[int, str] = {}
        self.rejected: set[int] = set()
        self.masked: set[int] = set()
        self.num_bytes = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send the messages of one step and return the good replies."""
        sent = {message.metadata.dst_node_id: message for message in messages}
        replies = {}
        received = list(self.grid.send_and_receive(list(sent.values()), timeout=timeout))
        asked = {message.metadata.message_id: node for node, message in sent.items()}
        for reply in received:
            # Whoever it says it is: it came in answer to this node's message.
            node = asked.get(reply.metadata.reply_to_message_id)
            if node is not None and node not in replies:
                try:
                    self._check(
                        node, reply, stage=str(sent[node].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
                    )
                    replies[node] = reply
                except ProtocolError as error:
                    self.failures[node] = str(error)
                    if not isinstance(error, RefusalError) and node not in self.rejected:
                        self.rejected.add(node)
                        self.on_rejected(node, str(error))
        for node in sent.keys() - replies.keys():
            self.failures.setdefault(node, "no reply in time")
        return list(replies.values())

    def _check(self, node: int, reply: Message, *, stage: str) -> None:
        raise_flower_error(reply)
        if reply.metadata.src_node_id != node:
            raise ProtocolError(f"it claims to come from node {reply.metadata.src_node_id}")
        told = reply.content.config_records.get(config_key)
        if told is not None and told.get("status") != "ok":
            raise RefusalError(str(told.get("reason", "refused"))[:2000])
        record = reply.content.config_records.get(RECORD_KEY_CONFIGS)
        expected = step_fields[stage]
        if record is None or not all(isinstance(record.get(key), kind) for key, kind in expected.items()):
            raise ProtocolError(f"it does not answer the step {stage!r} of secure aggregation")
        lists = [cast(list[Any], record[key]) for key, kind in expected.items() if kind is list]
        if len({len(values) for values in lists}) > 1:
            raise ProtocolError(f"its answer to the step {stage!r} has lists of different lengths")
        if not set(record.get(Key.DESTINATION_LIST, [])) | set(record.get(Key.NODE_ID_LIST, [])) <= self.nodes:  # type: ignore[arg-type]
            raise ProtocolError("it speaks of nodes that do not take part")
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self._check_masked(record[Key.MASKED_PARAMETERS])
            self.masked.add(node)

    def _check_masked(self, masked: object) -> None:
        masked = cast(list[Any], masked)
        if len(masked) != len(self.shapes) + 1:
            raise ProtocolError("its masked update has another number of arrays")
        for data, shape in zip(masked, [None, *self.shapes], strict=True):
            try:
                array = bytes_to_ndarray(cast(bytes, data))  # numpy's own format, pickles refused
            except Exception as error:
                raise ProtocolError("its masked update cannot be read") from error
            if array.dtype.kind not in "iu" or (shape is not None and array.shape != tuple(shape)):
                raise ProtocolError(f"its masked update has an array {array.dtype} {array.shape}")
            self.num_bytes += len(cast(bytes, data))
