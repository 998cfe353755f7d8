"""What a round's replies come to: its record, its progress lines, its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, MetricRecord

from ot_federated.errors import ProtocolError
from ot_federated.messages import metrics_key
from strategies.conversation import Conversation

max_count = 2**40


@dataclass
class RoundRecord:
    """What happened in one round; it is logged, saved and summed up in the run's summary.

    Attributes:
        number: The round, from 1.
        num_connected: Clients that were connected when it began.
        clients: Names of the clients that were asked to train.
        failures: Name -> reason, for each client without a valid reply.
        put_aside: Names of the clients that are not asked any more, for their rejected replies.
        num_replies: Valid replies.
        num_examples: Examples behind them.
        num_steps: Optimizer steps behind them, over all clients; 0 where clients keep them.
        num_tokens: Tokens that the clients processed.
        train_loss: Their mean training loss, weighted by examples, in nats per token; None where clients keep it.
        epsilon: Largest epsilon that a client told of, or that of the run so far under client-level privacy; else None.
        delta: The delta of that epsilon.
        alpha: Factor on the aggregated update, where one was chosen.
        bundle_bytes: Bytes of bundle shards sent.
        bytes_to_clients: Bytes of adapters sent to clients.
        bytes_to_server: Bytes of updates received in valid replies.
        wire_bytes_to_clients: Everything sent, bundles and questions included: see :mod:`strategies.traffic`.
        wire_bytes_to_server: Everything received.
        seconds: Duration, evaluation and checkpoint not counted.
    """

    number: int
    num_connected: int = 0
    clients: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    put_aside: list[str] = field(default_factory=list)
    num_replies: int = 0
    num_examples: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    train_loss: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    alpha: float | None = None
    bundle_bytes: int = 0
    bytes_to_clients: int = 0
    bytes_to_server: int = 0
    wire_bytes_to_clients: int = 0
    wire_bytes_to_server: int = 0
    seconds: float = 0.0


def describe_reply(conversation: Conversation, *, quiet: bool = False) -> str:
    """Return what a client's finished conversation looks like in a progress line.

    Args:
        conversation: The conversation.
        quiet: Leave out what the client tells of its data.
    """
    if conversation.failure or conversation.reply is None:
        return f"failed: {conversation.failure}"
    if quiet:
        return "replied"
    metrics = conversation.reply.content.metric_records.get(metrics_key)
    forms = {"num-examples": "{:d} examples", "num-steps": "{:d} steps", "loss": "loss {:.3f}", "seconds": "{:.0f} s"}
    private = metrics is not None and "loss" not in metrics
    parts = ["private"] if private else []
    for name, form in forms.items():
        value: Any = metrics.get(name) if metrics and not (private and name == "num-examples") else None
        # What a client keeps to itself is not shown; what a stranger made up must not break the line.
        if isinstance(value, float if "f}" in form else int):
            parts.append(form.format(value))
    return "  ".join(parts) or "replied"


def count_metric(metrics: MetricRecord, name: str, *, default: int | None = None) -> int:
    """Return a count from a reply's metrics, or ``default`` where it is absent.

    Raises:
        ProtocolError: If it is missing, not an integer, or out of range.
    """
    value = metrics.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < max_count:
        raise ProtocolError(f"{name} is {value!r:.200}")
    return value


def record_tensors(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return whole weights in an array record as torch tensors."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def tensors_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return torch tensors as an array record of fp32 numpy arrays."""
    return ArrayRecord({name: Array(tensor.float().cpu().numpy()) for name, tensor in tensors.items()})
