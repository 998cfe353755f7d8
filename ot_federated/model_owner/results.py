"""Score before and after tuning, deliver, and sum the run up."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from ot_federated.architectures import choose_auto_class, find_architecture
from ot_federated.bundle import head_prefix, read_tensors
from ot_federated.cache import atomic_write_text
from ot_federated.emulated_model import load_emulated_model
from ot_federated.logs import logger
from ot_federated.model_owner.choosing import Chosen, describe_delivery
from ot_federated.model_owner.client_privacy import ClientPrivacyBooks, describe_releases
from ot_federated.model_owner.delivery import deliver_adapter, deliver_model, deliver_state
from ot_federated.model_owner.evaluation import format_rows, recovery, row_names, score_with_progress
from ot_federated.model_owner.full_fine_tuning import fine_tune_full_model
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.harness import harness_version, parse_tasks, score_by_harness
from ot_federated.model_owner.owner import Owner
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.model_owner.splitting import describe_split, package_versions
from ot_federated.reporting.elapsed import Elapsed
from ot_federated.reporting.model_card import describe_privacy as describe_guarantee
from ot_federated.reporting.model_card import render_model_card
from ot_federated.reporting.plots import plot_rounds
from ot_federated.sources import draw_rows, load_table
from ot_federated.tasks.base import Score
from ot_federated.training import StepReport, build_optimizer_settings, plan_round
from ot_federated.tuning import is_mergeable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

say = logger.info


def score_start(owner: Owner) -> None:
    """Score full model and emulator before anything is tuned."""
    say("scoring before tuning: %d test examples", len(owner.test))
    owner.rows["full_zero_shot"] = score_with_progress(owner.task, owner.model, owner.test, title="full zero-shot")
    emulated = load_emulated_model(owner.bundle, owner.manifest, device=owner.device)
    owner.rows["emulator_zero_shot"] = score_with_progress(owner.task, emulated, owner.test, title="emulator zero-shot")
    add_harness_row(owner, "full_zero_shot", owner.model)
    add_harness_row(owner, "emulator_zero_shot", emulated)
    for line in format_rows(owner.rows):
        say(line)


def score_end(owner: Owner, state: dict[str, torch.Tensor], *, server_round: int) -> None:
    """Score the plug-in and the tuned emulator with the state of a round on the test data."""
    say("scoring after tuning: %d test examples", len(owner.test))
    with owner.plugged_in(state) as model:
        owner.rows["plug_in"] = score_with_progress(owner.task, model, owner.test, title="plug-in")
        add_harness_row(owner, "plug_in", model)
    emulated = owner.load_tuned_emulator(state, server_round=server_round)
    owner.rows["emulator_fine_tuned"] = score_with_progress(
        owner.task, emulated, owner.test, title="emulator fine-tuned"
    )
    add_harness_row(owner, "emulator_fine_tuned", emulated)


def add_harness_row(owner: Owner, row: str, model: PreTrainedModel) -> None:
    """Score a model on the harness's tasks too, where the run asks for it."""
    settings = owner.config.evaluation
    tasks = parse_tasks(settings.harness_tasks)
    if not tasks:
        return
    say("lm-eval: %s on %s", row.replace("_", " "), ", ".join(tasks))
    tokenizer = cast("PreTrainedTokenizerBase", owner.processor)  # a model with a head was refused
    owner.harness[row] = score_by_harness(
        model, tokenizer, tasks, task_files=settings.harness_task_files, max_examples=settings.max_examples
    )


def score_full_fine_tuning(owner: Owner, *, num_steps: int) -> Score:
    """Fine-tune a fresh copy of the full model on all training data, and score it."""
    say("fine-tuning the full model for %d steps", num_steps)
    model = fine_tuned_full_model(owner, num_steps=num_steps)
    return score_with_progress(owner.task, model, owner.test, title="full fine-tuned")


