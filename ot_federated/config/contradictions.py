"""Settings that contradict each other, found before anything is computed."""

from __future__ import annotations

from ot_federated.alphas import parse_alphas
from ot_federated.config.offsite import OffsiteConfig
from ot_federated.config.run import RunConfig
from ot_federated.errors import ConfigError
from ot_federated.label_words import check_prompt, parse_label_words

# Those that use nothing of a round but the mean of its updates.
mean_aggregators = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")


def check_consistency(config: RunConfig) -> None:
    """Check that no two settings contradict each other.

    Raises:
        ConfigError: If some do; the message names both and the remedy.
    """
    offsite = config.offsite
    trained = {"bottom": offsite.bottom_blocks, "top": offsite.top_blocks, "spread": offsite.spread_blocks}
    if not any(trained.values()):
        raise ConfigError(
            "offsite.bottom-blocks, offsite.top-blocks and offsite.spread-blocks are all 0: there is no adapter to "
            "train. Give at least one of them a block."
        )
    if offsite.spread_blocks and offsite.keep not in ("uniform", "influence"):
        raise ConfigError(
            f"offsite.spread-blocks={offsite.spread_blocks} does not go with offsite.keep={offsite.keep!r}, which "
            "chooses among all middle blocks: set offsite.keep=influence or uniform."
        )
    if trained.get(config.tuning.placement) == 0:
        side = config.tuning.placement
        raise ConfigError(f"tuning.placement={side!r} but offsite.{side}-blocks is 0: nothing would train.")
    _check_distillation(config.offsite)
    if not config.offsite.public_text:
        _check_text_free(config.offsite)
    if config.task.name == "classification" and not config.has_head:
        parse_label_words(config.task.label_words)
        check_prompt(config.task.prompt)
    if config.has_head and config.task.label_words:
        parse_label_words(config.task.label_words)
    if config.has_head and config.task.head_start == "probe" and config.offsite.public_text_column:
        raise ConfigError(
            f"offsite.public-text-column={config.offsite.public_text_column!r} takes unlabelled text, and "
            "task.head-start='probe' needs labels. Leave the column empty, or set task.head-start=zero."
        )
    if config.privacy.mode == "example" and config.task.name == "causal-lm":
        raise ConfigError(
            "privacy.mode='example' does not go with task.name='causal-lm': it joins records and cuts them into "
            "windows, so that no single example is one person's record. Use a task with one example a record."
        )
    if config.evaluation.harness_tasks and config.has_head:
        raise ConfigError(
            f"evaluation.harness-tasks={config.evaluation.harness_tasks!r} needs a language model, and "
            f"task.name={config.task.name!r} gives the model a classification head: leave it empty."
        )
    if config.privacy.mode == "example" and config.tuning.method == "ia3" and config.privacy.engine != "loop":
        raise ConfigError(
            f"tuning.method='ia3' does not go with privacy.engine={config.privacy.engine!r}: Opacus finds no "
            "per-example gradients of its factors. Set privacy.engine='loop'."
        )
    if config.evaluation.alpha_every_round and not config.evaluation.tried_alphas:
        raise ConfigError("evaluation.alpha-every-round=true needs evaluation.alphas, as in 0.5,0.75,1,1.25,1.5.")
    if config.evaluation.alpha_every_round and config.tuning.lora_aggregation == "exact":
        raise ConfigError(
            "evaluation.alpha-every-round=true does not go with tuning.lora-aggregation='exact', whose residual no "
            "client has. Take tuning.lora-aggregation='truncated', or choose alpha at delivery alone."
        )
    parse_alphas(config.evaluation.alphas)
    if config.offsite.realign_steps and not config.offsite.realign_every_rounds:
        raise ConfigError(
            f"offsite.realign-steps={config.offsite.realign_steps} needs offsite.realign-every-rounds: say after how "
            "many rounds, or set 0 steps."
        )
    if config.offsite.realign_every_rounds and config.offsite.bridge_rank:
        raise ConfigError(
            f"offsite.realign-every-rounds={config.offsite.realign_every_rounds} fits whole matrices anew, and "
            f"offsite.bridge-rank={config.offsite.bridge_rank}. Take offsite.bridge-rank=0."
        )
    if config.offsite.realign_every_rounds and config.offsite.gaps != "bridge":
        raise ConfigError(
            f"offsite.realign-every-rounds={config.offsite.realign_every_rounds} fits bridges anew, and "
            f"offsite.gaps={config.offsite.gaps!r} has none. Set offsite.gaps='bridge', or 0 rounds."
        )
    if config.tuning.lora_aggregation != "mean":
        _check_lora_aggregation(config)
    if config.strategy.secure_aggregation:
        _check_secure_aggregation(config)
    if config.privacy.mode == "client":
        _check_client_privacy(config)
    by_column = config.data.partitioner in ("dirichlet", "column")
    if by_column and not config.data.partition_column and not config.label_column:
        raise ConfigError(
            f"data.partitioner={config.data.partitioner!r} needs data.partition-column: {config.task.name} has no "
            "answer column to divide by."
        )


