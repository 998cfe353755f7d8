"""The ClientApp: message -> bundle -> local data -> fine-tuning -> reply.

Composition root of the data owner's side. Each message of a deployment runs in a new process, so nothing is
expected of memory, and what a message does not need (torch, transformers) is not imported for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ot_federated.bundle_shards import shard_size
from ot_federated.config import RunConfig, parse_run_config
from ot_federated.data_owner.audit_trail import Notes
from ot_federated.data_owner.bundle_cache import BundleCache, check_digest
from ot_federated.data_owner.replies import client_name, reply_to
from ot_federated.errors import ConfigError, DataError, ProtocolError
from ot_federated.logs import logger
from ot_federated.messages import (
    arrays_key,
    build_content,
    config_of,
    decode_shard,
    decode_update,
    encode_update,
    int_field,
    number_field,
    text_field,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset

    from ot_federated.data_owner.policy import Policy
    from ot_federated.tasks.base import AnyExample
    from ot_federated.training import OptimizerSettings, StepReport
    from ot_federated.tuning import Tuning

seconds_between_lines = 10.0
# The record that makes a train message a step of secure aggregation (Flower's name).
secure_step = "secaggplus_configs"

app = ClientApp()


def open_cache(context: Context) -> BundleCache:
    """Return the bundle cache of node config ``cache-dir`` and ``cache-max-bytes``, or the default one.

    Raises:
        ConfigError: If ``cache-max-bytes`` is no size.
    """
    directory, max_bytes = context.node_config.get("cache-dir"), context.node_config.get("cache-max-bytes", 0)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ConfigError(f"The node config's cache-max-bytes={max_bytes!r} is no number of bytes; 0 is no limit.")
    return BundleCache(Path(str(directory)).expanduser() if directory else None, max_bytes=max_bytes)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this client is, and which shards of the bundle it lacks."""

    def build() -> RecordDict:
        record = config_of(message)
        manifest = record.get("manifest")
        if not isinstance(manifest, bytes):
            raise ProtocolError("the message has no manifest")
        cache, digest = open_cache(context), check_digest(text_field(record, "bundle-digest"))
        if source := str(context.node_config.get("bundle-path", "")):
            from ot_federated.data_owner.bundle_import import import_if_missing

            import_if_missing(cache, source, digest, manifest)
        earlier = text_field(record, "base-digests").split() if record.get("base-digests") else []
        base = "" if cache.find(digest) else cache.find_base(earlier)
        missing = cache.announce(digest, manifest, shard_bytes=int_field(record, "shard-bytes"), base=base)
        return build_content(
            {
                "status": "ok",
                "name": client_name(context),
                "cache-id": cache.identify(),
                "base-digest": base,
                "missing-shards": missing,
            }
        )

    return reply_to(message, context, build)


