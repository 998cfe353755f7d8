"""A round whose updates the server never sees: clients get the bundle, train, and one sum leaves under masks.

What the masks are and when they come off is in :mod:`strategies.secure_aggregation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from ot_federated.logs import logger
from strategies.conversation import hold_conversations
from strategies.participants import Participants
from strategies.replies import RoundRecord
from strategies.secure_aggregation import SecureMean, aggregate_securely, quantisation_error


def hold_secure_round(
    grid: Grid,
    messages: Sequence[Message],
    *,
    participants: Participants,
    record: RoundRecord,
    sent: Mapping[str, torch.Tensor],
    clipping_range: float,
    timeout_seconds: float,
) -> dict[str, torch.Tensor]:
    """Let every chosen client train, and return the adapter with the mean of their updates.

    Args:
        grid: Flower's grid.
        messages: The message ``train`` to each chosen client.
        participants: The run's clients.
        record: The round's record, filled in but for what the server does not learn.
        sent: The adapter as clients get it: their updates are differences to this.
        clipping_range: Numbers of an update beyond it are cut off.
        timeout_seconds: Longest wait for the bundle to arrive, and in each of the protocol's four steps.

    Raises:
        SecureAggregationError: If too few clients take part or stay.
    """
    names = {message.metadata.dst_node_id: participants.name(message.metadata.dst_node_id) for message in messages}
    deliver_bundle(grid, messages, participants=participants, record=record, timeout_seconds=timeout_seconds)
    contents = {
        message.metadata.dst_node_id: message.content
        for message in messages
        if message.metadata.dst_node_id in participants.hellos
    }
    on_progress = participants.on_progress
    on_progress(f"round {record.number}  {len(contents)} clients train; their updates leave masked")

    def reject(node_id: int, reason: str) -> None:
        participants.reject(node_id, names[node_id], reason, record=record)

    mean = aggregate_securely(
        grid,
        contents,
        server_round=record.number,
        shapes=[tuple(sent[name].shape) for name in sorted(sent)],
        clipping_range=clipping_range,
        timeout_seconds=timeout_seconds,
        on_rejected=reject,
    )
    for node_id, reason in mean.failures.items():
        name = names[node_id]
        participants.forget(node_id)
        if node_id in mean.nodes:
            # The others' shares took its masks off: no update is missing.
            record.failures.pop(name, None)
            on_progress(f"round {record.number}  {name}  is in the mean, and left before the masks came off: {reason}")
        elif node_id not in mean.rejected:
            record.failures[name] = reason
            on_progress(f"round {record.number}  {name}  dropped out: {reason}")
    record.put_aside = participants.rejections.names_aside()
    record.num_replies = len(mean.nodes)
    record.bytes_to_server = mean.num_bytes
    _tell_range(mean, clipping_range=clipping_range, server_round=record.number, on_progress=on_progress)
    change = dict(zip(sorted(sent), map(torch.from_numpy, mean.arrays), strict=True))
    # In the order of what was sent: FedAvgM pairs arrays by position.
    return {name: sent[name] + change[name] for name in sent}


def deliver_bundle(
    grid: Grid,
    messages: Sequence[Message],
    *,
    participants: Participants,
    record: RoundRecord,
    timeout_seconds: float,
) -> None:
    """Bring the bundle to those chosen clients that lack it; who does not get it is forgotten."""
    lacking = [message for message in messages if participants.hellos[message.metadata.dst_node_id].missing_shards]
    conversations = participants.open_conversations(lacking, only_deliver=True)
    hold_conversations(grid, conversations, timeout_seconds=timeout_seconds, on_change=lambda _conversation: None)
    for conversation in conversations:
        record.bundle_bytes += conversation.num_bundle_bytes
        hello = participants.hellos[conversation.node_id]
        if conversation.failure:
            participants.forget(conversation.node_id)
            record.failures[hello.name] = conversation.failure
            participants.on_progress(f"{hello.name} did not get the bundle: {conversation.failure}")
        else:
            participants.note_bundle(conversation.node_id, hello)


def _tell_range(
    mean: SecureMean, *, clipping_range: float, server_round: int, on_progress: Callable[[str], None]
) -> None:
    """Say how large the mean update is in the range of quantisation, and warn where it comes near its end."""
    largest = max((float(np.abs(array).max()) for array in mean.arrays if array.size), default=0.0)
    on_progress(
        f"round {server_round}  secure mean of {len(mean.nodes)} updates; largest change {largest:.2g} in a range "
        f"of {clipping_range:.2g}, exact to {quantisation_error(clipping_range):.1g}"
    )
    if largest > 0.5 * clipping_range:
        logger.warning(
            "The mean update comes near the range of secure aggregation: single updates may have been cut off. "
            "Raise strategy.secure-aggregation-range above %g.",
            clipping_range,
        )