def count_steps(owner: Owner, rounds: Sequence[Mapping[str, Any]]) -> int:
    """Return how many steps the clients took together.

    Where they keep that, as they do under masks, it is what they take with equal shares of the training data.
    """
    if told := sum(int(line["num_steps"]) for line in rounds):
        return told
    config, train = owner.config, owner.config.train
    num_rows = load_table(config.data.train, split="train", columns=list(config.columns.values())).num_rows
    num_rows = min(num_rows, config.data.max_train_examples or num_rows)
    of_one = plan_round(
        num_examples=math.ceil(num_rows / max(1, count_clients(rounds))),
        batch_size=train.batch_size,
        local_epochs=train.local_epochs,
        max_steps=train.max_steps,
    )
    return of_one * sum(int(line["num_replies"]) for line in rounds)


def fine_tuned_full_model(owner: Owner, *, num_steps: int) -> PreTrainedModel:
    """Return a fresh copy of the full model, fine-tuned on all training data."""
    config = owner.config
    columns = config.columns
    table = load_table(config.data.train, split="train", columns=list(columns.values()))
    rows = table.select(draw_rows(table.num_rows, max_rows=config.data.max_train_examples, seed=config.seed))
    model, _ = load_full_model(
        config.model.source,
        revision=config.model.revision,
        dtype=owner.dtype,
        device=owner.device,
        reads=config.reads,
        classes=owner.manifest.classes,
    )
    start = read_tensors(owner.bundle / "adapter.safetensors")
    names = full_model_names(model, owner.manifest.stack)
    # A new head starts where the clients' did.
    model.load_state_dict({names[n]: start[n] for n in start if n.startswith(head_prefix)}, strict=False)
    optimizer = replace(
        build_optimizer_settings(config.train), learning_rate=config.evaluation.full_learning_rate, proximal_mu=0.0
    )
    fine_tune_full_model(
        model,
        owner.task.encode(rows),
        num_steps=num_steps,
        batch_size=config.train.batch_size,
        optimizer=optimizer,
        max_grad_norm=config.train.max_grad_norm,
        seed=config.seed,
        on_step=report_every(20),
    )
    return model


def report_every(num_steps: int) -> Callable[[StepReport], None]:
    """Return a step callback that says a line every ``num_steps`` steps."""

    def report(step: StepReport) -> None:
        if step.step % num_steps == 0 or step.step == step.num_steps:
            say("full fine-tuning  step %d/%d  loss %.3f", step.step, step.num_steps, step.loss)

    return report


def finish(owner: Owner, chosen: Chosen, elapsed: Elapsed) -> None:
    """Write adapter, model, plot and summary, and show the result."""
    config, run, merged = owner.config, owner.run, is_mergeable(owner.tuning)
    rounds = [line for line in run.read_metrics() if line.get("round", 0) > 0]
    digest = deliver(owner, chosen.state)
    plot_rounds(run.read_metrics(), run.path / "rounds.png", title=f"{config.model.source}, {config.data.train}")

    def sum_up() -> dict[str, Any]:
        summary = summarise(owner, rounds, adapter_digest=digest, elapsed=elapsed)
        summary["delivered"] = describe_delivery(chosen)
        auto_class = choose_auto_class(
            find_architecture(owner.model.config), classifies=bool(owner.manifest.classes)
        ).__name__
        table = "\n".join(format_rows(owner.rows))
        card = render_model_card(summary, table=table, merged=merged, auto_class=auto_class)
        atomic_write_text(run.path / ("model" if merged else "adapter") / "README.md", card)
        run.write_json("summary.json", summary)
        return summary

    summary = sum_up()
    if config.evaluation.full_fine_tuning:
        # Last, because it needs the most memory: whatever becomes of it, the result is delivered.
        owner.model.cpu()
        owner.rows["full_fine_tuned"] = score_full_fine_tuning(owner, num_steps=count_steps(owner, rounds))
        summary = sum_up()
    for line in format_rows(owner.rows):
        say(line)
    say(describe_outcome(summary))
    if summary["privacy"]:
        say("privacy: %s", describe_guarantee(summary["privacy"]))
    if summary["federation"]["failed_clients"]:
        logger.warning(describe_failures(summary["federation"]))
    if merged:
        say("adapter %s  model %s", digest[:16], run.path / "model")
    else:
        say("adapter %s in %s; README.md there says how to load it", digest[:16], run.path / "adapter")


