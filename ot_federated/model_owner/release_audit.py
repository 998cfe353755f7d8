"""What a bundle gives away of the full model, measured by its owner before it is released.

No theorem protects the model owner. So: which weights are in the bundle as they are, how alike the emulator's states
are to the full model's, how good the emulator is by itself, and how much of the rest a client could rebuild with a
given effort (:mod:`ot_federated.attacks.model_recovery`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.attacks.model_recovery import blocks_revealed, rebuild, recovered_fraction
from ot_federated.attacks.similarity import linear_cka
from ot_federated.bundle import Manifest, read_manifest
from ot_federated.config import RunConfig
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import ConfigError
from ot_federated.model_owner.compression.calibration import block_states
from ot_federated.model_owner.evaluation import choose_rows
from ot_federated.model_owner.owner import load_parts, make_bundle
from ot_federated.model_owner.preparation import check_model, prepare_windows
from ot_federated.model_owner.public_data import read_public
from ot_federated.model_owner.splitting import count_exact
from ot_federated.sources import load_table
from ot_federated.tasks.base import Example, Row, Task
from ot_federated.tasks.language_model import example_losses, num_tokens
from ot_federated.tasks.losses import continuations
from ot_federated.training import OptimizerSettings, StepReport, draw_batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

num_cka_windows = 16
window_tokens = 64


@dataclass(frozen=True)
class Attack:
    """One recovery attack.

    Attributes:
        name: What it is called: R1 to R4.
        start: What the attacker begins with, see :func:`ot_federated.attacks.model_recovery.rebuild`.
        data: ``public`` or ``client``: what it trains on; empty for no training.
    """

    name: str
    start: str
    data: str


attacks = (
    Attack("R1 repeat", "repeat", ""),
    Attack("R2 repeat, train on public text", "repeat", "public"),
    Attack("R3 train the emulator on client data", "emulator", "client"),
    Attack("R4 fresh blocks, train on public text", "fresh", "public"),
)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What models are scored on.

    Attributes:
        task: The task.
        rows: Its examples, scored without tuning.
        public_examples: Public text that no attack trains on.
    """

    task: Task
    rows: Sequence[Row]
    public_examples: Sequence[Example]

    def score(self, model: PreTrainedModel) -> dict[str, float | None]:
        """Return the model's loss on public text and on the task, in nats per token, and its accuracy."""
        score = self.task.score(model, self.rows)
        return {
            "public_loss": public_loss(model, self.public_examples),
            "task_loss": score.loss,
            "task_accuracy": score.accuracy,
        }


@torch.inference_mode()
def public_loss(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Return the mean loss per token of text, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(examples), 8):
        losses, counts = example_losses(model, examples[start : start + 8])
        total, count = total + float((losses * counts).sum()), count + int(counts.sum())
    return total / count


