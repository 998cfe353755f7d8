"""Log-probabilities from a causal language model, with logits only where they are needed.

Over a 49 000-token vocabulary the head costs as much as several blocks of a small model, so it is applied to the
positions that predict a target token and to no others. Padded positions are never among them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ot_federated.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_states(
    model: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any = None,
    use_cache: bool = False,
) -> Any:
    """Run the model below its head; ``last_hidden_state`` of the result is ``(batch, seq, hidden)``."""
    base = model.base_model
    accepted = inspect.signature(base.forward).parameters
    arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
    if cache is not None:
        # transformers 5.24 gave it the shorter name.
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache
    # BLOOM has no position ids: it reads positions from the attention mask.
    if "position_ids" in accepted:
        arguments["position_ids"] = position_ids
    return base(input_ids=input_ids, **arguments)


def find_cache(output: Any) -> Any:
    """Return the keys and values that a model gave with ``use_cache``."""
    if "cache" in output:
        return output["cache"]
    return output["past_key_values"]


def target_log_probs(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability, in fp32, of each target token.

    Args:
        model: Gives the head.
        hidden: Hidden states at the positions before the targets, ``(num_targets, hidden)``.
        targets: Token ids, ``(num_targets,)``.
    """
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return -functional.cross_entropy(logits, targets, reduction="none")


def pad(sequences: Sequence[Sequence[int]], *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad token sequences; return ids and attention mask, both ``(batch, longest)``.

    Padding uses id 0, which every vocabulary has; the mask hides it.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def example_losses(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's mean loss over its own target tokens, and the number of those tokens.

    The mean is over the example's tokens, never the batch's: one example's weight must not depend on the others,
    or per-example clipping would not bound its influence.

    Returns:
        Losses ``(batch,)`` in nats per token, with gradient, and token counts ``(batch,)``.
    """
    device = model.device
    ids, mask = pad([example.input_ids for example in examples], device=device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    output = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    context = torch.tensor([example.num_context for example in examples], device=device)[:, None]
    is_target = (positions >= context) & mask.bool()
    rows, columns = is_target.nonzero(as_tuple=True)
    log_probs = target_log_probs(model, output.last_hidden_state[rows, columns - 1], ids[rows, columns])
    counts = is_target.sum(dim=1)
    sums = torch.zeros(len(examples), device=device).index_add(0, rows, -log_probs)
    return sums / counts.clamp(min=1), counts


def num_tokens(examples: Sequence[Example]) -> int:
    """Return the number of tokens in all examples, padding not counted."""
    return sum(len(example.input_ids) for example in examples)
