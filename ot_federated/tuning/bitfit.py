"""BitFit: train the biases of the adapter's blocks, of linear layers and norms alike.

Elad Ben-Zaken, Shauli Ravfogel, Yoav Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", ACL 2022, https://arxiv.org/abs/2106.10199. Families without biases (LLaMA, Gemma) have
nothing to train.
"""

from __future__ import annotations

from torch import nn

from ot_federated.errors import ConfigError
from ot_federated.tuning.full import merge, start
from ot_federated.tuning.settings import Method, Places, Tuning, changes_all, remove_nothing


def inject(places: Places, tuning: Tuning) -> dict[str, nn.Parameter]:
    """Return the blocks' biases.

    Raises:
        ConfigError: If the family has none.
    """
    del tuning
    biases = {name: parameter for name, parameter in places.parameters().items() if name.endswith((".bias", "_bias"))}
    if not biases:
        raise ConfigError(
            f"tuning.method='bitfit' trains biases, and the blocks of a {places.model.config.model_type} model have "
            "none. Take full, lora, ia3 or bottleneck."
        )
    return biases


bitfit = Method(inject=inject, start=start, merge=merge, changes=changes_all, remove=remove_nothing, peft=None)
