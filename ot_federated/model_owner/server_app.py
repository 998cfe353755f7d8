"""The ServerApp: config -> bundle -> strategy.start -> plug in -> artefacts.

Composition root of the model owner's side: the only place where settings, method and federation meet.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from ot_federated.bundle import read_tensors
from ot_federated.config import RunConfig, flatten, parse_run_config
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import CheckpointError, OtFederatedError
from ot_federated.logs import log_fields, logger, show_lines
from ot_federated.model_owner.checkpoints import load_latest_checkpoint, save_checkpoint
from ot_federated.model_owner.choosing import (
    choose_delivery,
    choose_step,
    forget_best_after,
    interpolate,
    note_round,
)
from ot_federated.model_owner.client_privacy import ClientPrivacyBooks, ClientRelease
from ot_federated.model_owner.evaluation import score_with_progress
from ot_federated.model_owner.owner import Owner, build_realignment, prepare
from ot_federated.model_owner.results import finish, score_end, score_start
from ot_federated.reporting.elapsed import Elapsed
from ot_federated.reporting.prometheus import serve_metrics
from ot_federated.reporting.run_directory import (
    BusyRunError,
    RunDirectory,
    failure_file,
    hold_directory,
    rejections_file,
    summary_file,
)
from ot_federated.tuning import prepare_tuning, start_state
from strategies.aggregators import Aggregator, aggregator_state, build_aggregator, restore_aggregator
from strategies.client_level_privacy import describe_noise, protect_clients
from strategies.conversation import BundleSource
from strategies.lora_aggregation import StackedLora, interpolate_products, stack_products
from strategies.offsite_tuning import OffsiteTuning
from strategies.rejections import Rejections
from strategies.replies import RoundRecord, record_tensors, tensors_record
from strategies.secure_aggregation import choose_range
from strategies.validation import Bounds

say = logger.info

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; a failure is noted in the run directory, then raised."""
    show_lines()
    run = None
    with log_fields(run=str(context.run_id)), ExitStack() as held:
        try:
            config = parse_run_config(context.run_config)
            directory = held.enter_context(hold_directory(config.output_dir))
            run = RunDirectory.open(str(directory), flatten(config), resume=config.resume)
            with serve_metrics(run=str(context.run_id)) as tell:
                run.listeners += [tell] if tell else []
                run_federation(grid, config, run)
        except SystemExit:
            # What Flower makes of SIGTERM. Files are whole at any time; what is missing is a word to the operator.
            if run and not (run.path / summary_file).exists():
                run.write_failure(f"The run was stopped. Go on with resume=true output-dir={run.path}")
                say("stopped; resume=true goes on with %s", run.path)
            raise
        except BusyRunError:
            # Nothing is written where another process is at work.
            raise
        except Exception as error:
            output_dir = str(context.run_config.get("output-dir", ""))
            place = run or (RunDirectory(Path(output_dir).expanduser().absolute()) if output_dir else None)
            # A directory that holds another run's result is not this run's to write into.
            if place and (run or not (place.path / summary_file).exists()):
                note_failure(place, error)
            raise


def note_failure(place: RunDirectory, error: Exception) -> None:
    """Note in the run's directory why it failed; a disk too full for that must not hide the reason."""
    try:
        place.write_failure(describe_failure(error))
        say("failed; the reason is in %s", place.path / failure_file)
    except (OtFederatedError, OSError) as second:
        logger.error("failed: %s (this could not be noted in the run's directory: %s)", describe_failure(error), second)


def describe_failure(error: Exception) -> str:
    """Return why a run failed, and where one is known what helps."""
    if isinstance(error, OtFederatedError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"The model owner's device ran out of memory ({error}). Use a smaller data.max-length or model, or "
            "model.dtype=bfloat16, or model.device=cpu; then go on with resume=true."
        )
    return f"{type(error).__name__}: {error} (the log has the traceback)"


def run_federation(grid: Grid, config: RunConfig, run: RunDirectory) -> None:
    """Prepare, federate, plug in, evaluate, deliver."""
    with Elapsed(run, resume=config.resume) as elapsed:
        run_timed(grid, config, run, elapsed)