def _check_lora_aggregation(config: RunConfig) -> None:
    """Check what aggregating LoRA's products needs of the other settings.

    Raises:
        ConfigError: If it cannot be had with them.
    """
    head = f"tuning.lora-aggregation={config.tuning.lora_aggregation!r}"
    if config.tuning.method != "lora" or config.tuning.freeze_lora_a:
        raise ConfigError(
            f"{head} is for tuning.method='lora' with tuning.freeze-lora-a=false: everywhere else the plain mean is "
            "exact. Set tuning.lora-aggregation='mean'."
        )
    if config.strategy.name not in ("fedavg", "fedprox"):
        raise ConfigError(
            f"{head} does not go with strategy.name={config.strategy.name!r}, which works on A and B apart. Take "
            "fedavg or fedprox."
        )
    if config.strategy.secure_aggregation or config.privacy.mode == "client":
        raise ConfigError(
            f"{head} needs every client's A and B, which neither strategy.secure-aggregation=true nor "
            "privacy.mode='client' shows. Take tuning.freeze-lora-a=true, whose mean is exact by itself."
        )


def _check_distillation(offsite: OffsiteConfig) -> None:
    """Check that what distillation is to train is there, and stays what it is.

    Raises:
        ConfigError: If settings contradict each other.
    """
    if offsite.gaps == "trained-bridge" and not offsite.distillation_steps:
        raise ConfigError(
            "offsite.gaps='trained-bridge' needs offsite.distillation-steps: untrained, its bottleneck does nothing. "
            "Give some steps, or take bridge."
        )
    if offsite.distillation_steps and offsite.shrink == "magnitude" and offsite.distillation_trains == "all":
        raise ConfigError(
            "offsite.shrink='magnitude' does not go with offsite.distillation-trains='all', which would fill the zeros "
            "again. Train bridges alone, or shrink otherwise."
        )


def _check_text_free(offsite: OffsiteConfig) -> None:
    """Check that an emulator can be made without public text.

    Raises:
        ConfigError: If it needs some.
    """
    if offsite.distillation_steps:
        raise ConfigError(
            "offsite.public-text is empty, and distillation needs some. Set offsite.distillation-steps=0."
        )
    needs = {"offsite.keep": (offsite.keep, ("uniform",)), "offsite.gaps": (offsite.gaps, ("empty", "share"))}
    for name, (value, free) in needs.items():
        if value not in free:
            raise ConfigError(
                f"offsite.public-text is empty, and {name}={value!r} needs public text. Give some, or take "
                f"{name}={' or '.join(free)}."
            )


def _check_secure_aggregation(config: RunConfig) -> None:
    """Check what secure aggregation needs of the other settings.

    Raises:
        ConfigError: If it cannot be had with them.
    """
    if config.strategy.name not in mean_aggregators:
        raise ConfigError(
            f"strategy.secure-aggregation=true does not go with strategy.name={config.strategy.name!r}, which compares "
            f"single updates: the server sees none. Take one of {', '.join(mean_aggregators)}."
        )
    _check_no_norm_bound(config, "strategy.secure-aggregation=true", "the server sees no single update")
    if config.strategy.straggler_seconds:
        raise ConfigError(
            f"strategy.straggler-seconds={config.strategy.straggler_seconds:g} does not go with "
            "strategy.secure-aggregation=true: each of its steps waits for every client, until "
            "strategy.round-timeout-seconds. Set strategy.straggler-seconds=0, and that limit as you can wait."
        )
    if config.privacy.mode == "client":
        raise ConfigError(
            "strategy.secure-aggregation=true does not go with privacy.mode='client': the server cannot clip updates "
            "that it does not see. Take privacy.mode='example', which every client does for itself."
        )


def _check_no_norm_bound(config: RunConfig, other: str, reason: str) -> None:
    if config.strategy.max_update_norm:
        raise ConfigError(
            f"strategy.max-update-norm={config.strategy.max_update_norm:g} does not go with {other}: {reason}. Set it "
            "to 0."
        )


def _check_client_privacy(config: RunConfig) -> None:
    """Check what client-level privacy needs of the other settings.

    Raises:
        ConfigError: If it cannot be had with them.
    """
    privacy, strategy = config.privacy, config.strategy
    if strategy.name not in mean_aggregators:
        raise ConfigError(
            f"privacy.mode='client' does not go with strategy.name={strategy.name!r}, which compares single updates: "
            "only their noised mean may be used. Clipping already bounds what a faulty client can do. Take one of "
            f"{', '.join(mean_aggregators)}."
        )
    _check_no_norm_bound(config, "privacy.mode='client'", "it clips every update to privacy.update-norm")
    if privacy.clients_per_round < max(1, strategy.min_nodes):
        raise ConfigError(
            f"privacy.mode='client' with privacy.clients-per-round={privacy.clients_per_round}: it must be set, to at "
            f"least strategy.min-nodes={strategy.min_nodes}. The noised sum of the updates is divided by this number "
            "whoever replies; take as many clients as should train in a round."
        )
    if privacy.target_delta * privacy.clients_per_round >= 1:
        raise ConfigError(
            f"privacy.target-delta={privacy.target_delta:g} is not below 1 / {privacy.clients_per_round} clients: such "
            "a delta would allow to publish a whole client. Take a smaller one."
        )
