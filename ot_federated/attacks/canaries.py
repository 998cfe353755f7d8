"""Canaries: examples that nobody would write, whose memorisation can be measured.

Nicholas Carlini et al., "The Secret Sharer", 2019, https://arxiv.org/abs/1802.08232. A canary's exposure is
``log2 |R| - log2 rank``, its rank by loss among the canaries R that were not in the training data, itself included: 1
bit on average if nothing was memorised, ``log2 |R|`` if everything was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ot_federated.tasks.base import Example

Array = np.ndarray[Any, Any]
canary_kinds = ("natural", "mislabelled", "random")


def make_canaries(
    examples: Sequence[Example], *, kind: str, vocabulary_size: int, rng: np.random.Generator
) -> list[Example]:
    """Return a canary for each example.

    Args:
        examples: What the canaries are made from.
        kind: ``natural``: the example itself. ``mislabelled``: with the answer of another. ``random``: tokens drawn
            evenly from the vocabulary, as many as the example has, its answer kept.
        vocabulary_size: Number of tokens.
        rng: Draws tokens and answers.
    """
    if kind == "natural":
        return list(examples)
    canaries = []
    for example in examples:
        context, answer = example.input_ids[: example.num_context], example.input_ids[example.num_context :]
        if kind == "random":
            drawn = rng.integers(0, vocabulary_size, len(context))
            canaries.append(replace(example, input_ids=(*map(int, drawn), *answer)))
        else:
            answers = sorted({other.input_ids[other.num_context :] for other in examples} - {answer})
            wrong = answers[int(rng.integers(len(answers)))] if answers else answer
            canaries.append(replace(example, input_ids=context + wrong))
    return canaries


def measure_exposure(scores: Array, included: Array) -> Array:
    """Return the exposure in bits of each canary that was in, ``(num_included,)``.

    Args:
        scores: ``(num_canaries,)``, higher where the model knows the canary better.
        included: ``(num_canaries,)``, whether it was in the training data.
    """
    others = np.sort(scores[~included])
    num_above = len(others) - np.searchsorted(others, scores[included], side="right")
    return np.asarray(np.log2(len(others) + 1) - np.log2(num_above + 1))


def summarise_exposure(scores: Array, included: Array) -> dict[str, Any]:
    """Return mean exposure with its 95 % interval, the most that is possible, and what chance gives."""
    bits = measure_exposure(scores, included)
    most = float(np.log2((~included).sum() + 1))
    ranks = np.arange(1, (~included).sum() + 2)
    chance = float((most - np.log2(ranks)).mean())
    error = 1.96 * float(bits.std(ddof=1)) / np.sqrt(len(bits)) if len(bits) > 1 else 0.0
    mean = float(bits.mean()) if len(bits) else 0.0
    return {"mean_bits": mean, "interval": [mean - error, mean + error], "most_bits": most, "chance_bits": chance}