@app.query("shard")
def shard(message: Message, context: Context) -> Message:
    """Store one piece of the bundle."""

    def build() -> RecordDict:
        record = config_of(message)
        digest, index = text_field(record, "bundle-digest"), int_field(record, "shard-index")
        shard_bytes = int_field(record, "shard-bytes")
        cache = open_cache(context)
        if not cache.find(digest):
            base = text_field(record, "base-digest") if record.get("base-digest") else ""
            manifest = cache.announced(digest, shard_bytes=shard_bytes, base=base)
            pieces = decode_shard(message, num_bytes=shard_size(manifest, index, shard_bytes=shard_bytes))
            sha256 = text_field(record, "shard-sha256")
            cache.receive(digest, index, pieces, shard_bytes=shard_bytes, sha256=sha256, base=base)
        return build_content({"status": "ok", "shard-index": index})

    return reply_to(message, context, build)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Tune the adapter for one round and reply with its update."""
    notes = Notes()
    # Its cryptography is imported where it is asked for.
    if secure_step in message.content.config_records:
        from ot_federated.data_owner.secure_aggregation import answer_securely

        return reply_to(
            message,
            context,
            lambda: answer_securely(message, context, lambda: tune_masked(message, context, notes)),
            notes=notes,
        )

    def build() -> RecordDict:
        digest = text_field(config_of(message), "bundle-digest")
        with open_cache(context).use(digest) as directory:
            if directory is None:
                return build_content({"status": "bundle-missing", "bundle-digest": digest})
            return tune(message, context, directory, notes)

    return reply_to(message, context, build, notes=notes)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One round's work, read and checked: what ``train`` is about."""

    config: RunConfig
    directory: Path
    adapter: dict[str, torch.Tensor]
    rows: Dataset
    examples: Sequence[AnyExample]
    client: str
    device: str
    tuning: Tuning
    server_round: int
    run: str
    update_dtype: str
    optimizer: OptimizerSettings
    policy: Policy

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the round."""
        from ot_federated.training import plan_round

        train = self.config.train
        return plan_round(
            num_examples=len(self.examples),
            batch_size=train.batch_size,
            local_epochs=train.local_epochs,
            max_steps=train.max_steps,
        )


def read_assignment(message: Message, context: Context, directory: Path) -> Assignment:
    """Read the train message, the local data and the data owner's policy.

    Raises:
        ProtocolError: If the message is malformed.
        DataError: If the local data is not what the task needs.
        ConfigError: If the run config or the policy file is wrong.
    """
    from ot_federated.data_owner.fine_tuning import build_bundle_task, load_model_once, load_private_model
    from ot_federated.data_owner.local_data import load_local_rows
    from ot_federated.data_owner.policy import default_policy, load_policy
    from ot_federated.devices import choose_device
    from ot_federated.tasks.vocabulary import check_vocabulary
    from ot_federated.training import build_optimizer_settings
    from ot_federated.tuning import build_tuning

    record, config = config_of(message), parse_run_config(context.run_config)
    arrays, dtype = message.content.array_records.get(arrays_key), text_field(record, "update-dtype")
    if arrays is None or dtype not in ("float32", "float16", "bfloat16"):
        raise ProtocolError(f"the train message has no adapter, or its type {dtype!r} is unknown")
    proximal_mu = number_field(record, "proximal-mu", default=config.train.proximal_mu)
    policy_file = context.node_config.get("policy")
    policy = load_policy(Path(str(policy_file)).expanduser()) if policy_file else default_policy()
    work = {"length": config.data.max_length, "lora_r": config.tuning.lora_r}
    if config.privacy.mode != "example":  # whose batch is bounded by max-sample-rate
        work["batch_size"] = config.train.batch_size
    policy.check_work(**work)
    tuning = build_tuning(config)
    device = choose_device(str(context.node_config.get("device", "auto")))
    if config.privacy.mode == "example":
        tunable = load_private_model(str(directory), device, tuning, engine=config.privacy.engine)
    else:
        tunable = load_model_once(str(directory), device, tuning)
    adapter = decode_update(arrays, tunable.reference, dtype=dtype)
    # While it trains nobody needs what has been read: with a large adapter that is gigabytes.
    del arrays, message.content[arrays_key]
    columns = config.columns
    rows = load_local_rows(
        context.node_config,
        source=config.data.train,
        columns=list(columns.values()),
        partitioner=config.data.partitioner,
        partition_column=config.data.partition_column or config.label_column,
        dirichlet_alpha=config.data.dirichlet_alpha,
        max_train_examples=config.data.max_train_examples,
        seed=config.seed,
    )
    task = build_bundle_task(config, directory)
    examples = task.encode(rows)
    if not examples:
        raise DataError("This client's shard has no example to train on: give it more data, or use fewer clients.")
    check_vocabulary(examples, tunable.model, what="this client's data")
    server_round = int_field(record, "server-round")
    if not 1 <= server_round <= config.num_server_rounds:
        raise ProtocolError(f"the server asks for round {server_round} of {config.num_server_rounds}")
    return Assignment(
        config=config,
        directory=directory,
        adapter=adapter,
        rows=rows,
        examples=examples,
        client=client_name(context),
        device=device,
        tuning=tuning,
        server_round=server_round,
        run=text_field(record, "run"),
        update_dtype=dtype,
        optimizer=replace(build_optimizer_settings(config.train), proximal_mu=proximal_mu),
        policy=policy,
    )


def tune_masked(message: Message, context: Context, notes: Notes) -> list[np.ndarray[Any, Any]]:
    """Train on the local data and return the update in fp32, as masks need it.

    Raises:
        ProtocolError: If the bundle is not there.
    """
    import torch

    digest = text_field(config_of(message), "bundle-digest")
    with open_cache(context).use(digest) as directory:
        if directory is None:
            raise ProtocolError("the client has lost the bundle; it is served in the next round")
        content = tune(message, context, directory, notes, masked=True)
    update = content.array_records[arrays_key]
    shapes = {name: torch.zeros(array.shape) for name, array in update.items()}
    dtype = text_field(config_of(message), "update-dtype")
    tensors = decode_update(update, shapes, dtype=dtype)
    # By name: masks leave only an order, and a reply that was kept has lost the one it was made in.
    return [tensors[name].numpy() for name in sorted(tensors)]


def tune(message: Message, context: Context, directory: Path, notes: Notes, *, masked: bool = False) -> RecordDict:
    """Train on the local data, with privacy where the run or the data owner wants it, and build the reply."""
    began = time.monotonic()
    work = read_assignment(message, context, directory)
    work.policy.check_masked(masked=masked)
    private = work.config.privacy.mode == "example"
    arrays, metrics = run_private_round(work, context, notes) if private else run_plain_round(work)
    metrics["seconds"] = time.monotonic() - began
    # Under privacy a client's weight is constant: the number of its examples is not part of what it releases.
    weight = {"num-examples": 1 if private else len(work.examples)}
    fields: dict[str, str | int | float | bytes | list[int]] = {
        "status": "ok",
        "bundle-digest": directory.name,
        "server-round": work.server_round,
    }
    allowed = work.policy.filter_metrics(metrics, private=private)
    return build_content(fields, arrays=arrays, metrics={**allowed, **weight})


def run_plain_round(work: Assignment) -> tuple[ArrayRecord, dict[str, int | float]]:
    """Tune without privacy, if the policy allows it; return the update and the metrics."""
    from ot_federated.data_owner.fine_tuning import fine_tune

    config = work.config
    work.policy.check_work(plain_steps_per_round=work.num_steps)
    work.policy.check_request(
        task=config.task.name,
        num_rounds=config.num_server_rounds,
        num_examples=len(work.examples),
        release=None,
    )
    result = fine_tune(
        work.directory,
        work.adapter,
        work.examples,
        device=work.device,
        tuning=work.tuning,
        client=work.client,
        server_round=work.server_round,
        num_rounds=config.num_server_rounds,
        batch_size=config.train.batch_size,
        local_epochs=config.train.local_epochs,
        max_steps=config.train.max_steps,
        optimizer=work.optimizer,
        max_grad_norm=config.train.max_grad_norm,
        seed=config.seed,
        on_step=progress_line(work.client, work.server_round, config),
    )
    metrics: dict[str, int | float] = {
        "num-steps": result.num_steps,
        "num-tokens": result.num_tokens,
        "loss": result.loss,
    }
    return encode_update(result.weights, work.adapter, dtype=work.update_dtype), metrics


def run_private_round(work: Assignment, context: Context, notes: Notes) -> tuple[ArrayRecord, dict[str, int | float]]:
    """Tune by DP-SGD under the data owner's policy and ledger; return the update and what the owner may tell."""
    from ot_federated.data_owner.private_tuning import build_privacy_settings, tune_privately
    from ot_federated.training import TrainingResult

    config = work.config
    if context.node_config.get("data-path") and not context.node_config.get("dataset"):
        logger.warning(
            "The node config names no dataset, so the privacy ledger is known by the data's content: one record more "
            "or less begins a new ledger, as if nothing had been spent on the others. Name the data set for good: "
            'dataset = "ward-7".'
        )

    def encode(result: TrainingResult) -> dict[str, np.ndarray[Any, Any]]:
        record = encode_update(result.weights, work.adapter, dtype=work.update_dtype)
        return {name: array.numpy() for name, array in record.items()}

    arrays, guarantee = tune_privately(
        work.directory,
        work.adapter,
        work.examples,
        rows=work.rows,
        dataset=str(context.node_config.get("dataset", "")),
        policy=work.policy,
        settings=build_privacy_settings(config.privacy),
        run=work.run,
        task=config.task.name,
        device=work.device,
        tuning=work.tuning,
        client=work.client,
        server_round=work.server_round,
        num_rounds=config.num_server_rounds,
        batch_size=config.train.batch_size,
        num_steps=work.num_steps,
        optimizer=work.optimizer,
        encode=encode,
        on_step=progress_line(work.client, work.server_round, config),
    )
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    notes.guarantee = guarantee
    return record, {"num-steps": work.num_steps, "epsilon": guarantee.epsilon, "delta": guarantee.delta}


def progress_line(name: str, server_round: int, config: RunConfig) -> Callable[[StepReport], None]:
    """Return a step callback that writes a line to this side's log every few seconds."""
    last = time.monotonic()

    def report(step: StepReport) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds_between_lines:
            last = time.monotonic()
            logger.info(
                "round %d/%d  %s  step %d/%d%s",
                server_round,
                config.num_server_rounds,
                name,
                step.step,
                step.num_steps,
                # Private training withholds the loss.
                "" if math.isnan(step.loss) else f"  loss {step.loss:.3f}",
            )

    return report
