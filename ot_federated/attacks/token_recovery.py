"""Which tokens a data owner trained on, read from one adapter update.

The server knows the embeddings, and the first thing the bottom adapter does with them is a normalisation and three
linear maps. The gradient of such a map is a sum of outer products with its inputs, so the rows of its update lie in
the span of the normalised embeddings of the tokens that were used; a token whose vector lies in that span was
probably there. The idea is that of "Decepticons" (Fowl et al. 2022, https://arxiv.org/abs/2201.12675) and "DAGER"
(Petrov et al. 2024, https://arxiv.org/abs/2405.15586), which checks the span exactly. It says nothing once batch times
length exceeds the width, or once the update carries noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ot_federated.attacks.membership import area_under_curve
from ot_federated.errors import DataError
from ot_federated.tasks.language_model import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

rank_tolerance = 1e-3
num_tokens_per_batch = 512
num_random_spans = 100


def recover_tokens(
    model: PreTrainedModel,
    update: Mapping[str, torch.Tensor],
    modules: Mapping[str, nn.Module],
    *,
    tokens_used: Sequence[int],
) -> dict[str, Any]:
    """Score every token of the vocabulary by how far it lies in the update's span, and compare with the truth.

    Args:
        model: The emulated model as the server knows it, before the update.
        update: Changes of weight matrices by any names, each ``(out_features, in_features)``.
        modules: The model's linear layers by the same names; only those are used whose inputs are the first block's.
        tokens_used: Tokens of the examples that the update was computed on.

    Returns:
        ``recovered``: share of the used tokens among as many best-scored ones. ``auc``: of used against unused tokens.
        ``chance``: what random spans of the same rank recover on average, and ``chance_interval`` and
        ``chance_auc_interval``: where 95 % of them lie. Embeddings are correlated, and the tokens of one example are
        alike in how common they are, so that this is more, and wider, than a random guess of tokens would have it.
        ``at_chance``: whether neither measure is above that. ``rank``: dimensions of the span.

    Raises:
        DataError: If no layer reads the first block's input, or the update is zero.
    """
    names = [name for name in update if name in modules and update[name].abs().max() > 0]
    if not names:
        raise DataError("The update changes no layer that reads the first block's input: there is no span to check.")
    inputs = read_inputs(model, modules[names[0]])
    distinct = sorted(set(tokens_used))
    span = row_span(torch.cat([update[name].float() for name in names]), max_rank=len(distinct)).to(inputs.device)
    unit = inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1e-12)
    used = np.zeros(len(unit), dtype=bool)
    used[distinct] = True
    recovered, auc = measure_span(unit, span, used)
    chance, chance_interval, chance_auc_interval = measure_random_spans(unit, used, rank=span.shape[1])
    return {
        "recovered": recovered,
        "chance": chance,
        "chance_interval": chance_interval,
        "auc": auc,
        "chance_auc_interval": chance_auc_interval,
        "at_chance": recovered <= chance_interval[1] and auc <= chance_auc_interval[1],
        "rank": int(span.shape[1]),
        "num_tokens_used": int(used.sum()),
    }


def measure_span(unit: torch.Tensor, span: torch.Tensor, used: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the share of the used tokens that is found in a span, and the AUC of used against unused tokens.

    Args:
        unit: Unit vectors of the vocabulary, ``(vocabulary, in_features)``.
        span: Orthonormal basis, ``(in_features, rank)``.
        used: ``(vocabulary,)``, which tokens were used.
    """
    scores = (unit @ span).norm(dim=1).cpu().numpy()
    best = np.argsort(-scores, kind="stable")[: used.sum()]
    return float(used[best].mean()), area_under_curve(scores[used], scores[~used])[0]


def measure_random_spans(
    unit: torch.Tensor, used: np.ndarray[Any, Any], *, rank: int
) -> tuple[float, list[float], list[float]]:
    """Return what spans drawn evenly at random find: mean share of used tokens, its and the AUC's 95 % intervals."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_random_spans):
        drawn = torch.randn(unit.shape[1], rank, generator=generator)
        found.append(measure_span(unit, torch.linalg.qr(drawn).Q.to(unit.device), used))
    shares, aucs = np.array(found).T
    shares_interval, aucs_interval = (np.quantile(values, [0.025, 0.975]).tolist() for values in (shares, aucs))
    return float(shares.mean()), shares_interval, aucs_interval


def row_span(change: torch.Tensor, *, max_rank: int) -> torch.Tensor:
    """Return an orthonormal basis of the rows of ``change``, its largest directions.

    It is ``(in_features, rank)``, on the CPU.

    A gradient has no more directions than the batch has tokens. AdamW's update has all of them, since it divides every
    number by its own size, but the gradient's are still the largest: the attacker is granted their number.
    """
    _, sizes, directions = torch.linalg.svd(change.cpu().double(), full_matrices=False)
    rank = min(max_rank, int((sizes > rank_tolerance * sizes[0]).sum()))
    basis: torch.Tensor = directions[:rank].T.float()
    return basis


@torch.inference_mode()
def read_inputs(model: PreTrainedModel, layer: nn.Module) -> torch.Tensor:
    """Return what ``layer`` reads for every token of the vocabulary alone, ``(vocabulary, in_features)``, in fp32."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().float().cpu()))
    try:
        vocabulary = count_vocabulary(model)
        for start in range(0, vocabulary, num_tokens_per_batch):
            ids = torch.arange(start, min(start + num_tokens_per_batch, vocabulary), device=model.device)[:, None]
            hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.zeros_like(ids))
    finally:
        hook.remove()
    return torch.cat(seen).flatten(1) if seen[0].dim() == 2 else torch.cat(seen)[:, 0]


def count_vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model has embeddings of."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def first_attention_layers(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], *, is_input: Callable[[str], bool]
) -> dict[str, nn.Module]:
    """Return the linear layers that train and whose names ``is_input`` accepts, by their parameters' names."""
    owners = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
    return {name: owners[id(p)] for name, p in parameters.items() if is_input(name) and id(p) in owners}
