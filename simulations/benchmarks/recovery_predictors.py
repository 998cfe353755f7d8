"""What could tell a good emulator from a bad one without training: cheap predictors of recovery.

All are measured on the owner's validation examples, before anything is tuned. Which of them agrees with recovery is
what the benchmark is to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.emulated_model import load_emulated_model
from ot_federated.model_owner.compression.fidelity import measure_fidelity
from ot_federated.model_owner.owner import Owner
from ot_federated.tuning import prepare_tuning

higher_is_better = {
    "gradient_cosine_bottom": True,
    "gradient_cosine_top": True,
    "middle_error": False,
    "emulator_loss": False,
}


def measure_predictors(owner: Owner, *, num_examples: int = 64) -> dict[str, float | None]:
    """Return the predictors of a bundle, on so many of the owner's validation examples.

    Returns:
        Cosine of each side's gradient under the emulator with the one under the full model, relative error of the
        middle's output, and the emulator's loss; see :class:`Fidelity`.
    """
    emulated = load_emulated_model(owner.bundle, owner.manifest, device=owner.device)
    examples = owner.task.encode(list(owner.validation)[:num_examples])[:num_examples]
    examples = sorted(examples, key=lambda example: example.length)  # little padding
    found = measure_fidelity(owner.model, emulated, owner.manifest, examples)
    return {
        "gradient_cosine_bottom": found.bottom_cosine,
        "gradient_cosine_top": found.top_cosine,
        "middle_error": found.output_error,
        "emulator_loss": found.loss,
    }


def training_flops_fraction(owner: Owner) -> float:
    """Return a client's work for a token, as a share of that of full fine-tuning, embeddings and head not counted.

    Two operations a weight going up; two more going down where a gradient must pass, and two more where the weight
    itself is trained. A block that stands at two positions counts twice. Attention's own products are left out: at
    these lengths they are a few percent.
    """
    emulated = load_emulated_model(owner.bundle, owner.manifest)
    trained = prepare_tuning(emulated, owner.manifest, owner.tuning)
    blocks = get_blocks(emulated, find_architecture(emulated.config))
    placement = owner.config.tuning.placement
    lowest = next(i for i, entry in enumerate(owner.manifest.stack) if placement in ("both", entry.role))
    num_weights = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    work = 2 * sum(num_weights) + 2 * sum(num_weights[lowest:])
    work += 2 * sum(parameter.numel() for parameter in trained.values() if parameter.dim() == 2)
    full_blocks = get_blocks(owner.model, find_architecture(owner.model.config))
    full = 6 * sum(p.numel() for block in full_blocks for p in block.parameters() if p.dim() == 2)
    return work / full


def rank_agreement(predictor: Sequence[float], measure: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None with fewer than three points, or where one side does not vary."""
    from scipy.stats import spearmanr

    if len(predictor) < 3 or len(set(predictor)) < 2 or len(set(measure)) < 2:
        return None
    value = float(spearmanr(predictor, measure).statistic)
    return None if math.isnan(value) else value
