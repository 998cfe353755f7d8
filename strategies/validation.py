"""Which replies count: each by itself, then each beside the others of its round.

What a hostile client can send is anything. A reply counts only if everything in it is what was asked for; a number
that is allowed by itself can still be absurd beside those of the other clients, and two bounds are there for that:
on the norm of an update, absolute and as a multiple of the round's median (norm bounding: Ziteng Sun et al., "Can You
Really Backdoor Federated Learning?", 2019, https://arxiv.org/abs/1911.07963, where larger updates are scaled down;
here they are refused, because a client that sends one is not to be helped), and on the number of examples, which is
an update's weight in a mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from flwr.app import Message

from ot_federated.errors import ProtocolError
from ot_federated.messages import (
    arrays_key,
    config_of,
    decode_update,
    int_field,
    metrics_key,
    num_array_bytes,
    plain_text,
    text_field,
)
from strategies.replies import count_metric

# Of fewer updates no median says which one is wrong.
min_updates_for_median = 3


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What no honest client exceeds.

    Attributes:
        max_norm: Largest L2 norm of an update; 0: no bound.
        max_norm_ratio: Largest ratio of an update's norm to the median of the round's; 0: no bound.
        max_examples: Most examples that a client is believed to have; 0: no bound.
    """

    max_norm: float = 0.0
    max_norm_ratio: float = 0.0
    max_examples: int = 0


@dataclass(frozen=True, kw_only=True)
class ValidReply:
    """A reply in which everything is what was asked for.

    Attributes:
        message: The reply.
        weights: The client's whole weights in fp32, by role name.
        norm: L2 norm of its update.
        num_examples: Examples that it trained on; 1 under privacy.
        num_steps: Optimizer steps.
        num_tokens: Tokens that it processed.
        loss: Mean training loss; None where the client keeps it.
        epsilon: What it says to have spent; None where it does not.
        delta: The delta of that epsilon.
        num_bytes: Bytes of its arrays.
    """

    message: Message
    weights: dict[str, torch.Tensor]
    norm: float
    num_examples: int
    num_steps: int
    num_tokens: int
    loss: float | None
    epsilon: float | None
    delta: float | None
    num_bytes: int


def read_reply(
    reply: Message,
    *,
    server_round: int,
    bundle_digest: str,
    sent: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    update_dtype: str,
    bounds: Bounds,
) -> ValidReply:
    """Read a reply to ``train`` and check everything that can be checked without the other replies.

    Args:
        reply: The reply.
        server_round: The round that was asked for.
        bundle_digest: The bundle that it should be trained on.
        sent: Weights that the client was sent: its update is the difference to them.
        reference: The bundle's weights: what the next round sends is a difference to them.
        update_dtype: Type in which differences travel.
        bounds: What no honest client exceeds.

    Raises:
        ProtocolError: If anything in it is not what was asked for.
    """
    record = config_of(reply)
    if (replied := int_field(record, "server-round")) != server_round:
        raise ProtocolError(f"it answers round {replied}")
    if (digest := text_field(record, "bundle-digest")) != bundle_digest:
        raise ProtocolError(f"it was trained on the bundle {plain_text(digest[:12])}, not {bundle_digest[:12]}")
    arrays = reply.content.array_records.get(arrays_key)
    metrics = reply.content.metric_records.get(metrics_key)
    if arrays is None or metrics is None:
        raise ProtocolError("it lacks its arrays or its metrics")
    # A private reply tells neither loss nor counts; its weight is 1.
    num_examples, loss = count_metric(metrics, "num-examples"), metrics.get("loss")
    if num_examples == 0:
        raise ProtocolError("num-examples is 0")
    if 0 < bounds.max_examples < num_examples:
        raise ProtocolError(f"num-examples is {num_examples}, above strategy.max-examples={bounds.max_examples}")
    if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
        raise ProtocolError(f"loss is {loss!r}")
    epsilon, delta = metrics.get("epsilon"), metrics.get("delta")
    weights = decode_update(arrays, sent, dtype=update_dtype)
    largest = torch.finfo(getattr(torch, update_dtype)).max
    for name, tensor in weights.items():
        # One such value would make the mean one that cannot be sent: it would end the run of all others.
        if tensor.numel() and not (tensor - reference[name]).abs().max() <= largest:
            raise ProtocolError(f"{name} holds values too large to travel as {update_dtype}")
    norm = measure_norm(weights, sent)
    if 0 < bounds.max_norm < norm:
        raise ProtocolError(f"its update has the norm {norm:.4g}, above strategy.max-update-norm={bounds.max_norm:g}")
    return ValidReply(
        message=reply,
        weights=weights,
        norm=norm,
        num_examples=num_examples,
        num_steps=count_metric(metrics, "num-steps", default=0),
        num_tokens=count_metric(metrics, "num-tokens", default=0),
        loss=loss,
        # Without its delta an epsilon means nothing.
        epsilon=epsilon if _finite(epsilon) and _finite(delta) else None,  # type: ignore[arg-type]
        delta=delta if _finite(epsilon) and _finite(delta) else None,  # type: ignore[arg-type]
        num_bytes=num_array_bytes(arrays),
    )


def find_outliers(replies: Sequence[ValidReply], *, bounds: Bounds) -> dict[int, str]:
    """Return the places of replies that are absurd beside the others, and why.

    Nothing is said of fewer than three replies, or where the median update is zero.
    """
    if not bounds.max_norm_ratio or len(replies) < min_updates_for_median:
        return {}
    usual = median(reply.norm for reply in replies)
    return {
        index: (
            f"its update has the norm {reply.norm:.4g}, above strategy.max-norm-ratio={bounds.max_norm_ratio:g} times "
            f"the round's median {usual:.4g}"
        )
        for index, reply in enumerate(replies)
        if reply.norm > bounds.max_norm_ratio * usual > 0
    }


def measure_norm(weights: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor]) -> float:
    """Return the L2 norm of ``weights - sent``, in fp64, where no square of a float overflows."""
    squares = sum(float((tensor - sent[name]).double().square().sum()) for name, tensor in weights.items())
    return math.sqrt(squares)


def _finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