def run_timed(grid: Grid, config: RunConfig, run: RunDirectory, elapsed: Elapsed) -> None:
    """Do the work of :func:`run_federation`."""
    say("run directory %s", run.path)
    owner = prepare(config, run)
    score_start(owner)
    strategy, first_arrays = build_strategy(owner)
    elapsed.end_setup()
    result = strategy.start(
        grid,
        first_arrays,
        num_rounds=config.num_server_rounds,
        timeout=config.strategy.round_timeout_seconds,
        evaluate_fn=lambda server_round, arrays: evaluate_round(
            owner, server_round, owner_state(arrays, strategy.aggregator)
        ),
    )
    state = owner_state(result.arrays, strategy.aggregator)
    chosen = choose_delivery(owner, state, start=strategy.reference)
    score_end(owner, chosen.state, server_round=chosen.server_round)
    finish(owner, chosen, elapsed)


def build_strategy(owner: Owner) -> tuple[OffsiteTuning, ArrayRecord]:
    """Build the strategy and the adapter to begin with: the bundle's, or the last checkpoint's."""
    config, settings = owner.config, owner.config.strategy
    aggregator = build_aggregator(
        settings.name,
        proximal_mu=config.train.proximal_mu,
        server_learning_rate=settings.server_learning_rate,
        server_momentum=settings.server_momentum,
        num_malicious_nodes=settings.num_malicious_nodes,
        num_nodes_to_select=settings.num_nodes_to_select,
        trim_fraction=settings.trim_fraction,
    )
    aggregator = stack_products(aggregator, aggregation=config.tuning.lora_aggregation)
    parameters = prepare_tuning(load_emulated_model(owner.bundle, owner.manifest), owner.manifest, owner.tuning)
    reference = start_state(parameters, read_tensors(owner.bundle / "adapter.safetensors"), owner.tuning)
    adapter, last_round = reference, 0
    checkpoint = load_latest_checkpoint(owner.run.path / "checkpoints") if config.resume else None
    if config.privacy.mode == "client":
        num_parameters = sum(tensor.numel() for tensor in reference.values())
        done = checkpoint.server_round if checkpoint else 0
        aggregator = put_behind_privacy(owner, aggregator, num_parameters=num_parameters, last_round=done)
    if checkpoint is not None:
        if checkpoint.bundle_digest != owner.manifest.digest:
            raise CheckpointError(
                f"The checkpoint belongs to the bundle {checkpoint.bundle_digest[:12]}, and the same settings now give "
                f"{owner.manifest.digest[:12]}: the model, the public text or a package changed. Start a new run."
            )
        # In the order of the names that the aggregator knows: FedAvgM pairs arrays by position.
        adapter = {name: checkpoint.adapter[name] for name in reference}
        last_round = checkpoint.server_round
        restore_aggregator(aggregator.strategy, checkpoint.aggregator)
        say("continuing after round %d", last_round)
    owner.run.forget_rounds_after(last_round)
    forget_best_after(owner, last_round)
    owner.realignment = realignment = build_realignment(owner, last_round=last_round)

    def save_round(arrays: ArrayRecord, record: RoundRecord) -> None:
        # The line first: a run that is continued drops lines beyond its checkpoint, but cannot make up missing ones.
        line = asdict(record)
        owner.run.append_metrics({"round": line.pop("number"), **line})
        save_checkpoint(
            owner.run.path / "checkpoints",
            server_round=record.number,
            bundle_digest=owner.manifest.digest,
            adapter=record_tensors(arrays),
            aggregator=aggregator_state(aggregator.strategy),
        )

    def choose_source(server_round: int, arrays: ArrayRecord) -> BundleSource:
        directory, manifest = realignment.version_for(server_round, owner_state(arrays, aggregator))
        return BundleSource(directory, manifest, settings.shard_bytes, realignment.earlier(manifest))

    def scale_update(before: ArrayRecord, after: ArrayRecord) -> tuple[ArrayRecord, float]:
        between = interpolate_products if config.tuning.lora_aggregation == "truncated" else interpolate
        state, alpha = choose_step(owner, record_tensors(before), record_tensors(after), between=between)
        return tensors_record(state), alpha

    strategy = OffsiteTuning(
        aggregator=aggregator,
        source=BundleSource(owner.bundle, owner.manifest, settings.shard_bytes),
        reference=reference,
        update_dtype=settings.update_dtype,
        fraction_train=settings.fraction_train,
        min_nodes=settings.min_nodes,
        min_replies=settings.min_replies,
        min_replies_fraction=settings.min_replies_fraction,
        max_retries=settings.max_retries,
        straggler_seconds=settings.straggler_seconds,
        node_timeout_seconds=settings.node_timeout_seconds,
        secure_range=choose_secure_range(config) if settings.secure_aggregation else None,
        bounds=build_bounds(config),
        rejections=open_rejections(owner.run, limit=settings.max_rejections, last_round=last_round),
        seed=config.seed,
        run_id=owner.run.run_id,
        first_round=last_round + 1,
        on_progress=say,
        on_round=save_round,
        choose_source=choose_source,
        scale_update=scale_update if config.evaluation.alpha_every_round else None,
    )
    return strategy, tensors_record(adapter)