def window_examples(windows: torch.Tensor) -> list[Example]:
    """Return token windows ``(num_windows, window)`` as examples whose every token but the first is predicted."""
    pieces = windows[:, : windows.shape[1] // window_tokens * window_tokens].reshape(-1, window_tokens)
    pieces = pieces if len(pieces) else windows
    return [Example(tuple(row), 1) for row in pieces.tolist()]


def describe_exposure(directory: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Return which of the full model's weights are in the bundle as they are, compared one by one.

    Returns:
        ``fraction`` of all parameters, and for each block of the full model whether it is there.
    """
    manifest = read_manifest(directory)
    emulated = load_emulated_model(directory, manifest)
    theirs, ours = (list(get_blocks(m, find_architecture(m.config))) for m in (emulated, model))
    by_block = [0.0] * manifest.num_blocks
    equal = 0
    for position, entry in enumerate(manifest.stack):
        if entry.role in ("bridge", "share"):
            continue
        mine = dict(ours[entry.first_block].named_parameters())
        same = sum(
            count_exact(parameter, mine[name])
            for name, parameter in theirs[position].named_parameters()
            if name in mine
        )
        equal += same
        by_block[entry.first_block] = same / sum(parameter.numel() for parameter in mine.values())
    inside = find_architecture(model.config).blocks + "."
    outside = {name: p for name, p in model.named_parameters() if not name.startswith(inside)}
    released = dict(emulated.named_parameters())
    equal += sum(p.numel() for name, p in outside.items() if torch.equal(released[name], p.detach().cpu()))
    return {"fraction": equal / sum(p.numel() for p in model.parameters()), "by_block": by_block}


def compare_states(directory: Path, model: PreTrainedModel, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Return the linear CKA of the states behind every position of the emulated stack with the full model's.

    Args:
        directory: The bundle.
        model: The full model.
        windows: Token windows of public text, ``(num_windows, window)``.
    """
    manifest = read_manifest(directory)
    emulated = load_emulated_model(directory, manifest, device=str(model.device))
    full, reduced = collect_states(model, windows), collect_states(emulated, windows)
    return [
        {"role": entry.role, "block": entry.last_block, "cka": linear_cka(reduced[position], full[entry.last_block])}
        for position, entry in enumerate(manifest.stack)
    ]


@torch.inference_mode()
def collect_states(model: PreTrainedModel, windows: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the states behind each block, ``(num_tokens, width)``, by the block's position."""
    collected: dict[int, list[torch.Tensor]] = {}
    for record in block_states(model, windows[:num_cka_windows]):
        for position, (_, after) in record.items():
            collected.setdefault(position, []).append(after.flatten(0, 1).float().cpu())
    return {position: torch.cat(parts) for position, parts in collected.items()}


def run_attack(
    attack: Attack,
    directory: Path,
    *,
    device: str,
    yardstick: Yardstick,
    data: Mapping[str, Sequence[Example]],
    budgets: Sequence[int],
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[dict[str, Any]]:
    """Attack a bundle and score the result at every budget.

    Args:
        attack: What to try.
        directory: The bundle.
        device: Where to train.
        yardstick: What to score on.
        data: What the attacker trains on, by ``public`` and ``client``.
        budgets: Tokens trained on in all, rising; 0 scores the start.
        learning_rate: AdamW's, constant, so that a smaller budget is a prefix of a larger one.
        batch_size: Examples a step.
        seed: Of new blocks and of the order of the data.
        on_step: Called after every training step.

    Returns:
        For each budget that was reached, ``budget`` and the yardstick's scores.
    """
    model, parameters = rebuild(directory, start=attack.start, seed=seed)
    model = model.to(device)  # type: ignore[arg-type]  # transformers annotates .to loosely
    results: list[dict[str, Any]] = []
    optimizer = OptimizerSettings(
        learning_rate=learning_rate, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.0
    )
    spent, first_step = 0, 0
    for budget in sorted(set(budgets)) if attack.data else [0]:
        if budget > spent and parameters:
            examples = data[attack.data]
            per_step = num_tokens(examples) / len(examples) * batch_size
            num_steps = max(1, round((budget - spent) / per_step))
            lengths = [len(example.input_ids) for example in examples]
            train(
                model,
                parameters,
                examples,
                batches=draw_batches(
                    lengths, batch_size=batch_size, first_step=first_step, num_steps=num_steps, seed=[seed]
                ),
                first_step=first_step,
                num_steps=num_steps,
                total_steps=first_step + num_steps,
                optimizer=optimizer,
                max_grad_norm=1.0,
                on_step=on_step,
            )
            first_step += num_steps
            spent = budget
        results.append({"attack": attack.name, "budget": budget, **yardstick.score(model)})
    return results


def add_recovery(
    results: Sequence[dict[str, Any]], *, full: Mapping[str, Any], emulator: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the results with the share of the emulator's distance from the full model that each attack closed."""
    # Losses are better when lower.
    signs = {"public_loss": -1, "task_loss": -1, "task_accuracy": 1}
    measures = {name: sign for name, sign in signs.items() if full.get(name) is not None}
    return [
        {
            **result,
            "recovered": {
                name: recovered_fraction(
                    attack=sign * result[name], emulator=sign * emulator[name], full=sign * full[name]
                )
                for name, sign in measures.items()
            },
        }
        for result in results
    ]


def compare_releases(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return what several releases of one model reveal together (R6): the remedy is one kept set for ever."""
    together = blocks_revealed(manifests)
    first = blocks_revealed(manifests[:1])
    return {
        "blocks": together,
        "fraction_of_blocks": len(together) / manifests[0].num_blocks,
        "new_since_first": sorted(set(together) - set(first)),
    }


def value_gap(rows: Mapping[str, Any]) -> dict[str, float | None]:
    """Return how much better the plugged-in model is than what the client holds: the reason to come to the owner.

    Args:
        rows: ``rows`` of a run's summary.

    Returns:
        By measure, positive where the plug-in is better; None where a row is missing.
    """
    plug_in, tuned = rows.get("plug_in"), rows.get("emulator_fine_tuned")
    if not plug_in or not tuned:
        return {"loss": None, "accuracy": None}
    accuracy = None if plug_in.get("accuracy") is None else plug_in["accuracy"] - tuned["accuracy"]
    return {"loss": tuned["loss"] - plug_in["loss"], "accuracy": accuracy}


def audit_release(
    config: RunConfig,
    *,
    budgets: Sequence[int],
    bundle: Path | None = None,
    previous: Sequence[Path] = (),
    num_rows: int = 100,
    num_public_tokens: int = 8192,
    on_step: Callable[[StepReport], None] | None = None,
) -> dict[str, Any]:
    """Measure what a bundle gives away.

    Args:
        config: The run that it is for: model, data, split.
        budgets: Tokens that the attacks train on.
        bundle: The bundle; None for the one that the run would make.
        previous: Bundles of the same model that were released before.
        num_rows: Validation examples to score on.
        num_public_tokens: Tokens of public text to score on; the attacks get the rest.
        on_step: Called after every training step.

    Returns:
        ``exact_weights``, ``cka``, scores of the ``full`` model and the ``emulator``, ``attacks`` with what they
        recovered, ``releases``; JSON values.

    Raises:
        ConfigError: If the task has a classification head.
    """
    if config.has_head:
        raise ConfigError(
            "The audit reads a language model's tokens: it is not for tasks with a classification head. Set task.name "
            "to multiple-choice, causal-lm or instruction."
        )
    parts = load_parts(config)
    model, task, device = parts.model, parts.task, parts.device
    if bundle is None:
        bundle, _ = make_bundle(config, parts)
    manifest = read_manifest(bundle)
    check_model(bundle, manifest, model)
    windows = prepare_windows(model, parts.processor, read_public(config, parts), num_tokens=10**7)
    held_out = max(1, min(len(windows) // 4, num_public_tokens // windows.shape[1]))
    columns = list(config.columns.values())
    client_rows = load_table(config.data.train, split="train", columns=columns)
    rows = choose_rows(
        load_table(config.data.validation, split="validation", columns=columns),
        max_examples=num_rows,
        seed=config.seed,
        contiguous=config.task.name == "causal-lm",
    )
    # Scored on the end of the public text; the bridges were fitted on its beginning.
    yardstick = Yardstick(task=task, rows=rows, public_examples=window_examples(windows[-held_out:]))
    data = {"public": window_examples(windows[:-held_out]), "client": continuations(task.encode(client_rows))}
    full = yardstick.score(model)
    exact, cka = describe_exposure(bundle, model), compare_states(bundle, model, windows[-held_out:])
    del model
    emulator = yardstick.score(load_emulated_model(bundle, manifest, device=device))
    found: list[dict[str, Any]] = []
    for attack in attacks:
        found += run_attack(
            attack,
            bundle,
            device=device,
            yardstick=yardstick,
            data=data,
            budgets=budgets,
            seed=config.seed,
            on_step=on_step,
        )
    releases = [manifest, *(read_manifest(path) for path in previous)]
    return {
        "model": config.model.source,
        "bundle_digest": manifest.digest,
        "compression": manifest.compression,
        "kept_blocks": manifest.kept_blocks,
        "emulator_bytes_fraction": manifest.file_bytes("emulator.safetensors") / max(1, manifest.middle_bytes),
        "exact_weights": exact,
        "cka": cka,
        "full": full,
        "emulator": emulator,
        "attacks": add_recovery(found, full=full, emulator=emulator),
        "releases": compare_releases(releases[::-1]) if previous else None,
    }