def deliver(owner: Owner, state: dict[str, torch.Tensor]) -> str:
    """Write the adapter and, where it can be merged, the plugged-in model; return the adapter's SHA-256."""
    run, stack, tuning = owner.run, owner.manifest.stack, owner.tuning
    description = {
        "base_model": owner.config.model.source,
        "bundle_digest": owner.manifest.digest,
        "stack": [asdict(entry) for entry in stack],
        "tuning_method": tuning.method,
    }
    target = run.path / "adapter"
    if tuning.method in ("full", "bitfit"):
        adapter = owner.whole_adapter(state)
        digest = deliver_adapter(target, model=owner.model, adapter=adapter, stack=stack, description=description)
    else:
        digest = deliver_state(
            target, model=owner.model, state=state, stack=stack, tuning=tuning, description=description
        )
    if is_mergeable(tuning):
        deliver_model(
            run.path / "model",
            model=owner.model,
            tokenizer=owner.processor,
            adapter=owner.whole_adapter(state),
            stack=stack,
            placement=tuning.placement,
        )
    return digest


def describe_privacy(owner: Owner, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what the run asked of its clients, whose ledgers tell what was really spent, or what it spent itself.

    ``epsilon_is`` says of the epsilon of clients that it is the largest one ``reported``, over all their rounds and
    runs; or, where none reports any, the ``target`` for this run; or ``unknown``, where the noise was set instead.
    """
    privacy = owner.config.privacy
    if privacy.mode == "none":
        return None
    if privacy.mode == "client":
        books = ClientPrivacyBooks(owner.run.path, delta=privacy.target_delta)
        return {
            "mode": "client",
            "target_epsilon": None if privacy.noise_multiplier else privacy.target_epsilon,
            "update_norm": privacy.update_norm,
            "adaptive_clipping": privacy.adaptive_clipping,
            **describe_releases(books.releases, epsilon=books.epsilon(), delta=books.delta),
        }
    reported = [(line["epsilon"], line["delta"]) for line in rounds if line.get("epsilon") is not None]
    epsilon, delta = max(reported, default=(None, None))
    if epsilon is not None:
        told = {"epsilon": epsilon, "delta": delta, "epsilon_is": "reported"}
    elif privacy.noise_multiplier:
        told = {"epsilon": None, "delta": None, "epsilon_is": "unknown"}
    else:  # Clients choose their noise for it, and under masks, or where their policies say so, keep what they spent.
        told = {"epsilon": privacy.target_epsilon, "delta": privacy.target_delta, "epsilon_is": "target"}
    return {
        **asdict(privacy),
        **told,
        "unit": "example",
        "adjacency": "add-remove-one",
        "sampling": "poisson",
        "accountant": "PLD, in each data owner's ledger, over all rounds and runs",
        "largest_epsilon_reported": epsilon,
        "largest_epsilon_reported_at_delta": delta,
    }


def count_clients(rounds: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of clients that were connected in a round."""
    # Lines of an earlier release tell only of those that were asked to train.
    return max((int(line.get("num_connected", len(line["clients"]))) for line in rounds), default=0)


def count_failures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return in how many rounds each client failed, and why the last time; the worst first."""
    failures: dict[str, dict[str, Any]] = {}
    for line in rounds:
        for name, reason in line["failures"].items():
            before = failures.get(name, {"num_rounds": 0})
            failures[name] = {"num_rounds": before["num_rounds"] + 1, "last_reason": reason}
    return dict(sorted(failures.items(), key=lambda item: -item[1]["num_rounds"]))


def describe_failures(federation: Mapping[str, Any]) -> str:
    """Return the warning that the result was made without some of the clients' updates."""
    failed, shown = federation["failed_clients"], 3
    named = [
        f"{name} in {failure['num_rounds']} rounds (last: {failure['last_reason'][:200]})"
        for name, failure in list(failed.items())[:shown]
    ]
    more = f"; and {len(failed) - shown} more, see summary.json" if len(failed) > shown else ""
    return (
        f"WARNING: {federation['num_failures']} updates are missing from the result, which {federation['num_replies']} "
        f"replies in {federation['num_rounds']} rounds made: {'; '.join(named)}{more}"
    )


def describe_outcome(summary: Mapping[str, Any]) -> str:
    """Return recovery, bytes and seconds in one line."""
    shares = summary["recovery"]
    if shares is None:
        shown = "unknown (needs evaluation.full-fine-tuning=true)"
    else:
        shown = ", ".join(f"{name} {'none' if share is None else f'{share:.0%}'}" for name, share in shares.items())
    sizes, seconds = summary["bytes"], summary["seconds"]
    return (
        f"recovery {shown}; bundle {sizes['bundle_per_client'] / 1e6:.1f} MB, update "
        f"{sizes['update_per_client_round'] / 1e6:.1f} MB per client and round, full model "
        f"{sizes['full_model'] / 1e6:.1f} MB; {seconds['total']:.0f} s"
    )


def summarise(
    owner: Owner, rounds: Sequence[dict[str, Any]], *, adapter_digest: str, elapsed: Elapsed
) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    parameters = list(owner.model.parameters())
    replies = sum(int(line["num_replies"]) for line in rounds)
    update_bytes = sum(int(line["bytes_to_server"]) for line in rounds) / max(1, replies)
    rows = {name: owner.rows.get(name) for name in row_names}
    return {
        "scenario": os.environ.get("OT_FEDERATED_SCENARIO", ""),
        "command": os.environ.get("OT_FEDERATED_COMMAND", "flwr run ."),
        "versions": package_versions(),
        "device": owner.device,
        "dtype": str(owner.dtype).removeprefix("torch."),
        "seed": owner.config.seed,
        "model": {
            "source": owner.config.model.source,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "num_blocks": owner.manifest.num_blocks,
        },
        "offsite": {**describe_split(owner.manifest), "bundle_digest": owner.manifest.digest},
        "rows": {name: score.to_dict() if score else None for name, score in rows.items()},
        "recovery": recovery(rows),
        "federation": {
            "engine": os.environ.get("OT_FEDERATED_ENGINE", "flower"),
            "num_clients": count_clients(rounds),
            "num_clients_asked": len({name for line in rounds for name in line["clients"]}),
            "num_rounds": len(rounds),
            "num_replies": replies,
            "num_failures": sum(len(line["failures"]) for line in rounds),
            "failed_clients": count_failures(rounds),
        },
        "bytes": {
            "bundle_per_client": owner.manifest.num_bytes,
            "realignment_per_client": owner.realignment.num_bytes if owner.realignment else 0,
            "update_per_client_round": round(update_bytes),
            "wire_to_clients": sum(int(line.get("wire_bytes_to_clients", 0)) for line in rounds),
            "wire_to_server": sum(int(line.get("wire_bytes_to_server", 0)) for line in rounds),
            "full_model": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        },
        "seconds": {
            "total": round(elapsed.total(), 1),
            "setup": round(elapsed.setup(), 1),
            "rounds": [round(line["seconds"], 1) for line in rounds],
        },
        "privacy": describe_privacy(owner, rounds),
        "harness": {"version": harness_version(), "rows": owner.harness} if owner.harness else None,
        "adapter_sha256": adapter_digest,
    }