def build_bounds(config: RunConfig) -> Bounds:
    """Return what no honest client's update exceeds; under client-level privacy clipping stands in for it."""
    settings = config.strategy
    # Whether a client counts may then not depend on the others' updates, as a median does.
    ratio = 0.0 if config.privacy.mode == "client" else settings.max_norm_ratio
    return Bounds(max_norm=settings.max_update_norm, max_norm_ratio=ratio, max_examples=settings.max_examples)


def open_rejections(run: RunDirectory, *, limit: int, last_round: int) -> Rejections:
    """Return the run's rejections, those from before it was stopped included, up to the round it goes on after."""
    try:
        saved = run.read_json(rejections_file)
    except ValueError as error:
        raise CheckpointError(
            f"{run.path / rejections_file} is damaged ({error}). Delete it to go on without knowing who was put aside."
        ) from error
    return Rejections(
        limit=limit,
        saved=saved,
        last_round=last_round,
        on_change=lambda content: run.write_json(rejections_file, content),
    )


def put_behind_privacy(owner: Owner, aggregator: Aggregator, *, num_parameters: int, last_round: int) -> Aggregator:
    """Return the aggregator behind client-level privacy, with this run's books."""
    privacy = owner.config.privacy
    books = ClientPrivacyBooks(owner.run.path, delta=privacy.target_delta)
    books.check_rounds(last_round)
    noise_multiplier = books.plan_noise(
        noise_multiplier=privacy.noise_multiplier,
        target_epsilon=privacy.target_epsilon,
        num_rounds=owner.config.num_server_rounds - last_round,
    )

    def pay(server_round: int, clipping_norm: float) -> float:
        release = ClientRelease(
            server_round=server_round,
            noise_multiplier=noise_multiplier,
            clipping_norm=clipping_norm,
            clients_per_round=privacy.clients_per_round,
        )
        return books.pay(release)

    protected = protect_clients(
        aggregator,
        noise_multiplier=noise_multiplier,
        delta=privacy.target_delta,
        update_norm=privacy.update_norm,
        adaptive_clipping=privacy.adaptive_clipping,
        target_quantile=privacy.target_quantile,
        quantile_learning_rate=privacy.quantile_learning_rate,
        clients_per_round=privacy.clients_per_round,
        before_release=pay,
    )
    say(describe_noise(protected, num_parameters=num_parameters))
    return protected


def choose_secure_range(config: RunConfig) -> float:
    """Return the range of secure aggregation: the one that is set, or one for the updates that training can make."""
    return config.strategy.secure_aggregation_range or choose_range(
        learning_rate=config.train.learning_rate, max_steps=config.train.max_steps
    )


def owner_state(arrays: ArrayRecord, aggregator: Aggregator) -> dict[str, torch.Tensor]:
    """Return what is plugged in: what travels, and what only the owner has of the round's result."""
    state = record_tensors(arrays)
    if isinstance(aggregator.strategy, StackedLora):
        state |= {name: torch.from_numpy(array) for name, array in aggregator.strategy.residual_arrays().items()}
    return state


def evaluate_round(owner: Owner, server_round: int, state: dict[str, torch.Tensor]) -> MetricRecord | None:
    """Score the plug-in on the owner's validation data and note it in the round's metrics."""
    known = next((line for line in owner.run.read_metrics() if line.get("round") == server_round), {})
    last = server_round == owner.config.num_server_rounds
    if known.get("plug_in") or (server_round % owner.config.evaluation.every_rounds and not last):
        return None
    with owner.plugged_in(state) as model:
        score = score_with_progress(owner.task, model, owner.validation, title=f"round {server_round}")
    # First the state: a round whose line has a score is not scored again.
    note_round(owner, state, server_round=server_round, loss=score.loss)
    owner.run.append_metrics({"round": server_round, **known, "plug_in": score.to_dict()})
    accuracy = "" if score.accuracy is None else f"  accuracy {score.accuracy:.1%}"
    say(
        "round %d  plug-in on %d validation examples: loss %.3f%s",
        server_round,
        score.num_examples,
        score.loss,
        accuracy,
    )
    return MetricRecord({"loss": score.loss})
