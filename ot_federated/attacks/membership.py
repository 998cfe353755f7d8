"""Membership inference: was an example in the training data?

The signals, each higher for likelier members:

- ``loss``: a low loss (Yeom et al. 2018, https://arxiv.org/abs/1709.01604).
- ``reference``: how much lower the loss is than before tuning (Carlini et al. 2021,
  https://arxiv.org/abs/2012.07805, with the untuned model as reference: the attacker has it anyway).
- ``min-k``: the mean log-probability of the least likely fifth of all tokens (Shi et al. 2023,
  https://arxiv.org/abs/2310.16789).
- ``rmia``: the share of population examples that the example's likelihood ratio exceeds, with the one reference model
  weighted as in the offline attack (Zarifzadeh et al. 2024, https://arxiv.org/abs/2312.03262).

An attack is judged by the area under its ROC curve and by the true positives it finds at few false ones (Carlini et
al. 2022, https://arxiv.org/abs/2112.03570).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ot_federated.errors import DataError
from ot_federated.tasks.base import Example, wilson_interval
from ot_federated.tasks.language_model import hidden_states, pad, target_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]

attack_names = ("loss", "reference", "min-k", "rmia")
false_positive_rates = {"0.1%": 0.001, "1%": 0.01}
min_k_fraction = 0.2
# The offline weight of the reference model's likelihood, for a model whose tuning moved it moderately (RMIA, 4.2).
rmia_offline_weight = 0.3
num_examples_per_batch = 16


@dataclass(frozen=True)
class ExampleSignals:
    """What a model says of examples.

    Attributes:
        loss: Mean loss of each example's target tokens, ``(num_examples,)``, in nats.
        min_k: Mean log-probability of the least likely fifth of all its tokens, ``(num_examples,)``.
    """

    loss: Array
    min_k: Array


@torch.inference_mode()
def measure_signals(
    model: PreTrainedModel, examples: Sequence[Example], *, on_progress: Callable[[int], None] | None = None
) -> ExampleSignals:
    """Return what the model says of each example; every token but the first is predicted."""
    losses, lowest = np.zeros(len(examples)), np.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    for start in range(0, len(order), num_examples_per_batch):
        batch = order[start : start + num_examples_per_batch]
        ids, mask = pad([examples[index].input_ids for index in batch], device=model.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        states = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        rows, columns = mask[:, 1:].nonzero(as_tuple=True)
        log_probs = target_log_probs(model, states[rows, columns], ids[rows, columns + 1]).float().cpu().numpy()
        owners = rows.cpu().numpy()
        for row, index in enumerate(batch):
            of_example = log_probs[owners == row]
            targets = of_example[examples[index].num_context - 1 :]
            losses[index] = -targets.mean()
            num_lowest = max(1, math.ceil(min_k_fraction * len(of_example)))
            lowest[index] = np.sort(of_example)[:num_lowest].mean()
        if on_progress:
            on_progress(len(batch))
    return ExampleSignals(losses, lowest)


def membership_scores(after: ExampleSignals, before: ExampleSignals, *, population: Array) -> dict[str, Array]:
    """Return each attack's score of every example, higher for likelier members.

    Args:
        after: What the tuned model says of the examples.
        before: What the model before tuning says of them.
        population: Indices of examples that the attacker knows not to be members (for ``rmia``).
    """
    tuned, reference = np.exp(-after.loss), np.exp(-before.loss)
    marginal = ((1 + rmia_offline_weight) * reference + (1 - rmia_offline_weight)) / 2
    ratio = tuned / np.maximum(marginal, 1e-12)
    ranks = np.searchsorted(np.sort(ratio[population]), ratio, side="right") / max(1, len(population))
    return {
        "loss": -after.loss,
        "reference": before.loss - after.loss,
        "min-k": after.min_k,
        # Ties between examples that exceed the same share of the population are broken by the ratio itself.
        "rmia": ranks + 1e-6 * np.tanh(ratio),
    }


def judge_attack(scores: Array, included: Array) -> dict[str, Any]:
    """Return AUC and true positive rates of one attack, each with its 95 % interval.

    A rate of true positives at a rate of false ones of which the non-members are too few to allow even one is None.

    Args:
        scores: ``(num_examples,)``, higher for likelier members.
        included: ``(num_examples,)``, whether each is a member.

    Raises:
        DataError: If members or non-members are missing.
    """
    members, others = scores[included], scores[~included]
    if not len(members) or not len(others):
        raise DataError(f"{len(members)} members and {len(others)} non-members: an attack needs some of both.")
    auc, low, high = area_under_curve(members, others)
    result: dict[str, Any] = {"auc": auc, "auc_interval": [low, high]}
    for name, rate in false_positive_rates.items():
        # The threshold lies above all but the allowed share of the non-members.
        allowed = math.floor(rate * len(others))
        if not allowed:
            result |= {f"tpr_at_{name}": None, f"tpr_at_{name}_interval": None}
            continue
        threshold = np.sort(others)[::-1][allowed]
        found = int((members > threshold).sum())
        result[f"tpr_at_{name}"] = found / len(members)
        result[f"tpr_at_{name}_interval"] = list(wilson_interval(found, len(members)))
    return result


def area_under_curve(members: Array, others: Array) -> tuple[float, float, float]:
    """Return the chance that a member scores above a non-member, ties half, and its 95 % interval.

    The interval is that of DeLong, DeLong and Clarke-Pearson, Biometrics 1988.
    """
    sorted_members, sorted_others = np.sort(members), np.sort(others)

    def share_below(values: Array, against: Array) -> Array:
        left = np.searchsorted(against, values, side="left")
        right = np.searchsorted(against, values, side="right")
        return np.asarray((left + right) / (2 * len(against)))

    of_members, of_others = share_below(members, sorted_others), 1 - share_below(others, sorted_members)
    auc = float(of_members.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_members, of_others) if len(part) > 1)
    error = 1.96 * math.sqrt(variance)
    return auc, max(0.0, auc - error), min(1.0, auc + error)


def judge_attacks(scores: Mapping[str, Array], included: Array) -> dict[str, dict[str, Any]]:
    """Return :func:`judge_attack` of every attack, by its name."""
    return {name: judge_attack(values, included) for name, values in scores.items()}


def roc_curve(scores: Array, included: Array) -> tuple[list[float], list[float]]:
    """Return false and true positive rates over all thresholds, from none to all."""
    order = np.argsort(-scores, kind="stable")
    # Equal scores cross the threshold together.
    last = np.append(np.diff(scores[order]) != 0, True)
    hits, misses = np.cumsum(included[order])[last], np.cumsum(~included[order])[last]
    return [0.0, *(misses / max(1, misses[-1])).tolist()], [0.0, *(hits / max(1, hits[-1])).tolist()]
