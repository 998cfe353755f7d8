"""Aggregate what LoRA means: the mean of the clients' products B A, and not the product of their means.

FedAvg over A and B apart gives ``mean(B) mean(A)``, which is not ``mean(B A)``. What is done instead:

``truncated``
    The products are stacked, ``sum w_i B_i A_i = [w_1 B_1 ... w_k B_k] [A_1; ...; A_k]``, and the best approximation
    of rank r goes on (Jiamu Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources" (FlexLoRA), NeurIPS 2024, https://arxiv.org/abs/2402.11505). What rank r cannot hold is lost.
``exact``
    The same travels, and the model owner keeps what was cut off and adds it to the plugged-in model: the owner's
    change is then the sum over rounds of the clients' mean changes, to rounding. (Raghav Singhal, Kaustubh Ponkshe,
    Praneeth Vepakomma, "FedEx-LoRA", ACL 2025, https://arxiv.org/abs/2410.09432, sends that residual to the clients,
    whose frozen weights it changes; here it stays at the owner, because it has nearly the size of the weights.)

No product is ever formed: a QR decomposition of each stack leaves a singular value decomposition of side k r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ot_federated.messages import arrays_key, metrics_key
from ot_federated.tuning.lora import lora_a, lora_b, residual_a, residual_b
from strategies.aggregators import Aggregator
from strategies.training_only import TrainingOnly

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]
# Below this share of the largest, a singular value is rounding of fp32 numbers.
negligible = 1e-7


class StackedLora(TrainingOnly):
    """A weighted mean in which pairs of A and B are aggregated by their products.

    Args:
        strategy: FedAvg or FedProx: what becomes of all other arrays and of the metrics.
        keep_residual: Whether what rank r cannot hold is kept at the owner (``exact``).

    Attributes:
        residual: By layer, the pair whose product is what the owner alone has, A ``(rank, inputs)`` and B
            ``(outputs, rank)``.
        lost_fraction: What the last round's truncation cut off, as a share of the Frobenius norm of all changes.
    """

    def __init__(self, strategy: Strategy, *, keep_residual: bool) -> None:
        self.strategy = strategy
        self.keep_residual = keep_residual
        self.residual: dict[str, Pair] = {}
        self.lost_fraction = 0.0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of whole weights in fp32, with A and B of the mean product."""
        replies = list(replies)
        records = [reply.content.array_records[arrays_key] for reply in replies]
        counts = np.array([_count(reply) for reply in replies])
        weights = counts / counts.sum()
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is None:
            return arrays, metrics
        mean = {name: array.numpy().astype(np.float64) for name, array in arrays.items()}
        lost = whole = 0.0
        for module in [name.removesuffix(lora_b) for name in mean if name.endswith(lora_b)]:
            pairs = [
                (record[module + lora_a].numpy().astype(np.float64), weight * record[module + lora_b].numpy())
                for record, weight in zip(records, weights, strict=True)
            ]
            if module in self.residual:
                pairs.append(self.residual[module])
            kept, rest = truncate(pairs, like=mean[module + lora_a])
            mean[module + lora_a], mean[module + lora_b] = kept
            lost, whole = lost + _squared_norm(rest), whole + _squared_norm(kept) + _squared_norm(rest)
            if self.keep_residual:
                # In the checkpoint's type, so that a resumed run goes on with the same numbers.
                self.residual[module] = (_rounded(rest[0]), _rounded(rest[1]))
        self.lost_fraction = float(np.sqrt(lost / whole)) if whole else 0.0
        return ArrayRecord({name: Array(array.astype(np.float32)) for name, array in mean.items()}), metrics

    def residual_arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return the residual as it stands in the owner's state."""
        arrays = {}
        for module, (a, b) in self.residual.items():
            arrays[module + residual_a], arrays[module + residual_b] = a.astype(np.float32), b.astype(np.float32)
        return arrays

    def restore_residual(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Take back what :meth:`residual_arrays` returned."""
        for name, a in arrays.items():
            if name.endswith(residual_a):
                module = name.removesuffix(residual_a)
                self.residual[module] = (a.astype(np.float64), arrays[module + residual_b].astype(np.float64))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy add what its clients must know."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def summary(self) -> None:
        """Log the wrapped strategy's settings."""
        self.strategy.summary()


def _count(reply: Message) -> float:
    return float(str(reply.content.metric_records[metrics_key]["num-examples"]))


def truncate(pairs: Sequence[Pair], *, like: Floats) -> tuple[Pair, Pair]:
    """Return the sum of products ``B A`` in two parts: the best one of rank r, and the rest.

    Args:
        pairs: A ``(rank, inputs)`` and B ``(outputs, rank)`` of each product.
        like: An A ``(r, inputs)``, whose rows' size the new A gets: A's size sets the step that a learning rate makes.
            Directions that the sum does not have get its rows themselves.
    """
    rank = len(like)
    size = float(np.sqrt(np.mean(np.sum(like**2, axis=1)))) or 1.0
    left_q, left_r = np.linalg.qr(np.concatenate([b for _, b in pairs], axis=1))
    right_q, right_r = np.linalg.qr(np.concatenate([a for a, _ in pairs]).T)
    u, values, vt = np.linalg.svd(left_r @ right_r.T)
    present = int(np.sum(values > negligible * values[0])) if values[0] > 0 else 0
    u, vt = left_q @ u[:, :present], vt[:present] @ right_q.T
    values = values[:present]
    # A singular pair may be turned round: the same sum must give the same numbers everywhere.
    signs = np.sign(vt[np.arange(present), np.abs(vt).argmax(axis=1)]) if present else np.ones(0)
    u, vt = u * signs, vt * signs[:, None]
    num_kept = min(rank, present)
    a, b = like.copy(), np.zeros((len(u), rank))
    a[:num_kept], b[:, :num_kept] = size * vt[:num_kept], u[:, :num_kept] * values[:num_kept] / size
    return (a, b), (vt[num_kept:], u[:, num_kept:] * values[num_kept:])


def interpolate_products(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Return ``before + alpha (after - before)`` of LoRA's products, the best of rank r, and of all other tensors.

    After a decomposition A and B have directions of their own, so that A and B of two rounds cannot be interpolated
    apart.
    """
    state = {name: torch.lerp(before[name], tensor, alpha) for name, tensor in after.items()}
    for module in [name.removesuffix(lora_b) for name in after if name.endswith(lora_b)]:
        (old_a, old_b), (a, b) = (
            tuple(part[module + name].cpu().numpy().astype(np.float64) for name in (lora_a, lora_b))
            for part in (before, after)
        )
        (kept_a, kept_b), _ = truncate([(old_a, (1 - alpha) * old_b), (a, alpha * b)], like=a)
        for name, array in ((lora_a, kept_a), (lora_b, kept_b)):
            state[module + name] = torch.from_numpy(array).to(after[module + name])
    return state


def _rounded(array: Floats) -> Floats:
    return array.astype(np.float32).astype(np.float64)


def _squared_norm(pair: Pair) -> float:
    a, b = pair
    return float(np.sum((b.T @ b) * (a @ a.T)))


def stack_products(aggregator: Aggregator, *, aggregation: str) -> Aggregator:
    """Return the aggregator with LoRA's products aggregated as ``tuning.lora-aggregation`` says."""
    if aggregation == "mean":
        return aggregator
    return replace(aggregator, strategy=StackedLora(aggregator.strategy, keep_residual=aggregation == "exact"))
