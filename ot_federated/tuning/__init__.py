"""What trains inside the adapter: its blocks as a whole, or a few numbers on or between their layers.

One method a file, and a table of them (:mod:`ot_federated.tuning.methods`). Whatever the method, a *state* is a set of
tensors by role name: it is what travels, what is aggregated and what a checkpoint holds. A method says how a state
comes into a model (*unmerged*: the model gets new modules) and, where it can be had, how it becomes whole weights of
the adapter (*merged*: the model keeps its form). Nothing outside this package knows of methods.
"""

from ot_federated.tuning.bottleneck import load_bottlenecks
from ot_federated.tuning.lora import initial_a, lora_pairs
from ot_federated.tuning.methods import (
    build_peft,
    check_family,
    emulated_places,
    find_method,
    full_places,
    is_mergeable,
    merge,
    prepare_tuning,
    scale_change,
    start_state,
    tuned_unmerged,
)
from ot_federated.tuning.settings import Tuning, build_tuning, uses_conv1d

__all__ = [
    "Tuning",
    "build_peft",
    "build_tuning",
    "check_family",
    "emulated_places",
    "find_method",
    "full_places",
    "initial_a",
    "is_mergeable",
    "load_bottlenecks",
    "lora_pairs",
    "merge",
    "prepare_tuning",
    "scale_change",
    "start_state",
    "tuned_unmerged",
    "uses_conv1d",
]
