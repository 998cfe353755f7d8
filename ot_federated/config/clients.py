"""Settings of what data owners do: what trains, how, and with which privacy."""

from __future__ import annotations

from dataclasses import dataclass

from ot_federated.settings import setting


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What trains inside the adapter."""

    method: str = setting(
        "full",
        "full: the adapter's blocks. lora: low-rank changes of their linear layers. ia3: factors on keys, values and "
        "feed-forward inputs. bitfit: biases. bottleneck: small layers behind each sublayer (Houlsby), not mergeable.",
        choices=("full", "lora", "ia3", "bitfit", "bottleneck"),
    )
    placement: str = setting(
        "both",
        "Which adapter blocks train: both ends and those in the middle, bottom, top, or spread: those in the middle "
        "alone (offsite.spread-blocks).",
        choices=("both", "bottom", "top", "spread"),
    )
    lora_r: int = setting(8, "Rank of LoRA.", minimum=1)
    lora_alpha: float = setting(16.0, "LoRA's scale is lora-alpha / lora-r.", above=0)
    freeze_lora_a: bool = setting(
        False, "FFA-LoRA: A stays at its start, so that averaging B is exact and half as many numbers carry noise."
    )
    lora_aggregation: str = setting(
        "mean",
        "mean: A and B apart, which is not the mean of their products unless A is frozen. truncated: the mean of the "
        "products, cut to rank lora-r. exact: likewise, and the owner keeps and delivers what was cut off.",
        choices=("mean", "truncated", "exact"),
    )
    bottleneck_size: int = setting(64, "Width of bottleneck adapters.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Local training at a data owner."""

    learning_rate: float = setting(4e-4, "Peak learning rate of AdamW.", above=0)
    batch_size: int = setting(8, "Examples per step.", minimum=1)
    local_epochs: int = setting(1, "Passes over the local data in one round.", minimum=1)
    max_steps: int = setting(
        24,
        "At most this many steps in one round; 0: no limit. A later round goes on in the data where the last "
        "one stopped.",
        minimum=0,
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", minimum=0)
    warmup_fraction: float = setting(0.1, "Share of all steps of all rounds that warm up.", minimum=0, maximum=1)
    lr_schedule: str = setting(
        "linear",
        "Decay over all steps of all rounds: linear or cosine to zero, or constant.",
        choices=("linear", "cosine", "constant"),
    )
    max_grad_norm: float = setting(1.0, "Clip the gradient's norm; 0: no clipping.", minimum=0)
    proximal_mu: float = setting(
        0.0, "Weight of mu/2 ||w - w_round||^2 at the client (FedProx, Li et al. 2020).", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy: at the data owners, whose own policy and ledger stand above it, or at the server."""

    mode: str = setting(
        "none",
        "example: DP-SGD at every client, add/remove of one example, accounted over all rounds and runs in each data "
        "owner's ledger; train.batch-size is then the expected batch. client: the server, which is trusted, clips and "
        "noises the sum of the updates; for hundreds of clients.",
        choices=("none", "example", "client"),
    )
    target_epsilon: float = setting(
        8.0,
        "Epsilon of the whole run, at each client or for each client; the noise is calibrated to it. Unused with a "
        "noise multiplier.",
        above=0,
    )
    target_delta: float = setting(
        1e-5,
        "Delta, below 1 / examples of the smallest client, or 1 / clients of the federation.",
        above=0,
        maximum=0.1,
    )
    noise_multiplier: float = setting(0.0, "Noise over clipping norm; 0: from privacy.target-epsilon.", minimum=0)
    max_grad_norm: float = setting(1.0, "Clipping norm of one example's gradient.", above=0)
    clipping: str = setting(
        "flat",
        "flat: to at most the norm. automatic: every gradient to the norm (AUTO-S, Bu et al. 2023).",
        choices=("flat", "automatic"),
    )
    engine: str = setting(
        "hooks",
        "Per-example gradients. hooks, ghost: Opacus. loop: one example at a time, right for every model.",
        choices=("hooks", "ghost", "loop"),
    )
    micro_batch_size: int = setting(
        16, "Examples in the model at once; bounds memory, changes nothing else.", minimum=1
    )
    clients_per_round: int = setting(
        0,
        "client: so many clients train in a round at most, and the noised sum of their updates is divided by it, "
        "however many reply.",
        minimum=0,
    )
    update_norm: float = setting(
        1.0,
        "client: the L2 norm to which each update is clipped; where clipping adapts, in the first round.",
        above=0,
    )
    adaptive_clipping: bool = setting(
        False, "client: let the norm follow a quantile of the updates' norms (Andrew et al. 2021)."
    )
    target_quantile: float = setting(
        0.5, "Adaptive clipping: share of the updates that the norm leaves whole.", minimum=0, maximum=1
    )
    quantile_learning_rate: float = setting(0.2, "Adaptive clipping: step of the norm's logarithm.", above=0)
